"""Measuring restores: the law, and closures that fail."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from helpers.laws import make
from helpers.tensors import Bag, all_bits


def no_hooks_left() -> bool:
    return not nn.modules.module._global_forward_pre_hooks and not nn.modules.module._global_forward_hooks


# By estimator and number of directions: whether each evaluation is away from x; None where that depends.
AWAY: dict[str, Callable[[int], list[bool | None]]] = {
    "two-sided": lambda n: [True] * (2 * n),
    "one-sided": lambda n: [False, *[True] * n],
    "normalised": lambda n: [False, *[True] * n],
    "forward-mode": lambda n: [False] * n,
    "two-places": lambda n: [True] * 4,
    "conservative": lambda n: [*[True] * (2 * n), False, None, None],  # the last two are where the step would lead
}


def restore_law(config: str, tensors: list[torch.Tensor], **changes: object) -> None:
    """Parameters are moved while the closure runs, and bit for bit back afterwards; again gives the same record."""
    bag = Bag(tensors)
    opt = make(config, bag.named_parameters(), **changes)
    params = list(bag.parameters())
    before, version = all_bits(params), [(p.data_ptr(), p.stride(), p.requires_grad) for p in params]
    record = opt.measure(bag)
    estimator = opt.method.estimator
    away = AWAY[estimator.name](estimator.n_directions)
    moved = [all_bits(seen) != before for seen in bag.seen]
    assert len(moved) == len(away) and len(record.losses) == estimator.n_losses
    assert [m for m, known in zip(moved, away, strict=True) if known is not None] == [a for a in away if a is not None]
    assert all_bits(params) == before and no_hooks_left()
    assert [(p.data_ptr(), p.stride(), p.requires_grad) for p in params] == version
    assert opt.measure(bag) == record and opt.steps_done == 0
    first, second = bag.seen[: len(moved)], bag.seen[len(moved) :]
    assert [all_bits(s) for s in first] == [all_bits(s) for s in second]
    assert all_bits(params) == before


class Trouble(Exception):
    pass


def failing(bag: Bag, how: str) -> object:
    """The bag as a closure that fails at its 1st or 2nd evaluation, after the forward or inside it."""
    kind, at = how.split("-")
    calls = [0]

    def fail(*_: object) -> None:
        calls[0] += 1
        if calls[0] == int(at):
            raise {"raise": Trouble, "inside": Trouble, "interrupt": KeyboardInterrupt}[kind]

    if kind == "inside":
        bag.register_forward_hook(fail)
        return bag
    if kind == "nan":
        return lambda: bag() * (float("nan") if len(bag.seen) == int(at) else 1.0)
    return lambda: (bag(), fail())[0]
