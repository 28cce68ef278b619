"""Promises of torch.optim that its users build on: torch.optim.SGD and every optimizer here keep these laws."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

import jaguar
from helpers.contract import OURS, TORCH, Make, Net, everyone, ours, pair, step
from helpers.tensors import bits

Params = list[Any]


def all_of(net: nn.Module) -> list[bytes]:
    return [bits(p) for p in net.parameters()]


# -- maximize ----------------------------------------------------------------------------------------------------------


@everyone
def test_maximize_is_the_other_way(make: Make) -> None:
    down, up = pair(make, weight_decay=0.0), pair(make, weight_decay=0.0, maximize=True)
    first = [p.detach().clone() for p in down[1].parameters()]
    for opt, net in (down, up):
        step(opt, net)
    moved = False
    for x, a, b in zip(first, down[1].parameters(), up[1].parameters(), strict=True):
        torch.testing.assert_close(a - x, x - b, rtol=1e-3, atol=1e-6)
        moved |= bool((a != x).any())
    assert moved


@ours
def test_maximize_minus_f_is_minimize_f(make: Make) -> None:
    """Bit for bit, weight decay included; and the losses that are recorded are those that were measured."""
    (down, net), (up, other) = pair(make, weight_decay=0.1), pair(make, weight_decay=0.1, maximize=True)
    for _ in range(5):
        down.step(net)
        up.step(lambda: -other())
        assert up.last_record.losses == tuple(-loss for loss in down.last_record.losses)
    assert all_of(net) == all_of(other)


@ours
def test_maximize_decides_bits(make: Make) -> None:
    down, up = pair(make)[0], pair(make, maximize=True)[0]
    assert "maximizes" in repr(up) and "maximizes" not in repr(down)
    with pytest.raises(ValueError, match="maximize=True"):
        down.load_state_dict(up.state_dict())
    with pytest.raises(ValueError, match="maximize=False"):
        up.load_state_dict(down.state_dict())
    old = copy.deepcopy(down.state_dict())
    del old["jaguar"]["options"]["maximize"]  # of a version that did not know it
    down.load_state_dict(old)
    with pytest.raises(ValueError, match="maximize=False"):
        up.load_state_dict(old)
    with pytest.raises(ValueError, match="maximize=1"):
        pair(make, maximize=1)


# -- learning rates ----------------------------------------------------------------------------------------------------


@everyone
@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "one element"])
def test_a_learning_rate_may_be_a_tensor(make: Make, shape: tuple[int, ...]) -> None:
    (opt, net), (other, twin) = pair(make, lr=torch.full(shape, 2.0**-9)), pair(make, lr=2.0**-9)
    step(opt, net), step(other, twin)
    assert all_of(net) == all_of(twin) and repr(opt)
    state = through_a_file(opt.state_dict())
    other.load_state_dict(state)
    step(opt, net), step(other, twin)
    assert all_of(net) == all_of(twin) and str(opt) and f"{opt}"


@everyone
def test_a_learning_rate_of_several_elements_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="lr"):
        pair(make, lr=torch.ones(2))


def test_vector_lr_beside_a_tensor() -> None:
    net = Net()
    opt = jaguar.JaguarMuon(
        jaguar.param_groups(net), lr=torch.tensor([0.01]), vector_lr=torch.tensor(0.001), coordinates=0.5
    )
    assert opt.param_groups[0]["vector_lr"] == pytest.approx(0.1) and repr(opt)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0 / (t + 1)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.5, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8, cycle_momentum=False),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, 2, cycle_momentum=False),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "swa": lambda o: swa_utils.SWALR(o, 1e-4, 3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_schedules_are_those_of_sgd(name: str, tensor: bool) -> None:
    rates: list[list[float]] = []
    for make in (TORCH["torch"], OURS["fraction"]):
        opt, net = pair(make, lr=torch.tensor(0.0625) if tensor else 0.0625)
        scheduler = SCHEDULERS[name](opt)
        rates.append([])
        for _ in range(7):
            step(opt, net)
            scheduler.step()
            rates[-1].append(float(opt.param_groups[0]["lr"]))
    assert rates[0] == rates[1]


@everyone
def test_reduce_on_plateau(make: Make) -> None:
    opt, net = pair(make, lr=0.0625)
    scheduler = lr_scheduler.ReduceLROnPlateau(opt, patience=1, factor=0.5)
    for _ in range(4):
        step(opt, net)
        scheduler.step(1.0)
    assert opt.param_groups[0]["lr"] == 0.03125
    other, _ = pair(make, lr=0.0625)
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert other.param_groups[0]["lr"] == 0.03125


# -- state -------------------------------------------------------------------------------------------------------------


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@everyone
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_as_the_original(make: Make, how: str) -> None:
    opt, net = pair(make)
    step(opt, net)
    together = copy.deepcopy((opt, net)) if how == "deepcopy" else pickle.loads(pickle.dumps((opt, net)))
    for o, n in ((opt, net), together):
        for _ in range(3):
            step(o, n)
    assert all_of(net) == all_of(together[1])


@everyone
def test_a_copy_under_a_schedule_steps_itself(make: Make) -> None:
    opt, net = pair(make)
    scheduler = lr_scheduler.StepLR(opt, 1, 0.5)
    step(opt, net)
    scheduler.step()
    before = all_of(net)
    other, twin = copy.deepcopy((opt, net))
    step(other, twin)
    assert all_of(net) == before != all_of(twin)


@everyone
def test_zero_grad(make: Make) -> None:
    opt, net = pair(make)
    net().backward()
    opt.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in net.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in net.parameters())


@everyone
def test_groups(make: Make) -> None:
    opt, net = pair(make)
    extra = nn.Parameter(torch.ones(3))
    more = {"ns": False} if getattr(opt, "by_role", False) else {}
    with pytest.raises(ValueError):
        opt.add_param_group({"params": [net.weight]} | more)
    with pytest.raises(TypeError):
        opt.add_param_group([extra])
    opt.add_param_group({"params": [("extra", extra)], "lr": 0.5} | more)
    assert [group["lr"] for group in opt.param_groups][-1] == 0.5 and opt.param_groups[1]["params"][0] is extra
    with pytest.raises(ValueError):
        pair(make)[0].load_state_dict(opt.state_dict())


@everyone
def test_empty_groups(make: Make) -> None:
    net = Net()
    groups: Params = [{"params": [net.weight]}, {"params": []}]
    opt = jaguar.JaguarMuon([g | {"ns": True} for g in groups]) if make is OURS["muon"] else make(groups)
    step(opt, net)
    assert len(opt.param_groups) == 2
    opt.load_state_dict(through_a_file(opt.state_dict()))


@everyone
def test_averaged_models(make: Make) -> None:
    opt, net = pair(make)
    average = swa_utils.AveragedModel(net)
    for _ in range(3):
        step(opt, net)
        average.update_parameters(net)
    assert int(average.n_averaged) == 3
    other = swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    step(opt, net)
    other.update_parameters(net)
    assert math.isfinite(other().item())


@ours
def test_parameters_in_another_order_are_matched_by_name(make: Make) -> None:
    opt, net = pair(make)
    step(opt, net)
    twin = copy.deepcopy(net)
    shuffled = make(list(twin.named_parameters())[::-1])
    shuffled.load_state_dict(through_a_file(opt.state_dict()))
    step(opt, net), step(shuffled, twin)
    assert all_of(net) == all_of(twin)
    with pytest.raises(ValueError, match=r"names|saved with (layers|project)="):
        make(list(Net().parameters())[::-1]).load_state_dict(opt.state_dict())


# -- closures ----------------------------------------------------------------------------------------------------------


@ours
def test_a_closure_that_calls_backward_is_told_to_leave_it_out(make: Make) -> None:
    opt, net = pair(make)
    before = all_of(net)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = net()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"leave loss\.backward\(\) out"):
        opt.step(closure)
    with pytest.raises(RuntimeError, match=r"leave loss\.backward\(\) out"):
        opt.measure(lambda: torch.autograd.grad(net(), list(net.parameters()))[0].sum())
    assert all_of(net) == before and opt.steps_done == 0
    opt.step(net)


@ours
def test_other_errors_of_a_closure_are_its_own(make: Make) -> None:
    opt, _net = pair(make)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        opt.step(lambda: torch.ones(2, 3) @ torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_that_a_closure_widened_is_warned_of_once(dtype: torch.dtype) -> None:
    x = nn.Parameter(torch.ones(4))
    opt = jaguar.ZOSGD([x], lr=1e-3)
    opt.watch_dtype(torch.float32)
    with pytest.warns(UserWarning, match=f"{dtype}; at tau 1e-3"):
        opt.watch_dtype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.watch_dtype(dtype)
        opt.step(lambda: (x.square().sum()).to(dtype))
