"""`jaguar info --method NAME`: what it says is what the class says, and what an optimizer of it does."""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any, Unpack

import pytest
import torch

import jaguar
import jaguar.optimizers
from helpers.tiny import refused
from jaguar.backends import availability
from jaguar.cli import commands as cli
from jaguar.cli.method_card import facts
from jaguar.optimizers.common import Common, keywords
from jaguar.optimizers.names import FIRST_ORDER, METHODS, Named

each = pytest.mark.parametrize("name", METHODS)
each_class = pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.cls])
HEADINGS = ["method", "name", "equation", "evaluations per step", "state", "source", "backends", "defaults"]


def class_of(name: str) -> Any:
    return getattr(jaguar, METHODS[name].cls or "", torch.optim.SGD)


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Two layers, and names that every method knows what to do with."""
    parts = {name: torch.nn.Linear(8, 8, dtype=dtype) for name in ("q_proj", "v_proj")}
    return torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict(parts)])})


def made(cls: Any, dtype: torch.dtype = torch.float32, **given: Any) -> Any:
    small = model(dtype)
    role = {"ns": True} if cls.by_role else {}
    if "model" in inspect.signature(cls).parameters:
        given["model"] = small
    return cls([{"params": list(small.named_parameters())} | role], **given)


def arguments(text: str) -> dict[str, str]:
    """Argument -> its default, as they are shown."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


# -- what is printed ---------------------------------------------------------------------------------------------------


@each
def test_it_prints_every_fact(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--method", name]) == 0
    printed, found = capsys.readouterr().out, facts(name)
    assert re.findall(r"^(\S[^:]*):", printed, flags=re.MULTILINE) == list(found) == HEADINGS
    assert all(found.values())
    lines = [line.strip() for line in printed.splitlines()]
    for heading, text in found.items():
        below = text.splitlines()
        assert f"{heading}: {text}" in lines or all(line.strip() in lines for line in below)
    assert "\t" not in printed and "  \n" not in printed


@each_class
def test_the_words_are_those_of_the_class(name: str) -> None:
    text, found = inspect.getdoc(class_of(name)) or "", facts(name)
    head, _, rest = text.partition("\nArgs:")
    assert found["name"] == head.splitlines()[0]
    assert found["equation"].split() == " ".join(re.findall(r"^    .*", head, flags=re.MULTILINE)).split()
    assert found["source"] in " ".join(rest.split()) and f"Source: {found['source']}" in " ".join(rest.split())
    assert "Equivalent to" not in found["source"]


@each_class
def test_the_cost_is_that_of_the_optimizer(name: str) -> None:
    found, sizes = facts(name), []
    for dtype in (torch.float32, torch.bfloat16):
        said = re.search(
            r"evaluations per step: (.*), state: (\S+) bytes per parameter", repr(made(class_of(name), dtype))
        )
        assert said and said[1] == found["evaluations per step"]
        sizes.append(said[2])
    assert found["state"] == f"{sizes[0]} bytes per parameter in fp32, {sizes[1]} in bf16"


@pytest.mark.parametrize(
    ("name", "evaluations", "full", "half"),
    [
        ("jaguar-signsgd", 2, 4, 2),
        ("jaguar-muon", 2, 4, 2),
        ("zo-sgd", 2, 0, 0),
        ("zo-signsgd", 2, 0, 0),
        ("zo-adamm", 2, 12, 10),
        ("lezo", 2, 0, 0),
        ("fzoo", 9, 0, 0),
        ("zo-sgd-cons", 5, 0, 0),
    ],
)
def test_the_cost_of_those_that_are_known(name: str, evaluations: int, full: int, half: int) -> None:
    found = facts(name)
    assert found["evaluations per step"] == str(evaluations)
    assert found["state"] == f"{full} bytes per parameter in fp32, {half} in bf16"


@each
def test_the_defaults_are_those_of_the_class(name: str) -> None:
    cls, shown = class_of(name), arguments(facts(name)["defaults"])
    own = {n: p for n, p in inspect.signature(cls).parameters.items() if n in keywords(cls)}
    assert [n for n in shown if n in own] == [n for n, p in own.items() if p.default is not p.empty]
    assert not shown.keys() - set(keywords(cls))
    for n in shown.keys() & own.keys() - {"lr"}:
        assert shown[n] == repr(own[n].default)
    assert shown["lr"].startswith(str(own["lr"].default))


@each_class
def test_the_defaults_can_be_given(name: str) -> None:
    """What is common to all methods is shown where the method takes it, with the value that it has."""
    shown = arguments(facts(name)["defaults"])
    given = {n: ast.literal_eval(text) for n, text in shown.items() if n != "lr" and "torch." not in text}
    assert {"seed", "backend", "maximize"} <= given.keys()
    assert repr(made(class_of(name), **given)) == repr(made(class_of(name)))


def test_every_backend_is_named_with_its_reason() -> None:
    for name, row in METHODS.items():
        lines = facts(name)["backends"].splitlines()
        if row.cls:
            assert [line.split(":")[0] for line in lines] == list(availability.NAMES[1:])
            assert lines[0] == "reference: yes"
    assert "cuda: no: " in facts("zo-sgd")["backends"] and "cuda: yes" in facts("jaguar-muon")["backends"]


def test_what_a_machine_lacks_is_told_apart_from_what_a_method_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "unavailable", dict)
    assert "triton: yes\n" in facts("zo-sgd")["backends"] and facts("jaguar-muon")["backends"].endswith("cuda: yes")
    monkeypatch.setattr(availability, "unavailable", lambda: {"triton": "no GPU"})
    assert "triton: yes, but not here: no GPU\n" in facts("zo-sgd")["backends"]
    monkeypatch.setattr(availability, "undrawable", lambda method, groups: "it has no kernel")
    assert "triton: no: backend='triton' cannot draw this: it has no kernel" in facts("zo-sgd")["backends"]

    def not_installed(method: Any, groups: Any) -> None:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(availability, "undrawable", not_installed)
    assert "triton: not here: no GPU\n" in facts("zo-sgd")["backends"]


def test_the_baseline_with_gradients() -> None:
    found = facts(FIRST_ORDER)
    assert found["method"] == f"{FIRST_ORDER}, torch.optim.SGD"
    assert found["evaluations per step"] == "1, and a backward pass"
    assert found["state"].startswith("0 bytes per parameter in fp32, 0 in bf16; gradients: 4 bytes")
    x, g = torch.nn.Parameter(torch.tensor([1.0])), 0.5
    optimizer = torch.optim.SGD([x], lr=0.25, momentum=0.5, weight_decay=0.125)
    m, value = 0.0, 1.0
    for _ in range(3):  # the equation
        x.grad = torch.tensor([g])
        optimizer.step()
        m = 0.5 * m + g + 0.125 * value
        value -= 0.25 * m
    assert x.item() == pytest.approx(value)


# -- a class that asks for more ----------------------------------------------------------------------------------------


class NeedsModel(jaguar.ZOSGD):
    """A method of a model: it asks for one.

        x <- x

    And more of it.

        y <- [y]

    Args:
        params: tensors.
        model: whose they are.
        common: tau and
            seed, as `ZOSGD`; backend has no effect.

    Source: somewhere, in two
    lines.
    """

    def __init__(
        self, params: Any, lr: float | None = None, *, model: torch.nn.Module, **common: Unpack[Common]
    ) -> None:
        assert {id(p) for group in params for _, p in group["params"]} == set(map(id, model.parameters()))
        super().__init__(params, 1e-3 if lr is None else lr, momentum=0.5, **common)


def test_a_class_that_needs_a_model_gets_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(METHODS, "needs-model", Named("NeedsModel", __name__, "1e-3"))
    monkeypatch.setattr(jaguar.optimizers, "NeedsModel", NeedsModel, raising=False)
    found = facts("needs-model")
    assert found["equation"] == "x <- x\n\ny <- [y]"
    assert found["source"] == "somewhere, in two lines."
    assert found["state"] == "4 bytes per parameter in fp32, 2 in bf16"
    assert found["defaults"] == "lr=None (1e-3)\nmodel: must be given\ntau=0.001\nseed=0"
    monkeypatch.setattr("jaguar.cli.method_card.facts", {"zo-sgd": found}.get)
    assert cli.main(["info", "--optim-zo=zo-sgd"]) == 0
    assert "equation:\n  x <- x\n\n  y <- [y]\nevaluations" in capsys.readouterr().out


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["adam", "ZOSGD", "zo_sgd", ""])
def test_an_unknown_name_is_told_the_known_ones(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "info", "--method", word)
    assert f"invalid choice: {word!r} (choose from " in error and all(name in error for name in METHODS)


def test_a_method_and_a_model_are_two_questions(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model and --method: give one of them" in refused(capsys, "info", "--method", "zo-sgd", "--model", "lm")


def test_it_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    for name in METHODS:
        facts(name)
    assert torch.equal(torch.get_rng_state(), before)
