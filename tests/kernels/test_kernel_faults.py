"""Tensors that change between steps, and launches that fail, on the Triton backend: no step leaves a wrong trace."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.laws import TAU, make
from helpers.tensors import FORMS, Bag, all_bits, bits, weights

pytest.importorskip("triton")
from helpers.kernels import interpreted
from helpers.launches import bag_of, counted, everything, jobs, parameters
from jaguar import JaguarSignSGD
from jaguar.backends import availability
from jaguar.triton_kernels.launch import around

pytestmark = [interpreted, pytest.mark.usefixtures("poisoned")]

some_configs = pytest.mark.parametrize("config", ["fraction", "all", "gaussian-copy", "rademacher-copy"])


@pytest.fixture
def launches() -> Iterator[list[dict[str, Any]]]:
    with counted(run=True) as seen:
        yield seen


@pytest.mark.parametrize("change", [lambda t: t.bfloat16(), lambda t: torch.zeros(30_000)])
@pytest.mark.parametrize("config", ["fraction", "rademacher-copy"])
def test_a_tensor_that_became_another_is_refused(config: str, change: Callable[[Tensor], Tensor]) -> None:
    """The tables' offsets were made for the old one; nothing may be written by them."""
    bag = Bag([weights(torch.float32, 700), weights(torch.bfloat16, 40)])
    opt = make(config, bag.named_parameters(), backend="triton", momentum_dtype=torch.float32)
    opt.step(bag)
    bag.p0.data = change(bag.p0.data)
    before = all_bits(parameters(bag))
    with pytest.raises(RuntimeError, match="p0"):
        opt.measure(bag)
    assert all_bits(parameters(bag)) == before


@pytest.mark.parametrize("config", ["fraction", "all", "rademacher-copy"])
def test_a_launch_that_fails_leaves_no_trace(config: str) -> None:
    """A kernel that does not compile or has no memory wrote nothing: the step never was."""
    bag = Bag([weights(torch.float32, 700)])
    opt = make(config, bag.named_parameters(), backend="triton")
    opt.step(bag)
    before = everything(bag, opt)

    def failing_launch(name: str, programs: Any, constants: dict[str, Any], run: Callable[[], None]) -> None:
        if constants.get("JOB") in ("fused", "saved", "plain") or name == "tiles":
            raise RuntimeError("out of resource")
        run()

    with around(failing_launch), pytest.raises(RuntimeError, match="out of resource"):
        opt.step(bag)
    assert everything(bag, opt) == before
    opt.step(bag)  # not broken
    assert opt.steps_done == 2


def test_a_first_step_in_inference_mode_spoils_no_later_one() -> None:
    bag = Bag([weights(torch.float32, 700)])
    opt = make("fraction", bag.named_parameters(), backend="triton")
    with torch.inference_mode():
        opt.step(bag)
    opt.step(bag)
    assert opt.steps_done == 2


def test_a_replaced_momentum_is_the_one_that_counts() -> None:
    bag = Bag([weights(torch.float32, 700)])
    opt = make("all", bag.named_parameters(), backend="triton", weight_decay=0.0)
    opt.step(bag)
    opt.state[bag.p0] = {"momentum": torch.full((700,), -1e6)}
    before = bag.p0.detach().clone()
    opt.step(bag)
    assert bool((bag.p0 > before).all())


@some_configs
def test_versions_tell_autograd(config: str) -> None:
    bag = Bag([weights(torch.float32, 40, 3), weights(torch.float32, 11)])
    opt = make(config, bag.named_parameters(), backend="triton")
    opt.step(bag)
    tensors = parameters(bag) + [s["momentum"] for s in opt.state.values() if "momentum" in s]
    versions = [t._version for t in tensors]
    loss = sum((p * p).sum() for p in bag.parameters())
    opt.measure(bag)
    measured = [t._version for t in tensors]
    assert all(b > a for a, b in zip(versions[:2], measured, strict=False))
    opt.step()
    assert all(t._version > v for t, v in zip(tensors, measured, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@some_configs
def test_addresses_that_change_are_followed(config: str, launches: list[dict[str, Any]]) -> None:
    bag, twin = bag_of(torch.float32), bag_of(torch.float32)
    opt = make(config, bag.named_parameters(), backend="triton")
    reference = make(config, twin.named_parameters(), backend="reference")
    left = []
    for step in range(4):
        opt.step(bag), reference.step(twin)
        assert everything(bag, opt) == everything(twin, reference), step
        assert all(bits(old) == was for old, was in left), "what was left behind is not written to"
        for p in bag.parameters():
            flat = torch.zeros(p.numel() + 8)
            moved = flat[step : step + p.numel()].view_as(p)  # aligned at first, then not
            left.append((p.data, bits(p)))
            p.data = moved.copy_(p.data)
            if "momentum" in opt.state[p]:
                momentum = opt.state[p]["momentum"]
                left.append((momentum, bits(momentum)))
                if step % 2:
                    opt.state[p] = {"momentum": momentum.clone()}
                else:
                    opt.state[p]["momentum"] = momentum.clone()
    hints = [launch["HINT"] for launch in launches if launch["name"] in ("tiles", "step")]
    assert config == "fraction" or set(hints) == {True, False}


def another(make_other: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Bag, Any], None]:
    """Replaces the momentum of the first parameter by `make_other(parameter, momentum)`."""

    def spoil(bag: Bag, opt: Any) -> None:
        state = opt.state[bag.p0]
        state["momentum"] = make_other(bag.p0.detach(), state["momentum"])

    return spoil


def same_as_the_second(bag: Bag, opt: Any) -> None:
    shared = torch.zeros(100)
    opt.state[bag.p0]["momentum"] = shared[:64].view(8, 8)
    opt.state[bag.p1]["momentum"] = shared[36:100].view(8, 8)


FAULTS: dict[str, tuple[Callable[[Bag, Any], None], str]] = {
    "shape": (another(lambda x, m: torch.zeros(4, 16)), "momentum of p0"),
    "device": (another(lambda x, m: m.to("meta")), "momentum of p0 is .* on meta"),
    "integers": (another(lambda x, m: m.to(torch.int32)), "momentum of p0 has dtype torch.int32"),
    "float8_e4m3": (another(lambda x, m: m.to(torch.float8_e4m3fn)), "momentum of p0 has dtype torch.float8_e4m3fn"),
    "strides": (another(lambda x, m: m.t().contiguous().t()), "momentum of p0 has shape .* contiguous"),
    "parameter itself": (another(lambda x, m: x), "overlap"),
    "overlap": (same_as_the_second, "momentum of p0 and the momentum of p1 overlap"),
    "freed momentum": (another(lambda x, m: (m.untyped_storage().resize_(0), m)[1]), "momentum of p0 was freed"),
    "freed": (lambda bag, opt: bag.p0.untyped_storage().resize_(0), "storage of p0 was freed"),
    "shrunk": (lambda bag, opt: bag.p0.untyped_storage().resize_(80), "storage of p0 was freed"),
    # At the address where a good tensor was:
    "transposed": (lambda bag, opt: setattr(bag.p1, "data", bag.p1.data.t()), "p1 has shape .* contiguous"),
    "shorter": (another(lambda x, m: m[:3]), "momentum of p0"),
    "reinterpreted": (another(lambda x, m: m.view(torch.int32)), "momentum of p0 has dtype torch.int32"),
}
BAD = [(fault, "step", "fraction") for fault in FAULTS]
BAD += [(fault, "apply_", "fraction") for fault in ("integers", "overlap", "freed")]
BAD += [(fault, "step", config) for fault in ("integers", "freed") for config in ("all", "gaussian-copy")]


@pytest.mark.parametrize(("fault", "call", "config"), BAD)
def test_bad_tensors_are_refused_before_any_launch(
    fault: str, call: str, config: str, launches: list[dict[str, Any]]
) -> None:
    bag, twin = (Bag([weights(torch.float32, 8, 8, seed=i) for i in range(2)]) for _ in range(2))
    opt = make(config, bag.named_parameters(), backend="triton")
    reference = make(config, twin.named_parameters(), backend="reference")
    opt.step(bag), reference.step(twin)
    record = opt.measure(bag)
    good = [p.data for p in bag.parameters()], [opt.state[p]["momentum"] for p in bag.parameters()]
    values = [[t.clone() for t in tensors] for tensors in good]
    spoil, message = FAULTS[fault]
    spoil(bag, opt), launches.clear()
    with pytest.raises(RuntimeError, match=message):
        opt.step(bag) if call == "step" else opt.apply_(record)
    assert jobs(launches) == [] and opt.steps_done == 1
    for tensors, before in zip(good, values, strict=True):
        for t, v in zip(tensors, before, strict=True):
            if fault in ("freed", "shrunk", "freed momentum") and t.untyped_storage().nbytes() < v.nbytes:
                t.untyped_storage().resize_(v.nbytes)
                t.copy_(v)
            assert bits(t) == bits(v)
    for p, data, momentum in zip(bag.parameters(), *good, strict=True):
        p.data, opt.state[p]["momentum"] = data, momentum
    opt.step(bag), reference.step(twin)
    assert everything(bag, opt) == everything(twin, reference), "still usable"


def test_half_precision_momentum_that_somebody_put_there() -> None:
    """No option gives fp16 momentum, but it can be stored; both backends round it alike."""
    runs = []
    for backend in ("reference", "triton"):
        bag = bag_of(torch.float32)
        opt = make("all", bag.parameters(), backend=backend)
        opt.step(bag)
        for state in opt.state.values():
            state["momentum"] = state["momentum"].half()
        opt.step(bag)
        runs.append(everything(bag, opt))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("form", ["transposed", "slice"])
def test_tensors_that_are_not_contiguous_are_named(form: str) -> None:
    bag = Bag([weights(torch.float32, 5), FORMS[form](torch.float32)])
    with pytest.raises(availability.Unavailable, match=r"cannot take p1: it is not contiguous.*backend='auto'"):
        JaguarSignSGD(bag.named_parameters(), backend="triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        JaguarSignSGD(bag.named_parameters(), coordinates=0.5, tau=TAU, backend="auto").step(bag)


def test_cpu_tensors_without_the_interpreter() -> None:
    code = """
import torch, jaguar
try:
    jaguar.JaguarSignSGD([torch.nn.Parameter(torch.zeros(3))], backend="triton")
except RuntimeError as error:
    print(type(error).__name__, error)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.stderr == ""
    assert done.stdout.startswith("Unavailable backend='triton' is not available: there is no NVIDIA GPU")
    assert done.stdout.rstrip().endswith("available: reference")
