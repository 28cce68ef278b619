"""Directions on a sphere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jaguar.method.directions.base import Dense
from jaguar.method.directions.distributions import Gaussian
from jaguar.method.params import Slot
from jaguar.method.rng import Draw, Elements

# Squares are summed in units of 2^-20: integers have the same sum in any order, on any device.
_UNIT = 2.0**20
_PART = 1 << 20


@dataclass(frozen=True)
class Sphere(Dense):
    """e = sqrt(d) z / ||z||, z ~ N(0, I) over all d numbers: uniform on the sphere of radius sqrt(d).

    With it rho e is the estimate of the unit sphere, (d / (2 mu)) (f(x + mu u) - f(x - mu u)) u, at mu = tau sqrt(d):
    tau is what a coordinate moves, as with other directions. ||z||^2 is summed over all tensors in units of 2^-20.

    Source: the estimator of Huang, Gao, Pei, Huang, JMLR 23 (2022), section 4.
    Equivalent to: `z * (z.numel() ** 0.5 / z.norm())`.
    """

    name: ClassVar[str] = "sphere"
    alone: ClassVar[bool] = True

    @property
    def drawn(self) -> Dense:
        """z."""
        return Gaussian()

    def values_of(self, draw: Draw, elements: Elements) -> Tensor:
        """z of these elements, of which e is `length` times as much: fp32."""
        return self.drawn.values_of(draw, elements)

    def length(self, draw: Draw, slots: Sequence[Slot]) -> float:
        """sqrt(d) / ||z||, all of z: of shards, that of the whole tensors."""
        sums: dict[torch.device, Tensor] = {}
        for slot in slots:
            device = slot.tensor.device
            for first in range(0, slot.total, _PART):
                count = min(_PART, slot.total - first)
                z = self.values_of(draw, Elements([(slot.stream, first, count)], device)).to(torch.float64)
                part = (z * z * _UNIT).round().to(torch.int64).sum()
                sums[device] = sums[device] + part if device in sums else part
        square = sum(int(part) for part in sums.values()) / _UNIT
        return math.sqrt(sum(slot.total for slot in slots) / square) if square else 1.0
