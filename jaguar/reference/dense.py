"""Launches of the dense methods: perturb, restore, and the SGD step with momentum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from jaguar import rules
from jaguar.directions import Gaussian, Rademacher
from jaguar.estimators import Lost, Probe
from jaguar.params import Slot
from jaguar.reference.common import Launches, moved
from jaguar.reference.probes import CopyProbe, ModuleProbe, WalkProbe
from jaguar.rng import Draw, Purpose
from jaguar.rounding import compute_dtype
from jaguar.rules import Scalars
from jaguar.storage import flat_, ranges


@dataclass(frozen=True)
class DenseSteps(Launches):
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
        for draw in draws:
            move = partial(self.move_, draw=draw)
            if self.restore == "walk":
                walk = WalkProbe(self.slots, taus, move, before=walk)
                probes.append(walk)
            else:
                probes.append((CopyProbe if self.restore == "copy" else ModuleProbe)(self.slots, taus, move))
        return probes

    def move_(self, slot: Slot, scale: float, *, draw: Draw) -> None:
        """x <- x + scale e, rounded to nearest, for one slot."""
        with flat_(slot.tensor) as x:
            for part in ranges(slot.count):
                x[part] = moved(x[part], self._values(slot, draw, part), scale)

    def lost(self, draw: Draw, taus: Sequence[float]) -> list[Lost]:
        """The perturbations that rounding swallows, per tensor."""
        report = []
        for slot, tau in zip(self.slots, taus, strict=True):
            lost, x = 0, slot.tensor.reshape(-1)
            for part in ranges(slot.count):
                plus, other = self.endpoints(x[part], self._values(slot, draw, part), tau)
                lost += int((plus == other).sum())
            report.append(Lost(slot.name, lost, slot.count))
        return report

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
        for slot, s, m in zip(self.slots, scalars, momenta, strict=True):
            wide = compute_dtype(slot.tensor.dtype)
            with flat_(slot.tensor) as x:
                for part in ranges(slot.count):
                    g = rules.mean_gradient([self._values(slot, draw, part).to(wide) for draw in draws], s.rho)
                    if m is not None:
                        flat = m.view(-1)
                        g = rules.heavy_ball(flat[part].to(wide), g, s.beta)
                        flat[part] = self.stored(g, m.dtype, draws[0], slot, part, Purpose.ROUND_STATE)
                        g = flat[part].to(wide)
                    value = step(x[part].to(wide), g, s.decay, s.lr)
                    x[part] = self.stored(value, x.dtype, draws[0], slot, part, Purpose.ROUND)

    def _values(self, slot: Slot, draw: Draw, part: slice) -> Tensor:
        return self.direction.values(draw, slot, slot.start + part.start, part.stop - part.start)
