"""The step along matrices that are given, O = NewtonSchulz(M): what moves the tensors of JAGUAR Muon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from jaguar import rules
from jaguar.params import Slot
from jaguar.reference.common import Common
from jaguar.reference.pieces import Piece
from jaguar.rng import Draw, Purpose
from jaguar.rounding import compute_dtype
from jaguar.rules import Scalars
from jaguar.storage import flat_, ranges


@dataclass(frozen=True)
class MatrixSteps(Common):
    """x <- (1 - lr wd) x - lr O for slots that `signed` leaves out."""

    def move_(self, slots: Sequence[Slot], factors: Sequence[Tensor], scalars: Sequence[Scalars], draw: Draw) -> None:
        """One step; a matrix and a Scalars per slot, the matrices contiguous, in any dtype."""
        for slot, factor, s in zip(slots, factors, scalars, strict=True):
            piece, wide = Piece([0], [slot]), compute_dtype(slot.tensor.dtype)
            with flat_(slot.tensor) as x:
                for part in ranges(slot.count):
                    value = rules.sgd_step(x[part].to(wide), factor.view(-1)[part].to(wide), s.decay, s.lr)
                    x[part] = self.stored(value, x.dtype, draw, piece, part, Purpose.ROUND)
