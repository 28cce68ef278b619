"""Backends: their names, what each can do here, and the reasons of those that cannot."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from jaguar.backends.polar import cuda as extension
from jaguar.backends.polar import reference
from jaguar.backends.polar import schedule as iteration
from jaguar.backends.polar.reference import multiplies_bf16 as multiplies_bf16
from jaguar.method.directions import Coordinates
from jaguar.method.method import Method
from jaguar.method.orthogonal import Orthogonal
from jaguar.method.params import Slot
from jaguar.method.schemes import SCHEMES, checked

NAMES = ("auto", "reference", "triton", "cuda")
# Newton-Schulz steps that fit into the arguments of one launch.
_MOST_STEPS = 32

Groups = Sequence[Mapping[str, Any]]


class Unavailable(RuntimeError):
    """A backend was named that cannot run here."""


def unavailable() -> dict[str, str]:
    """Reasons of the backends that cannot run here, by name; what is not listed is available."""
    missing = {}
    if reason := extension.missing():
        missing["cuda"] = reason
    if importlib.util.find_spec("triton") is None:
        missing["triton"] = "triton is not installed (pip install triton)"
    elif not interpreted() and not torch.cuda.is_available():
        missing["triton"] = (
            "there is no NVIDIA GPU (with TRITON_INTERPRET=1 in the environment, Triton's interpreter runs the "
            "kernels on CPU tensors, slowly)"
        )
    elif not interpreted() and not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        missing["triton"] = "Triton needs a C compiler to launch kernels, and there is no gcc or clang on the PATH"
    return missing


def available() -> list[str]:
    """The backends that can be named here."""
    return [name for name in NAMES[1:] if name not in unavailable()]


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels; decided when they are imported."""
    loaded = sys.modules.get("jaguar.triton_kernels.launch")
    if loaded is not None:
        return bool(loaded.INTERPRETED)
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def choose(backend: str) -> str:
    """`backend` itself: a named one runs or raises, and only "auto" chooses, tensor by tensor (`assign`).

    Raises:
        ValueError: there is no backend of this name.
        Unavailable: there is, but not here; the message has the reason and what is available.
    """
    if backend not in NAMES:
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(map(repr, NAMES))}")
    if backend in unavailable():
        raise Unavailable(
            f"backend={backend!r} is not available: {unavailable()[backend]}; available: {', '.join(available())}"
        )
    return backend


def assign(backend: str, method: Method, slots: Sequence[Slot], groups: Groups) -> list[str]:
    """The backend of every slot's launches: what was named, or Triton on GPUs and the reference elsewhere."""
    if backend in ("reference", "triton"):
        return [backend] * len(slots)
    if "triton" in unavailable() or undrawable(method, groups):
        return ["reference"] * len(slots)
    names = ["triton" if slot.tensor.is_cuda and not unfit(slot) else "reference" for slot in slots]
    # The strata of a number of coordinates run across tensors: one backend draws them all.
    across = isinstance(method.direction, Coordinates) and isinstance(method.direction.coordinates, int)
    return ["reference"] * len(slots) if across and "reference" in names else names


def require(backend: str, method: Method, slots: Sequence[Slot], groups: Groups) -> None:
    """Raises Unavailable where a named backend cannot do this; the message has the tensor, if any, and the reason."""
    rule = method.rule
    if isinstance(rule, Orthogonal):
        for slot in slots:
            if rule.is_matrix(slot, groups[slot.group]):
                assigned(backend, slot.tensor, rule.steps, rule.ns_dtype)
    elif backend == "cuda":
        raise Unavailable(
            "backend='cuda' has Newton-Schulz only, which this optimizer does not use; 'triton' has its launches"
        )
    if backend != "triton":
        return
    reasons = [f"cannot take {slot.name}: it {unfit(slot)}" for slot in slots if unfit(slot)]
    if undrawable(method, groups):
        reasons.append(f"cannot draw this: {undrawable(method, groups)}")
    if reasons:
        raise Unavailable(f"backend='triton' {reasons[0]}; backend='auto' uses the reference for it")


def summary(backend: str, method: Method, slots: Sequence[Slot], groups: Groups) -> str:
    """The backend that runs, or how many tensors each of several has."""
    names = assign(backend, method, slots, groups)
    if len(set(names)) == 1:
        return names[0]
    return " and ".join(f"{name} ({names.count(name)} tensors)" for name in dict.fromkeys(names))


def undrawable(method: Method, groups: Groups) -> str | None:
    """The reason why kernels, where there are any, cannot run a method; None: they can."""
    from jaguar.backends.triton.supported import unsupported

    return unsupported(method, groups)


def unfit(slot: Slot) -> str | None:
    """The reason why kernels cannot take a tensor, of which they see an address and a length; None: they can."""
    x = slot.tensor
    if x.device.type != ("cpu" if interpreted() else "cuda"):
        where = "only CPU tensors, because TRITON_INTERPRET=1 is set" if interpreted() else "only on NVIDIA GPUs"
        return f"is on {x.device}, and the kernels run {where}"
    if not x.is_contiguous():
        return f"is not contiguous (shape {tuple(x.shape)}, strides {x.stride()})"
    if slot.width is not None:
        return f"holds rows of {slot.width} elements of a tensor, and the kernels run over one run of elements"
    return None


def orthogonaliser(backend: str, rule: Orthogonal) -> NewtonSchulz:
    """Newton-Schulz as a rule wants it."""
    return NewtonSchulz(backend, steps=rule.steps, coefficients=rule.ns_coefficients, dtype=rule.ns_dtype)


class NewtonSchulz:
    """Newton-Schulz for lists of matrices, none of them empty.

    Args:
        backend: which `choose` returned.
        steps, coefficients, dtype: as `jaguar.newton_schulz`.
    """

    def __init__(self, backend: str, *, steps: int | None, coefficients: str, dtype: torch.dtype) -> None:
        self._steps, self._scheme = checked(steps, coefficients, dtype), SCHEMES[coefficients]
        self._backend, self._dtype = backend, dtype
        self._known: dict[torch.device, str] = {}  # looking for a backend takes longer than a launch
        self._taken: dict[str, iteration.Taken] = {}  # by backend

    def prepare(self, matrices: Sequence[Tensor]) -> None:
        """Takes the memory of a call for these matrices.

        Torch, which the reference leaves to itself, is asked whether there is enough.
        """
        self._taken = {}
        for name, where in self._parts(matrices):
            chosen = [matrices[i] for i in where]
            if name == "reference":
                for members in iteration.batches(chosen, small=0):
                    batch = [chosen[i] for i in members]
                    count = sum(matrix.numel() for matrix in batch)
                    iteration.Space(batch[0].device, reference.most_bytes(count, batch[0].dtype, self._dtype))
            else:
                self._taken[name] = iteration.take(_products(name), chosen, self._task(chosen))

    def forget(self) -> None:
        """Lets go of that memory."""
        self._taken = {}

    def __call__(self, matrices: Sequence[Tensor]) -> Iterator[tuple[Sequence[int], Sequence[Tensor]]]:
        """Positions and polar factors, batch by batch; after `prepare` a batch is overwritten by the next."""
        for name, where in self._parts(matrices):
            chosen = [matrices[i] for i in where]
            if name == "reference":
                found = self._by_reference(chosen)
            else:
                found = iteration.orthogonalise(_products(name), chosen, self._task(chosen), self._taken.get(name))
            for members, factors in found:
                yield [where[i] for i in members], factors
                del factors  # or two batches would be in memory at a time

    def _parts(self, matrices: Sequence[Tensor]) -> list[tuple[str, list[int]]]:
        """Backends, and the positions of the matrices that each one gets."""
        for matrix in matrices:
            if matrix.device not in self._known:
                self._known[matrix.device] = assigned(self._backend, matrix, self._steps, self._dtype)
        parts: dict[str, list[int]] = {}
        for i, matrix in enumerate(matrices):
            parts.setdefault(self._known[matrix.device], []).append(i)
        return list(parts.items())

    def _task(self, matrices: Sequence[Tensor]) -> iteration.Task:
        return iteration.Task(self._scheme, self._steps, _n_sms(matrices[0].device))

    def _by_reference(self, matrices: Sequence[Tensor]) -> Iterator[tuple[list[int], list[Tensor]]]:
        coefficients = self._scheme.coefficients(self._steps)
        for members in iteration.batches(matrices, small=0):
            chosen = torch.stack([matrices[i] for i in members])
            found = reference.newton_schulz(chosen, coefficients, self._scheme.margin, self._dtype)
            yield members, list(found.unbind())
            del chosen, found


def assigned(backend: str, matrix: Tensor, steps: int, dtype: torch.dtype) -> str:
    """The backend of one matrix: what was named, or for "auto" the fastest that can take it.

    Raises:
        Unavailable: the named one cannot.
    """
    if backend == "reference":
        return backend
    reason = _refusal(steps, dtype)
    if backend != "auto":
        where = "cpu" if backend == "triton" and interpreted() else "cuda"
        if reason is None and matrix.device.type != where:
            reason = f"the matrix is on {matrix.device}"
        if reason:
            raise Unavailable(
                f"backend={backend!r} cannot orthogonalise this: {reason}; backend='auto' uses the reference for it"
            )
        return backend
    if reason or not matrix.is_cuda:
        return "reference"
    missing = unavailable()
    for name in fastest():
        if name not in missing:
            return name
    _say_slow(missing["cuda"], missing["triton"])
    return "reference"


def fastest() -> tuple[str, str]:
    """The kernels of Newton-Schulz, the faster ones first.

    Measured on Hopper (docs/gpu.md): Triton's take 0.74 to 1.03 of csrc's time.
    """
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return ("triton", "cuda") if hopper else ("cuda", "triton")


def _refusal(steps: int, dtype: torch.dtype) -> str | None:
    if dtype != torch.bfloat16:
        return f"kernels iterate in 16 bits, and dtype={dtype} was asked for"
    if steps > _MOST_STEPS:
        return f"kernels take at most {_MOST_STEPS} steps, and {steps} were asked for"
    return None


@cache
def _say_slow(*reasons: str) -> None:
    """Once per process."""
    warnings.warn(
        f"Newton-Schulz runs on the reference backend, several times slower than it could: {'; '.join(reasons)}",
        stacklevel=3,
    )


@cache
def _products(name: str) -> iteration.Products:
    if name == "cuda":
        from jaguar.backends.polar.cuda import CudaProducts

        return CudaProducts()
    from jaguar.backends.polar.triton import TritonProducts

    return TritonProducts()


@cache
def _n_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
