"""Launches of coordinate directions: move and restore the sampled coordinates, enter them into state, step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from jaguar.backends.launches import Lost, StepInputs
from jaguar.backends.reference.common import Common, moved
from jaguar.backends.reference.indexing import flat_, gather, ranges, scatter_
from jaguar.backends.reference.pieces import Piece
from jaguar.method.directions import Sparse
from jaguar.method.probe import Probe
from jaguar.method.rng import Draw
from jaguar.method.rounding import compute_dtype
from jaguar.method.rule import Scalars
from jaguar.method.samples import Chosen


@dataclass(frozen=True)
class CoordinateLaunches(Common):
    """Coordinate directions with any rule."""

    fuses_restore = True
    _samples: dict[Draw, list[Chosen]] = field(default_factory=dict, init=False, repr=False)

    def samples(self, draw: Draw) -> list[Chosen]:
        """The sample of every piece; kept from `measure` to the end of the step, which needs the same ones."""
        if draw not in self._samples:
            for other in [d for d in self._samples if d.step != draw.step]:
                del self._samples[other]
            direction = self.method.direction
            assert isinstance(direction, Sparse)
            self._samples[draw] = direction.choose(draw, self.slots, [p.where for p in self.pieces])
        return self._samples[draw]

    def n_perturbed(self, inputs: StepInputs) -> int:
        """Number of coordinates in S."""
        chosen = self.samples(inputs.draws[0])
        return sum(chosen[k].count for k, _ in self.working(inputs))

    def probes(self, inputs: StepInputs) -> list[Probe]:
        """Probes, one per direction, that move the parameters and take them back."""
        made: list[Probe] = []
        for draw in inputs.draws:
            chosen = self.samples(draw)
            work = [(piece, chosen[k], inputs.scalars[piece.kind].tau) for k, piece in self.working(inputs)]
            made.append(CoordinateProbe(work))
        return made

    def lost(self, inputs: StepInputs) -> list[Lost]:
        """The perturbations along the first direction that rounding swallows, per tensor."""
        report: dict[int, tuple[int, int]] = {}
        for k, piece in self.working(inputs):
            ends = torch.tensor(piece.counts, device=piece.device).cumsum(0)
            of, lost = (torch.zeros(len(piece.slots), dtype=torch.int64, device=piece.device) for _ in range(2))
            with piece.indexable_(piece.tensors) as x:
                for place, sign in self.samples(inputs.draws[0])[k].parts():
                    slot = torch.searchsorted(ends, place, right=True)
                    of += torch.bincount(slot, minlength=len(piece.slots))
                    gone = slot[~self._live(x, place, sign, inputs.scalars[piece.kind].tau)]
                    lost += torch.bincount(gone, minlength=len(piece.slots))
            report.update(zip(piece.where, zip(lost.tolist(), of.tolist(), strict=True), strict=True))
        return [Lost(self.slots[i].name, *report[i]) for i in sorted(report)]

    def update_(self, inputs: StepInputs) -> None:
        """Entries of every direction in order, then one step; the parameters are those before the step."""
        if inputs.probe is not None:
            inputs.probe.abort()
        every = self.method.rule.update == "all"
        for k, piece, s, buffers in self.work(inputs):
            chosen = [self.samples(draw)[k] for draw in inputs.draws]
            if not any(c.count for c in chosen) and not (piece.slots[0].signed and every):
                continue
            with piece.indexable_(piece.tensors) as x, ExitStack() as stack:
                state = [stack.enter_context(piece.indexable_(tensors)) for tensors in buffers]
                if state:
                    self._update_(piece, s, x, state, inputs.draws, chosen)
                else:
                    self._step_along_g_(piece, s, x, inputs.draws, chosen)
        self.forget()

    def forget(self) -> None:
        """The samples."""
        self._samples.clear()

    def _update_(
        self, piece: Piece, s: Scalars, x: Tensor, state: list[Tensor], draws: Sequence[Draw], chosen: list[Chosen]
    ) -> None:
        signed, every = piece.slots[0].signed, self.method.rule.update == "all"
        touched = None if len(draws) == 1 else torch.zeros(piece.count, dtype=torch.bool, device=piece.device)
        for k, draw in enumerate(draws):
            for place, sign in chosen[k].parts():
                place, along = self._enter_(piece, s, x, state, s.weights[k], draw, place, sign)
                if touched is not None:
                    touched[place] = True
                elif signed and not every:
                    self._step_at_(piece, s, x, along, draw, place)
        if signed and every:
            self._step_all_(piece, s, x, state, draws[0])
        elif signed and touched is not None:
            for part in ranges(piece.count):
                place = touched[part].nonzero().squeeze(1) + part.start
                along = [gather(m, place).to(compute_dtype(piece.dtype)) for m in state]
                self._step_at_(piece, s, x, along, draws[0], place)

    def _step_along_g_(self, piece: Piece, s: Scalars, x: Tensor, draws: Sequence[Draw], chosen: list[Chosen]) -> None:
        """The step of a rule without state: g, the mean over directions, is kept as a vector meanwhile."""
        wide = compute_dtype(piece.dtype)
        g = torch.zeros(piece.count, dtype=wide, device=piece.device)
        touched = torch.zeros(piece.count, dtype=torch.bool, device=piece.device)
        for k in range(len(draws)):
            for place, sign in chosen[k].parts():
                live = self._live(x, place, sign, s.tau)
                place, sign = place[live], sign[live]
                g[place] = g[place] + sign.to(wide) * s.weights[k]
                touched[place] = True
        if len(draws) > 1:
            g = g / g.new_full((), len(draws))
        if self.method.rule.update == "all":
            self._step_all_(piece, s, x, [g], draws[0])
        else:
            place = touched.nonzero().squeeze(1)
            self._step_at_(piece, s, x, [g[place]], draws[0], place)

    def _live(self, x: Tensor, place: Tensor, sign: Tensor, tau: float) -> Tensor:
        """Mask of the perturbations that are not lost; the other coordinates count as unsampled."""
        plus, other = self.endpoints(gather(x, place), sign, tau)
        return plus != other

    def _enter_(
        self, piece: Piece, s: Scalars, x: Tensor, state: list[Tensor], weight: float, draw: Draw, place: Tensor,
        sign: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """One direction's entries; returns the places whose perturbation was not lost, and their state."""
        wide, live = compute_dtype(piece.dtype), self._live(x, place, sign, s.tau)
        if not bool(live.all()):
            place, sign = place[live], sign[live]
        g = sign.to(wide) * weight
        read, write = partial(_read, place=place), partial(_write, place=place)
        return place, self.enter_(piece, s, state, g, draw, place, read, write)

    def _step_at_(
        self, piece: Piece, s: Scalars, x: Tensor, along: Sequence[Tensor], draw: Draw, place: Tensor
    ) -> None:
        scatter_(x, place, self.stepped(piece, s, gather(x, place), along, draw, place))

    def _step_all_(self, piece: Piece, s: Scalars, x: Tensor, along: Sequence[Tensor], draw: Draw) -> None:
        wide = compute_dtype(piece.dtype)
        with flat_(x) as flat:
            for part in ranges(piece.count):
                beside = [m.view(-1)[part].to(wide) for m in along]
                flat[part] = self.stepped(piece, s, flat[part], beside, draw, part)


def _read(m: Tensor, place: Tensor) -> Tensor:
    return gather(m, place)


def _write(m: Tensor, values: Tensor, place: Tensor) -> None:
    scatter_(m, place, values)


class CoordinateProbe:
    """Saves the touched values when it first moves them, and moves and restores from what was saved."""

    def __init__(self, work: list[tuple[Piece, Chosen, float]]) -> None:
        self._work = work
        self._saved: list[Tensor] = []
        self._reached: list[int] = []  # how many values of each were saved

    def to(self, scale: float) -> None:
        """x_S <- x_S + scale tau s."""
        if self._saved:
            self._write_(scale)
            return
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
                        scatter_(x, place, moved(values, sign, scale * tau))

    def finish(self) -> None:
        """x_S <- the saved values; pieces and parts that a failed `to` did not reach have none."""
        self._write_(None)
        self._saved.clear()
        self._reached.clear()

    abort = finish

    def _write_(self, scale: float | None) -> None:
        for (piece, chosen, tau), saved, reached in zip(self._work, self._saved, self._reached, strict=False):
            if not reached:
                continue
            with piece.indexable_(piece.tensors) as x:
                first = 0
                for place, sign in chosen.parts():
                    if first < reached:
                        values = saved[first:][: place.numel()]
                        scatter_(x, place, values if scale is None else moved(values, sign, scale * tau))
                    first += place.numel()
