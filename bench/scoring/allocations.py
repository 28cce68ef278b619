"""Allocations of a computation: live bytes and their peak, from the operators that it calls.

Storages are followed, not tensors: views and in-place operators allocate nothing, and memory counts as long as any view
of it lives. What was there before (weights, inputs) is not counted. Works on real tensors and, without memory or time,
on fake ones, so that the shapes of a large model can be traced anywhere:

    with FakeTensorMode() as mode:
        model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad(), mode, Allocations() as trace:
        model(input_ids=torch.zeros(32, 64, dtype=torch.long))
    trace.peak

Not seen: what an operator allocates and frees inside (workspaces of attention kernels), an allocator's rounding, and on
real tensors the few bytes of `torch.tensor(...)`, which no operator makes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """While it is on, follows the storages that operators make.

    Attributes:
        live: bytes that are held now.
        peak: the most that were held at once.
        at: the operator that reached the peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.at = ""
        self._bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operator and counts the storages of its results that were not among its arguments."""
        given = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            key = storage._cdata
            if key in given and key not in self._bytes:
                continue  # a weight or an input, or a view of one
            if key not in self._bytes:
                weakref.finalize(storage, self._freed, key).atexit = False
            self.live += storage.nbytes() - self._bytes.get(key, 0)  # `out=` may have made an old one larger
            self._bytes[key] = storage.nbytes()
        if self.live > self.peak:
            self.peak, self.at = self.live, str(func)
        return out

    def _freed(self, key: int) -> None:
        self.live -= self._bytes.pop(key)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor))
