"""Directions that are mixed from fresh noise and from what they were in the steps before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from jaguar.method import rng
from jaguar.method.directions.base import Dense
from jaguar.method.params import Slot, is_int
from jaguar.method.rng import Draw, Elements, Purpose

# Share of the steps after which the schedule is at its end.
_LATE = 0.8


@dataclass(frozen=True)
class Mixed(Dense):
    """e = m' = beta1 z + (1 - beta1) y,   z ~ N(0, alpha I),   y ~ N(m, (1 - alpha) I),   m the e of the last step.

    alpha, beta1 and beta2 are 1 for the first `warmup` steps, where e is fresh noise, go down to the given values by a
    cosine until 0.8 `total`, and stay there:

        value(t) = end + (1 - end) (1/2 + 1/2 cos(pi (t - warmup) / (0.8 total - warmup)))

    Attributes:
        alpha, beta1, beta2: at the end.
        warmup, total: in steps.

    Source: arXiv 2312.15184 (ZO-AdaMU), equations 3 to 5. Its annealing formula falls from 1 to 0.004 at the end of the
    warm-up, against its text and its figure: this is the schedule that these describe.
    """

    alpha: float = 0.5
    beta1: float = 0.9
    beta2: float = 0.01
    warmup: int = 1024
    total: int = 20000

    name: ClassVar[str] = "mixed"
    alone: ClassVar[bool] = True
    width: ClassVar[int] = 6

    def __post_init__(self) -> None:
        for name in ("alpha", "beta1", "beta2"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}={value!r}: give a number in [0, 1], where the schedule ends")
            object.__setattr__(self, name, float(value))
        if not is_int(self.total) or self.total < 1:
            raise ValueError(f"total={self.total!r}: give the number of steps of the run, an int of at least 1")
        if not is_int(self.warmup) or self.warmup < 0:
            raise ValueError(f"warmup={self.warmup!r}: give a number of steps, an int of at least 0")
        if self.warmup >= _LATE * self.total:
            raise ValueError(
                f"warmup={self.warmup} leaves nothing of the schedule, which ends at {_LATE:g} total = "
                f"{_LATE * self.total:g}: give a smaller warmup, or total= as the number of steps of the run"
            )

    def values_of(self, draw: Draw, elements: Elements) -> Tensor:
        """z / sqrt(alpha) of these elements."""
        return rng.normals_of(draw.key(Purpose.DIRECTION), elements)

    def others_of(self, draw: Draw, elements: Elements) -> Tensor:
        """(y - m) / sqrt(1 - alpha) of these elements."""
        return rng.normals_of(draw.key(Purpose.DIRECTION_1), elements)

    def numbers(self, step: int) -> tuple[float, ...]:
        """sqrt(alpha), sqrt(1 - alpha), beta1, 1 - beta1, beta2 and 1 - beta2 of a step, from 0."""
        alpha, beta1, beta2 = self._schedule(step)
        return alpha**0.5, (1.0 - alpha) ** 0.5, beta1, 1.0 - beta1, beta2, 1.0 - beta2

    def _schedule(self, step: int) -> tuple[float, float, float]:
        late = _LATE * self.total
        if step < self.warmup:
            share = 1.0
        elif step >= late:
            share = 0.0
        else:
            share = 0.5 + 0.5 * math.cos(math.pi * (step - self.warmup) / (late - self.warmup))
        alpha, beta1, beta2 = (end + (1.0 - end) * share for end in (self.alpha, self.beta1, self.beta2))
        return alpha, beta1, beta2

    def shown(self, slots: Sequence[Slot]) -> str:
        """The schedule."""
        ends = f"alpha {self.alpha:g}, beta1 {self.beta1:g}, beta2 {self.beta2:g}"
        return f"direction: mixed with momentum, to {ends} between step {self.warmup} and {_LATE * self.total:g}"
