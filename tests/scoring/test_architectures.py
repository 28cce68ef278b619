"""Every architecture of transformers: what is saved comes back, and scores are the model's own; or it is refused.

A refusal is an error that names the model and says why. `python bench architectures` writes the outcomes as a table.
"""

import json
from pathlib import Path

import pytest

from helpers import architectures
from helpers.architecture_checks import CHECKS, check_scores, every_check, outcome

# -- saving, resuming, the best model ----------------------------------------------------------------------------------


# -- scores ------------------------------------------------------------------------------------------------------------


# One of each kind of trouble: a renamed head, fused experts, a recurrence, positions that begin at two, two lengths of
# options in a row, a classifier that looks for padding.
QUICK = ("causal-gpt_neox", "causal-mixtral", "causal-qwen3_5", "causal-opt", "masked-bert", "classifier-llama")
NAMES = architectures.names()


@pytest.mark.filterwarnings("ignore")  # what transformers says about its own models
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_is_right_or_refused(name, tmp_path):
    for what, found, _ in every_check(name, tmp_path):
        assert found == "equal" or found.startswith("refused: "), f"{name}, {what}: {found}"


@pytest.mark.parametrize("name", QUICK)
def test_a_few_architectures_are_right(name, tmp_path):
    assert {what: found for what, found, _ in every_check(name, tmp_path)} == dict.fromkeys(CHECKS, "equal")


def test_a_causal_model_that_looks_ahead_is_refused(tmp_path):
    found, _ = outcome(check_scores, "causal-xlnet", tmp_path)
    assert found.startswith("refused: ") and "XLNetLMHeadModel differs from its whole forward by" in found


def test_the_table_has_them_all_and_nothing_differs():
    table = json.loads((Path(__file__).parents[2] / "bench/results/architectures.json").read_text())
    assert [row["name"] for row in table["rows"]] == NAMES and table["absent"] == architectures.ABSENT
    assert len({name.split("-", 1)[1] for name in NAMES}) >= 150
    for row in table["rows"]:
        for what in CHECKS:
            refused = row[what].startswith("refused: ") and row["class"] in row[what]
            assert row[what] == "equal" or refused, f"{row['name']}, {what}: {row[what]}"
