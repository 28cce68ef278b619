"""Newton-Schulz comes after momenta were written: what it needs is taken before, or the step has not begun."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.laws import TAU
from helpers.tensors import DTYPES, all_bits, dtype_id, state_bits, weights
from jaguar import JaguarMuon, ZOMuon, param_groups
from jaguar.backends import availability
from jaguar.backends.polar import reference
from jaguar.backends.polar import run as polar_run
from jaguar.backends.polar.schedule import Task, batches, orthogonalise, take
from jaguar.method.schemes import SCHEMES

METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "jaguar": (JaguarMuon, {"coordinates": 0.2, "lr": 1e-2}),
    "zo-muon": (ZOMuon, {"lr": 1e-2, "restore": "copy", "momentum": 0.5}),
    "without momentum": (ZOMuon, {"lr": 1e-2, "restore": "copy"}),
}
CASES: list[Any] = [(method, "reference") for method in METHODS]
if availability.interpreted():
    CASES += [("jaguar", "triton"), pytest.param("without momentum", "triton", marks=pytest.mark.slow)]


class Net(nn.Module):
    """Matrices on chip and in the large form, of a width that is padded, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        for i, shape in enumerate([(8, 24), (36, 45), (50,)]):
            self.register_parameter(f"p{i}", nn.Parameter(weights(torch.float32, *shape, seed=i)))

    def forward(self) -> Tensor:
        return sum((p - 0.1).square().sum() for p in self.parameters())


def made(method: str, backend: str) -> tuple[Net, Any]:
    net = Net()
    cls, options = METHODS[method]
    return net, cls(param_groups(net), tau=TAU, ns_steps=2, backend=backend, **options)


def everything(net: Net, opt: Any) -> tuple[list[bytes], list[bytes]]:
    return all_bits(list(net.parameters())), state_bits(opt, list(net.parameters()))


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Lets Newton-Schulz get no memory."""
    real = torch.empty

    def empty(*words: Any, **more: Any) -> Tensor:
        if sys._getframe(1).f_globals["__name__"] in (
            "jaguar.backends.polar.schedule",
            "jaguar.backends.polar.reference",
        ):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*words, **more)

    return lambda is_full: monkeypatch.setattr(torch, "empty", empty if is_full else real)


@pytest.mark.parametrize(("method", "backend"), CASES)
def test_nothing_is_written_where_newton_schulz_gets_no_memory(
    method: str, backend: str, full: Callable[[bool], None]
) -> None:
    (net, opt), (other, twin) = made(method, backend), made(method, backend)
    for step in range(2):
        record = opt.measure(net)
        before = everything(net, opt)
        full(True)
        for call, argument in ((opt.apply_, record), (opt.step, net)):
            with pytest.raises(torch.OutOfMemoryError):
                call(argument)
        full(False)
        if step or method == "without momentum":  # the first attempt makes the momenta, all 0
            assert everything(net, opt) == before
        assert all_bits(list(net.parameters())) == before[0] and opt.steps_done == step
        opt.step(net) if step else opt.apply_(record)
        twin.step(other)
        assert everything(net, opt) == everything(other, twin), "as if nothing had been"


class Idle:
    """Products that do nothing."""

    small = 16

    def prepare(self, *_: Any) -> None:
        pass

    small_ = prepare

    def product(self, *_: Any, **__: Any) -> None:
        pass


class Allocations(TorchDispatchMode):
    """The operations that made memory of more than a number, and the most bytes that were there at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.most = 0
        self._alive: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.numel() > 1 and t.untyped_storage().data_ptr() not in given:
                self.found.append(str(func))
                self._alive.append(weakref.ref(t))
        self._alive = [ref for ref in self._alive if ref() is not None]
        storages = [t.untyped_storage() for ref in self._alive if (t := ref()) is not None]
        self.most = max(self.most, sum({s.data_ptr(): s.nbytes() for s in storages}.values()))
        return out


SHAPES = [(8, 24), (24, 8), (36, 45), (45, 36), (36, 45), (20, 200), (200, 20)]


def matrices_of(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    found = [torch.randn(shape).to(dtype) for shape in SHAPES]
    return [*found, *(matrix.mT for matrix in found[:4])]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e5m2], ids=dtype_id)
def test_a_call_allocates_nothing_after_its_memory_was_taken(dtype: torch.dtype, name: str) -> None:
    matrices, task = matrices_of(dtype), Task(SCHEMES[name], SCHEMES[name].steps, 132)
    taken = take(Idle(), matrices, task)
    with Allocations() as seen:
        found = [members for members, _ in orthogonalise(Idle(), matrices, task, taken)]
    assert found == batches(matrices, Idle.small) and seen.found == []
    with Allocations() as seen:
        list(orthogonalise(Idle(), matrices, task))
    assert seen.found


@pytest.mark.skipif(not availability.interpreted(), reason="runs kernels on CPU tensors, in Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=dtype_id)
def test_the_memory_of_a_call_changes_no_bit(dtype: torch.dtype) -> None:
    run = polar_run.NewtonSchulz("triton", steps=2, coefficients="quintic", dtype=torch.bfloat16)
    matrices = matrices_of(dtype)[::3]

    def factors() -> Iterator[tuple[int, bytes]]:
        for where, found in run(matrices):
            yield from zip(where, [all_bits([factor])[0] for factor in found], strict=True)

    own = dict(factors())
    run.prepare(matrices)
    assert dict(factors()) == own and len(own) == len(matrices)


@pytest.mark.parametrize("shape", [(3, 60, 60), (2, 20, 300), (1, 300, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
def test_the_reference_needs_no_more_than_it_says(shape: Sequence[int], held: torch.dtype, dtype: torch.dtype) -> None:
    G = torch.randn(*shape).to(held)
    scheme = SCHEMES["quintic"]
    with Allocations() as seen:
        reference.newton_schulz(G, scheme.coefficients(2), scheme.margin, dtype)
    count = math.prod(shape)
    most = reference.most_bytes(count, held, dtype)
    assert most / 3 < seen.most + count * held.itemsize <= most
