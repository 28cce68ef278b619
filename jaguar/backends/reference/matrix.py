"""The step along matrices that are given, O = NewtonSchulz(M): what moves the tensors of JAGUAR Muon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from jaguar.backends.launches import StepInputs
from jaguar.backends.reference.common import Common
from jaguar.backends.reference.indexing import flat_, ranges
from jaguar.backends.reference.pieces import Piece
from jaguar.method import rules
from jaguar.method.params import Slot
from jaguar.method.rng import Purpose
from jaguar.method.rounding import compute_dtype


@dataclass(frozen=True)
class MatrixLaunches(Common):
    """x <- (1 - lr wd) x - lr O for slots that `signed` leaves out."""

    slots: Sequence[Slot] = ()

    def move_(self, slots: Sequence[Slot], factors: Sequence[Tensor], inputs: StepInputs) -> None:
        """One step; a matrix per slot, contiguous, in any dtype."""
        for slot, factor in zip(slots, factors, strict=True):
            piece, wide, s = Piece([0], [slot]), compute_dtype(slot.tensor.dtype), inputs.scalars[slot.kind]
            with flat_(slot.tensor) as x:
                for part in ranges(slot.count):
                    value = rules.sgd_step(x[part].to(wide), factor.view(-1)[part].to(wide), s.decay, s.lr)
                    x[part] = self.stored(value, x.dtype, inputs.draws[0], piece, part, Purpose.ROUND)
