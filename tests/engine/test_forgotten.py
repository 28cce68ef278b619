"""Draws and copies for a step are let go of when it is over: finished, skipped, given up or failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers.laws import CONFIGS, make
from helpers.tensors import Bag, weights
from jaguar.backends import availability
from jaguar.backends.launches import Launches

DRAWN_AND_SAVED = {"_samples", "_drawn", "_momenta", "_buffers", "_scratch", "_listed"}
CASES = [(config, "reference") for config in sorted(CONFIGS)]
if availability.interpreted():
    CASES += [(config, "triton") for config in ("fraction", "released", "all", "rademacher-copy", "layers")]


class Trouble(Exception):
    pass


def left(opt: Any) -> dict[str, Any]:
    """What the launches of an optimizer have of a step, by name."""
    parts: list[Launches] = [launches for _, launches in opt._trained.bound.parts]
    return {name: held for part in parts for name in DRAWN_AND_SAVED if (held := getattr(part, name, None))}


def failing(bag: Bag, at: int) -> Callable[[], torch.Tensor]:
    calls = iter(range(1, 100))

    def closure() -> torch.Tensor:
        if next(calls) == at:
            raise Trouble
        return bag()

    return closure


@pytest.mark.filterwarnings("ignore:step .* was skipped")
@pytest.mark.parametrize(("config", "backend"), CASES)
def test_nothing_is_left_of_a_step(config: str, backend: str) -> None:
    bag = Bag([weights(torch.float32, 12, 10), weights(torch.float32, 40, seed=1)])
    opt = make(config, bag.named_parameters(), backend=backend)
    opt.step(bag)
    assert not left(opt), "after a step"
    for step in (opt.step, lambda closure: opt.apply_(opt.measure(closure))):
        step(lambda: bag() * float("nan"))
        assert opt.last_record.skipped and not left(opt), "after one that was skipped"
    for call in (opt.measure, opt.step):
        with pytest.raises(Trouble):
            call(failing(bag, 1 if config == "forward-grad" else 2))
        assert not left(opt), "after one that failed"
    record = opt.measure(bag)
    drawn = left(opt)
    opt.discard_()
    assert not left(opt), "after one that was given up"
    opt.apply_(record)
    assert not left(opt) and opt.n_skipped == 2
    # The reference draws once for both halves of a step; kernels draw for themselves, but for listed blocks.
    if config in ("fraction", "released", "rademacher-copy"):
        assert bool(drawn) == (backend == "reference" or config == "released")


@pytest.mark.skipif(not availability.interpreted(), reason="runs kernels on CPU tensors")
@pytest.mark.parametrize("config", ["fraction", "released", "all", "gaussian-copy"])
def test_nothing_is_left_where_memory_runs_out(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first buffer is there when the second one is not."""
    from jaguar.backends.triton.plan import Plan

    bag = Bag([weights(dtype, 12, 10) for dtype in (torch.float32, torch.float64)])
    opt = make(config, bag.named_parameters(), backend="triton")
    opt.step(bag)
    real, calls = Plan.saved, iter(range(100))

    def saved(self: Plan, *words: Any) -> torch.Tensor:
        if next(calls):
            raise torch.OutOfMemoryError
        return real(self, *words)

    monkeypatch.setattr(Plan, "saved", saved)
    with pytest.raises(torch.OutOfMemoryError):
        opt.step(bag)
    assert not left(opt)
    monkeypatch.undo()
    opt.step(bag)
    assert opt.steps_done == 2
