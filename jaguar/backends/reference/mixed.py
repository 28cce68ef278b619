"""Launches of directions that are mixed with momentum: the direction of a step is the momentum that it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jaguar.backends.launches import Lost, State, StepInputs
from jaguar.backends.reference.dense import DenseLaunches
from jaguar.backends.reference.indexing import ranges
from jaguar.backends.reference.pieces import Piece
from jaguar.method import rules
from jaguar.method.directions import Mixed
from jaguar.method.params import Slot
from jaguar.method.probe import Probe
from jaguar.method.rng import Draw, Purpose
from jaguar.method.rounding import compute_dtype
from jaguar.method.rule import rounded, state_dtype


@dataclass(frozen=True)
class MixedLaunches(DenseLaunches):
    """x -+ tau m'; then m <- m', x <- (1 - lr wd) x - (lr rho) m' / sqrt(v + 1e-8), v = beta2 z^2 + (1 - beta2) y^2."""

    _momenta: dict[Slot, Tensor] = field(default_factory=dict, init=False, repr=False)

    def probes(self, inputs: StepInputs) -> list[Probe]:
        """The probe of the step's direction."""
        self._look(inputs.state)
        return super().probes(inputs)

    def lost(self, inputs: StepInputs) -> list[Lost]:
        """The perturbations that rounding swallows, per tensor."""
        self._look(inputs.state)
        return super().lost(inputs)

    def update_(self, inputs: StepInputs) -> None:
        """The step, and the new momentum."""
        if inputs.probe is not None:
            inputs.probe.abort()
        self._look(inputs.state)
        (draw,) = inputs.draws
        for _, piece, s, (momenta,) in self.work(inputs):
            wide = compute_dtype(piece.dtype)
            rate = rounded(s.lr * s.weights[0], piece.kind.double)
            with piece.flat_(piece.tensors) as x, ExitStack() as stack:
                m = stack.enter_context(piece.flat_(momenta))
                for part in ranges(piece.count):
                    z, y, betas = self._noises(piece, draw, part, m[part])
                    e = self._entered(piece, draw, part, m.dtype, z, y, betas)
                    v = rules.blend(z * z, y * y, *betas[2:])
                    value = self.method.rule.step(x[part].to(wide), e.to(wide), s.decay, rate, v)
                    m[part] = e
                    x[part] = self.stored(value, x.dtype, draw, piece, part, Purpose.ROUND)
        self._drawn.clear()

    def forget(self) -> None:
        """Drops what was drawn, and the momenta, which are the optimizer's."""
        super().forget()
        self._momenta.clear()

    def _look(self, state: State) -> None:
        """Keeps the momenta of the slots: zeros where there is no state yet."""
        (buffer,) = self.method.rule.state({})
        self._momenta.clear()
        for slot, own in zip(self.slots, state, strict=True):
            dtype = state_dtype(slot.tensor.dtype, buffer, self.method.momentum_dtype)
            self._momenta[slot] = own[0] if own else torch.zeros_like(slot.tensor, dtype=dtype)

    def _values(self, piece: Piece, draw: Draw, part: slice) -> Tensor:
        """m' as it is stored, widened."""
        momenta = [self._momenta[slot].reshape(-1) for slot in piece.slots]
        m = momenta[0] if len(momenta) == 1 else torch.cat(momenta)
        z, y, betas = self._noises(piece, draw, part, m[part])
        return self._entered(piece, draw, part, m.dtype, z, y, betas).to(compute_dtype(piece.dtype))

    def _noises(self, piece: Piece, draw: Draw, part: slice, m: Tensor) -> tuple[Tensor, Tensor, list[float]]:
        """z, y, and beta1, 1 - beta1, beta2, 1 - beta2."""
        direction = self.method.direction
        assert isinstance(direction, Mixed)
        fresh, spread, *betas = (rounded(n, piece.kind.double) for n in direction.numbers(draw.step))
        wide, elements = compute_dtype(piece.dtype), piece.elements(part)
        z = direction.values_of(draw, elements).to(wide) * fresh
        y = m.to(wide) + direction.others_of(draw, elements).to(wide) * spread
        return z, y, betas

    def _entered(
        self, piece: Piece, draw: Draw, part: slice, dtype: torch.dtype, z: Tensor, y: Tensor, betas: Sequence[float]
    ) -> Tensor:
        """m' in the dtype of momentum."""
        return self.stored(self.method.rule.entry(z, y, *betas[:2]), dtype, draw, piece, part, Purpose.ROUND_STATE)
