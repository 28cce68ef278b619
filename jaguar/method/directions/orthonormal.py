"""Directions whose matrices have orthonormal rows or columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jaguar.method.directions.base import Dense
from jaguar.method.directions.distributions import Gaussian, Rademacher
from jaguar.method.params import Slot
from jaguar.method.rng import Draw, Elements


@dataclass(frozen=True)
class Orthonormal(Dense):
    """E = U V^T of each matrix: orthonormal rows where it is wide, columns where it is tall; e_i = +1 or -1 elsewhere.

    E is the Q of a Gaussian matrix (made in fp64, with the signs that make it uniform), rounded to fp32: the same on
    every backend of a device, and up to its last bit on another device. All of E is in memory during a step: 4 bytes
    per parameter.

    Source: arXiv 2506.04430, Algorithm 4.
    Equivalent to: `torch.linalg.qr(torch.randn(m, n)).Q.T`.
    """

    name: ClassVar[str] = "orthonormal"

    def values_of(self, draw: Draw, elements: Elements) -> Tensor:
        """Signs, for tensors that are no matrices."""
        return Rademacher().values_of(draw, elements)

    def along(self, draw: Draw, slot: Slot) -> Tensor:
        """e of a slot's local elements, in their order: fp32."""
        device = slot.tensor.device
        if not slot.matrices or not slot.total:
            return self.values_of(draw, Elements(list(slot.spans(0, slot.count)), device))
        z = Gaussian().values_of(draw, Elements([(slot.stream, 0, slot.total)], device))
        whole = orthonormal(z.view(-1, *slot.matrices)).reshape(-1)
        if slot.count == slot.total:
            return whole
        return torch.cat([whole[first : first + count] for _, first, count in slot.spans(0, slot.count)])


def orthonormal(z: Tensor) -> Tensor:
    """Matrices with orthonormal rows or columns, whichever are fewer, from a batch of Gaussian ones: fp32."""
    wide = z.shape[-2] < z.shape[-1]
    tall = (z.mT if wide else z).to(torch.float64)
    q, r = torch.linalg.qr(tall)
    q *= torch.where(torch.diagonal(r, dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)
    found: Tensor = (q.mT if wide else q).to(torch.float32)
    return found
