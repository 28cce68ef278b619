"""Newton-Schulz for lists of matrices, each on the fastest backend that can take it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from jaguar.backends import availability
from jaguar.backends.availability import Unavailable
from jaguar.backends.polar import reference, schedule
from jaguar.method.schemes import SCHEMES, validate_scheme

# Newton-Schulz steps that fit into the arguments of one launch.
_MOST_STEPS = 32


class NewtonSchulz:
    """Newton-Schulz for lists of matrices, none of them empty.

    Args:
        backend: which `availability.choose` returned.
        steps, coefficients, dtype: as `jaguar.newton_schulz`.
    """

    def __init__(self, backend: str, *, steps: int | None, coefficients: str, dtype: torch.dtype) -> None:
        self._steps, self._scheme = validate_scheme(steps, coefficients, dtype), SCHEMES[coefficients]
        self._backend, self._dtype = backend, dtype
        self._known: dict[torch.device, str] = {}  # looking for a backend takes longer than a launch
        self._taken: dict[str, schedule.Taken] = {}  # by backend

    def prepare(self, matrices: Sequence[Tensor]) -> None:
        """Takes the memory of a call for these matrices.

        Torch, which the reference leaves to itself, is asked whether there is enough.
        """
        self._taken = {}
        for name, where in self._parts(matrices):
            chosen = [matrices[i] for i in where]
            if name == "reference":
                for members in schedule.batches(chosen, small=0):
                    batch = [chosen[i] for i in members]
                    count = sum(matrix.numel() for matrix in batch)
                    schedule.Space(batch[0].device, reference.most_bytes(count, batch[0].dtype, self._dtype))
            else:
                self._taken[name] = schedule.take(_products(name), chosen, self._task(chosen))

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
                found = schedule.orthogonalise(_products(name), chosen, self._task(chosen), self._taken.get(name))
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

    def _task(self, matrices: Sequence[Tensor]) -> schedule.Task:
        return schedule.Task(self._scheme, self._steps, _n_sms(matrices[0].device))

    def _by_reference(self, matrices: Sequence[Tensor]) -> Iterator[tuple[list[int], list[Tensor]]]:
        coefficients = self._scheme.coefficients(self._steps)
        for members in schedule.batches(matrices, small=0):
            chosen = torch.stack([matrices[i] for i in members])
            found = reference.newton_schulz(chosen, coefficients, self._scheme.margin, self._dtype)
            yield members, list(found.unbind())
            del chosen, found


def assigned(backend: str, matrix: Tensor, steps: int, dtype: torch.dtype) -> str:
    """The backend of one matrix: what was named, or for "auto" the fastest that can take it.

    Raises:
        Unavailable: the named one cannot.
    """
    named = None if backend == "auto" else availability.named(backend)
    if named is not None and named.products is None:
        return "reference"
    reason = _refusal(steps, dtype)
    if named is not None:
        if reason is None and matrix.device.type != named.device:
            reason = f"the matrix is on {matrix.device}"
        if reason:
            raise Unavailable(
                f"backend={backend!r} cannot orthogonalise this: {reason}; backend='auto' uses the reference for it"
            )
        return backend
    if reason or not matrix.is_cuda:
        return "reference"
    missing = availability.unavailable()
    for name in fastest():
        if name not in missing:
            return name
    _say_slow(*(missing[name] for name in sorted(fastest())))
    return "reference"


def fastest() -> list[str]:
    """The backends with products of Newton-Schulz, the faster ones first.

    Measured on Hopper (docs/gpu.md): Triton's take 0.74 to 1.03 of csrc's time.
    """
    names = [backend.name for backend in availability.BACKENDS if backend.products is not None]
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return sorted(names, key=lambda name: hopper and name == "cuda")


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
def _products(name: str) -> schedule.Products:
    make = availability.named(name).products
    assert make is not None
    return make()


@cache
def _n_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
