"""Launches of the dense methods: perturb, restore, and the SGD step with momentum."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial

from torch import Tensor

from jaguar import rules
from jaguar.directions import Gaussian, Rademacher
from jaguar.estimators import Probe
from jaguar.launches import Lost
from jaguar.params import Slot
from jaguar.reference.common import Common, moved
from jaguar.reference.pieces import Piece
from jaguar.reference.probes import CopyProbe, ModuleProbe, WalkProbe
from jaguar.rng import Draw, Purpose
from jaguar.rounding import compute_dtype
from jaguar.rules import Scalars
from jaguar.storage import CHUNK, flat_, ranges

# Elements of small tensors' directions that are kept from the first perturbation of a step to its update.
_KEPT = 1 << 22


@dataclass(frozen=True)
class DenseSteps(Common):
    """Dense directions with the SGD or the sign rule.

    Attributes:
        direction: Gaussian or Rademacher.
        restore: "copy": from copies of all trained tensors; "module": perturb and restore one module at a time while
            it runs; "walk": step back, which rounds differently and leaves a drift that `update_` reproduces.
        rule: "sgd" or "sign".
    """

    direction: Gaussian | Rademacher
    restore: str
    rule: str = "sgd"
    _drawn: dict[tuple[Draw, Piece], Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def takes_back(self) -> bool:
        """Whether `update_` can end the last probe of a step; modules restore themselves while the model runs."""
        return self.restore != "module"

    def n_perturbed(self, draw: Draw) -> int:
        """Number of perturbed coordinates."""
        return sum(slot.count for slot in self.slots)

    def probes(self, draws: Sequence[Draw], taus: Sequence[float]) -> list[Probe]:
        """What moves the parameters along each direction and back; `taus` has one length per slot."""
        probes: list[Probe] = []
        walk: WalkProbe | None = None
        work = [(piece, taus[piece.where[0]]) for piece in self.pieces]
        for draw in draws:
            move = partial(self.move_, draw=draw)
            if self.restore == "walk":
                walk = WalkProbe(work, move, before=walk)
                probes.append(walk)
            elif self.restore == "copy":
                probes.append(CopyProbe(work, move))
            else:
                probes.append(ModuleProbe(self.slots, taus, partial(self._move_slot_, draw=draw)))
        return probes

    def move_(self, piece: Piece, scale: float, origin: Tensor | None = None, *, draw: Draw) -> None:
        """x <- x + scale e, or origin + scale e, rounded to nearest."""
        with piece.flat_(piece.tensors) as x:
            for part in ranges(piece.count):
                x[part] = moved((x if origin is None else origin)[part], self._values(piece, draw, part), scale)

    def _move_slot_(self, slot: Slot, scale: float, *, draw: Draw) -> None:
        """`move_` of one slot, along what its piece has drawn if that is kept."""
        piece, first = self._places[slot]
        if not self._keeps(piece):
            self.move_(Piece([0], [slot]), scale, draw=draw)
            return
        e = self._values(piece, draw, slice(0, piece.count))[first : first + slot.count]
        with flat_(slot.tensor) as x:
            x.copy_(moved(x, e, scale))

    @cached_property
    def _places(self) -> dict[Slot, tuple[Piece, int]]:
        return {slot: (piece, sum(piece.counts[:k])) for piece in self.pieces for k, slot in enumerate(piece.slots)}

    def lost(self, draw: Draw, taus: Sequence[float]) -> list[Lost]:
        """The perturbations that rounding swallows, per tensor."""
        report: dict[int, int] = {}
        for piece in self.pieces:
            lost, x = [0] * len(piece.slots), piece.read(piece.tensors)
            for part in ranges(piece.count):
                plus, other = self.endpoints(x[part], self._values(piece, draw, part), taus[piece.where[0]])
                per_slot = (plus == other).split(piece.counts) if len(lost) > 1 else [plus == other]
                lost = [n + int(share.sum()) for n, share in zip(lost, per_slot, strict=True)]
            report.update(zip(piece.where, lost, strict=True))
        return [Lost(slot.name, report[i], slot.count) for i, slot in enumerate(self.slots)]

    def update_(
        self,
        draws: Sequence[Draw],
        scalars: Sequence[Scalars],
        momenta: Sequence[Tensor | None],
        held: Probe | None = None,
    ) -> None:
        """g = mean over directions of rho e, in order; heavy ball where there is momentum; then the rule."""
        if held is not None:
            held.abort()
        step = rules.sign_step if self.rule == "sign" else rules.sgd_step
        for piece, s, own in self.work(scalars, momenta):
            wide = compute_dtype(piece.dtype)
            with piece.flat_(piece.tensors) as x, piece.flat_(own) if own else nullcontext() as m:
                for part in ranges(piece.count):
                    g = rules.mean_gradient([self._values(piece, draw, part).to(wide) for draw in draws], s.rho)
                    if m is not None:
                        g = rules.heavy_ball(m[part].to(wide), g, s.beta)
                        m[part] = self.stored(g, m.dtype, draws[0], piece, part, Purpose.ROUND_STATE)
                        g = m[part].to(wide)
                    value = step(x[part].to(wide), g, s.decay, s.lr)
                    x[part] = self.stored(value, x.dtype, draws[0], piece, part, Purpose.ROUND)
        self._drawn.clear()

    def _keeps(self, piece: Piece) -> bool:
        """Whether the directions of a piece are drawn once a step."""
        return piece.count <= CHUNK

    def _values(self, piece: Piece, draw: Draw, part: slice) -> Tensor:
        if not self._keeps(piece):
            return self.direction.values_of(draw, piece.elements(part))
        if (draw, piece) not in self._drawn:
            kept = sum(e.numel() for e in self._drawn.values())
            if kept + piece.count > _KEPT or any(d.step != draw.step for d, _ in self._drawn):
                self._drawn.clear()
            self._drawn[draw, piece] = self.direction.values_of(draw, piece.elements(part))
        return self._drawn[draw, piece]
