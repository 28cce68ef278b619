"""The trained tensors, and what every step asks of each of them: kept, so that a step costs little per tensor."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from jaguar.optimizers.guards import check_storage
from jaguar.params import Slot

T = TypeVar("T")


class Kind(NamedTuple):
    """What the scalars of a step depend on; `double`: arithmetic is in fp64; `rate` and `gain` as in `Slot`."""

    group: int
    double: bool
    rate: float
    gain: float


class Roster:
    """One list of slots and one optimizer state.

    Attributes:
        state: the optimizer's state; another object needs another roster.
        slots: the slots.
        kinds: the kinds that occur.
        double: whether losses are fp64: one of the parameters is.
        devices: where the parameters are.
        tensors: the parameters, by slot.
    """

    def __init__(self, slots: Sequence[Slot], state: Mapping[Tensor, dict[str, Any]]) -> None:
        self.state, self.slots = state, slots
        self._kind_of = [Kind(s.group, s.tensor.dtype == torch.float64, s.rate, s.gain) for s in slots]
        self.kinds: list[Kind] = list(dict.fromkeys(self._kind_of))
        self.double = any(kind.double for kind in self.kinds)
        self.devices = {slot.tensor.device for slot in slots}
        self.tensors = [slot.tensor for slot in slots]
        self._seen: list[int] | None = None
        self._entries: list[dict[str, Any]] = []
        self._places: list[Any] = []
        self._momenta: list[Tensor | None] = []

    def per_slot(self, by_kind: Mapping[Kind, T]) -> list[T]:
        """What a kind has, for every slot."""
        return [by_kind[kind] for kind in self._kind_of]

    def momenta(self) -> list[Tensor | None]:
        """The momentum of every slot, None where there is none."""
        seen = list(map(id, self.state.values()))
        if seen != self._seen:  # entries were added, taken away or replaced
            self._seen = seen
            self._entries = [self.state.get(t, {}) for t in self.tensors]
        return [entry.get("momentum") for entry in self._entries]

    def check(self) -> bool:
        """Whether a tensor is another one, or elsewhere, than at the last call.

        Raises:
            RuntimeError: one is not where it should be.
        """
        momenta, tensors = self.momenta(), self.tensors
        # Not strides and shapes, which cost as much as the rest of the step.
        places = [*map(Tensor.data_ptr, tensors), *map(Tensor.is_contiguous, tensors), *map(Tensor.numel, tensors)]
        places += [0 if m is None else m.data_ptr() for m in momenta]
        if places == self._places and all(map(operator.is_, momenta, self._momenta)):
            return False
        check_storage(self.slots, momenta)
        self._places, self._momenta = places, momenta
        return True
