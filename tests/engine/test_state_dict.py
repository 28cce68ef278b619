"""Saving and loading: exact in every dtype, loadable with weights_only, refused where it does not fit; schedules."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from helpers.laws import CONFIGS, make
from helpers.steps import skipping
from helpers.tensors import DTYPES, Bag, all_bits, bits, dtype_id, every_form, state_bits, weights
from jaguar import ZOSGD, JaguarSignSGD

MOMENTA = [None, torch.float32, torch.bfloat16, torch.float8_e5m2]


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def plain(value: object) -> bool:
    """Only ints, floats, tensors, strings, None, and containers of them."""
    if isinstance(value, dict):
        return all(plain(k) and plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return value is None or isinstance(value, (int, float, str, torch.Tensor))


def continue_law(config: str, dtype: torch.dtype, **changes: object) -> None:
    """Saved after 4 steps, loaded into a fresh optimizer, continued for 4: the bits of 8 uninterrupted steps."""
    bag, fresh = every_form(dtype), every_form(dtype)
    opt = make(config, bag.named_parameters(), **changes)
    with skipping():
        for t in range(4):
            opt.step(bag if t != 2 else (lambda: bag() * float("nan")))
    state, model = through_a_file(opt.state_dict()), through_a_file(bag.state_dict())
    assert plain(state)
    again = make(config, fresh.named_parameters(), **(changes | {"seed": 1}))
    fresh.load_state_dict(model)
    again.load_state_dict(state)
    assert repr(again) == repr(opt) and again.steps_done == 4 and again.n_skipped == 1
    assert state_bits(again, list(fresh.parameters())) == state_bits(opt, list(bag.parameters()))
    assert dtypes_of(again) == dtypes_of(opt)
    for _ in range(4):
        assert opt.measure(bag) == again.measure(fresh)
        opt.step(), again.step()
    assert all_bits(list(bag.parameters())) == all_bits(list(fresh.parameters()))
    assert state_bits(again, list(fresh.parameters())) == state_bits(opt, list(bag.parameters()))


def dtypes_of(opt: torch.optim.Optimizer) -> list[torch.dtype]:
    return [m.dtype for s in opt.slots for m in opt.state[s.tensor].values()]


@pytest.mark.parametrize("momentum", MOMENTA, ids=lambda d: dtype_id(d) or "own")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("config", ["fraction", "all", "gaussian-copy"])
def test_continuing_is_never_having_stopped(config: str, dtype: torch.dtype, momentum: torch.dtype | None) -> None:
    continue_law(config, dtype, momentum_dtype=momentum)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_continuing_in_every_configuration(config: str, dtype: torch.dtype) -> None:
    continue_law(config, dtype)


@pytest.mark.parametrize("momentum", MOMENTA, ids=lambda d: dtype_id(d) or "own")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_state_dtypes(dtype: torch.dtype, momentum: torch.dtype | None) -> None:
    bag = every_form(dtype)
    opt = make("fraction", bag.named_parameters(), momentum_dtype=momentum)
    opt.step(bag)
    own = torch.bfloat16 if dtype == torch.float16 else dtype
    assert dtypes_of(opt) == [momentum or own] * 6
    assert [opt.state[p]["momentum"].shape for p in bag.parameters()] == [p.shape for p in bag.parameters()]
    loaded = make("fraction", every_form(dtype).named_parameters(), momentum_dtype=momentum)
    loaded.load_state_dict(opt.state_dict())
    assert dtypes_of(loaded) == dtypes_of(opt)
    saved = opt.state_dict()["state"][0]["momentum"]
    before = bits(saved)
    loaded.step(Bag([weights(dtype, 3)]))
    assert bits(saved) == before, "loading copies"


def test_group_values_are_loaded_and_watched() -> None:
    opt = JaguarSignSGD([("a", torch.zeros(5, requires_grad=True))], lr=0.5, tau=0.25)
    opt.step(lambda: torch.zeros(()))
    again = JaguarSignSGD([("a", torch.zeros(5, requires_grad=True))], lr=0.1, tau=0.1)
    again.load_state_dict(opt.state_dict())
    assert again.param_groups[0]["lr"] == 0.5 and again.param_groups[0]["tau"] == 0.25
    again.param_groups[0]["tau"] = 0.1
    with pytest.raises(RuntimeError, match="tau"):
        again.measure(lambda: torch.zeros(()))


def pair(
    cls: type,
    saved: dict,
    own: dict,
    shapes: tuple = ((4, 5), (4, 5)),
    names: tuple = ("a", "a"),
    splits: tuple = (1, 1),
) -> tuple:
    made = []
    for options, shape, name, groups in zip((saved, own), shapes, names, splits, strict=True):
        params = [{"params": [(f"{name}{g}", torch.ones(shape, requires_grad=True))]} for g in range(groups)]
        made.append(cls(params, **options))
        made[-1].step(lambda: torch.zeros(()))
    return made[0].state_dict(), made[1]


MISMATCHES = {
    "count-fraction": (JaguarSignSGD, {"coordinates": 1}, {"coordinates": 1.0}, r"coordinates=1, .*coordinates=1\.0"),
    "fraction": (JaguarSignSGD, {"coordinates": 0.1}, {"coordinates": 0.01}, r"coordinates=0\.1, .*0\.01"),
    "layout": (JaguarSignSGD, {"layout": "block"}, {}, "layout='block'"),
    "signs": (JaguarSignSGD, {"signs": "ones"}, {}, "signs='ones'"),
    "update": (JaguarSignSGD, {"update": "all"}, {}, "update='all'"),
    "released": (JaguarSignSGD, {"released": True}, {}, "released=True"),
    "momentum": (JaguarSignSGD, {"momentum_dtype": torch.float32}, {}, "momentum_dtype='torch.float32'.*None"),
    "rounding": (JaguarSignSGD, {"rounding": "nearest"}, {}, "rounding='nearest'"),
    "directions": (JaguarSignSGD, {"n_directions": 2}, {}, "n_directions=2"),
    "estimator": (JaguarSignSGD, {"estimator": "one-sided"}, {}, "estimator='one-sided'"),
    "clip": (JaguarSignSGD, {"rho_clip": 1.0}, {}, r"rho_clip=1\.0"),
    "distribution": (ZOSGD, {"distribution": "rademacher"}, {}, "distribution='rademacher'"),
    "restore": (ZOSGD, {"restore": "walk"}, {}, "restore='walk'"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_different_option_is_named(case: str) -> None:
    cls, saved, own, message = MISMATCHES[case]
    state, opt = pair(cls, saved, own)
    refuse(opt, state, f"saved with {message}")


class Mine(ZOSGD):
    """A user's own subclass."""


@pytest.mark.parametrize("restores", [("copy", "module"), ("module", None), (None, "copy")])
@pytest.mark.parametrize("classes", [(ZOSGD, ZOSGD), (ZOSGD, Mine), (Mine, ZOSGD)])
def test_what_decides_no_bits_is_not_compared(restores, classes) -> None:
    """How a step gets back to its parameters, and the name of a subclass."""
    modules = [nn.Linear(4, 3) for _ in range(2)]
    saving, loading = (
        kind(module.named_parameters(), lr=1e-2, momentum=0.9, restore=restore, seed=5)
        for kind, module, restore in zip(classes, modules, restores, strict=True)
    )
    data = torch.arange(8.0).view(2, 4)
    saving.step(lambda: modules[0](data).square().sum().detach())
    modules[1].load_state_dict(modules[0].state_dict())
    loading.load_state_dict(saving.state_dict())
    for opt, module in zip((saving, loading), modules, strict=True):
        opt.step(lambda module=module: module(data).square().sum().detach())
    assert torch.equal(modules[0].weight, modules[1].weight) and loading.steps_done == 2


def refuse(opt: torch.optim.Optimizer, state: dict, message: str) -> None:
    """load_state_dict raises and changes nothing."""
    before, momenta = repr(opt), [bits(s["momentum"]) for s in opt.state.values() if "momentum" in s]
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert repr(opt) == before
    assert [bits(s["momentum"]) for s in opt.state.values() if "momentum" in s] == momenta


OTHER_PARAMETERS = {
    "shape": ({"shapes": ((4, 5), (5, 4))}, r"shape \(4, 5\).*\(5, 4\)"),
    "name": ({"names": ("a", "b")}, "'a0' where this optimizer has 'b0'"),
    "groups": ({"splits": (1, 2)}, "1 parameter groups, this optimizer has 2"),
}


@pytest.mark.parametrize("case", OTHER_PARAMETERS)
def test_other_parameters_are_named(case: str) -> None:
    changes, message = OTHER_PARAMETERS[case]
    state, opt = pair(JaguarSignSGD, {}, {}, **changes)
    refuse(opt, state, message)


def test_other_number_of_tensors_and_other_optimizers() -> None:
    def leaf() -> torch.Tensor:
        return torch.ones(3, requires_grad=True)

    two, one = JaguarSignSGD([("a", leaf()), ("b", leaf())]), JaguarSignSGD([("a", leaf())])
    refuse(one, two.state_dict(), "2 tensors, this optimizer's 1")
    refuse(one, ZOSGD([("a", leaf())]).state_dict(), "optimizer='ZOSGD'")
    refuse(one, torch.optim.SGD([leaf()], lr=1.0).state_dict(), "not made by a jaguar optimizer")


def test_names_are_compared_canonically() -> None:
    def leaf() -> torch.Tensor:
        return torch.ones(3, requires_grad=True)

    JaguarSignSGD([("a", leaf())]).load_state_dict(JaguarSignSGD([("module._orig_mod.a", leaf())]).state_dict())


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@pytest.mark.parametrize("config", CONFIGS)
def test_pickle_and_deepcopy(config: str, how: str) -> None:
    bag = every_form(torch.bfloat16)
    opt = make(config, bag.named_parameters())
    opt.step(bag), opt.step(bag)
    twin, other = pickle.loads(pickle.dumps((bag, opt))) if how == "pickle" else copy.deepcopy((bag, opt))
    assert repr(other) == repr(opt)
    assert {id(s.tensor) for s in other.slots} == {id(p) for p in twin.parameters()}
    for _ in range(3):
        opt.step(bag), other.step(twin)
    assert opt.last_record == other.last_record
    assert all_bits(list(bag.parameters())) == all_bits(list(twin.parameters()))
    assert state_bits(opt, list(bag.parameters())) == state_bits(other, list(twin.parameters()))


def test_a_copy_between_measure_and_apply() -> None:
    bag = every_form(torch.float32)
    opt = make("fraction", bag.named_parameters())
    opt.measure(bag)
    twin, other = copy.deepcopy((bag, opt))
    opt.step(), other.step()
    assert all_bits(list(bag.parameters())) == all_bits(list(twin.parameters()))


def test_a_state_dict_heals_a_broken_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    bag = every_form(torch.float32)
    opt = make("fraction", bag.named_parameters())
    opt.step(bag)
    saved, model = through_a_file(opt.state_dict()), copy.deepcopy(bag.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr("jaguar.rules.sign_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opt.step(bag)
    with pytest.raises(RuntimeError, match="reload"):
        opt.step(bag)
    bag.load_state_dict(model)
    opt.load_state_dict(saved)
    opt.step(bag)
    assert opt.steps_done == 2


def test_freed_storage_is_noticed() -> None:
    x = weights(torch.float32, 30).requires_grad_()
    opt = JaguarSignSGD([("layer.weight", x)])
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"layer\.weight was freed"):
        opt.step(lambda: torch.zeros(()))


# -- copies, names and foreign numbers ---------------------------------------------------------------------------------


def quadratic(model):
    return lambda: sum((p.float() ** 2).sum() for p in model.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_made_under_a_scheduler_steps_itself(copied):
    model = torch.nn.Linear(3, 4)
    optimizer = JaguarSignSGD(model.named_parameters(), coordinates=1.0)
    torch.optim.lr_scheduler.LinearLR(optimizer)
    other = copied(optimizer)
    other.step(quadratic(model))
    assert (optimizer.steps_done, other.steps_done) == (0, 1)


def test_state_is_matched_by_name_whatever_the_order():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    start = copy.deepcopy(model)
    runs = []
    for again in (False, True):
        m = copy.deepcopy(start)
        opt = JaguarSignSGD(m.named_parameters(), coordinates=1.0, lr=1e-2)
        for _ in range(3):
            opt.step(quadratic(m))
        if again:
            shuffled = JaguarSignSGD(reversed(list(m.named_parameters())), coordinates=1.0, lr=1e-2)
            shuffled.load_state_dict(opt.state_dict())
            opt = shuffled
        for _ in range(3):
            opt.step(quadratic(m))
        runs.append(torch.cat([p.detach().reshape(-1) for p in m.parameters()]))
    assert torch.equal(*runs)


def test_numbers_from_numpy_load_with_weights_only(tmp_path):
    model = torch.nn.Linear(3, 4)
    optimizer = JaguarSignSGD(
        model.named_parameters(), lr=np.float64(0.1), coordinates=np.float64(0.5), tau=np.float32(1e-2)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: np.cos(k) ** 2)
    optimizer.step(quadratic(model))
    schedule.step()
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))


@pytest.mark.parametrize("missing", ["step", "seed", "options"])
def test_an_incomplete_state_dict_changes_nothing(missing):
    model = torch.nn.Linear(3, 4)
    optimizer = JaguarSignSGD(model.named_parameters(), coordinates=1.0)
    optimizer.step(quadratic(model))
    broken = copy.deepcopy(optimizer.state_dict())
    del broken["jaguar"][missing]
    broken["state"][0]["momentum"] += 1
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match="missing or incomplete"):
        optimizer.load_state_dict(broken)
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(before[i]["momentum"], after[i]["momentum"]) for i in before)


@pytest.mark.parametrize("config", CONFIGS)
def test_state_that_is_missing_is_named(config: str) -> None:
    """Whatever a method keeps of a tensor, of one tensor or of all: none of it is begun anew without a word."""
    bag = every_form(torch.float32)
    opt = make(config, bag.named_parameters())
    opt.step(bag)
    kept = {name for entry in opt.state.values() for name in entry}
    for name in kept:
        state = copy.deepcopy(opt.state_dict())
        i = next(i for i, entry in state["state"].items() if name in entry)
        del state["state"][i][name]
        where = state["param_groups"][0]["param_names"][i]
        refuse(opt, state, f"no {name} of {where}, .*: it is incomplete")
    if kept:
        refuse(opt, copy.deepcopy(opt.state_dict()) | {"state": {}}, "it is incomplete")
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


@pytest.mark.filterwarnings("ignore:1 of 2 tensors have requires_grad=False")
def test_a_tensor_that_was_frozen_in_all_steps_has_no_state() -> None:
    bag = Bag([weights(torch.float32, 20), weights(torch.float32, 30)])
    opt = make("fraction", bag.named_parameters())
    frozen = next(iter(bag.parameters())).requires_grad_(False)
    opt.step(bag)
    assert frozen not in opt.state
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    frozen.requires_grad_(True)
    refuse(opt, copy.deepcopy(opt.state_dict()), "freeze it .* while loading")


def test_record_hooks_outlive_loading() -> None:
    """torch's load ends in __setstate__, as copying does."""
    weight, found = torch.zeros(3, requires_grad=True), []
    opt = ZOSGD([("w", weight)])
    opt.register_record_hook(lambda _, record: found.append(record))
    opt.load_state_dict(opt.state_dict())
    opt.step(lambda: weight.sum())
    assert found == [opt.last_record]
    copy.deepcopy(opt).step(lambda: weight.sum())
    assert len(found) == 1
