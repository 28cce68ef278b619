"""Types of what a backend does for an optimizer: below the backends, and below all that combines them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from jaguar.directions import Coordinates, Gaussian, Rademacher, ReleasedBlock
from jaguar.estimators import Probe
from jaguar.params import Slot
from jaguar.rng import Draw
from jaguar.rules import Scalars

Direction: TypeAlias = Coordinates | ReleasedBlock | Gaussian | Rademacher

# Matrices -> positions and polar factors, batch by batch.
Orthogonaliser: TypeAlias = Callable[[Sequence[Tensor]], Iterator[tuple[Sequence[int], Sequence[Tensor]]]]


@dataclass(frozen=True)
class Lost:
    """How many perturbed coordinates of a tensor rounding put back where they were."""

    name: str
    lost: int
    perturbed: int

    @property
    def share(self) -> float:
        """Lost coordinates / perturbed coordinates."""
        return self.lost / max(self.perturbed, 1)


class Launches(Protocol):
    """The launches of one optimizer over one list of tensors."""

    @property
    def takes_back(self) -> bool:
        """Whether `update_` can end the last probe of a step."""

    @property
    def wrote(self) -> bool:
        """Whether the last `update_` came to write anything; asked when it failed."""

    def n_perturbed(self, draw: Draw) -> int:
        """Number of coordinates that a direction moves; kernels, which store no list of them, know it nearly."""

    def probes(self, draws: Sequence[Draw], taus: Sequence[float]) -> list[Probe]:
        """What moves the parameters along each direction and back; `taus` has one length per slot."""

    def lost(self, draw: Draw, taus: Sequence[float]) -> list[Lost]:
        """The perturbations that rounding swallows, per tensor."""

    def check(self, momenta: Sequence[Tensor | None]) -> None:
        """Raises RuntimeError for tensors that `update_` could not move; called before a step where one has changed."""

    def update_(
        self,
        draws: Sequence[Draw],
        scalars: Sequence[Scalars],
        momenta: Sequence[Tensor | None],
        held: Probe | None = None,
    ) -> None:
        """Moves momenta and parameters by one step, in place; one Scalars and one momentum (or none) per slot.

        Args:
            held: a probe that was not finished; its way back comes first, and may share a launch with the step.
        """


class Moves(Protocol):
    """x <- (1 - lr wd) x - lr O."""

    def move_(self, slots: Sequence[Slot], factors: Sequence[Tensor], scalars: Sequence[Scalars], draw: Draw) -> None:
        """One step; a contiguous matrix and a Scalars per slot."""
