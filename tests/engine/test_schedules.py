"""Schedules: the rate of a step is that of its measurement, and only rates may be scheduled."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

from helpers.laws import make
from helpers.tensors import all_bits, every_form
from jaguar import JaguarSignSGD


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_schedulers_survive_a_reload() -> None:
    def fresh() -> tuple[nn.Linear, JaguarSignSGD, torch.optim.lr_scheduler.LinearLR]:
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        opt = JaguarSignSGD(model.named_parameters(), lr=0.1, coordinates=0.5)
        return model, opt, torch.optim.lr_scheduler.LinearLR(opt, 0.1, 1.0, total_iters=8)

    def train(model: nn.Module, opt: JaguarSignSGD, schedule: torch.optim.lr_scheduler.LRScheduler, n: int) -> None:
        for _ in range(n):
            opt.step(lambda: model(torch.ones(2, 6)).square().mean())
            schedule.step()

    one, two = fresh(), fresh()
    train(*one, 8)
    train(*two, 3)
    three = fresh()
    for part, saved in zip(three, [part.state_dict() for part in two], strict=True):
        part.load_state_dict(through_a_file(saved))
    train(*three, 5)
    assert three[1].last_record == one[1].last_record and three[1].last_record.lrs[0] > 0.08
    assert all_bits(list(one[0].parameters())) == all_bits(list(three[0].parameters()))


@pytest.mark.parametrize("key", ["tau", "beta", "weight_decay"])
def test_only_lr_may_be_scheduled(key: str) -> None:
    bag = every_form(torch.float32)
    opt = make("fraction", bag.named_parameters())
    opt.param_groups[0][key] = 0.25
    opt.step(bag)
    record, before = opt.measure(bag), all_bits(list(bag.parameters()))
    opt.param_groups[0][key] = 0.125
    for call in (lambda: opt.step(bag), lambda: opt.apply_(record)):
        with pytest.raises(RuntimeError, match=f"{key} of parameter group 0 changed from 0.25 to 0.125.*only lr"):
            call()
    assert all_bits(list(bag.parameters())) == before and opt.steps_done == 1
    opt.param_groups[0][key], opt.param_groups[0]["lr"] = 0.25, 0.5
    opt.step(bag)
    assert opt.last_record.lrs == (0.5,)


@pytest.mark.parametrize("lr", [-1.0, math.nan, math.inf])
def test_a_bad_scheduled_lr(lr: float) -> None:
    bag = every_form(torch.float32)
    opt = make("fraction", bag.named_parameters())
    opt.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match="lr"):
        opt.step(bag)


def test_the_rate_of_measure_counts() -> None:
    x = torch.zeros(10, requires_grad=True)
    opt = JaguarSignSGD([x], lr=0.5, coordinates=1.0, signs="ones")
    record = opt.measure(lambda: x.sum())
    opt.param_groups[0]["lr"] = 4.0
    opt.apply_(record)
    assert (x == -0.5).all()


def test_a_cycled_momentum_is_refused() -> None:
    bag = every_form(torch.float32)
    opt = make("gaussian-copy", bag.named_parameters())
    cycle = torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=5)
    opt.step(bag)
    cycle.step()
    with pytest.raises(RuntimeError, match=r"momentum.*cycle_momentum=False"):
        opt.step(bag)
