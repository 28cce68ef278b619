"""Copies of what can change in place, and the way back: tensors, arrays, containers and records of them, generators."""

from __future__ import annotations

import random
import sys
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from itertools import chain
from operator import is_not
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_SEQUENCES = (list, deque)


class Saved(ABC):
    """One object as it was."""

    @abstractmethod
    def put_back(self) -> bool:
        """Gives the object its contents back; returns whether they had changed."""

    def reseed(self, seed: int) -> None:  # noqa: B027
        """Begins a generator anew; nothing for all else."""


def saved(value: Any, apart: Collection[int], memo: dict[int, Saved | None]) -> Saved | None:
    """Copy from which to put `value` back; None for a value that cannot change in place, or is left alone.

    Of objects, the fields of dataclasses and SimpleNamespaces are looked at. Left alone are objects of other classes
    (their contents may be handles that live once), parameters, and tensors that cannot be copied or compared.

    Args:
        apart: addresses of storages whose tensors are left alone.
        memo: what was saved before, by id; keeps shared objects shared and ends cycles.
    """
    if id(value) in memo:
        return memo[id(value)]
    kind = type(value)
    made: Saved | None = None
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter) and copies(value) and value.untyped_storage().data_ptr() not in apart:
            made = SavedTensor(value)
    elif kind in (*_MAPPINGS, *_SEQUENCES, set) or isinstance(value, tuple):
        made = memo[id(value)] = SavedContainer(value)
        made.save_items(apart, memo)
        if isinstance(value, tuple) and not made.items:
            made = None
    elif kind is SimpleNamespace or (is_dataclass(kind) and not isinstance(value, (dict, nn.Module))):
        made = memo[id(value)] = SavedContainer(vars(value)) if hasattr(value, "__dict__") else SavedSlots(value)
        made.save_items(apart, memo)
    elif isinstance(value, (torch.Generator, random.Random)):
        made = SavedGenerator(value)
    elif (numpy := sys.modules.get("numpy")) is not None:
        if kind is numpy.ndarray and not value.dtype.hasobject:
            made = SavedArray(value)
        elif kind in (numpy.random.Generator, numpy.random.RandomState):
            made = SavedGenerator(value)
    if made is not None:
        memo[id(value)] = made
    return made


class SavedTensor(Saved):
    """A tensor's values. batch_norm writes without raising the version counter, so values are compared."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._values = tensor, tensor.detach().clone()

    def put_back(self) -> bool:
        """Compares, and copies where it must."""
        now, then = self.tensor, self._values
        same_form = (now.shape, now.dtype, now.device) == (then.shape, then.dtype, then.device)
        if same_form and torch.equal(now, then):
            return False
        with torch.no_grad():
            if same_form:
                now.copy_(then)
            else:
                now.data = then.clone()
        return True


class SavedArray(Saved):
    """A numpy array's values."""

    def __init__(self, array: Any) -> None:
        self._array, self._values = array, array.copy()

    def put_back(self) -> bool:
        """Compares bytes, and copies where it must."""
        if self._array.shape == self._values.shape and self._array.tobytes() == self._values.tobytes():
            return False
        self._array.resize(self._values.shape, refcheck=False)
        self._array[...] = self._values
        return True


class SavedContainer(Saved):
    """Items of a list, dict, set or tuple, and their contents.

    Attributes:
        items: contents that can change in place.
    """

    def __init__(self, container: Any) -> None:
        self._container = container
        self._held: Any = dict(container) if isinstance(container, dict) else list(container)
        self.items: list[Saved] = []

    def save_items(self, apart: Collection[int], memo: dict[int, Saved | None]) -> None:
        """Saves what is inside."""
        held = self._held.values() if isinstance(self._held, dict) else self._held
        found = [saved(value, apart, memo) for value in held]
        self.items = [item for item in found if item is not None and item is not self]

    def put_back(self) -> bool:
        """Contents first, then what the container holds."""
        items, self.items = self.items, []  # a cycle ends here
        changed = [item.put_back() for item in items]
        self.items = items
        if not self._holds_the_same():
            if isinstance(self._held, dict) or isinstance(self._container, set):
                self._container.clear()
                self._container.update(self._held)
            else:
                self._container.clear()
                self._container.extend(self._held)
            return True
        return any(changed)

    def _holds_the_same(self) -> bool:
        now, then = self._container, self._held
        if isinstance(now, tuple):
            return True
        if len(now) != len(then):
            return False
        if isinstance(now, set):
            return all(value in now for value in then)
        if isinstance(then, dict):
            return not any(map(is_not, chain(now, now.values()), chain(then, then.values())))
        return not any(map(is_not, now, then))


class SavedSlots(SavedContainer):
    """Values of the fields of a dataclass with slots, and their contents."""

    def __init__(self, record: Any) -> None:
        self._record = record
        super().__init__(self._now())

    def put_back(self) -> bool:
        """Contents first, then the fields, frozen ones too."""
        self._container = self._now()
        changed = super().put_back()
        if changed:
            for name, value in self._held.items():
                object.__setattr__(self._record, name, value)
        return changed

    def _now(self) -> dict[str, Any]:
        record = self._record
        return {field.name: getattr(record, field.name) for field in fields(record) if hasattr(record, field.name)}


class SavedGenerator(Saved):
    """The state of a random generator of torch, Python or numpy."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self._state = self._now()

    def reseed(self, seed: int) -> None:
        """The state that a new generator of this seed has."""
        generator = self._generator
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        elif isinstance(generator, random.Random):
            generator.seed(seed)
        elif hasattr(generator, "bit_generator"):
            generator.bit_generator.state = type(generator.bit_generator)(seed).state
        else:
            generator.seed(seed & 0xFFFFFFFF)

    def put_back(self) -> bool:
        """Sets the state that was saved; it has changed, if by `reseed` alone."""
        generator = self._generator
        if isinstance(generator, torch.Generator):
            generator.set_state(self._state)
        elif isinstance(generator, random.Random):
            generator.setstate(self._state)
        elif hasattr(generator, "bit_generator"):
            generator.bit_generator.state = self._state
        else:
            generator.set_state(self._state)
        return True

    def _now(self) -> Any:
        generator = self._generator
        if isinstance(generator, torch.Generator):
            return generator.get_state()
        if isinstance(generator, random.Random):
            return generator.getstate()
        if hasattr(generator, "bit_generator"):
            return generator.bit_generator.state
        return generator.get_state(legacy=False)


def copies(tensor: Tensor) -> bool:
    """Tells whether values can be compared and written back: not of subclasses, sparse, meta or inference tensors."""
    return (
        type(tensor) in (Tensor, nn.Buffer, nn.Parameter)
        and tensor.layout == torch.strided
        and not (tensor.is_meta or tensor.is_inference() or tensor.is_quantized)
        and torch._debug_has_internal_overlap(tensor) != 1  # type: ignore[attr-defined]
    )
