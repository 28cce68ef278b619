"""Tensors of one optimizer on more than one backend: their launches as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from jaguar.estimators import Probe
from jaguar.launches import Launches, Lost
from jaguar.rng import Draw
from jaguar.rules import Scalars


@dataclass(frozen=True)
class Parts:
    """Launches over a list of slots, made of steps over parts of it.

    Attributes:
        parts: positions in the list of slots, and the launches for them.
    """

    parts: Sequence[tuple[Sequence[int], Launches]]

    @property
    def takes_back(self) -> bool:
        """Whether `update_` can end the last probe of a step."""
        return all(steps.takes_back for _, steps in self.parts)

    @property
    def wrote(self) -> bool:
        """Whether the last `update_` came to write anything."""
        return any(steps.wrote for _, steps in self.parts)

    def n_perturbed(self, draw: Draw) -> int:
        """Number of coordinates that a direction moves."""
        return sum(steps.n_perturbed(draw) for _, steps in self.parts)

    def probes(self, draws: Sequence[Draw], taus: Sequence[float]) -> list[Probe]:
        """What moves the parameters along each direction and back; `taus` has one length per slot."""
        made = [steps.probes(draws, [taus[i] for i in where]) for where, steps in self.parts]
        return [JointProbe([probes[k] for probes in made]) for k in range(len(draws))]  # also of no part at all

    def lost(self, draw: Draw, taus: Sequence[float]) -> list[Lost]:
        """The perturbations that rounding swallows, per tensor."""
        found: dict[int, Lost] = {}
        for where, steps in self.parts:
            found.update(zip(where, steps.lost(draw, [taus[i] for i in where]), strict=True))
        return [found[i] for i in sorted(found)]

    def check(self, momenta: Sequence[Tensor | None]) -> None:
        """Raises for tensors that `update_` could not move."""
        for where, steps in self.parts:
            steps.check([momenta[i] for i in where])

    def update_(
        self,
        draws: Sequence[Draw],
        scalars: Sequence[Scalars],
        momenta: Sequence[Tensor | None],
        held: Probe | None = None,
    ) -> None:
        """Moves momenta and parameters by one step, in place."""
        assert held is None or isinstance(held, JointProbe)
        for k, (where, steps) in enumerate(self.parts):
            own = None if held is None else held.probes[k]
            steps.update_(draws, [scalars[i] for i in where], [momenta[i] for i in where], own)


@dataclass(frozen=True)
class JointProbe:
    """The probes of one direction, one for every part."""

    probes: Sequence[Probe]

    def plus(self) -> None:
        """Parameters become x + tau e."""
        for probe in self.probes:
            probe.plus()

    def minus(self) -> None:
        """Parameters become x - tau e."""
        for probe in self.probes:
            probe.minus()

    def finish(self) -> None:
        """Parameters become x."""
        for probe in self.probes:
            probe.finish()

    def abort(self) -> None:
        """Parameters become x, also those of parts that were not reached."""
        for probe in self.probes:
            probe.abort()
