"""Command lines, and the runs that they mean."""

from __future__ import annotations

import warnings

import pytest

from jaguar.cli import commands as cli
from jaguar.cli.finetune.run import Run


class Reached(Exception):
    """Everything was checked that can be without data and model."""


BASE = {"model": "lm", "output_dir": "out", "max_steps": "4", "train_file": "a.csv", "test_file": "b.csv"}


def line(flag, value, more=()):
    """A command line with a flag in some spelling; no value: the bare flag."""
    name = flag.replace("-", "_")
    left_out = {name, *(word[2:] for word in more), *["max_steps"] * (name == "num_train_epochs")}
    base = [word for key, text in BASE.items() if key not in left_out for word in (f"--{key}", text)]
    return ["finetune", *base, *more, f"--{flag}", *([] if value is None else [value])]


@pytest.fixture
def settled(monkeypatch):
    """The run that a command line means, as it is before data and model are loaded."""
    real = Run.trainer_arguments

    def trainer_arguments(self):
        raise Reached(self, real(self))

    monkeypatch.setattr(Run, "trainer_arguments", trainer_arguments)

    def parsed(words):
        with pytest.raises(Reached) as reached, warnings.catch_warnings(action="ignore"):
            cli.main(words)
        return reached.value.args[0]

    return parsed
