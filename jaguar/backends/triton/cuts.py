"""Strata of tensors, in the numbers that kernels need; `jaguar.method.directions` defines the cut."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from jaguar.backends.triton.plan import Cut
from jaguar.method.directions import Coordinates, ReleasedBlock, matrix_shape
from jaguar.method.params import Slot
from jaguar.triton_kernels.launch import BLOCK, STRATA

# Layout, cut of every slot, and (SIZE, REST, NUMBER, LANES).
Cutting = tuple[str, list[Cut], tuple[int, int, int, int]]


def cuts_of(slots: Sequence[Slot], everything: Sequence[Slot], direction: Coordinates | ReleasedBlock) -> Cutting:
    """The layout that kernels are compiled for, and the strata of each slot."""
    if isinstance(direction, ReleasedBlock):
        return "listed", [_listed(slot) for slot in slots], (0, 0, 0, STRATA)
    if isinstance(direction.coordinates, int):
        return _count(slots, everything, direction.coordinates)
    size = direction.stratum
    if direction.layout == "block":
        return "block", [_block(slot, size) for slot in slots], (size, 0, 0, STRATA)
    return "fraction", [_fraction(slot, size) for slot in slots], (size, 0, 0, _lanes(size))


def _lanes(size: int) -> int:
    """Strata of at least `size` elements that BLOCK elements in a row can meet, wherever they begin."""
    return (int(BLOCK) - 2) // size + 2


def _fraction(slot: Slot, size: int) -> Cut:
    first = slot.start // size
    length = -(-(slot.start + slot.count) // size) - first
    at = partial(_strided, start=slot.start, size=size)
    return Cut(first, length, origin=slot.start, stream=slot.stream, at=at)


def _strided(local: Tensor, *, start: int, size: int) -> Tensor:
    """The stratum of each local index: strata of `size` elements."""
    return (local + start) // size


def _block(slot: Slot, size: int) -> Cut:
    rows, columns = matrix_shape(slot.shape)
    across = -(-columns // size) if len(slot.shape) >= 2 else 1
    return Cut(0, -(-rows // size) * across, origin=slot.start, stream=slot.stream, strata=across)


def _listed(slot: Slot) -> Cut:
    rows, columns = matrix_shape(slot.shape)
    length = max(1, rows // 10) * max(1, columns // 10) if rows and columns else 0
    return Cut(0, length, strata=length)


def _count(slots: Sequence[Slot], everything: Sequence[Slot], k: int) -> Cutting:
    begins, total = {}, 0
    for slot in everything:
        begins[slot] = total + slot.start
        total += slot.total
    whole, rest = divmod(total, k)
    cuts = []
    for slot in slots:
        at = partial(_counted, begin=begins[slot], whole=whole, rest=rest, k=k)
        if slot.count:  # where an empty tensor begins, there need not be a stratum
            first, last = (int(at(torch.tensor([i]))) for i in (0, slot.count - 1))
            cuts.append(Cut(first, last - first + 1, origin=begins[slot], at=at))
        else:
            cuts.append(Cut(0, 0))
    return "count", cuts, (whole, rest, k, _lanes(whole))


def _counted(local: Tensor, *, begin: int, whole: int, rest: int, k: int) -> Tensor:
    """The stratum of each local index, 0 <= local + begin < d: boundaries floor(j d / k) over all tensors in a row."""
    position = local + begin
    j = (position.to(torch.float64) * (k / (whole * k + rest))).to(torch.int64).clamp_(0, k - 1)
    while True:  # the estimate is off by one at most, as long as positions fit into a double
        low = (position >= (j + 1) * whole + (j + 1) * rest // k).to(torch.int64)
        high = (position < j * whole + j * rest // k).to(torch.int64)
        if not bool((low + high).any()):
            return j
        j = (j + low - high).clamp_(0, k - 1)
