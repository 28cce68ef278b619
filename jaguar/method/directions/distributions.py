"""Dense directions by their distribution: Gaussian and Rademacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from jaguar.method import rng
from jaguar.method.directions.base import Dense
from jaguar.method.rng import Draw, Elements, Purpose


@dataclass(frozen=True)
class Gaussian(Dense):
    """e ~ N(0, I)."""

    name: ClassVar[str] = "gaussian"

    def values_of(self, draw: Draw, elements: Elements) -> Tensor:
        """e of these elements: fp32."""
        return rng.normals_of(draw.key(Purpose.DIRECTION), elements)


@dataclass(frozen=True)
class Rademacher(Dense):
    """e_i = +1 or -1 with probability 1/2 each."""

    name: ClassVar[str] = "rademacher"

    def values_of(self, draw: Draw, elements: Elements) -> Tensor:
        """e of these elements: fp32."""
        return rng.signs_of(draw.key(Purpose.DIRECTION), elements)


DENSE: dict[str, Dense] = {d.name: d for d in (Gaussian(), Rademacher())}


def dense(distribution: str) -> Dense:
    """The dense direction of that name.

    Raises:
        ValueError: there is none.
    """
    if distribution not in DENSE:
        raise ValueError(f"distribution={distribution!r}: choose {' or '.join(map(repr, DENSE))}")
    return DENSE[distribution]
