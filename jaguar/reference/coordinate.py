"""JAGUAR's launches: perturb, flip and restore the sampled coordinates; momentum entry and sign step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jaguar import rules
from jaguar.directions import Coordinates, ReleasedBlock, Sample
from jaguar.estimators import Lost, Probe
from jaguar.params import Slot
from jaguar.reference.common import Launches, moved
from jaguar.rng import Draw, Purpose
from jaguar.rounding import compute_dtype
from jaguar.rules import Scalars
from jaguar.storage import flat_, gather, ranges, scatter_


@dataclass(frozen=True)
class CoordinateSteps(Launches):
    """Coordinate directions with JAGUAR's momentum and the sign rule.

    Attributes:
        direction: how S is drawn.
        update: "sampled": the sign step moves S; "all": every coordinate.
    """

    direction: Coordinates | ReleasedBlock
    update: str
    takes_back = True
    _samples: dict[Draw, list[Sample]] = field(default_factory=dict, init=False, repr=False)

    def samples(self, draw: Draw) -> list[Sample]:
        """The sample of every slot; kept from `measure` to the end of `apply_`, which needs the same ones."""
        if draw not in self._samples:
            for other in [d for d in self._samples if d.step != draw.step]:
                del self._samples[other]
            self._samples[draw] = self.direction.sample(draw, self.slots)
        return self._samples[draw]

    def n_perturbed(self, draw: Draw) -> int:
        """Number of coordinates in S."""
        return sum(index.numel() for index, _ in self.samples(draw))

    def probes(self, draws: Sequence[Draw], taus: Sequence[float]) -> list[Probe]:
        """What moves the parameters along each direction and back; `taus` has one length per slot."""
        return [CoordinateProbe(list(zip(self.slots, self.samples(draw), taus, strict=True))) for draw in draws]

    def lost(self, draw: Draw, taus: Sequence[float]) -> list[Lost]:
        """The perturbations that rounding swallows, per tensor."""
        report = []
        for slot, (index, sign), tau in zip(self.slots, self.samples(draw), taus, strict=True):
            live = self._live(slot, index, sign, tau)
            report.append(Lost(slot.name, index.numel() - int(live.sum()), index.numel()))
        return report

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
        for i, (slot, s, m) in enumerate(zip(self.slots, scalars, momenta, strict=True)):
            assert m is not None
            touched = []
            wide = compute_dtype(slot.tensor.dtype)
            for k, draw in enumerate(draws):
                index, sign = self.samples(draw)[i]
                live = self._live(slot, index, sign, s.tau)
                if not bool(live.all()):
                    index, sign = index[live], sign[live]
                entry = rules.momentum_entry(gather(m, index).to(wide), sign.to(wide), s.beta, s.entry[k])
                scatter_(m, index, self.stored(entry, m.dtype, draw, slot, index, Purpose.ROUND_STATE))
                touched.append(index)
            if not slot.signed:
                continue
            if self.update == "all":
                self._step_all_(slot, s, m, draws[0])
            else:
                self._step_at_(slot, s, m, draws[0], touched[0] if len(touched) == 1 else torch.cat(touched).unique())
        self._samples.clear()

    def _live(self, slot: Slot, index: Tensor, sign: Tensor, tau: float) -> Tensor:
        """Where the perturbation is not lost; the other coordinates count as unsampled."""
        plus, other = self.endpoints(gather(slot.tensor, index), sign, tau)
        return plus != other

    def _step_at_(self, slot: Slot, s: Scalars, m: Tensor, draw: Draw, index: Tensor) -> None:
        x, wide = slot.tensor, compute_dtype(slot.tensor.dtype)
        value = rules.sign_step(gather(x, index).to(wide), gather(m, index).to(wide), s.decay, s.lr)
        scatter_(x, index, self.stored(value, x.dtype, draw, slot, index, Purpose.ROUND))

    def _step_all_(self, slot: Slot, s: Scalars, m: Tensor, draw: Draw) -> None:
        wide = compute_dtype(slot.tensor.dtype)
        with flat_(slot.tensor) as x:
            for part in ranges(slot.count):
                value = rules.sign_step(x[part].to(wide), m.view(-1)[part].to(wide), s.decay, s.lr)
                x[part] = self.stored(value, x.dtype, draw, slot, part, Purpose.ROUND)


class CoordinateProbe:
    """Saves the touched values and writes x + tau s, then x - tau s, then what was saved."""

    def __init__(self, work: list[tuple[Slot, Sample, float]]) -> None:
        self._work = work
        self._saved: list[Tensor] = []

    def plus(self) -> None:
        """x_S <- x_S + tau s."""
        for slot, (index, sign), tau in self._work:
            self._saved.append(gather(slot.tensor, index))
            scatter_(slot.tensor, index, moved(self._saved[-1], sign, tau))

    def minus(self) -> None:
        """x_S <- x_S - tau s, from the saved values."""
        for (slot, (index, sign), tau), saved in zip(self._work, self._saved, strict=True):
            scatter_(slot.tensor, index, moved(saved, sign, -tau))

    def finish(self) -> None:
        """x_S <- the saved values; tensors that a failed `plus` did not reach have none."""
        for (slot, (index, _), _), saved in zip(self._work, self._saved, strict=False):
            scatter_(slot.tensor, index, saved)
        self._saved.clear()

    abort = finish
