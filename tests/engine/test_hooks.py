"""Hooks of torch.optim: their order, what they may change, and that they can be removed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from helpers.contract import Make, everyone, ours, pair, step


def plain(state: dict[str, Any]) -> str:
    return repr(state)


# -- hooks -------------------------------------------------------------------------------------------------------------


@everyone
def test_state_dict_hooks_come_in_order_and_see_everything(make: Make) -> None:
    opt, net = pair(make)
    step(opt, net)
    told: list[Any] = []
    whole = set(opt.state_dict())
    opt.register_state_dict_pre_hook(lambda o: told.append(("first", o is opt)))
    opt.register_state_dict_pre_hook(lambda o: told.append(("second", o is opt)))
    opt.register_state_dict_pre_hook(lambda o: told.append(("zeroth", o is opt)), prepend=True)
    opt.register_state_dict_post_hook(lambda o, s: told.append(("whole", set(s) == whole)))
    opt.register_state_dict_post_hook(lambda o, s: s | {"mine": 1})
    opt.register_state_dict_post_hook(lambda o, s: told.append(("after", "mine" in s)))
    state = opt.state_dict()
    names = ["zeroth", "first", "second", "whole", "after"]
    assert told == [(name, True) for name in names] and set(state) == whole | {"mine"}


@everyone
def test_a_post_hook_may_change_what_is_saved_in_place(make: Make) -> None:
    opt, net = pair(make)
    step(opt, net)
    opt.register_state_dict_post_hook(lambda o, s: s.clear() or None)
    assert opt.state_dict() == {}


@everyone
def test_load_hooks_come_in_order_and_see_everything(make: Make) -> None:
    opt, net = pair(make)
    step(opt, net)
    saved = opt.state_dict()
    other, _ = pair(make)
    told: list[Any] = []
    before = plain(other.state_dict())

    def pre(o: Any, s: dict[str, Any]) -> dict[str, Any] | None:
        told.append((set(s) == {*saved, "mine"}, plain(o.state_dict()) == before))
        s.pop("mine")
        return None

    other.register_load_state_dict_pre_hook(pre)
    other.register_load_state_dict_pre_hook(lambda o, s: told.append(("mine" not in s, True)) or dict(s))
    other.register_load_state_dict_post_hook(
        lambda o: told.append((plain(o.state_dict()) == plain(saved), repr(o) == repr(opt)))
    )
    given = saved | {"mine": 1}
    other.load_state_dict(given)
    assert told == [(True, True)] * 3 and "mine" in given, "the caller's dict is not touched"


@everyone
def test_a_load_pre_hook_may_give_another_dict(make: Make) -> None:
    opt, net = pair(make)
    step(opt, net)
    saved = opt.state_dict()
    other, _ = pair(make)
    other.register_load_state_dict_pre_hook(lambda o, s: saved)
    other.load_state_dict({})
    assert plain(other.state_dict()) == plain(saved)


@everyone
def test_hooks_can_be_removed_and_are_not_copied(make: Make) -> None:
    opt, _net = pair(make)
    told: list[int] = []
    handles = [opt.register_state_dict_pre_hook(lambda o: told.append(1)), opt.register_step_pre_hook(lambda *a: None)]
    opt.state_dict()
    copied = copy.deepcopy(opt)
    copied.state_dict()
    assert len(told) == 1
    for handle in handles:
        handle.remove()
    opt.state_dict()
    assert len(told) == 1


@everyone
def test_a_hook_that_fails_leaves_the_others_in_place(make: Make) -> None:
    opt, net = pair(make)
    step(opt, net)
    saved, told = opt.state_dict(), []

    def fail(*_: Any) -> None:
        raise ArithmeticError

    opt.register_load_state_dict_post_hook(lambda o: told.append(1))
    handle = opt.register_load_state_dict_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        opt.load_state_dict(saved)
    with pytest.raises((ValueError, KeyError)):
        handle.remove()
        opt.load_state_dict({"state": {}})
    opt.load_state_dict(saved)
    assert told == [1]


@everyone
def test_step_hooks_run_once_a_step_in_torchs_order(make: Make) -> None:
    opt, net = pair(make)
    told: list[Any] = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, a, k: told.append("all, before")),
        register_optimizer_step_post_hook(lambda o, a, k: told.append("all, after")),
    ]
    opt.register_step_pre_hook(lambda o, a, k: told.append("before"))
    opt.register_step_post_hook(lambda o, a, k: told.append("after"))
    try:
        step(opt, net)
        step(opt, net)
    finally:
        for handle in handles:
            handle.remove()
    assert told == ["all, before", "before", "after", "all, after"] * 2


@ours
def test_step_hooks_run_once_for_each_applied_step(make: Make) -> None:
    opt, net = pair(make)
    told: list[Any] = []
    replica, _ = pair(make)
    for o in (opt, replica):
        o.register_step_pre_hook(lambda o, a, k: told.append(("before", o.steps_done)))
        o.register_step_post_hook(lambda o, a, k: told.append(("after", o.steps_done)))
    record = opt.measure(net)
    assert not told
    opt.step()
    replica.apply_(record)
    assert told == [("before", 0), ("after", 1)] * 2
    replica.apply_(record=opt.measure(net))
    assert told[4:] == [("before", 1), ("after", 2)]
    with pytest.raises(ValueError, match="step"):
        replica.apply_(record)
    assert told[6:] == [("before", 2)], "a step that fails has no end"


@everyone
def test_a_pre_hook_may_change_the_arguments(make: Make) -> None:
    opt, net = pair(make)
    opt.register_step_pre_hook(lambda o, a, k: ((o, net), {}))
    with torch.enable_grad():
        net().backward()
    assert opt.step().ndim == 0
