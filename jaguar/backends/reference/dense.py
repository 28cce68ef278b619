"""Launches of dense directions: move and restore all coordinates, enter g into state, step."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from jaguar.backends.launches import Lost, StepInputs
from jaguar.backends.reference.common import Common, moved
from jaguar.backends.reference.indexing import CHUNK, flat_, ranges
from jaguar.backends.reference.pieces import Piece
from jaguar.backends.reference.probes import CopyProbe, ModuleProbe, WalkProbe
from jaguar.method import rules
from jaguar.method.directions import Dense, Orthonormal
from jaguar.method.params import Slot
from jaguar.method.probe import Probe
from jaguar.method.rng import Draw
from jaguar.method.rounding import compute_dtype

# Elements of small tensors' directions that are kept from the first perturbation of a step to its update.
_KEPT = 1 << 22


@dataclass(frozen=True)
class DenseLaunches(Common):
    """Dense directions with any rule.

    Attributes:
        restore: "copy": from copies of all trained tensors; "module": perturb and restore one module at a time while
            it runs; "walk": step back, which rounds differently and leaves a drift that `update_` reproduces.
    """

    restore: str
    _drawn: dict[tuple[Draw, Piece], Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def fuses_restore(self) -> bool:
        """Tells whether `update_` can end the last probe of a step; modules restore themselves while the model runs."""
        return self.restore != "module"

    def n_perturbed(self, inputs: StepInputs) -> int:
        """Number of perturbed coordinates."""
        return sum(piece.count for _, piece in self.working(inputs))

    def probes(self, inputs: StepInputs) -> list[Probe]:
        """Probes, one per direction, that move the parameters and take them back."""
        probes: list[Probe] = []
        walk: WalkProbe | None = None
        work = [(piece, inputs.scalars[piece.kind].tau) for _, piece in self.working(inputs)]
        for draw in inputs.draws:
            move = partial(self.move_, draw=draw)
            if self.restore == "walk":
                walk = WalkProbe(work, move, before=walk)
                probes.append(walk)
            elif self.restore == "copy":
                probes.append(CopyProbe(work, move))
            else:
                slots = [slot for piece, _ in work for slot in piece.slots]
                taus = [inputs.scalars[slot.kind].tau for slot in slots]
                probes.append(ModuleProbe(slots, taus, partial(self._move_slot_, draw=draw)))
        return probes

    def move_(self, piece: Piece, scale: float, origin: Tensor | None = None, *, draw: Draw) -> None:
        """x <- x + scale e, or origin + scale e, rounded to nearest."""
        with piece.flat_(piece.tensors) as x:
            for part in ranges(piece.count):
                x[part] = moved((x if origin is None else origin)[part], self._values(piece, draw, part), scale)

    def _move_slot_(self, slot: Slot, scale: float, *, draw: Draw) -> None:
        """`move_` of one slot, along what its piece has drawn if that is kept."""
        piece, first = self._places[slot]
        if not self._keeps(piece) and not isinstance(self.method.direction, Orthonormal):
            self.move_(Piece([0], [slot]), scale, draw=draw)
            return
        e = self._values(piece, draw, slice(0, piece.count))[first : first + slot.count]
        with flat_(slot.tensor) as x:
            x.copy_(moved(x, e, scale))

    @cached_property
    def _places(self) -> dict[Slot, tuple[Piece, int]]:
        return {slot: (piece, sum(piece.counts[:k])) for piece in self.pieces for k, slot in enumerate(piece.slots)}

    def lost(self, inputs: StepInputs) -> list[Lost]:
        """The perturbations along the first direction that rounding swallows, per tensor."""
        report: dict[int, int] = {}
        for _, piece in self.working(inputs):
            lost, x = [0] * len(piece.slots), piece.read(piece.tensors)
            for part in ranges(piece.count):
                e = self._values(piece, inputs.draws[0], part)
                plus, other = self.endpoints(x[part], e, inputs.scalars[piece.kind].tau)
                gone = (plus == other) & (e != 0)
                per_slot = gone.split(piece.counts) if len(lost) > 1 else [gone]
                lost = [n + int(share.sum()) for n, share in zip(lost, per_slot, strict=True)]
            report.update(zip(piece.where, lost, strict=True))
        return [Lost(self.slots[i].name, report[i], self.slots[i].count) for i in sorted(report)]

    def update_(self, inputs: StepInputs) -> None:
        """g = mean over directions of w e, in order; its entry into state; the step."""
        if inputs.probe is not None:
            inputs.probe.abort()
        draw = inputs.draws[0]
        for _, piece, s, buffers in self.work(inputs):
            wide = compute_dtype(piece.dtype)
            with piece.flat_(piece.tensors) as x, ExitStack() as stack:
                state = [stack.enter_context(piece.flat_(tensors)) for tensors in buffers]
                for part in ranges(piece.count):
                    e = [self._values(piece, draw, part).to(wide) for draw in inputs.draws]
                    g = rules.mean_gradient(e, s.weights)
                    read, write = partial(_read, part=part), partial(_write, part=part)
                    along = self.enter_(piece, s, state, g, draw, part, read, write) if state else [g]
                    if piece.slots[0].signed:
                        x[part] = self.stepped(piece, s, x[part], along, draw, part)
        self.forget()

    def forget(self) -> None:
        """Drops what was drawn."""
        self._drawn.clear()

    def _whole(self, direction: Orthonormal, piece: Piece, draw: Draw) -> Tensor:
        """e of all of a piece, made once a step."""
        if (draw, piece) not in self._drawn:
            if any(d.step != draw.step for d, _ in self._drawn):
                self._drawn.clear()
            self._drawn[draw, piece] = torch.cat([direction.along(draw, slot) for slot in piece.slots])
        return self._drawn[draw, piece]

    def _keeps(self, piece: Piece) -> bool:
        """Tells whether the directions of a piece are drawn once a step."""
        return piece.count <= CHUNK

    def _values(self, piece: Piece, draw: Draw, part: slice) -> Tensor:
        direction = self.method.direction
        assert isinstance(direction, Dense)
        if isinstance(direction, Orthonormal):
            return self._whole(direction, piece, draw)[part]
        if not self._keeps(piece):
            return direction.values_of(draw, piece.elements(part))
        if (draw, piece) not in self._drawn:
            kept = sum(e.numel() for e in self._drawn.values())
            if kept + piece.count > _KEPT or any(d.step != draw.step for d, _ in self._drawn):
                self._drawn.clear()
            self._drawn[draw, piece] = direction.values_of(draw, piece.elements(part))
        return self._drawn[draw, piece]


def _read(m: Tensor, part: slice) -> Tensor:
    return m[part]


def _write(m: Tensor, values: Tensor, part: slice) -> None:
    m[part] = values
