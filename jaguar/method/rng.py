"""Counter-based random numbers: the definition that every backend must reproduce bit for bit.

A number depends on (seed, step, direction, purpose, stream, logical element index) and on nothing else, so a
tensor can be cut, moved, transposed or held in another dtype without changing its draws, and the generators
of torch, numpy and python are neither read nor written here.

    step key = words 0, 1 of philox(key=seed, counter=(step low, direction, purpose, step high))
    element  = philox(key=step key, counter=(group low, group high, stream, purpose))

Words are uint32 values held in int64 tensors: torch has no unsigned arithmetic on every device, and the low 64
bits of a product of two words are right whether or not the sign bit is taken.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox-4x32-10).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

# Any change to a bit that comes out of this file needs a new tag; a journal names the tag it was written with.
TAG = "philox4x32-10/2"

Word: TypeAlias = "int | Tensor"
Key: TypeAlias = tuple[int, int]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Purpose(IntEnum):
    """Purpose of a draw; it separates the streams of one step from each other."""

    CLOSURE = 0  # seeds of the global generators while the closure runs
    DIRECTION = 1  # dense directions
    COORDINATES = 2  # coordinate choice and signs
    ROWS = 3  # row choice of the block layout
    COLUMNS = 4  # column choice of the block layout
    LAYERS = 5  # layer choice
    ROUND = 6  # stochastic rounding of parameters
    ROUND_STATE = 7  # stochastic rounding of optimizer state
    ROUND_STATE_1 = 8  # stochastic rounding of its second buffer
    ROUND_STATE_2 = 9  # stochastic rounding of its third buffer
    SEARCH = 10  # search along layers
    PROJECT = 11  # stochastic rounding of what a search found
    DIRECTION_1 = 12  # a second dense direction


# Purposes of the noise that rounds the state buffers of a rule, in order.
STATE_PURPOSES = (Purpose.ROUND_STATE, Purpose.ROUND_STATE_1, Purpose.ROUND_STATE_2)


def philox(key: tuple[Word, Word], counter: tuple[Word, Word, Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Four uint32 words of Philox-4x32-10; ints and int64 tensors may be mixed and broadcast.

    Raises nothing: every value is taken modulo 2**32 by the caller.
    """
    c0, c1, c2, c3 = counter
    for k0, k1 in _kept_round_keys(key) if isinstance(key[0], int) else _round_keys(key):
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0 = ((p1 >> 32) & _MASK) ^ c1 ^ k0
        c1 = p1 & _MASK
        c2 = ((p0 >> 32) & _MASK) ^ c3 ^ k1
        c3 = p0 & _MASK
    return c0, c1, c2, c3


def _round_keys(key: tuple[Word, Word]) -> list[tuple[Word, Word]]:
    """The key of every round."""
    return [((key[0] + i * _WEYL[0]) & _MASK, (key[1] + i * _WEYL[1]) & _MASK) for i in range(_ROUNDS)]


_kept_round_keys = lru_cache(maxsize=64)(_round_keys)  # a run has one key for all of its step keys


def step_key(seed: int, step: int, direction: int, purpose: Purpose) -> Key:
    """The 64-bit key of one (step, direction, purpose) of a run; `seed` and `step` are uint64."""
    counter = (step & _MASK, direction, int(purpose), step >> 32)
    k0, k1, _, _ = philox((seed & _MASK, seed >> 32), counter)
    return int(k0), int(k1)


@dataclass(frozen=True)
class Draw:
    """One direction of one step of one run: what a direction's random numbers are keyed by."""

    seed: int
    step: int
    direction: int = 0

    def key(self, purpose: Purpose) -> Key:
        """The step key of this draw for `purpose`."""
        return step_key(self.seed, self.step, self.direction, purpose)


def closure_seed(seed: int, step: int) -> int:
    """The 63-bit seed that the global generators get before every evaluation of one step."""
    k0, k1 = step_key(seed, step, 0, Purpose.CLOSURE)
    return (k1 << 32 | k0) >> 1


def words(key: Key, group: Tensor, stream: Word, purpose: Purpose) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each `group` (int64, any shape, up to 2**63 - 1) in a `stream` (uint32)."""
    w0, w1, w2, w3 = philox(key, (group & _MASK, group >> 32, stream, int(purpose)))
    assert isinstance(w0, Tensor) and isinstance(w1, Tensor) and isinstance(w2, Tensor) and isinstance(w3, Tensor)
    return w0, w1, w2, w3


def mulhi64(high: Tensor, low: Tensor, bound: Word) -> Tensor:
    """floor((high * 2**32 + low) * bound / 2**64): a 64-bit word scaled to [0, bound), bound < 2**63."""
    b1, b0 = bound >> 32, bound & _MASK
    cross0 = low * b1
    cross1 = high * b0
    lowest = ((low * b0) >> 32) & _MASK
    carry = ((cross0 & _MASK) + (cross1 & _MASK) + lowest) >> 32
    return high * b1 + ((cross0 >> 32) & _MASK) + ((cross1 >> 32) & _MASK) + carry


def runs(first: Tensor, length: Tensor) -> Tensor:
    """first[0], first[0] + 1, ..., length[0] numbers, then those from first[1] on: int64.

    Equivalent to: `torch.cat([torch.arange(f, f + n) for f, n in zip(first, length)])`.
    """
    before = length.cumsum(0) - length
    numbers = (first - before).repeat_interleave(length)
    return numbers + torch.arange(numbers.numel(), dtype=torch.int64, device=numbers.device)


class Elements:
    """Elements of one or several streams, one after the other: many small tensors cost one run of Philox.

    Args:
        spans: stream (uint32), first element and number of elements of each.
        device: where the numbers will be.
    """

    def __init__(self, spans: Sequence[tuple[int, int, int]], device: torch.device | None = None) -> None:
        self._spans, self._device = spans, device

    @cached_property
    def _columns(self) -> tuple[Tensor, Tensor, Tensor]:
        streams, starts, counts = torch.tensor(self._spans, dtype=torch.int64).t().contiguous().to(self._device)
        return streams, starts, counts

    def calls(self, size: int) -> tuple[Tensor, Word, Tensor | slice]:
        """The groups of `size` elements that cover them, their streams, and where the elements are in what is drawn."""
        if len(self._spans) == 1:
            ((stream, start, count),) = self._spans
            skip = start % size
            group = torch.arange(start // size, -(-(start + count) // size), dtype=torch.int64, device=self._device)
            return group, stream, slice(skip, skip + count)
        streams, starts, counts = self._columns
        first = starts // size
        length = (starts + counts + (size - 1)) // size - first
        begin = (length.cumsum(0) - length) * size + starts - first * size
        return runs(first, length), streams.repeat_interleave(length), runs(begin, counts)

    def at(self, place: Tensor) -> tuple[Word, Tensor]:
        """Stream and logical index of the elements at `place` (int64) in the whole."""
        if len(self._spans) == 1:
            ((stream, start, _),) = self._spans
            return stream, place + start if start else place
        streams, starts, counts = self._columns
        ends = counts.cumsum(0)
        of = torch.searchsorted(ends, place, right=True)
        return streams[of], place + (starts - ends + counts)[of]


def signs_of(key: Key, elements: Elements) -> Tensor:
    """Rademacher numbers: fp32, +1 or -1.

    Element i takes bit i % 32 of word (i % 128) // 32 of call i // 128; a set bit is -1.
    """
    group, stream, places = elements.calls(128)
    word = torch.stack(words(key, group, stream, Purpose.DIRECTION), dim=1)
    bits = (word.unsqueeze(-1) >> torch.arange(32, device=word.device)) & 1
    return 1.0 - 2.0 * bits.reshape(-1)[places].to(torch.float32)


def normals_of(key: Key, elements: Elements) -> Tensor:
    """Standard normal numbers: fp32.

    Box-Muller, u = ((w >> 8) + 0.5) * 2**-24, four numbers a call:

        z0, z1 = sqrt(-2 ln u0) * (cos 2 pi u1, sin 2 pi u1);    z2, z3 the same from u2, u3

    The functions are fixed polynomials in separate multiplications and additions (never a library's `log` or
    `cos`, whose last bit differs between devices), so the bits are part of the interface.
    """
    group, stream, places = elements.calls(4)
    w0, w1, w2, w3 = words(key, group, stream, Purpose.DIRECTION)
    radius, angle = (((torch.stack(w) >> 8).to(torch.float32) + 0.5) * 2.0**-24 for w in ((w0, w2), (w1, w3)))
    # Not torch.sqrt in fp32: on CPUs it is a vector library's and off by one bit in 16 % of the numbers. In fp64
    # its error stays below the distance of any fp32 number's root from a rounding boundary.
    r = torch.sqrt((_log(radius) * -2.0).to(torch.float64)).to(torch.float32)
    cos, sin = _cos_sin_turns(angle)
    return torch.stack((r * cos, r * sin), dim=1).reshape(4, -1).t().reshape(-1)[places]


def noise16_of(key: Key, elements: Elements, purpose: Purpose) -> Tensor:
    """16 random bits for each element: int64, for stochastic rounding.

    Element i takes half i % 2 (low half first) of word (i % 8) // 2 of call i // 8.
    """
    group, stream, places = elements.calls(8)
    word = torch.stack(words(key, group, stream, purpose), dim=1)
    return torch.stack((word & 0xFFFF, word >> 16), dim=2).reshape(-1)[places]


def signs(key: Key, stream: int, start: int, count: int, device: torch.device | None = None) -> Tensor:
    """`signs_of` elements start .. start + count of one stream."""
    return signs_of(key, Elements([(stream, start, count)], device))


def normals(key: Key, stream: int, start: int, count: int, device: torch.device | None = None) -> Tensor:
    """`normals_of` elements start .. start + count of one stream."""
    return normals_of(key, Elements([(stream, start, count)], device))


def noise16(
    key: Key, stream: int, start: int, count: int, purpose: Purpose, device: torch.device | None = None
) -> Tensor:
    """`noise16_of` elements start .. start + count of one stream."""
    return noise16_of(key, Elements([(stream, start, count)], device), purpose)


def noise16_at(key: Key, stream: Word, index: Tensor, purpose: Purpose) -> Tensor:
    """`noise16` of the elements at `index` (int64, any order), of one stream or of a stream each."""
    word = torch.stack(words(key, index >> 3, stream, purpose), dim=-1)
    chosen = word.gather(-1, ((index >> 1) & 3).unsqueeze(-1)).squeeze(-1)
    return (chosen >> (16 * (index & 1))) & 0xFFFF


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    y = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        y = y * x + c
    return y


# Minimax coefficients of Cephes (S. Moshier, 1989: logf, sinf, cosf), below 2 ulp on the ranges used here.
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4


def _log(u: Tensor) -> Tensor:
    """Natural logarithm of fp32 u in (0, 1]."""
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23  # so that the mantissa lies in [sqrt(1/2), sqrt(2))
    x = (bits - (exponent << 23)).view(torch.float32) - 1.0
    e = exponent.to(torch.float32)
    z = x * x
    y = _horner(x, _LOG) * x * z + e * _LN2_LOW
    return (y - z * 0.5 + x) + e * _LN2_HIGH


def _cos_sin_turns(u: Tensor) -> tuple[Tensor, Tensor]:
    """cos(2 pi u) and sin(2 pi u) of fp32 u in [0, 1]."""
    quarter = torch.floor(u * 4.0 + 0.5)
    a = (u * 4.0 - quarter) * (math.pi / 2)
    z = a * a
    sin = _horner(z, _SIN) * z * a + a
    cos = _horner(z, _COS) * z * z - z * 0.5 + 1.0
    q = quarter.to(torch.int32) & 3
    swapped = (q & 1) == 1
    c, s = torch.where(swapped, sin, cos), torch.where(swapped, cos, sin)
    return torch.where((q == 1) | (q == 2), -c, c), torch.where(q >= 2, -s, s)
