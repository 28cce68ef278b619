"""Base classes of directions: dense ones, and a few signed coordinates."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from jaguar.method.params import Slot
from jaguar.method.rng import Draw, Elements
from jaguar.method.samples import Chosen, Sample


@dataclass(frozen=True)
class Direction:
    """A direction e. A subclass is a frozen dataclass whose fields decide bits: `Dense` or `Sparse`."""

    # Ends a warning: coordinates whose perturbation rounding swallows ...
    fate_of_lost: ClassVar[str] = "move by chance only"
    # True if a step has one of it: it has a `length` of its own, or reads state.
    alone: ClassVar[bool] = False
    # How many numbers of its own launches read in a step.
    width: ClassVar[int] = 0

    def units(self, slots: Sequence[Slot]) -> Sequence[Hashable]:
        """The unit of each slot; slots of one unit take part in a step together, or none of them does."""
        return [None] * len(slots)

    def active(self, draw: Draw, slots: Sequence[Slot]) -> list[bool] | None:
        """The slots that take part in the step of `draw`; None: all. The others are neither read nor written."""
        return None

    def length(self, draw: Draw, slots: Sequence[Slot]) -> float:
        """Factor of its values along these slots: in tau, and in what the direction contributes to g."""
        return 1.0

    def numbers(self, step: int) -> tuple[float, ...]:
        """Its own numbers of a step, from 0."""
        return ()

    def fraction(self, total: int) -> float:
        """The probability that a coordinate of a matrix is perturbed, of `total` coordinates in the set."""
        return 1.0

    def check(self, slots: Sequence[Slot]) -> None:
        """Raises ValueError if it cannot be drawn for these slots."""

    def options(self) -> dict[str, Any]:
        """The fields as plain values."""
        raise NotImplementedError

    def shown(self, slots: Sequence[Slot]) -> str:
        """A line about it, along these tensors."""
        raise NotImplementedError


@dataclass(frozen=True)
class Dense(Direction):
    """A direction that moves every coordinate.

    Attributes:
        name: name of the distribution in checkpoints.
    """

    name: ClassVar[str]

    @property
    def drawn(self) -> Dense:
        """The direction whose values these are."""
        return self

    def values_of(self, draw: Draw, elements: Elements) -> Tensor:
        """e of these elements, in their order: fp32, on their device.

        A pure function of the draw and of each element's stream and logical index (`elements.at`), whatever is asked
        for beside it.
        """
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The distribution and the fields."""
        return {"distribution": self.name} | {f.name: getattr(self, f.name) for f in fields(self)}

    def shown(self, slots: Sequence[Slot]) -> str:
        """A line about it."""
        return f"direction: {self.name}"


@dataclass(frozen=True)
class Sparse(Direction):
    """A direction that moves a few signed coordinates; the others take no part in the entry into state.

    Attributes:
        ones: all signs are +1.
    """

    fate_of_lost: ClassVar[str] = "are not trained"

    @property
    def ones(self) -> bool:
        """Tells whether all signs are +1."""
        raise NotImplementedError

    def choose(self, draw: Draw, slots: Sequence[Slot], sets: Sequence[Sequence[int]]) -> list[Chosen]:
        """The chosen coordinates of every set of slots (positions), as places in its tensors' concatenation.

        The slots of a set are on one device. A set costs about as much as a slot: small tensors go together.
        """
        raise NotImplementedError

    def sample(self, draw: Draw, slots: Sequence[Slot]) -> list[Sample]:
        """The sample of every slot, as local indices in ascending order."""
        return [_whole(chosen) for chosen in self.choose(draw, slots, [[i] for i in range(len(slots))])]


def _whole(chosen: Chosen) -> Sample:
    """All parts in one."""
    index, sign = zip(*chosen.parts(), strict=True)
    return torch.cat(index), torch.cat(sign)
