"""Help of the command line: defaults and choices are those of the code."""

from __future__ import annotations

import inspect
import re
import warnings

import pytest
import torch
from transformers import HfArgumentParser

import jaguar
from helpers.flag_tables import FIELDS, OURS
from helpers.flags import settled as settled
from jaguar.backends.availability import NAMES
from jaguar.cli import commands as cli
from jaguar.cli import flags as flag_groups
from jaguar.method import schemes
from jaguar.method.estimators import ESTIMATORS
from jaguar.optimizers.names import METHODS
from jaguar.trainer import options as choices
from jaguar.trainer.arguments import OPTIONS
from jaguar.trainer.options import OptimizerOptions


def _help(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        cli.main([*words])
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def _text(name):
    return next(o["help"] for _, _, flags in flag_groups.FINETUNE for names, o in flags if f"--{name}" in names)


def test_help_shows_the_defaults_of_the_optimizers():
    said = {"lr": "learning_rate"}
    for cls in (getattr(jaguar, row.cls) for row in METHODS.values() if row.cls):
        for name, parameter in inspect.signature(cls).parameters.items():
            has_flag = said.get(name, name) in OURS - {"seed", "released"}
            if not has_flag or parameter.default is None:
                continue
            default = str(parameter.default).removeprefix("torch.")
            found = re.search(r"default: ([^)]*)", _text(said.get(name, name)))
            numbers = [float(word) for word in re.findall(r"\d[\d.]*(?:e-\d+)?", found[1])]
            assert default in found[1].split() or float(default) in numbers, (cls, name)


def test_the_flags_of_the_optimizers_are_the_fields_of_the_arguments():
    fields_of_it = {action.dest: action for action in HfArgumentParser(jaguar.ZOTrainingArguments)._actions}
    for name in OptimizerOptions.__dataclass_fields__:
        assert name in OURS | {"optim_zo"} and _text(name).startswith(fields_of_it[name].help)
    assert {"optim_zo", "zo_options", *OPTIONS} <= OptimizerOptions.__dataclass_fields__.keys()


def test_help_shows_the_defaults_of_the_command(capsys):
    for name, value in flag_groups.DEFAULTS.items():
        assert f"(default: {value})" in _text(name)
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--help_all"])
    _, _, others = capsys.readouterr().out.partition("Every other flag of transformers.TrainingArguments, with")
    parts = re.split(r"^  --", others, flags=re.MULTILINE)[1:]
    said = {part.split()[0]: " ".join(part.split()) for part in parts}
    assert said.keys() == FIELDS - OURS
    for name, value in flag_groups.OF_THE_RUN.items():
        assert name in OURS or f"(default: {value})" in said[name] or (value is None and "default" not in said[name])
    for name in ("max_grad_norm", "adam_beta1", "do_train", "torch_empty_cache_steps"):
        assert "Does nothing here: " in said[name]
    assert "Refused: --optim is of Trainer's own" in said["optim"]


def test_choices_are_those_of_the_library(capsys):
    assert choices.OPTIONS["backend"] == NAMES and choices.OPTIONS["estimator"] == tuple(ESTIMATORS)
    assert choices.OPTIONS["ns_coefficients"] == tuple(schemes.SCHEMES)
    assert {getattr(torch, name) for name in choices.OPTIONS["ns_dtype"]} == set(schemes.DTYPES)
    text = _help(capsys, "finetune", "--help")
    for words in choices.OPTIONS.values():
        assert f"{{{','.join(words)}}}" in text.replace(" ", "")
    with warnings.catch_warnings(action="ignore"):
        for name in ("layout", "signs", "update", "adjust_lr", "distribution", "restore", "momentum_dtype", "rounding"):
            cls = jaguar.ZOSGD if name in ("distribution", "restore") else jaguar.JaguarMuon
            known = inspect.signature(cls).parameters
            assert name in known
            for word in (*choices.OPTIONS[name], "x"):
                value = getattr(torch, word, torch.int8) if name == "momentum_dtype" else word
                group = {"params": [torch.nn.Parameter(torch.zeros(16, 16))]} | (
                    {"ns": True} if "beta" in known else {}
                )
                more = {"coordinates": 0.25} if name == "layout" else {}
                if word == "x":
                    with pytest.raises(ValueError, match=name):
                        cls([group], **{name: value}, **more)
                else:
                    cls([group], **{name: value}, **more)
