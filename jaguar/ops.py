"""The only file that knows that backends exist: it turns a backend's name into the launches of an optimizer."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from jaguar import extension, iteration, reference
from jaguar.directions import Coordinates, Gaussian, Rademacher, ReleasedBlock
from jaguar.kept import keeping
from jaguar.launches import Direction, Launches, Moves, Orthogonaliser
from jaguar.muon import MuonSteps
from jaguar.params import Slot
from jaguar.parts import Parts
from jaguar.reference import multiplies_bf16 as multiplies_bf16
from jaguar.rng import Draw
from jaguar.rules import Scalars
from jaguar.schemes import SCHEMES, checked

NAMES = ("auto", "reference", "triton", "cuda")
# Newton-Schulz steps that fit into the arguments of one launch.
_MOST_STEPS = 32


class Unavailable(RuntimeError):
    """A backend was named that cannot run here."""


def unavailable() -> dict[str, str]:
    """Why each backend that cannot run here cannot, by name; what is not listed is available."""
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


def assign(backend: str, slots: Sequence[Slot], direction: Direction, n_directions: int) -> list[str]:
    """The backend of every slot: what was named, or for "auto" Triton on GPUs and the reference elsewhere."""
    if backend != "auto":
        return [backend] * len(slots)
    if "triton" in unavailable() or _undrawable(direction, n_directions):
        return ["reference"] * len(slots)
    names = ["triton" if slot.tensor.is_cuda and not _unfit(slot) else "reference" for slot in slots]
    # The strata of a number of coordinates run across tensors: one backend draws them all.
    across = isinstance(direction, Coordinates) and isinstance(direction.coordinates, int)
    return ["reference"] * len(slots) if across and "reference" in names else names


def require(backend: str, slots: Sequence[Slot], direction: Direction, n_directions: int) -> None:
    """Raises Unavailable where a named backend cannot do this; the message has the tensor, if any, and the reason."""
    if backend == "cuda":
        raise Unavailable(
            "backend='cuda' has Newton-Schulz only, which this optimizer does not use; 'triton' has its launches"
        )
    if backend != "triton":
        return
    reasons = [f"cannot take {slot.name}: it {_unfit(slot)}" for slot in slots if _unfit(slot)]
    if _undrawable(direction, n_directions):
        reasons.append(f"cannot draw this: {_undrawable(direction, n_directions)}")
    if reasons:
        raise Unavailable(f"backend='triton' {reasons[0]}; backend='auto' uses the reference for it")


def summary(backend: str, slots: Sequence[Slot], direction: Direction, n_directions: int) -> str:
    """What runs: the backend, or how many tensors each of them has."""
    assigned = assign(backend, slots, direction, n_directions)
    names = list(dict.fromkeys(assigned))
    if len(names) == 1:
        return names[0]
    return " and ".join(f"{name} ({assigned.count(name)} tensors)" for name in names)


def _undrawable(direction: Direction, n_directions: int) -> str | None:
    """Why kernels cannot draw something."""
    if isinstance(direction, ReleasedBlock) and n_directions > 1:
        # Their blocks overlap anywhere, so the programs of one launch would meet in the same elements.
        return "released=True with several directions has no kernel"
    return None


def _unfit(slot: Slot) -> str | None:
    """Why kernels cannot take a tensor: they see an address and a number of elements."""
    x = slot.tensor
    if x.device.type != ("cpu" if interpreted() else "cuda"):
        where = "only CPU tensors, because TRITON_INTERPRET=1 is set" if interpreted() else "only on NVIDIA GPUs"
        return f"is on {x.device}, and the kernels run {where}"
    if not x.is_contiguous():
        return f"is not contiguous (shape {tuple(x.shape)}, strides {x.stride()})"
    return None


def coordinate_steps(
    backend: str,
    slots: Sequence[Slot],
    direction: Coordinates | ReleasedBlock,
    *,
    update: str,
    stochastic: bool,
    two_sided: bool,
    n_directions: int,
) -> Launches:
    """JAGUAR's launches on `backend`, which `choose` returned."""

    def make(name: str, part: Sequence[Slot]) -> Launches:
        if name == "reference":
            return reference.CoordinateSteps(part, stochastic, two_sided, direction, update)
        from jaguar import fused

        return fused.CoordinateSteps(
            part,
            slots,
            direction,
            update=update,
            stochastic=stochastic,
            two_sided=two_sided,
            n_directions=n_directions,
        )

    require(backend, slots, direction, n_directions)
    return _joined(backend, slots, assign(backend, slots, direction, n_directions), make)


def dense_steps(
    backend: str,
    slots: Sequence[Slot],
    direction: Gaussian | Rademacher,
    *,
    restore: str,
    rule: str,
    stochastic: bool,
    two_sided: bool,
    n_directions: int,
) -> Launches:
    """The launches of dense directions on `backend`, which `choose` returned."""

    def make(name: str, part: Sequence[Slot]) -> Launches:
        if name == "reference":
            return reference.DenseSteps(part, stochastic, two_sided, direction, restore, rule)
        from jaguar import fused

        return fused.DenseSteps(
            part,
            direction,
            restore=restore,
            rule=rule,
            stochastic=stochastic,
            two_sided=two_sided,
            n_directions=n_directions,
        )

    require(backend, slots, direction, n_directions)
    return _joined(backend, slots, assign(backend, slots, direction, n_directions), make)


def muon_steps(
    backend: str,
    slots: Sequence[Slot],
    direction: Coordinates,
    *,
    stacked: frozenset[int],
    newton_schulz: Orthogonaliser,
    period: int,
    update: str,
    stochastic: bool,
    two_sided: bool,
    n_directions: int,
) -> Launches:
    """JAGUAR Muon's launches: those of `coordinate_steps`, then Newton-Schulz and the step along its results.

    Args:
        stacked: streams of the slots that hold a batch of matrices.
        newton_schulz: how, on which backend; a `NewtonSchulz`.
        period: a matrix has its turn in one of `period` steps.
    """
    entries = coordinate_steps(
        backend,
        slots,
        direction,
        update=update,
        stochastic=stochastic,
        two_sided=two_sided,
        n_directions=n_directions,
    )
    moves = _MatrixSteps(backend, stochastic, two_sided)
    return keeping(MuonSteps(slots, stacked, entries, newton_schulz, moves, period), slots)


class _MatrixSteps:
    """The step along given matrices, each on the backend that moves its tensor's other launches."""

    def __init__(self, backend: str, stochastic: bool, two_sided: bool) -> None:
        self._fused = backend == "triton" or (backend == "auto" and "triton" not in unavailable())
        self._named = backend == "triton"
        self._reference = reference.MatrixSteps((), stochastic, two_sided)
        self._kernels: Moves | None = None
        if self._fused:
            from jaguar import fused

            self._kernels = fused.MatrixSteps(stochastic)

    def move_(self, slots: Sequence[Slot], factors: Sequence[Tensor], scalars: Sequence[Scalars], draw: Draw) -> None:
        """x <- (1 - lr wd) x - lr O."""
        by_kernel = [self._named or (self._fused and slot.tensor.is_cuda and not _unfit(slot)) for slot in slots]
        for moves, wanted in ((self._kernels, True), (self._reference, False)):
            where = [i for i, kernel in enumerate(by_kernel) if kernel is wanted]
            if where and moves is not None:
                moves.move_([slots[i] for i in where], [factors[i] for i in where], [scalars[i] for i in where], draw)


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

    def __call__(self, matrices: Sequence[Tensor]) -> Iterator[tuple[Sequence[int], Sequence[Tensor]]]:
        """Positions and polar factors, batch by batch."""
        for matrix in matrices:
            if matrix.device not in self._known:
                self._known[matrix.device] = assigned(self._backend, matrix, self._steps, self._dtype)
        names = [self._known[matrix.device] for matrix in matrices]
        for name in dict.fromkeys(names):
            where = [i for i, other in enumerate(names) if other == name]
            chosen = [matrices[i] for i in where]
            if name == "reference":
                found = self._by_reference(chosen)
            else:
                task = iteration.Task(self._scheme, self._steps, _n_sms(chosen[0].device))
                found = iteration.orthogonalise(_products(name), chosen, task)
            for members, factors in found:
                yield [where[i] for i in members], factors
                del factors  # or two batches would be in memory at a time

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
    for name in ("cuda", "triton"):
        if name not in missing:
            return name
    _say_slow(missing["cuda"], missing["triton"])
    return "reference"


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
        from jaguar.extension import CudaProducts

        return CudaProducts()
    from jaguar.fused import TritonProducts

    return TritonProducts()


@cache
def _n_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _joined(
    backend: str, slots: Sequence[Slot], assigned: Sequence[str], make: Callable[[str, Sequence[Slot]], Launches]
) -> Launches:
    """One set of launches for every backend that got tensors; says so where "auto" leaves a GPU's to the reference."""
    slow = [s for s, name in zip(slots, assigned, strict=True) if name == "reference" and s.tensor.is_cuda]
    if slow and backend == "auto" and "triton" not in unavailable():
        reasons = [f"{slot.name} {_unfit(slot)}" for slot in slots if _unfit(slot)]
        warnings.warn(
            f"the reference backend moves {len(slow)} of {len(slots)} tensors, slowly: "
            + (reasons[0] if reasons else "kernels cannot draw these directions"),
            stacklevel=2,
        )
    parts = []
    for name in dict.fromkeys(assigned):
        where = [i for i, chosen in enumerate(assigned) if chosen == name]
        parts.append((where, make(name, [slots[i] for i in where])))
    return keeping(parts[0][1] if len(parts) == 1 else Parts(parts), slots)
