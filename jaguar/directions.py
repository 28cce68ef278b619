"""Directions e of a zero-order step: dense (Gaussian, Rademacher) or a few signed coordinates.

A direction is never stored: it is a pure function of the step key and the logical element index. Dense directions
give their values for a range of elements; coordinate directions give the chosen elements and their signs.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from jaguar import rng
from jaguar.params import Slot
from jaguar.rng import Draw, Key, Purpose

# Local element indices (int64, no duplicates) of a slot, and their signs (fp32, +1 or -1).
Sample: TypeAlias = tuple[Tensor, Tensor]

# Strata per Philox call: the int64 temporaries of one chunk stay in the L2 cache.
_CHUNK = 1 << 15


@dataclass(frozen=True)
class Gaussian:
    """e ~ N(0, I)."""

    name = "gaussian"

    def values(self, draw: Draw, slot: Slot, start: int, count: int) -> Tensor:
        """e of logical elements start .. start + count: fp32 (count,)."""
        return rng.normals(draw.key(Purpose.DIRECTION), slot.stream, start, count, slot.tensor.device)


@dataclass(frozen=True)
class Rademacher:
    """e_i = +1 or -1 with probability 1/2 each."""

    name = "rademacher"

    def values(self, draw: Draw, slot: Slot, start: int, count: int) -> Tensor:
        """e of logical elements start .. start + count: fp32 (count,)."""
        return rng.signs(draw.key(Purpose.DIRECTION), slot.stream, start, count, slot.tensor.device)


DENSE = {d.name: d for d in (Gaussian(), Rademacher())}


@dataclass(frozen=True)
class Coordinates:
    """e = sum over i in S of s_i e_i, S a stratified sample without storage.

    A tensor with N elements and fraction 1/G is cut into strata of G consecutive logical elements; each stratum
    chooses one of its places with one 64-bit word, so every coordinate is chosen with probability 1/G (to within
    G * 2**-64) and none twice. A place past the end leaves the last stratum idle.

    Attributes:
        coordinates: float: fraction of every tensor, (0, 1]; int: exactly that many over the whole set.
        layout: "uniform": elements; "block": rows x columns, chosen separately at the square root of the fraction.
        signs: "rademacher": random; "ones": +1.
    """

    coordinates: int | float = 0.01
    layout: str = "uniform"
    signs: str = "rademacher"

    def __post_init__(self) -> None:
        k = self.coordinates
        if isinstance(k, numbers.Real) and not isinstance(k, bool):  # numpy's numbers become Python's
            k = int(k) if isinstance(k, numbers.Integral) else float(k)
            object.__setattr__(self, "coordinates", k)
        else:
            raise ValueError(
                f"coordinates={k!r}: give an int (a number of coordinates over the whole set) or a float "
                "in (0, 1] (a fraction of every tensor)"
            )
        if self.layout not in ("uniform", "block"):
            raise ValueError(f"layout={self.layout!r}: choose 'uniform' or 'block'")
        if self.signs not in ("rademacher", "ones"):
            raise ValueError(f"signs={self.signs!r}: choose 'rademacher' or 'ones'")
        if isinstance(k, int):
            if k < 1:
                raise ValueError(f"coordinates={k}: a number of coordinates must be at least 1")
            if self.layout == "block":
                raise ValueError(
                    f"layout='block' needs a fraction, not a number: coordinates={k} (int) should be a float in (0, 1]"
                )
        elif not 0.0 < k <= 1.0:
            raise ValueError(f"coordinates={k}: a fraction lies in (0, 1]; for a number of coordinates give an int")
        else:
            self._check_reachable(k)

    def _check_reachable(self, fraction: float) -> None:
        if fraction < 2.0**-62:
            raise ValueError(f"coordinates={fraction}: a fraction below 2**-62 leaves nothing of any tensor")
        actual = 1.0 / self.stratum**self._axes
        if abs(fraction / actual - 1.0) > 0.1:
            g = self.stratum if actual > fraction else self.stratum - 1
            above, below = 1.0 / g**self._axes, 1.0 / (g + 1) ** self._axes
            raise ValueError(
                f"coordinates={fraction}: with layout={self.layout!r} the nearest fractions are "
                f"{below:.6g} and {above:.6g}; choose one of them"
            )

    @property
    def _axes(self) -> int:
        return 2 if self.layout == "block" else 1

    @property
    def stratum(self) -> int:
        """G: elements per stratum (uniform), rows per stratum and columns per stratum (block)."""
        per_axis: float = (1.0 / self.coordinates) ** (1.0 / self._axes)
        return max(1, round(per_axis))

    @property
    def ones(self) -> bool:
        """Whether all signs are +1."""
        # One coordinate is Algorithm 1's e_i: its sign would cancel, so the first evaluation is the one at x + tau e_i.
        return self.signs == "ones" or (self.coordinates == 1 and isinstance(self.coordinates, int))

    def fraction(self, total: int) -> float:
        """The actual probability that a coordinate of a matrix is chosen, of `total` coordinates in the set."""
        if isinstance(self.coordinates, int):
            return self.coordinates / max(total, 1)
        return float(1.0 / self.stratum**self._axes)

    def sample(self, draw: Draw, slots: Sequence[Slot]) -> list[Sample]:
        """The sample of every slot, as local indices in ascending order."""
        if isinstance(self.coordinates, int):
            samples = self._sample_count(draw.key(Purpose.COORDINATES), slots)
        elif self.layout == "block":
            samples = [self._sample_block(draw, slot) for slot in slots]
        else:
            samples = self._sample_fraction(draw.key(Purpose.COORDINATES), slots)
        if self.ones:
            samples = [(index, torch.ones_like(sign)) for index, sign in samples]
        return samples

    def _sample_fraction(self, key: Key, slots: Sequence[Slot]) -> list[Sample]:
        """All tensors of a device in one run of Philox: its ~130 calls into torch are what a small tensor costs."""
        size = self.stratum
        samples: list[Sample | None] = [None] * len(slots)
        for device in {slot.tensor.device: None for slot in slots}:
            here = [i for i, slot in enumerate(slots) if slot.tensor.device == device]
            spans = [(slots[i].start // size, -(-(slots[i].start + slots[i].count) // size)) for i in here]
            lengths = torch.tensor([hi - lo for lo, hi in spans], device=device)
            ids = torch.tensor([slots[i].stream for i in here], dtype=torch.int64, device=device)
            stratum = torch.cat([torch.arange(lo, hi, dtype=torch.int64, device=device) for lo, hi in spans])
            place, sign = _draw(key, stratum, ids.repeat_interleave(lengths), size, Purpose.COORDINATES)
            pieces = zip((stratum * size + place).split(lengths.tolist()), sign.split(lengths.tolist()), strict=True)
            for i, (index, s) in zip(here, pieces, strict=True):
                samples[i] = _local(slots[i], index, s)
        return [sample for sample in samples if sample is not None]

    def _sample_count(self, key: Key, slots: Sequence[Slot]) -> list[Sample]:
        """Strata with boundaries floor(j d / k) over the concatenation of all tensors in canonical order."""
        k, d = int(self.coordinates), sum(slot.total for slot in slots)
        whole, rest = divmod(d, k)
        j = torch.arange(k, dtype=torch.int64)
        first = j * whole + j * rest // k
        size = (j + 1) * whole + (j + 1) * rest // k - first
        place, sign = _draw(key, j, 0, size, Purpose.COORDINATES)
        position = first + place
        ends = torch.tensor([slot.total for slot in slots]).cumsum(0)
        cuts = torch.searchsorted(position, ends).tolist()
        samples = []
        for slot, lo, hi, end in zip(slots, [0, *cuts], cuts, ends.tolist(), strict=False):
            device = slot.tensor.device
            index = position[lo:hi] - (end - slot.total)
            samples.append(_local(slot, index.to(device), sign[lo:hi].to(device)))
        return samples

    def _sample_block(self, draw: Draw, slot: Slot) -> Sample:
        rows, columns = matrix_shape(slot.shape)
        row, row_sign = self._sample_axis(draw.key(Purpose.ROWS), slot, rows, Purpose.ROWS)
        if len(slot.shape) < 2:
            return _local(slot, row, row_sign)
        column, column_sign = self._sample_axis(draw.key(Purpose.COLUMNS), slot, columns, Purpose.COLUMNS)
        index = row.unsqueeze(1) * columns + column
        # The product of two independent signs is a sign, and two different elements stay uncorrelated.
        return _local(slot, index.reshape(-1), (row_sign.unsqueeze(1) * column_sign).reshape(-1))

    def _sample_axis(self, key: Key, slot: Slot, length: int, purpose: Purpose) -> Sample:
        stratum = torch.arange(-(-length // self.stratum), dtype=torch.int64, device=slot.tensor.device)
        place, sign = _draw(key, stratum, slot.stream, self.stratum, purpose)
        index = stratum * self.stratum + place
        live = index < length
        return index[live], sign[live]


@dataclass(frozen=True)
class ReleasedBlock:
    """What the authors' released code perturbs: one joint block per tensor, all entries with the sign +1.

    Exactly max(1, n // 10) rows x max(1, n // 10) columns of a matrix (more dimensions are flattened to (first, rest))
    and max(1, n // 10) entries of a vector, without replacement: the places with the smallest Philox words.
    """

    ones = True

    def sample(self, draw: Draw, slots: Sequence[Slot]) -> list[Sample]:
        """The block of every slot, as local indices in ascending order."""
        samples = []
        for slot in slots:
            rows, columns = matrix_shape(slot.shape)
            row = self._axis(draw.key(Purpose.ROWS), slot, rows, Purpose.ROWS)
            column = self._axis(draw.key(Purpose.COLUMNS), slot, columns, Purpose.COLUMNS)
            index = (row.unsqueeze(1) * columns + column).reshape(-1)
            samples.append(_local(slot, index, torch.ones(index.numel(), device=index.device)))
        return samples

    def fraction(self, total: int) -> float:
        """The share of a matrix's entries in a block, about 1 %."""
        return 0.01

    @staticmethod
    def _axis(key: Key, slot: Slot, length: int, purpose: Purpose) -> Tensor:
        place = torch.arange(length, dtype=torch.int64, device=slot.tensor.device)
        if length == 0:
            return place
        w0, w1, _, _ = rng.words(key, place, slot.stream, purpose)
        order = torch.argsort((w1 << 31) | (w0 >> 1), stable=True)  # 63 bits, so that int64 compares as unsigned
        return order[: max(1, length // 10)].sort().values


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """(rows, columns) of a tensor: (first, rest) from two dimensions on, (n, 1) for a vector, (1, 1) for a scalar."""
    if len(shape) < 2:
        return math.prod(shape), 1
    return shape[0], math.prod(shape[1:])


def _draw(key: Key, stratum: Tensor, stream: int | Tensor, size: int | Tensor, purpose: Purpose) -> Sample:
    """The place (int64, [0, size)) and sign of each stratum: one Philox call each.

    place = mulhi64(w1:w0, size), sign = -1 where the top bit of w2 is set; w3 is reserved.
    """
    place, sign = torch.empty_like(stratum), torch.empty(stratum.shape, device=stratum.device)
    for lo in range(0, stratum.numel(), _CHUNK):
        part = slice(lo, lo + _CHUNK)
        here, bound = (v[part] if isinstance(v, Tensor) else v for v in (stream, size))
        w0, w1, w2, _ = rng.words(key, stratum[part], here, purpose)
        place[part] = rng.mulhi64(w1, w0, bound)
        sign[part] = 1.0 - 2.0 * (w2 >> 31).to(torch.float32)
    return place, sign


def _local(slot: Slot, index: Tensor, sign: Tensor) -> Sample:
    """Logical indices to local ones; those held elsewhere, and the idle place of the last stratum, fall away."""
    index = index - slot.start if slot.start else index
    if index.numel() and (int(index[0]) < 0 or int(index[-1]) >= slot.count):
        live = (index >= 0) & (index < slot.count)
        return index[live], sign[live]
    return index, sign
