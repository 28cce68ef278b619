"""`measure_` and the trainer's fused step: three launches, the bits of two calls, and always a way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from helpers.checkpoints import bits, equal, rows, trainer
from helpers.checkpoints import make as model_of
from helpers.laws import CONFIGS, TAU, make
from helpers.steps import skipping
from helpers.tensors import all_bits, every_form, state_bits
from jaguar import ZOTrainer

configs = pytest.mark.parametrize("config", CONFIGS)


@configs
def test_measure_in_place_and_apply_is_a_step(config: str) -> None:
    one, other = every_form(torch.bfloat16), every_form(torch.bfloat16)
    stepped, held = make(config, one.named_parameters()), make(config, other.named_parameters())
    with skipping():
        for t in range(5):
            losses = [one, other] if t != 2 else [lambda b=b: b() * float("nan") for b in (one, other)]
            stepped.step(losses[0])
            record = held.measure_(losses[1])
            held.apply_(record)
            assert repr(record) == repr(stepped.last_record)
            assert all_bits(list(one.parameters())) == all_bits(list(other.parameters())), t
            assert state_bits(stepped, list(one.parameters())) == state_bits(held, list(other.parameters()))


@configs
def test_the_way_back(config: str) -> None:
    bag = every_form(torch.float32)
    opt, before = make(config, bag.named_parameters()), all_bits(list(bag.parameters()))
    opt.measure_(bag)
    if opt._measured.probe is not None:
        with pytest.raises(RuntimeError, match="call apply_"):
            opt.measure_(bag)
        with pytest.raises(RuntimeError, match="before saving"):
            opt.state_dict()
    opt.discard_()
    assert all_bits(list(bag.parameters())) == before
    with pytest.raises(RuntimeError, match="nothing was measured"):
        opt.step()
    opt.step(bag)


class Stops(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.seen = bits(others["model"])


def test_a_run_that_is_stopped_between_losses_and_update_is_whole(tmp_path: Any, monkeypatch: Any) -> None:
    run, stops = trainer(tmp_path, model_of("tied")), Stops()
    run.add_callback(stops)
    clip, calls = ZOTrainer._clip_grad_norm, []

    def stopped(self: Any, model: Any) -> Any:
        calls.append(bits(model))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return clip(self, model)

    monkeypatch.setattr(ZOTrainer, "_clip_grad_norm", stopped)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert not equal(calls[1], stops.seen), "the second step was held where it was measured"
    assert equal(bits(run.model), stops.seen)


class Looks(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        pass


class Subclass(ZOTrainer):
    def training_step(self, *args: Any, **others: Any) -> Any:
        return super().training_step(*args, **others)


@pytest.mark.parametrize("who", ["nobody", "a callback", "a hook", "a subclass"])
def test_steps_are_held_where_nobody_looks(tmp_path: Any, monkeypatch: Any, who: str) -> None:
    run = trainer(tmp_path, model_of("tied"), save_strategy="no")
    if who == "a callback":
        run.add_callback(Looks())
    elif who == "a hook":
        run.create_optimizer().register_step_pre_hook(lambda *_: None)
    elif who == "a subclass":
        run.__class__ = Subclass
    held = []
    clip = ZOTrainer._clip_grad_norm

    def noted(self: Any, model: Any) -> Any:
        held.append(self.zeroth_order._measured.probe is not None)
        return clip(self, model)

    monkeypatch.setattr(ZOTrainer, "_clip_grad_norm", noted)
    run.train()
    assert held == [who == "nobody"] * 4


def test_three_launches_a_step_of_the_trainer(tmp_path: Any) -> None:
    pytest.importorskip("triton")
    from helpers.launches import counted, jobs

    run = trainer(tmp_path, model_of("tied"), coordinates=0.5, tau=TAU, backend="triton", save_strategy="no")
    with counted(run=True) as seen:
        run.train()
    assert set(jobs(seen)) == {"lost", "perturb", "flip", "fused"}
    with counted(run=True) as seen:
        ZOTrainer.training_step(run, run.model, run._prepare_inputs(run.data_collator(rows(4))))
        run.optimizer.step()
    assert jobs(seen) == ["perturb", "flip", "fused"]
