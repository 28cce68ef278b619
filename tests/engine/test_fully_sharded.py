"""FSDP2: a model whose parameters are spread over processes takes the steps of the whole one, to the bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from helpers import fully_sharded, processes


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    return processes.run(fully_sharded.cases, 2, tmp_path_factory.mktemp("two"))


MESHES = [f"mesh {shape}{more}" for shape in ((1, 2), (2, 1)) for more in ("", ", directions")]


@pytest.mark.parametrize("config", [*fully_sharded.SHARDED, *MESHES, "padding row", "one row", "by hand"])
def test_parts_take_the_steps_of_the_whole(two: list[dict[str, Any]], config: str) -> None:
    """Records, parameters and lost shares; meshes have copies, which may share directions, and parts.

    "By hand" has uneven columns.
    """
    assert [found[config] for found in two] == [[], []]


def test_the_law_notices_parts_whose_place_is_ignored(two: list[dict[str, Any]]) -> None:
    assert all(found["start ignored"] for found in two)


@pytest.mark.parametrize("reshard", [None, False, True])
def test_no_loss_is_of_stale_weights(two: list[dict[str, Any]], reshard: bool | None) -> None:
    """Whatever `reshard_after_forward` is: losses are those of the whole model, and so is what the model shows."""
    for found in two:
        wanted, got, moved = found[f"stale {reshard} guarded"]
        assert got == wanted and all(moved)
        wanted, got, moved = found[f"stale {reshard} unguarded"]
        assert (got == wanted) == all(moved) == (reshard is True)  # FSDP2 keeps the copies, but for True


@pytest.mark.parametrize("config", ["all", "muon", "dizo"])
def test_state_of_the_part_here_is_saved_and_loaded(two: list[dict[str, Any]], config: str) -> None:
    for rank, found in enumerate(two):
        same, said = found[f"continued {config}"]
        assert same
        assert f"saved with parts='(S(0)) at ({1 - rank},) of (2,) processes', this optimizer has" in said


@pytest.mark.parametrize("config", ["fraction", "muon", "dizo"])
def test_a_journal_of_parts_leads_to_the_same_weights(two: list[dict[str, Any]], config: str) -> None:
    """In a whole model, and in parts."""
    assert all(found[f"replayed {config}"] for found in two)


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("module", "restore='module' moves a tensor when its module runs, and down.weight is sharded"),
        ("dual numbers", "down.weight is sharded, and Forward-Grad needs whole parameters"),
        ("partial", "parameter 'w' is a DTensor, and it is placed as"),
        ("shards", "w is a DTensor, which says itself what part of it is here: leave it out of shards"),
        ("copies", "experts is a copy that FSDP2 gathered for a forward pass"),
        ("moved", "the part of down.weight that is here is not where it was"),
    ],
)
def test_what_cannot_be_is_refused(two: list[dict[str, Any]], case: str, match: str) -> None:
    assert all(match in found["refused"][case] for found in two)


@pytest.mark.parametrize("config", ["fraction", "adamm"])
def test_a_step_sends_what_its_forward_passes_send(two: list[dict[str, Any]], config: str) -> None:
    for found in two:
        passes, step = found[f"sent {config}"]
        assert passes and step == passes


@pytest.mark.parametrize(
    ("config", "matrices"),
    [("muon", [8 * 6]), ("zo-muon", [7 * 6, 12 * 6, 8 * 6])],  # every second one; all, in canonical order
)
def test_newton_schulz_gathers_one_matrix_after_the_other(
    two: list[dict[str, Any]], config: str, matrices: list[int]
) -> None:
    """Padded to equal parts; the batch of experts is cut between its matrices, and is not gathered."""
    for found in two:
        passes, step = found[f"sent {config}"]
        assert step[: len(passes)] == passes
        more = [size for _, size in step[len(passes) :]]
        assert sorted(more) == sorted(4 * n for n in matrices)


def test_the_page_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "processes.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.S | re.M)
    names: dict[str, Any] = {}
    exec(compile(block, "processes.md", "exec", dont_inherit=True), names)
    assert names["optimizer"].steps_done == 10 and len(names["optimizer"].last_record.losses) == 2


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_every_method_in_every_dtype(tmp_path: Path, world: int) -> None:
    for found in processes.run(fully_sharded.every_case, world, tmp_path):
        assert {name: wrong for name, wrong in found.items() if wrong} == {}
