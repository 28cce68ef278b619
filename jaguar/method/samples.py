"""Chosen coordinates: listed where they are few, part by part where a list would be larger than the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from jaguar.method import rng
from jaguar.method.params import Slot
from jaguar.method.rng import Key, Purpose

# Places (int64, no duplicates) in a vector, and their signs (fp32, +1 or -1).
Sample: TypeAlias = tuple[Tensor, Tensor]

# Coordinates, or strata per Philox call, whose int64 temporaries stay in the L2 cache.
PART = 1 << 15


class Chosen(Protocol):
    """The chosen coordinates of one vector.

    Attributes:
        count: number of chosen coordinates.
    """

    @property
    def count(self) -> int:
        """Number of chosen coordinates."""

    def parts(self) -> Iterator[Sample]:
        """The chosen places and their signs, the same parts at every call."""


class Listed:
    """A list of places."""

    def __init__(self, place: Tensor, sign: Tensor) -> None:
        self._sample, self.count = (place, sign), place.numel()

    def parts(self) -> Iterator[Sample]:
        """All of it."""
        yield self._sample


class Strata:
    """One place of each stratum of a slot, kept as what Philox gave: 8 strata of one element in a byte, else a byte
    per stratum of up to 128 elements, instead of an index and a sign.
    """

    def __init__(self, key: Key, slot: Slot, size: int) -> None:
        self._slot, self._size = slot, size
        self._first, last = strata(slot, size)
        kinds = (torch.uint8, torch.int16, torch.int32, torch.int64)
        dtype = next(kind for kind in kinds if 2 * size - 1 <= torch.iinfo(kind).max)
        self._total, self._device = last - self._first, slot.tensor.device
        self._codes = torch.empty(-(-self._total // self._packed), dtype=dtype, device=self._device)
        for part, stratum in self._numbers():
            place, sign = draw(key, stratum, slot.stream, size, Purpose.COORDINATES)
            code = place * 2 + (sign < 0)
            self._codes[part] = _packed(code) if self._packed > 1 else code
        self.count = sum(place.numel() for place, _ in self.parts())

    @property
    def _packed(self) -> int:
        """Strata per code."""
        return 8 if self._size == 1 else 1

    def parts(self) -> Iterator[Sample]:
        """The places of the next `PART` strata."""
        for part, stratum in self._numbers():
            code = self._codes[part].to(torch.int64)
            if self._packed > 1:
                code = _unpacked(code)[: stratum.numel()]
            sign = 1.0 - 2.0 * (code & 1).to(torch.float32)
            yield _local(self._slot, stratum * self._size + (code >> 1), sign)

    def _numbers(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the codes, `PART` strata at a time, with the strata's numbers."""
        for lo in range(0, self._total, PART):
            first, last = self._first + lo, self._first + min(lo + PART, self._total)
            part = slice(lo // self._packed, (lo + PART) // self._packed)
            yield part, torch.arange(first, last, dtype=torch.int64, device=self._device)


def _packed(bits: Tensor) -> Tensor:
    """8 bits in a number, the first one lowest."""
    whole = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    return (whole << torch.arange(8, device=bits.device)).sum(1)


def _unpacked(codes: Tensor) -> Tensor:
    """The bits of `_packed`."""
    return ((codes.unsqueeze(1) >> torch.arange(8, device=codes.device)) & 1).view(-1)


class Grid:
    """The crossings of chosen rows and columns of a slot that is a matrix of `width` columns."""

    def __init__(self, slot: Slot, rows: Sample, columns: Sample, width: int) -> None:
        self._slot, self._rows, self._columns, self._width = slot, rows, columns, width
        self.count = rows[0].numel() * columns[0].numel()
        if slot.count < slot.total:
            self.count = sum(place.numel() for place, _ in self.parts())

    def parts(self) -> Iterator[Sample]:
        """The crossings of the next rows, about `PART` of them."""
        column, column_sign = self._columns
        step = max(1, PART // max(1, column.numel()))
        for row, row_sign in zip(*(values.split(step) for values in self._rows), strict=True):
            index = row.unsqueeze(1) * self._width + column
            yield _local(self._slot, index.reshape(-1), (row_sign.unsqueeze(1) * column_sign).reshape(-1))


class Ones:
    """The same places, all signs +1."""

    def __init__(self, chosen: Chosen) -> None:
        self._chosen, self.count = chosen, chosen.count

    def parts(self) -> Iterator[Sample]:
        """The parts of what was chosen."""
        for place, sign in self._chosen.parts():
            yield place, torch.ones_like(sign)


def strata(slot: Slot, size: int) -> tuple[int, int]:
    """The first stratum of `size` elements that a slot has a part of, and one past the last."""
    return slot.start // size, -(-slot.end // size)


def draw(key: Key, stratum: Tensor, stream: int | Tensor, size: int | Tensor, purpose: Purpose) -> Sample:
    """The place (int64, [0, size)) and sign of each stratum: one Philox call each.

    place = mulhi64(w1:w0, size), sign = -1 where the top bit of w2 is set; w3 is reserved.
    """
    place, sign = torch.empty_like(stratum), torch.empty(stratum.shape, device=stratum.device)
    for lo in range(0, stratum.numel(), PART):
        part = slice(lo, lo + PART)
        here, bound = (v[part] if isinstance(v, Tensor) else v for v in (stream, size))
        w0, w1, w2, _ = rng.words(key, stratum[part], here, purpose)
        place[part] = rng.mulhi64(w1, w0, bound)
        sign[part] = 1.0 - 2.0 * (w2 >> 31).to(torch.float32)
    return place, sign


def listed(
    slots: Sequence[Slot], sets: Sequence[Sequence[int]], of: Tensor, index: Tensor, sign: Tensor
) -> list[Listed]:
    """Logical indices as places in the vectors that sets of slots make.

    What is held elsewhere, and the idle place of a last stratum, falls away.

    Args:
        slots: in the order of the sets.
        sets: positions in `slots`, consecutive ones.
        of: position of the slot of each index, ascending.
    """
    if len(slots) == 1:
        return [Listed(*_local(slots[0], index, sign))]
    offsets, ends = [], []
    for members in sets:
        offset = 0
        for i in members:
            offsets.append(offset)
            offset += slots[i].count
        ends.append(len(offsets))
    numbers = [(slot.start, slot.count, *_rows(slot), offset) for slot, offset in zip(slots, offsets, strict=True)]
    starts, counts, widths, pitches, shifts = torch.tensor(numbers).t().contiguous().to(index.device)
    place, live = index - starts[of], None
    if any(slot.width is not None for slot in slots):
        column = place % pitches[of]
        live = column < widths[of]
        place = place.div(pitches[of], rounding_mode="floor") * widths[of] + column
    inside = (place >= 0) & (place < counts[of])
    live = inside if live is None else live & inside
    place = place + shifts[of]
    if not bool(live.all()):
        of, place, sign = of[live], place[live], sign[live]
    cuts = torch.searchsorted(of, torch.tensor(ends, device=of.device)).tolist()
    return [Listed(place[a:b], sign[a:b]) for a, b in zip([0, *cuts], cuts, strict=False)]


def _rows(slot: Slot) -> tuple[int, int]:
    """Width and pitch of a slot's rows; of one that is a single run of elements, its length."""
    whole = max(slot.count, 1)
    return slot.width or whole, slot.pitch or whole


def _local(slot: Slot, index: Tensor, sign: Tensor) -> Sample:
    """Logical indices, ascending, as local ones."""
    index = index - slot.start if slot.start else index
    if slot.width is not None:
        width, pitch = _rows(slot)
        column = index % pitch
        live = (index >= 0) & (column < width)
        index, sign = (index.div(pitch, rounding_mode="floor") * width + column)[live], sign[live]
    if index.numel() and (int(index[0]) < 0 or int(index[-1]) >= slot.count):
        live = (index >= 0) & (index < slot.count)
        return index[live], sign[live]
    return index, sign
