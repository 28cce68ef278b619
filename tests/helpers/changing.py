"""Modules that an evaluation changes."""

from __future__ import annotations

import collections
import copy
import dataclasses
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from helpers.tensors import Log, bits, weights


def plain(value: Any, depth: int = 9) -> Any:
    """Something that compares, contents and all."""
    if depth == 0:
        return "deep inside"
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.dtype, bits(value))
    if isinstance(value, nn.Module):
        return everything(value)
    if isinstance(value, types.SimpleNamespace):
        return plain(vars(value), depth)
    if isinstance(value, (Record, SlottedRecord, FrozenRecord)):
        return [plain(getattr(value, field.name), depth - 1) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        return {key: plain(v, depth - 1) for key, v in value.items()}
    if isinstance(value, (list, tuple, collections.deque)):
        return [plain(v, depth - 1) for v in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, torch.Generator):
        return bits(value.get_state())
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return plain(value.get_state())
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, set):
        return sorted(value)
    return value if isinstance(value, (int, float, str, bytes, type(None))) else "object"


def everything(model: nn.Module) -> dict[str, Any]:
    """What a model is, but for its parameters."""
    form = set(nn.Module().__dict__) - {"training", "_non_persistent_buffers_set"}
    found: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        own = {k: v for k, v in module.__dict__.items() if k not in form}
        for key, value in (own | dict(module._buffers) | dict.fromkeys(module._modules)).items():
            found[f"{prefix}.{key}"] = plain(value)
    return found


class Changing(nn.Module):
    """A linear layer whose output depends on a state that its forward changes, from the `since`-th call on."""

    def __init__(self, begin: Callable[[nn.Module], None], change: Callable[[nn.Module], Any], since: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights(torch.float32, 8))
        self._begin, self._change = begin, change
        self.log = Log()  # an object of no known kind: left alone
        self.since = since
        begin(self)

    def forward(self) -> Tensor:
        self.log.seen.append(None)
        shift = self._change(self) if len(self.log.seen) > self.since else 0.0
        return (self.weight * self.weight).sum() + float(shift)


def counted(m: Any) -> Any:
    m.calls += 1
    return m.calls


@dataclasses.dataclass
class Record:
    calls: int = 0
    seen: list[int] = dataclasses.field(default_factory=lambda: [0])
    cache: Any = None


@dataclasses.dataclass(slots=True)
class SlottedRecord:
    calls: int = 0
    seen: list[int] = dataclasses.field(default_factory=lambda: [0])
    cache: Any = None


@dataclasses.dataclass(frozen=True)
class FrozenRecord:
    counts: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(2))


def setter(**values: Any) -> Callable[[nn.Module], None]:
    def begin(m: nn.Module) -> None:
        for name, value in copy.deepcopy(values).items():
            m.register_buffer(name, value) if name in ("steps", "first_b") else setattr(m, name, value)

    return begin
