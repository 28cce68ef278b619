"""The stage after the launches that moves matrices along the polar factor of their momentum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jaguar.backends.launches import Moves, Orthogonaliser, StepInputs
from jaguar.method import distributed
from jaguar.method.directions import matrix_shape
from jaguar.method.orthogonal import is_scattered
from jaguar.method.params import Slot


@dataclass
class MatrixStage:
    """Newton-Schulz for the matrices whose turn it is, and the step along its results.

    A matrix whose parts are spread over processes comes together in each of them, one at a time, and each process moves
    its part.

    Attributes:
        slots: all tensors, in canonical order; those that are not `signed` are moved here.
        stacked: streams of the slots that hold a batch of matrices instead of one.
        orthogonalise: Newton-Schulz.
        moves: the step along its results.
        period: a matrix has its turn in one of `period` steps, in rotation.
    """

    slots: Sequence[Slot]
    stacked: frozenset[int]
    orthogonalise: Orthogonaliser
    moves: Moves
    period: int

    def __post_init__(self) -> None:
        self._matrices = [i for i, slot in enumerate(self.slots) if not slot.signed and slot.total]
        self._scattered = {i for i in self._matrices if is_scattered(s := self.slots[i], s.stream in self.stacked)}
        self._prepared: list[tuple[Slot, Tensor]] = []  # whose turn it is in the step that is being made

    def due(self, step: int) -> list[int]:
        """Positions of the slots that have their turn: every `period`-th matrix in canonical order."""
        return self._matrices[step % self.period :: self.period]

    def prepare(self, inputs: StepInputs) -> None:
        """Takes all memory of `update_`: it comes after momenta were written, and then none may be missing."""
        if due := self._together(inputs):
            largest = max((slot for slot, _ in due), key=lambda slot: slot.total)
            room = torch.empty(largest.shape, dtype=due[0][1].dtype, device=largest.tensor.device)
            self.orthogonalise.prepare(self._matrices_of(largest, room))
            self.orthogonalise.forget()
        self._prepared = list(self._turn(inputs))
        self.orthogonalise.prepare([matrix for _, matrix in self._prepared])

    def update_(self, inputs: StepInputs) -> None:
        """x <- (1 - lr wd) x - lr NS(m), m the momentum with this step's entries."""
        turn = self._prepared or list(self._turn(inputs))
        for where, factors in self.orthogonalise([matrix for _, matrix in turn]):
            self.moves.move_([turn[i][0] for i in where], factors, inputs)
            del factors  # before the next batch is made
        self.forget()
        for slot, m in self._together(inputs):
            self._move_together_(slot, m, inputs)

    def _move_together_(self, slot: Slot, m: Tensor, inputs: StepInputs) -> None:
        """The step of a tensor whose matrices are spread over processes."""
        matrices = self._matrices_of(slot, distributed.whole(slot.spread, m))
        factors = torch.empty(0)
        for where, found in self.orthogonalise(matrices):
            if not factors.numel():
                factors = found[0].new_empty(len(matrices), *matrices[0].shape)
            for i, factor in zip(where, found, strict=True):
                factors[i] = factor
        part = distributed.own(slot.spread, factors.view(slot.shape))
        if slot.count:
            self.moves.move_([slot], [part], inputs)

    def _together(self, inputs: StepInputs) -> list[tuple[Slot, Tensor]]:
        """The slots that have their turn and whose matrices are spread over processes, and their momenta here."""
        due = [i for i in self.due(inputs.draws[0].step) if i in self._scattered]
        return [(self.slots[i], inputs.state[i][0]) for i in due if inputs.active is None or inputs.active[i]]

    def _matrices_of(self, slot: Slot, values: Tensor) -> list[Tensor]:
        """The matrices in all values of a slot."""
        if slot.stream in self.stacked:
            return list(values.unbind())
        return [values.view(matrix_shape(values.shape))]

    def forget(self) -> None:
        """Lets go of the memory that `prepare` took."""
        self._prepared = []
        self.orthogonalise.forget()

    def _turn(self, inputs: StepInputs) -> Iterator[tuple[Slot, Tensor]]:
        """The matrices that are moved in a step, as slots, and their momenta."""
        for i in self.due(inputs.draws[0].step):
            if i not in self._scattered and self.slots[i].count and (inputs.active is None or inputs.active[i]):
                yield from self._pieces(self.slots[i], inputs.state[i][0])

    def _pieces(self, slot: Slot, m: Tensor) -> Iterator[tuple[Slot, Tensor]]:
        """The matrices of a slot: its (first, rest), or each of a batch with its place in the whole."""
        if slot.stream not in self.stacked:
            yield slot, m.view(matrix_shape(m.shape))
            return
        for k, (x, matrix) in enumerate(zip(slot.tensor.unbind(), m.unbind(), strict=True)):
            yield replace(slot, tensor=x, shape=x.shape, start=slot.start + k * x.numel()), matrix


def stacked(slots: Sequence[Slot], groups: Sequence[Mapping[str, Any]]) -> frozenset[int]:
    """Streams of the slots that hold a batch of matrices."""
    return frozenset(s.stream for s in slots if len(s.shape) == 3 and groups[s.group]["ns"] != "flatten")
