"""Demands of any method on kernels: several state buffers, any points, tensors that are left out, hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.tensors import DTYPES

pytest.importorskip("triton")
import triton
import triton.language as tl  # noqa: F401 (the interpreter looks for it where a kernel is)
from triton.runtime.interpreter import InterpreterBuilder

from helpers.kernels import (
    DIRECTIONS,
    GROUPS,
    RHO,
    Form,
    Twins,
    coordinate_twins,
    dense_twins,
    forms_of,
    interpreted,
    method_of,
    same,
    step_law,
)
from helpers.launches import as_the_end, counted, edit_tables, jobs
from jaguar.backends import availability
from jaguar.backends.triton.device_scalars import arithmetic
from jaguar.backends.triton.plan import Plan
from jaguar.backends.triton.supported import unsupported
from jaguar.method.directions import DENSE
from jaguar.method.rule import Buffer, Rule
from jaguar.method.rules import SGD, AveragedSign
from jaguar.triton_kernels import rules as kernels
from jaguar.triton_kernels.launch import around

pytestmark = [interpreted, pytest.mark.usefixtures("poisoned")]

restores = pytest.mark.parametrize("restore", ["copy", "walk"])


def three_entry(m: Tensor, v: Tensor, h: Tensor, g: Tensor, b1: float, s1: float, b2: float) -> tuple[Tensor, ...]:
    v = v * b2 + g * g
    return m * b1 + g * s1, v, h * b2 + v


def three_step(x: Tensor, m: Tensor, v: Tensor, h: Tensor, decay: float, lr: float, c: float, d: float) -> Tensor:
    return x * decay - (m * c + v * d + h) * lr


@triton.jit
def three_entry_kernel(m, v, h, g, b1, s1, b2):
    v = v * b2 + g * g
    return m * b1 + g * s1, v, h * b2 + v


@triton.jit
def three_step_kernel(x, m, v, h, decay, lr, c, d):
    return x * decay - (m * c + v * d + h) * lr


def two_entry(m: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    return m + g, v + g * g


def two_step(x: Tensor, m: Tensor, v: Tensor, decay: float, lr: float) -> Tensor:
    return x * decay - (m + v) * lr


@triton.jit
def two_entry_kernel(m, v, g):
    return m + g, v + g * g


@triton.jit
def two_step_kernel(x, m, v, decay, lr):
    return x * decay - (m + v) * lr


@dataclass(frozen=True)
class Made(Rule):
    """A rule of two or three buffers; `made` gives the kernels its functions."""

    n: int = 3

    @property
    def widths(self) -> tuple[int, int]:
        return (3, 2) if self.n == 3 else (0, 0)

    @property
    def entry(self) -> Callable[..., Any]:
        return three_entry if self.n == 3 else two_entry

    @property
    def step(self) -> Callable[..., Tensor]:
        return three_step if self.n == 3 else two_step

    def state(self, group: Mapping[str, Any]) -> tuple[Buffer, ...]:
        return tuple(Buffer(name) for name in "mvh"[: self.n])

    def entry_numbers(self, group: Mapping[str, Any], t: int) -> tuple[float, ...]:
        return (group["beta"], 1.0 - group["beta"], 0.75) if self.n == 3 else ()

    def step_numbers(self, group: Mapping[str, Any], t: int) -> tuple[float, ...]:
        return (0.3, 1.0 / 3.0) if self.n == 3 else ()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("three_entry", "three_step", "two_entry", "two_step"):
        monkeypatch.setattr(kernels, name, globals()[f"{name}_kernel"], raising=False)


@pytest.mark.parametrize(
    ("buffers", "distribution", "restore", "n", "held", "stochastic"),
    [
        (("bf16", "fp32", "fp32"), "rademacher", "copy", 1, True, True),
        (("bf16", "fp32", "e5m2"), "gaussian", "walk", 1, True, True),
        (("own", "own", "own"), "rademacher", "copy", 3, False, True),
        (("fp32", "bf16", "bf16"), "rademacher", "walk", 2, True, False),
        (("e5m2", "bf16"), "gaussian", "copy", 1, False, True),
        (("bf16", "fp32"), "rademacher", "copy", 2, True, True),
    ],
)
def test_rules_of_several_buffers(
    made: None, buffers: tuple[str, ...], distribution: str, restore: str, n: int, held: bool, stochastic: bool
) -> None:
    """Each buffer is stored in its own dtype, with noise of its own purpose."""
    method = method_of(DENSE[distribution], Made(len(buffers)), n=n, stochastic=stochastic, walk=restore == "walk")
    forms = [Form(shape, dtype, i % 3, skew=i % 2) for i, dtype in enumerate(DTYPES) for shape in ((300,), (7, 13))]
    twins = Twins(forms, method, *buffers, restore=restore)
    step_law(twins, held=held)
    for before, after in zip(twins.start.state, twins.models[1].state, strict=True):
        assert not any(bool(same(a, b).all()) for a, b in zip(before, after, strict=True))


def test_the_law_notices_buffers_that_share_noise(made: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaguar.triton_kernels import rng

    method = method_of(DENSE["rademacher"], Made(2))
    twins = Twins([Form((300,), torch.bfloat16)], method, "bf16", "bf16")
    monkeypatch.setattr(rng, "ROUND_STATE_1", rng.ROUND_STATE)
    with pytest.raises(AssertionError, match=r"update: .* elements differ"):
        step_law(twins)


@pytest.mark.parametrize("kind", ["fraction", "block", "rademacher", "gaussian", "walk"])
def test_probes_go_to_any_point(kind: str) -> None:
    forms = forms_of("matrix", 0)
    if kind in DIRECTIONS:
        twins = coordinate_twins(forms, DIRECTIONS[kind])
    elif kind == "walk":
        twins = dense_twins(forms, "rademacher", restore="walk")
    else:
        twins = dense_twins(forms, kind)
    probes = [twins.probes(k)[0] for k in range(2)]
    for scale in (1.0, 0.5, -3.0, 0.7, 0.0, -1.0):
        scale = float(np.float32(scale))
        for probe in probes:
            probe.to(scale)
        twins.check(f"to {scale}")
    for probe in probes:
        probe.abort()
    twins.check("abort")
    assert kind == "walk" or not twins.moved()


ACTIVE = [True, False, False, True, False, True]


@contextmanager
def reached() -> Iterator[list[np.ndarray]]:
    """The addresses that kernels read or write meanwhile, as they come."""
    found: list[np.ndarray] = []
    real = {name: getattr(InterpreterBuilder, name) for name in ("create_masked_load", "create_masked_store")}

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        found.append(pointers.data[mask.data])
        return real["create_masked_load"](self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        found.append(pointers.data[mask.data])
        return real["create_masked_store"](self, pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", load)
        patch.setattr(InterpreterBuilder, "create_masked_store", store)
        yield found


def addresses(twins: Twins, wanted: bool) -> list[tuple[int, int]]:
    """Where the Triton copy's tensors are that take part, or do not."""
    model, spans = twins.models[1], []
    for slot, own, active in zip(model.slots, model.state, ACTIVE, strict=True):
        if active is wanted:
            spans += [(t.data_ptr(), t.data_ptr() + t.numel() * t.itemsize) for t in (slot.tensor, *own)]
    return spans


def masked(restore: str, n: int = 1, momentum: str = "own") -> Twins:
    # The second one is longer than a program. All are of different kinds: the reference moves those of a kind together.
    shapes = [(300,), (8192 + 40,), (7, 13), (500,), (40,), (9,)]
    forms = [Form(shape, DTYPES[i % 2], i % 3) for i, shape in enumerate(shapes)]
    return dense_twins(forms, "rademacher", restore=restore, n=n, momentum=momentum, active=ACTIVE)


@restores
@pytest.mark.parametrize(("n", "held", "momentum"), [(1, True, "own"), (2, True, "none"), (2, False, "fp32")])
def test_tensors_that_take_no_part(restore: str, n: int, held: bool, momentum: str) -> None:
    """They are neither read nor written, and not counted either."""
    twins = masked(restore, n, momentum)
    inputs = twins.inputs(1)
    assert [steps.launches.n_perturbed(inputs) for steps in twins.steps] == [300 + 500 + 9] * 2
    with reached() as touched:
        step_law(twins, held=held)
    assert [lost.name for lost in twins.steps[1].launches.lost(inputs)] == ["p00", "p03", "p05"]
    seen = np.concatenate([np.ravel(a) for a in touched]).astype(np.uint64)
    for begin, end in addresses(twins, False):
        assert not ((seen >= begin) & (seen < end)).any()
    for begin, end in addresses(twins, True):
        assert ((seen >= begin) & (seen < end)).any()
    model, start = twins.models[1], twins.start
    for i, active in enumerate(ACTIVE):
        pairs = [(model.slots[i].tensor, start.slots[i].tensor), *zip(model.state[i], start.state[i], strict=True)]
        for a, b in pairs:
            assert bool(same(a, b).all()) is not active


@restores
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_moves_nothing_reads_no_tensor_that_takes_no_part(restore: str, bad: float) -> None:
    twins = masked(restore)
    probes = [twins.probes(k)[0] for k in range(2)]
    for probe in probes:
        probe.to(1.0), probe.to(-1.0)
    with reached() as touched:
        twins.update_(1, [bad], probes[1])
    probes[0].abort()
    twins.check("back")
    seen = np.concatenate([np.ravel(a) for a in touched]).astype(np.uint64)
    for begin, end in addresses(twins, False):
        assert not ((seen >= begin) & (seen < end)).any()


def test_element_numbers_past_2_to_the_31_of_tensors_that_take_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of such a tensor is less than nothing by more than 32 bits can say."""
    start = 2**31 + 8192
    forms = [Form((300,), dtype, i, start, (start + 300,)) for i, dtype in enumerate(DTYPES[:2])]
    twins = dense_twins(forms, "rademacher", active=[True, False])
    edit_tables(monkeypatch, partial(as_the_end, momentum="own", dense=True))
    step_law(twins)
    assert bool(same(twins.models[1].slots[1].tensor, twins.start.slots[1].tensor).all())


def test_all_flags_set_are_no_mask() -> None:
    twins, other = (masked("copy") for _ in range(2))
    twins.active, other.active = [True] * len(ACTIVE), None
    step_law(twins), step_law(other)
    for a, b in zip(twins.models[1].buffers, other.models[1].buffers, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("kind", ["fraction", "several", "copy"])
def test_launches_of_a_step_allocate_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` does, so that none of them can fail for want of memory."""
    forms = [Form((300,), torch.float32), Form((40,), torch.bfloat16)]
    n = 3 if kind == "several" else 1
    twins = dense_twins(forms, "rademacher") if kind == "copy" else coordinate_twins(forms, DIRECTIONS["fraction"], n=n)
    steps, launches = twins.steps[1], twins.steps[1].launches
    first, known = twins.inputs(1), twins.inputs(1, rho=RHO[:n])

    def nothing(*_: Any) -> None:
        raise AssertionError("a buffer was made")

    steps.prepare(first)
    with monkeypatch.context() as patch:
        patch.setattr(Plan, "saved", nothing)
        probes = launches.probes(first)
        for probe in probes:
            probe.to(1.0), probe.to(-1.0)
            if probe is not probes[-1] or not launches.fuses_restore:
                probe.finish()
    steps.prepare(known)
    with monkeypatch.context() as patch:
        patch.setattr(Plan, "saved", nothing)
        launches.update_(replace(known, probe=probes[-1] if launches.fuses_restore else None))
    assert not launches._buffers and not getattr(launches, "_scratch", None), "memory is let go after a step"


def test_hooks_see_launches_and_decide_whether_they_run() -> None:
    twins = coordinate_twins([Form((300,), torch.float32)], DIRECTIONS["fraction"])
    order: list[str] = []

    def outer(name: str, programs: Any, constants: dict[str, Any], run: Callable[[], None]) -> None:
        order.append(f"{name} {constants['JOB']} of {programs}")
        run()

    with around(outer), counted(run=False) as seen:
        (probe,) = twins.probes(1)
        probe.to(1.0)
    assert jobs(seen) == ["perturb"] and order == [] and not twins.moved(), "the last hook did not run it"
    with counted(run=True) as seen, around(outer):
        probe.to(1.0)
    assert jobs(seen) == ["flip"] and order == ["sparse flip of 1"]
    probe.finish()
    assert seen == [] and order == ["sparse flip of 1"]


class Fifth(SGD):
    """A rule whose functions no kernel has."""

    @property
    def step(self) -> Callable[..., Tensor]:
        return three_step


class Four(Rule):
    """A rule with more state than a kernel has columns for."""

    def state(self, group: Mapping[str, Any]) -> tuple[Buffer, ...]:
        return tuple(map(Buffer, "abcd"))

    @property
    def entry(self) -> Callable[..., Any]:
        return lambda a, b, c, d, g: (a, b, c, d)


def test_what_has_no_kernel_is_named() -> None:
    method = method_of(DENSE["gaussian"], Fifth())
    assert "three_step" in str(unsupported(method, GROUPS))
    assert "state" in str(unsupported(method_of(DIRECTIONS["fraction"], SGD()), GROUPS))
    assert unsupported(method_of(DIRECTIONS["fraction"], AveragedSign()), GROUPS) is None
    assert "up to 3 state buffers" in str(unsupported(method_of(DENSE["gaussian"], Four()), GROUPS))
    with pytest.raises(RuntimeError, match="has no three_step"):
        arithmetic(Fifth())
    with pytest.raises(RuntimeError, match="Four has 4 state buffers, and kernels move 3"):
        arithmetic(Four())
    with pytest.raises(availability.Unavailable, match="three_step"):
        Twins([Form((3,), torch.float32)], method, "none")
