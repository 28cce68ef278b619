"""JAGUAR's launches: perturb, flip and restore the sampled coordinates; momentum entry and sign step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jaguar import rules
from jaguar.directions import Coordinates, ReleasedBlock
from jaguar.estimators import Probe
from jaguar.launches import Lost
from jaguar.reference.common import Common, moved
from jaguar.reference.pieces import Piece
from jaguar.rng import Draw, Purpose
from jaguar.rounding import compute_dtype
from jaguar.rules import Scalars
from jaguar.samples import Chosen
from jaguar.storage import flat_, gather, ranges, scatter_


@dataclass(frozen=True)
class CoordinateSteps(Common):
    """Coordinate directions with JAGUAR's momentum and the sign rule.

    Attributes:
        direction: how S is drawn.
        update: "sampled": the sign step moves S; "all": every coordinate.
    """

    direction: Coordinates | ReleasedBlock
    update: str
    takes_back = True
    _samples: dict[Draw, list[Chosen]] = field(default_factory=dict, init=False, repr=False)

    def samples(self, draw: Draw) -> list[Chosen]:
        """The sample of every piece; kept from `measure` to the end of `apply_`, which needs the same ones."""
        if draw not in self._samples:
            for other in [d for d in self._samples if d.step != draw.step]:
                del self._samples[other]
            self._samples[draw] = self.direction.choose(draw, self.slots, [p.where for p in self.pieces])
        return self._samples[draw]

    def n_perturbed(self, draw: Draw) -> int:
        """Number of coordinates in S."""
        return sum(chosen.count for chosen in self.samples(draw))

    def probes(self, draws: Sequence[Draw], taus: Sequence[float]) -> list[Probe]:
        """What moves the parameters along each direction and back; `taus` has one length per slot."""
        lengths = [taus[piece.where[0]] for piece in self.pieces]
        return [CoordinateProbe(list(zip(self.pieces, self.samples(draw), lengths, strict=True))) for draw in draws]

    def lost(self, draw: Draw, taus: Sequence[float]) -> list[Lost]:
        """The perturbations that rounding swallows, per tensor."""
        report: dict[int, tuple[int, int]] = {}
        for piece, chosen in zip(self.pieces, self.samples(draw), strict=True):
            ends = torch.tensor(piece.counts, device=piece.device).cumsum(0)
            of, lost = (torch.zeros(len(piece.slots), dtype=torch.int64, device=piece.device) for _ in range(2))
            with piece.indexable_(piece.tensors) as x:
                for place, sign in chosen.parts():
                    slot = torch.searchsorted(ends, place, right=True)
                    of += torch.bincount(slot, minlength=len(piece.slots))
                    gone = slot[~self._live(x, place, sign, taus[piece.where[0]])]
                    lost += torch.bincount(gone, minlength=len(piece.slots))
            report.update(zip(piece.where, zip(lost.tolist(), of.tolist(), strict=True), strict=True))
        return [Lost(slot.name, *report[i]) for i, slot in enumerate(self.slots)]

    def update_(
        self,
        draws: Sequence[Draw],
        scalars: Sequence[Scalars],
        momenta: Sequence[Tensor | None],
        held: Probe | None = None,
    ) -> None:
        """Entry updates of every direction in order, then one sign step; the parameters are those before the step."""
        if held is not None:
            held.finish()
        for number, (piece, s, own) in enumerate(self.work(scalars, momenta)):
            chosen = [self.samples(draw)[number] for draw in draws]
            if not any(c.count for c in chosen) and not (piece.slots[0].signed and self.update == "all"):
                continue
            with piece.indexable_(piece.tensors) as x, piece.indexable_(own) as m:
                touched = None if len(draws) == 1 else torch.zeros(piece.count, dtype=torch.bool, device=piece.device)
                for k, draw in enumerate(draws):
                    for place, sign in chosen[k].parts():
                        place = self._enter_(piece, s, x, m, k, draw, place, sign)
                        if touched is not None:
                            touched[place] = True
                        elif piece.slots[0].signed and self.update == "sampled":
                            self._step_at_(piece, s, x, m, draw, place)
                if not piece.slots[0].signed:
                    continue
                if self.update == "all":
                    self._step_all_(piece, s, x, m, draws[0])
                elif touched is not None:
                    for part in ranges(piece.count):
                        self._step_at_(piece, s, x, m, draws[0], touched[part].nonzero().squeeze(1) + part.start)
        self._samples.clear()

    def _live(self, x: Tensor, place: Tensor, sign: Tensor, tau: float) -> Tensor:
        """Where the perturbation is not lost; the other coordinates count as unsampled."""
        plus, other = self.endpoints(gather(x, place), sign, tau)
        return plus != other

    def _enter_(
        self, piece: Piece, s: Scalars, x: Tensor, m: Tensor, k: int, draw: Draw, place: Tensor, sign: Tensor
    ) -> Tensor:
        """The k-th direction's momentum entries; returns the places whose perturbation was not lost."""
        wide, live = compute_dtype(piece.dtype), self._live(x, place, sign, s.tau)
        if not bool(live.all()):
            place, sign = place[live], sign[live]
        entry = rules.momentum_entry(gather(m, place).to(wide), sign.to(wide), s.beta, s.entry[k])
        scatter_(m, place, self.stored(entry, m.dtype, draw, piece, place, Purpose.ROUND_STATE))
        return place

    def _step_at_(self, piece: Piece, s: Scalars, x: Tensor, m: Tensor, draw: Draw, place: Tensor) -> None:
        wide = compute_dtype(piece.dtype)
        value = rules.sign_step(gather(x, place).to(wide), gather(m, place).to(wide), s.decay, s.lr)
        scatter_(x, place, self.stored(value, x.dtype, draw, piece, place, Purpose.ROUND))

    def _step_all_(self, piece: Piece, s: Scalars, x: Tensor, m: Tensor, draw: Draw) -> None:
        wide = compute_dtype(piece.dtype)
        with flat_(x) as flat:
            for part in ranges(piece.count):
                value = rules.sign_step(flat[part].to(wide), m.view(-1)[part].to(wide), s.decay, s.lr)
                flat[part] = self.stored(value, flat.dtype, draw, piece, part, Purpose.ROUND)


class CoordinateProbe:
    """Saves the touched values and writes x + tau s, then x - tau s, then what was saved."""

    def __init__(self, work: list[tuple[Piece, Chosen, float]]) -> None:
        self._work = work
        self._saved: list[Tensor] = []
        self._reached: list[int] = []  # how many values of each were saved

    def plus(self) -> None:
        """x_S <- x_S + tau s."""
        for piece, chosen, tau in self._work:
            saved = torch.empty(chosen.count, dtype=piece.dtype, device=piece.device)
            self._saved.append(saved)
            self._reached.append(0)
            if chosen.count:
                with piece.indexable_(piece.tensors) as x:
                    for place, sign in chosen.parts():
                        values = gather(x, place)
                        saved[self._reached[-1] :][: place.numel()] = values
                        self._reached[-1] += place.numel()
                        scatter_(x, place, moved(values, sign, tau))

    def minus(self) -> None:
        """x_S <- x_S - tau s, from the saved values."""
        self._write_(-1.0)

    def finish(self) -> None:
        """x_S <- the saved values; pieces and parts that a failed `plus` did not reach have none."""
        self._write_(None)
        self._saved.clear()
        self._reached.clear()

    abort = finish

    def _write_(self, side: float | None) -> None:
        for (piece, chosen, tau), saved, reached in zip(self._work, self._saved, self._reached, strict=False):
            if not reached:
                continue
            with piece.indexable_(piece.tensors) as x:
                first = 0
                for place, sign in chosen.parts():
                    if first < reached:
                        values = saved[first:][: place.numel()]
                        scatter_(x, place, values if side is None else moved(values, sign, side * tau))
                    first += place.numel()
