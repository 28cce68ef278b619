"""The only file that knows that backends exist: it turns a backend's name into the launches of an optimizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from jaguar import reference
from jaguar.directions import Coordinates, Gaussian, Rademacher, ReleasedBlock
from jaguar.estimators import Lost, Probe
from jaguar.params import Slot
from jaguar.rng import Draw
from jaguar.rules import Scalars

NAMES = ("auto", "reference", "triton", "cuda")


class Unavailable(RuntimeError):
    """A backend was named that cannot run here."""


class Steps(Protocol):
    """The launches of one optimizer over one list of tensors."""

    def n_perturbed(self, draw: Draw) -> int:
        """Number of coordinates that a direction moves."""

    def probes(self, draws: Sequence[Draw], taus: Sequence[float]) -> list[Probe]:
        """What moves the parameters along each direction and back; `taus` has one length per slot."""

    def lost(self, draw: Draw, taus: Sequence[float]) -> list[Lost]:
        """The perturbations that rounding swallows, per tensor."""

    def update_(self, draws: Sequence[Draw], scalars: Sequence[Scalars], momenta: Sequence[Tensor | None]) -> None:
        """Moves momenta and parameters by one step, in place; one Scalars and one momentum (or none) per slot."""


def unavailable() -> dict[str, str]:
    """Why each backend that cannot run here cannot, by name; what is not listed is available."""
    missing = {
        "triton": "this version of jaguar has no Triton kernels yet",
        "cuda": "this version of jaguar has no CUDA extension yet",
    }
    if importlib.util.find_spec("triton") is None:
        missing["triton"] += " (and triton is not installed)"
    return missing


def available() -> list[str]:
    """The backends that can be named here."""
    return [name for name in NAMES[1:] if name not in unavailable()]


def choose(backend: str) -> str:
    """The backend that runs: a named one runs or raises, and only "auto" chooses.

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
    return "reference" if backend == "auto" else backend


def coordinate_steps(
    backend: str,
    slots: Sequence[Slot],
    direction: Coordinates | ReleasedBlock,
    *,
    update: str,
    stochastic: bool,
    two_sided: bool,
) -> Steps:
    """JAGUAR's launches on `backend`, which `choose` returned."""
    return reference.CoordinateSteps(slots, stochastic, two_sided, direction, update)


def dense_steps(
    backend: str,
    slots: Sequence[Slot],
    direction: Gaussian | Rademacher,
    *,
    restore: str,
    stochastic: bool,
    two_sided: bool,
) -> Steps:
    """The launches of dense directions on `backend`, which `choose` returned."""
    return reference.DenseSteps(slots, stochastic, two_sided, direction, restore)
