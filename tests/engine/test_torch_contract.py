"""What torch.optim promises and its users build on: torch.optim.SGD and every optimizer here keep these laws."""

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
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import jaguar
from helpers.laws import CONFIGS, TAU, built
from helpers.tensors import bits, weights

Params = list[Any]
OURS: dict[str, Any] = {
    name: (lambda p, cls=cls, options=options, **o: built(cls, p, {"tau": TAU} | options | o))
    for name, (cls, options) in CONFIGS.items()
}
TORCH = {"torch": lambda p, **o: torch.optim.SGD(p, **({"lr": 1e-3, "momentum": 0.9} | o))}
everyone = pytest.mark.parametrize("make", [*TORCH.values(), *OURS.values()], ids=[*TORCH, *OURS])
ours = pytest.mark.parametrize("make", OURS.values(), ids=list(OURS))
Make = Callable[..., Any]


class Net(nn.Module):
    """restore="module" moves parameters in the forward of the module that has them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weights(torch.float32, 6, 8)), nn.Parameter(weights(torch.float32, 8))

    def forward(self) -> Tensor:
        return (torch.ones(2, 6) @ self.weight + self.bias - 1.0).square().mean()


def step(opt: Any, net: nn.Module) -> Any:
    """One step, as users of either take it."""
    if isinstance(opt, jaguar.ZerothOrder):
        return opt.step(net)
    opt.zero_grad()
    net().backward()
    return opt.step()


def pair(make: Make, **options: Any) -> tuple[Any, Net]:
    net = Net()
    return make(net.named_parameters(), **options), net


def all_of(net: nn.Module) -> list[bytes]:
    return [bits(p) for p in net.parameters()]


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
