"""The trained tensors, and what every step asks of each of them: kept, so that a step costs little per tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from jaguar.optimizers.guards import check_storage
from jaguar.params import Slot

# Parameter group, and whether arithmetic is in fp64: what the scalars of a step depend on.
Kind: TypeAlias = tuple[int, bool]
T = TypeVar("T")


class Roster:
    """One list of slots and one optimizer state.

    Attributes:
        state: the optimizer's state; another object needs another roster.
        kinds: the kinds that occur.
        double: whether losses are fp64: one of the parameters is.
        devices: where the parameters are.
    """

    def __init__(self, slots: Sequence[Slot], state: Mapping[Tensor, dict[str, Any]]) -> None:
        self.state, self._slots = state, slots
        self._kind_of = [(slot.group, slot.tensor.dtype == torch.float64) for slot in slots]
        self.kinds: list[Kind] = list(dict.fromkeys(self._kind_of))
        self.double = any(double for _, double in self.kinds)
        self.devices = {slot.tensor.device for slot in slots}
        self._tensors = [slot.tensor for slot in slots]
        self._n_entries = -1
        self._entries: list[dict[str, Any]] = []
        self._addresses: list[int] = []

    def per_slot(self, by_kind: Mapping[Kind, T]) -> list[T]:
        """What a kind has, for every slot."""
        return [by_kind[kind] for kind in self._kind_of]

    def momenta(self) -> list[Tensor | None]:
        """The momentum of every slot, None where there is none."""
        if len(self.state) != self._n_entries:  # the state was filled, or emptied
            self._n_entries = len(self.state)
            self._entries = [self.state.get(t, {}) for t in self._tensors]
        return [entry.get("momentum") for entry in self._entries]

    def check(self) -> None:
        """Raises RuntimeError where a tensor is not where it should be; looks closer only at what has moved."""
        momenta = self.momenta()
        addresses = [*map(Tensor.data_ptr, self._tensors), *(m.data_ptr() for m in momenta if m is not None)]
        if addresses != self._addresses:
            check_storage(self._slots, momenta)
            self._addresses = addresses
