"""What the coordinate and the dense launches of the reference share: moving a value and storing a value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from jaguar import rng, rules
from jaguar.params import Slot
from jaguar.reference.pieces import Piece, pieces
from jaguar.rng import Draw, Purpose
from jaguar.rounding import compute_dtype, needs_noise, store
from jaguar.rules import Scalars


@dataclass(frozen=True)
class Common:
    """Tensors and options that all launches of one optimizer have in common.

    Attributes:
        slots: the tensors, in canonical order.
        stochastic: round updates stochastically where storage is narrower than fp32.
        two_sided: the estimator visits x - tau e besides x + tau e.
    """

    slots: Sequence[Slot]
    stochastic: bool
    two_sided: bool

    @cached_property
    def pieces(self) -> list[Piece]:
        """The tensors, small ones together."""
        return pieces(self.slots)

    def work(
        self, scalars: Sequence[Scalars], momenta: Sequence[Tensor | None]
    ) -> Iterator[tuple[Piece, Scalars, list[Tensor]]]:
        """Every piece with its scalars and its momenta, none where there is no momentum."""
        for piece in self.pieces:
            own = [m for i in piece.where if (m := momenta[i]) is not None]
            yield piece, scalars[piece.where[0]], own

    @property
    def wrote(self) -> bool:
        """Whether the last `update_` came to write anything: torch does not say."""
        return True

    def check(self, momenta: Sequence[Tensor | None]) -> None:
        """Nothing that torch would not check itself."""

    def endpoints(self, x: Tensor, e: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        """The two stored points whose losses are compared: x + tau e, and x - tau e or x itself."""
        return moved(x, e, tau), moved(x, e, -tau) if self.two_sided else x

    def stored(
        self, value: Tensor, dtype: torch.dtype, draw: Draw, piece: Piece, where: Tensor | slice, purpose: Purpose
    ) -> Tensor:
        """`value` as `dtype`, rounded with the noise of the elements `where` of the piece."""
        if not (self.stochastic and needs_noise(dtype)):
            return store(value, dtype)
        key = draw.key(purpose)
        if isinstance(where, slice):
            noise = rng.noise16_of(key, piece.elements(where), purpose)
        else:
            noise = rng.noise16_at(key, *piece.at(where), purpose)
        return store(value, dtype, noise)


def moved(x: Tensor, e: Tensor, scale: float) -> Tensor:
    """x + scale e, rounded to nearest in x's dtype."""
    wide = compute_dtype(x.dtype)
    return store(rules.perturbed(x.to(wide), e.to(wide), scale), x.dtype)
