"""Common parts of the launches of the reference: the work of a step, moving a value and storing a value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from jaguar.backends.launches import State, StepInputs
from jaguar.backends.reference.pieces import Piece, pieces
from jaguar.method import rng, rules
from jaguar.method.method import Method
from jaguar.method.params import Slot
from jaguar.method.rng import STATE_PURPOSES, Draw, Purpose
from jaguar.method.rounding import compute_dtype, needs_noise, store
from jaguar.method.rule import Scalars

# Reads and writes the elements of a tensor that a part of a launch works on.
Read = Callable[[Tensor], Tensor]
Write = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Common:
    """Tensors and method of all launches of one optimizer.

    Attributes:
        method: what is computed.
        slots: the tensors, in canonical order.
    """

    method: Method
    slots: Sequence[Slot]

    @cached_property
    def pieces(self) -> list[Piece]:
        """The tensors, small ones together."""
        return pieces(self.slots, self.method.direction.units(self.slots))

    def working(self, inputs: StepInputs) -> list[tuple[int, Piece]]:
        """The pieces that take part, with their numbers."""
        active = inputs.active
        return [(k, piece) for k, piece in enumerate(self.pieces) if active is None or active[piece.where[0]]]

    def work(self, inputs: StepInputs) -> Iterator[tuple[int, Piece, Scalars, list[tuple[Tensor, ...]]]]:
        """Every piece that takes part: its number, its scalars, and the tensors of each of its state buffers."""
        for k, piece in self.working(inputs):
            buffers = list(zip(*(inputs.state[i] for i in piece.where), strict=True))
            yield k, piece, inputs.scalars[piece.kind], buffers

    @property
    def wrote(self) -> bool:
        """Tells whether the last `update_` came to write anything: torch does not say."""
        return True

    def check(self, state: State) -> None:
        """Nothing that torch would not check itself."""

    def prepare(self, inputs: StepInputs) -> None:
        """Nothing: torch allocates as it goes."""

    def forget(self) -> None:
        """Nothing: nothing is kept."""

    def endpoints(self, x: Tensor, e: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        """The two stored points whose losses are compared: x + tau e, and x - tau e or x itself."""
        return moved(x, e, tau), moved(x, e, -tau) if self.method.estimator.two_sided else x

    def enter_(
        self,
        piece: Piece,
        s: Scalars,
        state: Sequence[Tensor],
        g: Tensor,
        draw: Draw,
        where: Tensor | slice,
        read: Read,
        write: Write,
    ) -> list[Tensor]:
        """Enters g into the elements `where` of the state buffers; returns what they hold then, widened."""
        wide = g.dtype
        new = self.method.rule.entry(*(read(m).to(wide) for m in state), g, *s.entry)
        held = []
        purposes = STATE_PURPOSES[: len(state)]
        for m, value, purpose in zip(state, new if isinstance(new, tuple) else (new,), purposes, strict=True):
            kept = self.stored(value, m.dtype, draw, piece, where, purpose)
            write(m, kept)
            held.append(kept.to(wide))
        return held

    def stepped(
        self, piece: Piece, s: Scalars, x: Tensor, along: Sequence[Tensor], draw: Draw, where: Tensor | slice
    ) -> Tensor:
        """New values of the elements `where` of a parameter, which hold x."""
        value = self.method.rule.step(x.to(compute_dtype(x.dtype)), *along, s.decay, s.lr, *s.step)
        return self.stored(value, x.dtype, draw, piece, where, Purpose.ROUND)

    def stored(
        self, value: Tensor, dtype: torch.dtype, draw: Draw, piece: Piece, where: Tensor | slice, purpose: Purpose
    ) -> Tensor:
        """`value` as `dtype`, rounded with the noise of the elements `where` of the piece."""
        if not (self.method.stochastic and needs_noise(dtype)):
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
