"""Cached state buffers and places of the trained tensors, so that the host's work per step is small."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jaguar.backends.launches import State
from jaguar.method.distributed import local
from jaguar.method.method import Method
from jaguar.method.params import Kind, Slot
from jaguar.method.rule import Buffer, state_dtype
from jaguar.optimizers.guards import check_storage

_DTYPE = operator.attrgetter("dtype")


class Roster:
    """One list of slots and one optimizer state.

    Attributes:
        entries: the optimizer's state; another object needs another roster.
        slots: the slots.
        kinds: the kinds that occur.
        double: whether losses are fp64: one of the parameters is.
        devices: where the parameters are.
        tensors: the parameters, by slot.
        spread: the slots of which other processes hold parts.
        state: the buffers of every slot as `moved` saw them; () where one is not made yet.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        entries: dict[Tensor, dict[str, Any]],
        buffers: Sequence[tuple[Buffer, ...]],
        copies: Sequence[tuple[str, ...]] = (),
    ) -> None:
        self.entries, self.slots, self._buffers = entries, slots, buffers
        # (slot, name) of the state that begins as a copy of a parameter, and that launches do not see.
        self._copies = [(s, name) for s, names in zip(slots, copies, strict=False) for name in names]
        self.kinds: list[Kind] = list(dict.fromkeys(slot.kind for slot in slots))
        self.double = any(kind.double for kind in self.kinds)
        self.devices = {slot.tensor.device for slot in slots}
        self.tensors = [slot.tensor for slot in slots]
        self._owners = [slot.parameter for slot in slots]  # of the entries
        self.spread = [slot for slot in slots if slot.spread is not None]
        self._seen: list[int] | None = None
        self._complete = not any(buffers)
        # One (entry of the state, name) per buffer of every slot.
        self._wanted: list[tuple[dict[str, Any], str]] = []
        self._held: list[Tensor | None] = []
        self.state: State = [()] * len(slots)
        self._places: list[Any] = []

    def _look(self) -> None:
        seen = list(map(id, self.entries.values()))
        if seen != self._seen:  # entries were added, taken away or replaced
            self._seen, own = seen, [self.entries.get(p, {}) for p in self._owners]
            self._wanted = [(e, b.name) for e, buffers in zip(own, self._buffers, strict=True) for b in buffers]
        held = [entry.get(name) for entry, name in self._wanted]
        if len(held) == len(self._held) and all(map(operator.is_, held, self._held)):
            return
        left = iter(held)
        found = [[next(left) for _ in own] for own in self._buffers]
        there = [[m for m in own if m is not None] for own in found]
        self.state = [tuple(own) if len(own) == len(all_) else () for own, all_ in zip(there, found, strict=True)]
        self._complete = all(m is not None for m in held)
        self._held, self._places = held, []

    def moved(self) -> bool:
        """Looks at all tensors; returns whether one is another one, or elsewhere, than at the last call.

        Raises:
            RuntimeError: one is not where it should be.
        """
        self._look()
        tensors = self.tensors
        for slot in self.spread:
            if slot.count and local(slot.parameter).data_ptr() != slot.tensor.data_ptr():
                raise RuntimeError(
                    f"the part of {slot.name} that is here is not where it was when the optimizer was made: make the "
                    "optimizer after moving the model, and load models with assign=False"
                )
        # Not strides and shapes, which cost as much as the rest of the step.
        places: list[Any] = [
            *map(Tensor.data_ptr, tensors),
            *map(Tensor.is_contiguous, tensors),
            *map(Tensor.numel, tensors),
        ]
        places += map(_DTYPE, tensors)  # an address can come back with another tensor
        places += [0 if m is None else m.data_ptr() for m in self._held]
        if places == self._places:
            return False
        check_storage(self.slots, self._buffers, self.state)
        self._places = places
        return True

    @property
    def lacks_copies(self) -> bool:
        """Tells whether `make` has copies of parameters to make, which must be where a step begins."""
        return any(name not in self.entries.get(slot.parameter, {}) for slot, name in self._copies)

    def copies(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Every parameter that has a copy of this name by now, and the copy."""
        return [
            (slot.tensor, self.entries[slot.parameter][of])
            for slot, of in self._copies
            if of == name and of in self.entries.get(slot.parameter, {})
        ]

    def make(self, method: Method) -> bool:
        """Makes the buffers and copies that are missing; returns whether any was a buffer."""
        if self._copies and self.lacks_copies:
            with torch.inference_mode(False), torch.no_grad():
                for slot, name in self._copies:
                    if name not in (entry := self.entries[slot.parameter]):
                        entry[name] = slot.tensor.detach().clone(memory_format=torch.preserve_format)
        if self._complete:
            return False
        missing = [i for i, own in enumerate(self._buffers) if own and not self.state[i]]
        with torch.inference_mode(False):  # made in inference mode it could not be written to outside it
            for i in missing:
                tensor, entry = self.tensors[i], self.entries[self._owners[i]]
                for buffer in self._buffers[i]:
                    if buffer.name not in entry:
                        dtype = state_dtype(tensor.dtype, buffer, method.momentum_dtype)
                        entry[buffer.name] = torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)
        return self.moved()

    def drop(self) -> bool:
        """Drops the buffers that last for a step only; returns whether there was one."""
        dropped = False
        for owner, own in zip(self._owners, self._buffers, strict=True):
            for buffer in own:
                if not buffer.lasting and owner in self.entries:
                    self.entries[owner].pop(buffer.name, None)
                    if not self.entries[owner]:
                        del self.entries[owner]
                    dropped = True
        return dropped and self.moved()

    def left(self) -> bool:
        """Tells whether a parameter is elsewhere than at the last `moved`: after a closure, which may do anything."""
        return list(map(Tensor.data_ptr, self.tensors)) != self._places[: len(self.tensors)]


def buffers_of(method: Method, slots: Sequence[Slot], groups: Sequence[Mapping[str, Any]]) -> list[tuple[Buffer, ...]]:
    """The state that the rule keeps of every slot."""
    by_group = [method.rule.state(group) for group in groups]
    return [by_group[slot.group] for slot in slots]


def copies_of(method: Method, slots: Sequence[Slot], groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The names of the copies that the rule keeps of every slot."""
    return [method.rule.copies(slot, groups[slot.group]) for slot in slots]
