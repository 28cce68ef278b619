"""JAGUAR Muon's update: coordinate launches for every tensor, then Newton-Schulz for the matrices whose turn it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from jaguar.directions import matrix_shape
from jaguar.estimators import Probe
from jaguar.launches import Launches, Lost, Moves, Orthogonaliser
from jaguar.params import Slot
from jaguar.rng import Draw
from jaguar.rules import Scalars


@dataclass
class MuonSteps:
    """The launches of JAGUAR Muon.

    Attributes:
        slots: all tensors, in canonical order; those that are not `signed` are moved here.
        stacked: streams of the slots that hold a batch of matrices instead of one.
        entries: momentum entries of all tensors, and the sign step of the others.
        orthogonalise: Newton-Schulz.
        moves: the step along its results.
        period: a matrix has its turn in one of `period` steps, in rotation.
    """

    slots: Sequence[Slot]
    stacked: frozenset[int]
    entries: Launches
    orthogonalise: Orthogonaliser
    moves: Moves
    period: int

    def __post_init__(self) -> None:
        self._matrices = [i for i, slot in enumerate(self.slots) if not slot.signed and slot.count]

    @property
    def takes_back(self) -> bool:
        """Whether `update_` can end the last probe of a step."""
        return self.entries.takes_back

    @property
    def wrote(self) -> bool:
        """Whether the last `update_` came to write anything."""
        return self.entries.wrote

    def n_perturbed(self, draw: Draw) -> int:
        """Number of coordinates that a direction moves."""
        return self.entries.n_perturbed(draw)

    def probes(self, draws: Sequence[Draw], taus: Sequence[float]) -> list[Probe]:
        """What moves the parameters along each direction and back; `taus` has one length per slot."""
        return self.entries.probes(draws, taus)

    def lost(self, draw: Draw, taus: Sequence[float]) -> list[Lost]:
        """The perturbations that rounding swallows, per tensor."""
        return self.entries.lost(draw, taus)

    def check(self, momenta: Sequence[Tensor | None]) -> None:
        """Raises RuntimeError for tensors that `update_` could not move."""
        self.entries.check(momenta)

    def due(self, step: int) -> list[int]:
        """Positions of the slots that have their turn: every `period`-th matrix in canonical order."""
        return self._matrices[step % self.period :: self.period]

    def update_(
        self,
        draws: Sequence[Draw],
        scalars: Sequence[Scalars],
        momenta: Sequence[Tensor | None],
        held: Probe | None = None,
    ) -> None:
        """Momentum entries and sign steps, then x <- (1 - lr wd) x - lr NS(m) for the matrices whose turn it is."""
        self.entries.update_(draws, scalars, momenta, held)
        slots, matrices, numbers = [], [], []
        for i in self.due(draws[0].step):
            m = momenta[i]
            assert m is not None
            for slot, matrix in self._pieces(self.slots[i], m):
                slots.append(slot)
                matrices.append(matrix)
                numbers.append(scalars[i])
        for where, factors in self.orthogonalise(matrices):
            self.moves.move_([slots[i] for i in where], factors, [numbers[i] for i in where], draws[0])
            del factors  # before the next batch is made

    def _pieces(self, slot: Slot, m: Tensor) -> Iterator[tuple[Slot, Tensor]]:
        """The matrices of a slot: its (first, rest), or each of a batch with its place in the whole."""
        if slot.stream not in self.stacked:
            yield slot, m.view(matrix_shape(m.shape))
            return
        for k, (x, matrix) in enumerate(zip(slot.tensor.unbind(), m.unbind(), strict=True)):
            yield replace(slot, tensor=x, shape=x.shape, start=slot.start + k * x.numel()), matrix
