"""A run of the command line that was not disturbed, and its words."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import tiny
from jaguar.cli import commands as cli


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, and a run that was not disturbed."""
    folder = tmp_path_factory.mktemp("ending")
    tiny.causal_lm(folder / "lm")
    for name, count, seed in (("train", 32, 1), ("test", 16, 2)):
        tiny.write_csv(folder / f"{name}.csv", tiny.sentences(count, seed))
    assert cli.main(words(folder, folder / "whole")) == 0
    return folder


def words(place: Path, out: Path, *more: str) -> list[str]:
    files = ["--train_file", str(place / "train.csv"), "--test_file", str(place / "test.csv")]
    steps = ["--max_steps", "4", "--save_steps", "2", "--per_device_train_batch_size", "8", "--use_cpu"]
    options = ["--learning_rate", "1e-2", "--coordinates", "0.5", "--tau", "1e-2", "--template", tiny.TEMPLATE]
    return ["finetune", "--model", str(place / "lm"), "--output_dir", str(out), *files, *steps, *options, *more]
