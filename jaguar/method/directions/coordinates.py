"""Coordinate directions: a stratified sample, or the block of the authors' released code."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from jaguar.method import rng, samples
from jaguar.method.directions.base import Sparse
from jaguar.method.params import Slot
from jaguar.method.rng import Draw, Key, Purpose, runs
from jaguar.method.samples import Chosen, Grid, Ones, Strata


@dataclass(frozen=True)
class Coordinates(Sparse):
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
        """Tells whether all signs are +1."""
        # One coordinate is Algorithm 1's e_i: its sign would cancel, so the first evaluation is the one at x + tau e_i.
        return self.signs == "ones" or (self.coordinates == 1 and isinstance(self.coordinates, int))

    def fraction(self, total: int) -> float:
        """The actual probability that a coordinate of a matrix is chosen, of `total` coordinates in the set."""
        if isinstance(self.coordinates, int):
            return self.coordinates / max(total, 1)
        return float(1.0 / self.stratum**self._axes)

    def check(self, slots: Sequence[Slot]) -> None:
        """Raises ValueError for a number that is more than there are."""
        total = sum(slot.total for slot in slots)
        if slots and isinstance(self.coordinates, int) and self.coordinates > total:
            raise ValueError(
                f"coordinates={self.coordinates} is more than the {total} there are; a float in (0, 1] is a fraction"
            )

    def options(self) -> dict[str, Any]:
        """The fields."""
        return {"coordinates": self.coordinates, "layout": self.layout, "signs": self.signs, "released": False}

    def shown(self, slots: Sequence[Slot]) -> str:
        """A line about it."""
        what = f"{self.coordinates!r}, layout {self.layout}, signs {self.signs}"
        return f"coordinates: {what} (fraction {self.fraction(sum(slot.total for slot in slots)):.6g})"

    def choose(self, draw: Draw, slots: Sequence[Slot], sets: Sequence[Sequence[int]]) -> list[Chosen]:
        """The chosen coordinates of every set of slots (positions)."""
        chosen: list[Chosen]
        if isinstance(self.coordinates, int):
            chosen = self._choose_count(draw.key(Purpose.COORDINATES), slots, sets)
        elif self.layout == "block":
            chosen = _by_device(slots, sets, partial(_grids, self._axis, draw))
        else:
            chosen = _by_device(slots, sets, partial(self._choose_fraction, draw.key(Purpose.COORDINATES)))
        return [Ones(found) for found in chosen] if self.ones else chosen

    def _choose_fraction(self, key: Key, slots: Sequence[Slot], sets: Sequence[Sequence[int]]) -> list[Chosen]:
        """All of them in one run of Philox, but for tensors whose own runs are long."""
        size = self.stratum
        spans = [samples.strata(slot, size) for slot in slots]
        alone = [len(m) == 1 and spans[m[0]][1] - spans[m[0]][0] > samples.PART for m in sets]
        members = [i for m, single in zip(sets, alone, strict=True) if not single for i in m]
        some = [slots[i] for i in members]
        together: Iterator[Chosen] = iter(())
        if members:
            numbers = [(spans[i][0], spans[i][1] - spans[i][0], slots[i].stream) for i in members]
            first, length, streams = torch.tensor(numbers, dtype=torch.int64).t().contiguous().to(some[0].tensor.device)
            stratum, of = runs(first, length), _numbers_of(length)
            place, sign = samples.draw(key, stratum, streams[of], size, Purpose.COORDINATES)
            inner = _renumbered(m for m, single in zip(sets, alone, strict=True) if not single)
            together = iter(samples.listed(some, inner, of, stratum * size + place, sign))
        return [
            Strata(key, slots[m[0]], size) if single else next(together) for m, single in zip(sets, alone, strict=True)
        ]

    def _choose_count(self, key: Key, slots: Sequence[Slot], sets: Sequence[Sequence[int]]) -> list[Chosen]:
        """Strata with boundaries floor(j d / k) over the concatenation of all tensors in canonical order."""
        k, d = int(self.coordinates), sum(slot.total for slot in slots)
        whole, rest = divmod(d, k)
        j = torch.arange(k, dtype=torch.int64)
        first = j * whole + j * rest // k
        size = (j + 1) * whole + (j + 1) * rest // k - first
        place, sign = samples.draw(key, j, 0, size, Purpose.COORDINATES)
        position = first + place
        totals = torch.tensor([slot.total for slot in slots], dtype=torch.int64)
        ends = totals.cumsum(0)
        cuts = torch.searchsorted(position, ends)
        lengths = cuts.diff(prepend=cuts.new_zeros(1))
        chosen: list[Chosen] = []
        for members in sets:
            which = torch.tensor(members, dtype=torch.int64)
            length = lengths[which]
            chosen_here, of = runs(cuts[which] - length, length), _numbers_of(length)
            index = position[chosen_here] - (ends - totals)[which][of]
            some, device = [slots[i] for i in members], slots[members[0]].tensor.device
            values = (value.to(device) for value in (of, index, sign[chosen_here]))
            chosen += samples.listed(some, [range(len(some))], *values)
        return chosen

    def _axis(self, draw: Draw, slots: Sequence[Slot], lengths: Tensor, purpose: Purpose) -> _Axis:
        """One row (or column) of each stratum of rows, where it is not past the end."""
        size, streams = self.stratum, torch.tensor([slot.stream for slot in slots], device=lengths.device)
        count = (lengths + (size - 1)) // size
        stratum, of = runs(torch.zeros_like(count), count), _numbers_of(count)
        place, sign = samples.draw(draw.key(purpose), stratum, streams[of], size, purpose)
        index = stratum * size + place
        live = index < lengths[of]
        return index[live], sign[live], torch.bincount(of[live], minlength=len(slots))


@dataclass(frozen=True)
class ReleasedBlock(Sparse):
    """The block of the authors' released code: one joint block per tensor, all entries with the sign +1.

    Exactly max(1, n // 10) rows x max(1, n // 10) columns of a matrix (more dimensions are flattened to (first, rest))
    and max(1, n // 10) entries of a vector, without replacement: the places with the smallest Philox words.
    """

    @property
    def ones(self) -> bool:
        """All signs are +1."""
        return True

    def options(self) -> dict[str, Any]:
        """The options of `Coordinates`, which have no part in it."""
        return Coordinates().options() | {"released": True}

    def shown(self, slots: Sequence[Slot]) -> str:
        """A line about it."""
        return f"coordinates: released code's joint block (fraction {self.fraction(0):.6g})"

    def choose(self, draw: Draw, slots: Sequence[Slot], sets: Sequence[Sequence[int]]) -> list[Chosen]:
        """The blocks of every set of slots, as `Coordinates.choose`."""
        return _by_device(slots, sets, partial(_grids, self._axis, draw))

    def fraction(self, total: int) -> float:
        """The share of a matrix's entries in a block, about 1 %."""
        return 0.01

    @staticmethod
    def _axis(draw: Draw, slots: Sequence[Slot], lengths: Tensor, purpose: Purpose) -> _Axis:
        streams = torch.tensor([slot.stream for slot in slots], device=lengths.device)
        place, of = runs(torch.zeros_like(lengths), lengths), _numbers_of(lengths)
        w0, w1, _, _ = rng.words(draw.key(purpose), place, streams[of], purpose)
        order = torch.argsort((w1 << 31) | (w0 >> 1), stable=True)  # 63 bits, so that int64 compares as unsigned
        order = order[torch.argsort(of[order], stable=True)]  # now slot by slot
        drawn = torch.zeros_like(of, dtype=torch.bool)
        drawn[order[place < (lengths // 10).clamp_min(1)[of]]] = True
        index = place[drawn]
        return index, torch.ones(index.numel(), device=index.device), torch.bincount(of[drawn], minlength=len(slots))


# Chosen rows or columns of several slots, their signs, and how many of them each slot has.
_Axis: TypeAlias = tuple[Tensor, Tensor, Tensor]


def _grids(
    axis: Callable[[Draw, Sequence[Slot], Tensor, Purpose], _Axis],
    draw: Draw,
    slots: Sequence[Slot],
    sets: Sequence[Sequence[int]],
) -> list[Chosen]:
    """Rows x columns of every slot, chosen separately: a vector has one column, with the sign +1."""
    device = slots[0].tensor.device
    heights, widths = torch.tensor([matrix_shape(slot.shape) for slot in slots], device=device).t().contiguous()
    vector = torch.tensor([len(slot.shape) < 2 for slot in slots], device=device)
    row, row_sign, n_rows = axis(draw, slots, heights, Purpose.ROWS)
    column, column_sign, n_columns = axis(draw, slots, torch.where(vector, 0, widths), Purpose.COLUMNS)
    row_at, column_at = ((n.cumsum(0) - n) for n in (n_rows, n_columns))
    alone = [len(m) == 1 and int(n_rows[m[0]] * n_columns[m[0]]) > samples.PART for m in sets]
    members = [i for m, single in zip(sets, alone, strict=True) if not single for i in m]
    which = torch.tensor(members, dtype=torch.int64, device=device)
    across = torch.where(vector, 1, n_columns)[which]
    crossings = n_rows[which] * across
    of, number = _numbers_of(crossings), runs(torch.zeros_like(crossings), crossings)
    r = row_at[which][of] + number // across.clamp_min(1)[of]
    index, sign = row[r], row_sign[r]
    crossed = ~vector[which][of]
    c = column_at[which][of] + number % across.clamp_min(1)[of]
    if column.numel():
        c = c.clamp_max(column.numel() - 1)  # vectors do not read it
        index = torch.where(crossed, index * widths[which][of] + column[c], index)
        # The product of two independent signs is a sign, and two different elements stay uncorrelated.
        sign = torch.where(crossed, sign * column_sign[c], sign)
    inner = _renumbered(m for m, single in zip(sets, alone, strict=True) if not single)
    together = iter(samples.listed([slots[i] for i in members], inner, of, index, sign) if members else ())
    chosen: list[Chosen] = []
    for m, single in zip(sets, alone, strict=True):
        if single:
            (i,) = m
            rows, columns = (
                slice(int(at[i]), int(at[i] + n[i])) for at, n in ((row_at, n_rows), (column_at, n_columns))
            )
            own = (row[rows], row_sign[rows]), (column[columns], column_sign[columns])
            chosen.append(Grid(slots[i], *own, int(widths[i])))
        else:
            chosen.append(next(together))
    return chosen


def _by_device(
    slots: Sequence[Slot],
    sets: Sequence[Sequence[int]],
    choose: Callable[[Sequence[Slot], Sequence[Sequence[int]]], list[Chosen]],
) -> list[Chosen]:
    """Chosen coordinates of every set, found device by device."""
    chosen: dict[int, Chosen] = {}
    for device in dict.fromkeys(slots[members[0]].tensor.device for members in sets):
        here = [k for k, members in enumerate(sets) if slots[members[0]].tensor.device == device]
        some = [slots[i] for k in here for i in sets[k]]
        chosen.update(zip(here, choose(some, _renumbered(sets[k] for k in here)), strict=True))
    return [chosen[k] for k in range(len(sets))]


def _renumbered(sets: Iterable[Sequence[int]]) -> list[range]:
    """Sets of the same sizes whose members are numbered one after the other."""
    ends = [0, *accumulate(len(members) for members in sets)]
    return [range(a, b) for a, b in pairwise(ends)]


def _numbers_of(length: Tensor) -> Tensor:
    """length[0] zeros, then length[1] ones, and so on."""
    return torch.arange(length.numel(), device=length.device).repeat_interleave(length)


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """(rows, columns) of a tensor: (first, rest) from two dimensions on, (n, 1) for a vector, (1, 1) for a scalar."""
    if len(shape) < 2:
        return math.prod(shape), 1
    return shape[0], math.prod(shape[1:])
