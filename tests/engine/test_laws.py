"""The table of laws: every public optimizer has a row, every law tries every row; and the laws of groups."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import jaguar
from helpers.laws import CONFIGS, LAWS, TAU, make
from helpers.tensors import Bag, all_bits, dtype_id, every_form, state_bits

TESTS = Path(__file__).parents[1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
configs = pytest.mark.parametrize("config", CONFIGS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


# -- the table ---------------------------------------------------------------------------------------------------------


def without_a_row() -> set[type]:
    """Public optimizers that no row tries; a row of a parent, or of a child, does not count."""
    public = {getattr(jaguar, name) for name in jaguar.__all__}
    optimizers = {found for found in public if isinstance(found, type) and issubclass(found, torch.optim.Optimizer)}
    return optimizers - {cls for cls, _ in CONFIGS.values()}


def test_every_public_optimizer_has_a_row() -> None:
    assert not without_a_row()


def test_an_optimizer_without_a_row_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Another(jaguar.ZOSGD):
        pass

    monkeypatch.setattr(jaguar, "Another", Another, raising=False)
    monkeypatch.setattr(jaguar, "__all__", [*jaguar.__all__, "Another"])
    assert without_a_row() == {Another}


def left_out(test: Callable[..., Any]) -> list[str]:
    """The rows and dtypes that a test does not try."""
    tried: dict[str, list[Any]] = {}
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize" and isinstance(mark.args[0], str):
            tried[mark.args[0]] = list(mark.args[1])
    rows, kinds = tried.get("config", []), tried.get("dtype", [])
    return [name for name in CONFIGS if name not in rows] + [str(dtype) for dtype in DTYPES if dtype not in kinds]


@cache
def loaded(module: str) -> ModuleType:
    """A file of tests, wherever it is: its tables, and not its tests, are looked at here."""
    (path,) = TESTS.rglob(f"{module}.py")
    spec = importlib.util.spec_from_file_location(f"looked_at_{module}", path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize(("law", "test"), [(law, test) for law, tests in LAWS.items() for test in tests])
def test_a_law_leaves_out_no_row(law: str, test: str) -> None:
    module, name = test.split(".")
    assert not left_out(getattr(loaded(module), name)), law


def test_a_law_that_leaves_out_something_is_noticed() -> None:
    @configs
    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def narrow(config: str, dtype: torch.dtype) -> None: ...

    @dtypes
    @pytest.mark.parametrize("config", list(CONFIGS)[:-1])
    def short(config: str, dtype: torch.dtype) -> None: ...

    assert left_out(narrow) == ["torch.float32"] and left_out(short) == [list(CONFIGS)[-1]]


# -- groups ------------------------------------------------------------------------------------------------------------


def split(bag: Bag, **values: Any) -> list[dict[str, Any]]:
    """The parameters of a bag as two groups, the second one with values of its own."""
    named = list(bag.named_parameters())
    return [{"params": named[::2]}, {"params": named[1::2]} | values]


@configs
@dtypes
def test_groups_with_equal_values_are_one(config: str, dtype: torch.dtype) -> None:
    bag, twin = every_form(dtype), every_form(dtype)
    one = make(config, bag.named_parameters())
    two = make(config, split(twin, lr=one.defaults["lr"], tau=TAU))
    for _ in range(4):
        one.step(bag)
        two.step(twin)
        assert two.last_record == replace(one.last_record, lrs=one.last_record.lrs * 2)
    assert all_bits(list(bag.parameters())) == all_bits(list(twin.parameters()))
    assert state_bits(one, list(bag.parameters())) == state_bits(two, list(twin.parameters()))


@configs
@dtypes
@pytest.mark.filterwarnings("ignore:tau is too small")  # for entries of matrices with orthonormal columns
def test_values_of_a_group_are_its_own(config: str, dtype: torch.dtype) -> None:
    """Each group goes where it would go if its values were those of all, with the same losses."""
    values = {"lr": 3.0 * CONFIGS[config][1]["lr"], "tau": 0.7 * TAU, "weight_decay": 0.5}
    bag, usual, other = (every_form(dtype) for _ in range(3))
    opt = make(config, split(bag, **values))
    alone = [(usual, make(config, usual.named_parameters())), (other, make(config, other.named_parameters(), **values))]
    for _ in range(4):
        opt.step(bag)
        for group, (_, replay) in enumerate(alone):
            replay.apply_(replace(opt.last_record, lrs=opt.last_record.lrs[group : group + 1]))
    found = [list(model.parameters()) for model in (bag, usual, other)]
    for group, (mine, replay) in enumerate(zip(found[1:], (o for _, o in alone), strict=True)):
        assert all_bits(found[0][group::2]) == all_bits(mine[group::2])
        assert state_bits(opt, found[0][group::2]) == state_bits(replay, mine[group::2])
    assert all_bits(found[1]) != all_bits(found[2]), "the values matter"
