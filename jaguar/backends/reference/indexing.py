"""Reading and writing tensors by logical (row-major) element index, whatever their strides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Elements per pass of a dense loop: its temporaries stay in the L2 cache of a core.
CHUNK = 1 << 16


def gather(tensor: Tensor, index: Tensor) -> Tensor:
    """The values at logical `index` (int64), as a copy in the tensor's dtype.

    Equivalent to: `tensor.reshape(-1)[index]`.
    """
    cells = _indexable(tensor)
    values = cells.view(-1)[index] if cells.is_contiguous() else cells[torch.unravel_index(index, cells.shape)]
    return values.view(tensor.dtype)


def scatter_(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Writes `values` (the tensor's dtype) at logical `index` (int64, no duplicates), in place.

    Equivalent to: `tensor.view(-1)[index] = values` for a contiguous tensor.
    """
    cells = _indexable(tensor)
    if cells.is_contiguous():
        cells.view(-1)[index] = _indexable(values)
    else:
        cells[torch.unravel_index(index, cells.shape)] = _indexable(values)


@contextmanager
def flat_(tensor: Tensor) -> Iterator[Tensor]:
    """All elements in logical order as one vector that may be written to.

    A view where the tensor is contiguous; else a copy that is written back at the end, unless something failed.
    """
    if tensor.is_contiguous():
        yield tensor.view(-1)
    else:
        copy = tensor.reshape(-1)
        yield copy
        tensor.copy_(copy.view(tensor.shape))


def ranges(count: int) -> Iterator[slice]:
    """Slices that cover [0, count) in pieces small enough for a dense loop's temporaries to stay in cache."""
    for first in range(0, count, CHUNK):
        yield slice(first, min(first + CHUNK, count))


def _indexable(tensor: Tensor) -> Tensor:
    """float8 has no indexing kernels; its bytes do."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
