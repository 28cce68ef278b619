"""ZO-SGD-Cons: the lowest of three losses is taken, with the bits that were scored; a step that stays leaves all."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import jaguar
from helpers.steps import skipping
from helpers.tensors import Bag, all_bits, bits, weights
from jaguar import Record

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WAYS = [{"restore": "copy"}, {"restore": "module"}, {"backend": "triton"}, {"n_directions": 2, "weight_decay": 0.3}]


def made(bag: Bag, **options: Any) -> jaguar.ZOSGDCons:
    return jaguar.ZOSGDCons(bag.named_parameters(), **({"lr": 1e-3, "tau": 2.0**-5, "seed": 12345} | options))


def bag_of(dtype: torch.dtype) -> Bag:
    return Bag([weights(dtype, 12, 17), weights(dtype, 9)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_is_taken_is_what_was_scored(dtype: torch.dtype, way: dict[str, Any]) -> None:
    """Of steps at several rates some are taken, some are taken backwards or not at all."""
    bag, taken = bag_of(dtype), []
    opt = made(bag, **way)
    slow = way.get("backend") == "triton"  # in the interpreter
    for lr in (1e-3, 0.3) if slow else (1e-3, 1e-2, 0.3, 1e-3, 0.5, 1e-3):
        opt.param_groups[0]["lr"] = lr
        before, first = all_bits(list(bag.parameters())), len(bag.seen)
        record = opt.measure(bag)
        n = 2 * opt.method.estimator.n_directions
        assert all_bits(list(bag.parameters())) == before and len(record.losses) == n + 3 == len(bag.seen) - first
        opt.apply_(record)
        three = list(record.losses[n:])
        chosen = three.index(min(three))
        scored = [bits(x) for x in bag.seen[first + n + chosen]]
        assert all_bits(list(bag.parameters())) == scored
        assert (scored == before) == (chosen == 0)
        taken.append(chosen)
    assert 0 in taken and 1 in taken


def test_the_opposite_step_is_taken_where_it_is_lower() -> None:
    """Far from x the loss rises to the right, and near x it falls: the derivative points the wrong way."""
    x = torch.zeros(1, requires_grad=True)
    opt = jaguar.ZOSGDCons([x], lr=0.25, tau=2.0, distribution="rademacher")
    points: list[float] = []

    def loss() -> Tensor:
        points.append(x.item())
        return torch.tensor(points[-1] if abs(points[-1]) > 1 else -points[-1])

    record = opt.measure(loss)
    assert record.losses[2:] == (0.0, 0.25, -0.25) and points[2:] == [0.0, -0.25, 0.25]
    opt.apply_(record)
    assert x.item() == 0.25


def test_ties_stay() -> None:
    bag = bag_of(torch.float32)
    before = all_bits(list(bag.parameters()))
    opt = made(bag, weight_decay=0.5)
    opt.step(lambda: torch.ones(()))
    assert all_bits(list(bag.parameters())) == before and opt.steps_done == 1 and opt.n_skipped == 0


def test_what_is_taken_is_what_was_scored_down_to_the_sign_of_a_zero() -> None:
    """Where the derivative is 0 and the loss is made larger, decay moves one tensor and g = 0 z signs the other."""
    bag = Bag([torch.full((64,), -0.0), torch.ones(3)])
    opt, losses = made(bag, weight_decay=0.5, maximize=True), iter([1.0, 1.0, 1.0, 2.0, 1.0])
    points: list[list[bytes]] = []

    def closure() -> Tensor:
        points.append(all_bits(list(bag.parameters())))
        return torch.tensor(next(losses))

    opt.step(closure)
    assert all_bits(list(bag.parameters())) == points[3] != points[2]
    # It is what ZO-SGD does, whose derivative of what is made larger is minus that of the loss: 0 - (-0 z) where z > 0.
    twin = torch.full((64,), -0.0, requires_grad=True)
    z = torch.full((64,), 0.0, requires_grad=True)
    jaguar.ZOSGD([("p0", z)], lr=1.0, tau=2.0**-5, seed=12345).apply_(Record(0, (1.0,), (0.0, 2.0**-4)))
    jaguar.ZOSGD([("p0", twin)], lr=1e-3, tau=2.0**-5, seed=12345, maximize=True).apply_(Record(0, (1e-3,), (1.0, 1.0)))
    assert torch.equal(twin.signbit(), z < 0) and z.abs().min() > 0


@pytest.mark.parametrize("losses", [(1.0, 1.0, 1.0), (0.5, 1.0, 0.5), (0.5, 0.5, 1.0)])
def test_ties_stay_in_records_too(losses: tuple[float, float, float]) -> None:
    bag = bag_of(torch.float32)
    before = all_bits(list(bag.parameters()))
    made(bag).apply_(Record(0, (1e-3,), (2.0, 1.0, *losses)))
    assert all_bits(list(bag.parameters())) == before


def test_between_two_equal_steps_it_is_the_usual_one() -> None:
    bags = [bag_of(torch.float32), bag_of(torch.float32)]
    made(bags[0]).apply_(Record(0, (1e-3,), (2.0, 1.0, 1.0, 0.5, 0.5)))
    jaguar.ZOSGD(bags[1].named_parameters(), lr=1e-3, tau=2.0**-5, seed=12345).apply_(Record(0, (1e-3,), (2.0, 1.0)))
    assert all_bits(list(bags[0].parameters())) == all_bits(list(bags[1].parameters()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_records_replay(dtype: torch.dtype, backend: str) -> None:
    """By step(), by measure and apply_, and by apply_ alone: the same bits."""
    bags = [bag_of(dtype) for _ in range(3)]
    opts = [made(bag, lr=0.02, backend=backend) for bag in bags]
    for _ in range(2 if backend == "triton" else 5):
        opts[0].step(bags[0])
        opts[1].apply_(opts[1].measure(bags[1]))
        assert opts[1].last_record == opts[0].last_record
        opts[2].apply_(Record.unpack(opts[0].last_record.pack()))
        assert len({tuple(all_bits(list(bag.parameters()))) for bag in bags}) == 1


@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failure_in_any_evaluation_leaves_the_parameters(at: int, error: type[BaseException]) -> None:
    bag, calls = bag_of(torch.bfloat16), [0]
    before = all_bits(list(bag.parameters()))
    opt = made(bag, lr=0.1)

    def failing() -> Tensor:
        calls[0] += 1
        if calls[0] == at + 1:
            raise error
        return bag()

    with pytest.raises(error):
        opt.step(failing)
    assert all_bits(list(bag.parameters())) == before and opt.steps_done == 0
    opt.step(bag)
    assert opt.steps_done == 1


@pytest.mark.parametrize("at", range(5))
def test_a_loss_that_is_not_finite_skips_the_step(at: int) -> None:
    bag, calls = bag_of(torch.bfloat16), [0]
    before = all_bits(list(bag.parameters()))
    opt = made(bag, lr=0.1)

    def closure() -> Tensor:
        calls[0] += 1
        return bag() * (math.nan if calls[0] == at + 1 else 1.0)

    with skipping():
        opt.step(closure)
    assert all_bits(list(bag.parameters())) == before and opt.n_skipped == 1


def test_it_never_raises_the_loss_of_its_batch() -> None:
    bag = bag_of(torch.float32)
    opt = made(bag, lr=2e-3)
    losses = [bag().item()]
    for _ in range(60):
        opt.step(bag)
        losses.append(bag().item())
    assert all(b <= a for a, b in pairwise(losses)) and losses[-1] < 0.75 * losses[0]


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="restore='walk' leaves x"):
        jaguar.ZOSGDCons([x], restore="walk")
    with pytest.raises(ValueError, match="estimator='two-sided': this method has an estimator of its own"):
        jaguar.ZOSGDCons([x], estimator="two-sided")
    assert "evaluations per step: 5, state: 0 bytes" in repr(jaguar.ZOSGDCons([x]))
