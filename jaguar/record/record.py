"""A step is a record: the handful of numbers from which everything else of a zero-order step follows.

Reading a record needs no torch and executes nothing: the bytes are fixed-size fields and a checksum.
"""

from __future__ import annotations

import ctypes
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

_HEAD = struct.Struct("<QBHH")  # step, flags, number of learning rates, number of losses
_CHECKSUM = struct.Struct("<I")
_FROZEN = struct.Struct("<I")  # stands before the checksum, if its flag is set
_FOUND = struct.Struct("<HHI")  # numbers of taus and of errors, which follow, and rows; after that, if its flag is set
_SKIPPED, _HAS_FROZEN, _HAS_FOUND = 1, 2, 4


def mean(losses: Sequence[float]) -> float:
    """Mean of losses; NaN if there is none, or one is not finite."""
    if not losses or not all(map(math.isfinite, losses)):
        return math.nan
    try:
        return math.fsum(losses) / len(losses)
    except OverflowError:
        return math.fsum(loss / len(losses) for loss in losses)


@dataclass(frozen=True, slots=True)
class Record:
    """One zero-order step: what was measured, and the learning rates it is to be applied with.

    Attributes:
        step: number of steps finished before this one, uint64.
        lrs: learning rate of each parameter group, fp64.
        losses: measured losses in order of evaluation, exact in the loss dtype; two-sided: f(x + tau e), f(x - tau e)
            for each direction; one-sided: f(x), then f(x + tau e) for each direction. With an automatic step some steps
            begin with more, for second differences: the first one f(x + h e) and f(x - h e) with h a part of tau; then
            two-sided f(x), one-sided f(x - tau e) of the first direction.
        skipped: a loss was not finite; the step counts, and nothing moves.
        frozen: which of the optimizer's tensors took no part, because they had requires_grad=False; 0: all took part.
        taus: length of the perturbation of each parameter group, with an automatic step; else () and the group's own.
        errors: with an automatic step, squared standard errors over the rows: of the difference of the losses of each
            direction, and of second differences where there are some; else ().
        rows: of the batch, with an automatic step; else 0.
    """

    step: int
    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    skipped: bool = False
    frozen: int = 0
    taus: tuple[float, ...] = ()
    errors: tuple[float, ...] = ()
    rows: int = 0

    @property
    def loss(self) -> float:
        """Mean of the losses."""
        return mean(self.losses)

    def check(self, *, step: int, n_lrs: int, n_losses: int, frozen: int = 0, n_errors: int = 0) -> None:
        """Raises ValueError unless it is of step number `step`, with so many rates and losses and these frozen.

        Args:
            n_errors: standard errors, and with them a tau for every rate; 0: the step is not automatic.
        """
        if self.step != step:
            raise ValueError(f"this record is of step {self.step}, but the optimizer has finished {step} steps")
        if len(self.lrs) != n_lrs:
            raise ValueError(f"the record has {len(self.lrs)} learning rates for {n_lrs} parameter groups")
        if not all(lr >= 0 and math.isfinite(lr) for lr in self.lrs):
            raise ValueError(f"the record's learning rates must be finite and at least 0, got {self.lrs}")
        if len(self.losses) != n_losses:
            raise ValueError(f"the record has {len(self.losses)} losses; this optimizer measures {n_losses} a step")
        if len(self.errors) != n_errors or len(self.taus) != (n_lrs if n_errors else 0):
            raise ValueError(
                f"the record has {len(self.errors)} standard errors and {len(self.taus)} lengths tau; this optimizer, "
                + (
                    f"with an automatic step, measures {n_errors}"
                    if n_errors
                    else "without an automatic step, has none"
                )
            )
        if not all(tau < math.inf and ctypes.c_float(tau).value > 0.0 for tau in self.taus):
            raise ValueError(f"the record's lengths tau must be finite and positive in fp32, got {self.taus}")
        if self.frozen != frozen:
            then, now = ("some" if marked else "none" for marked in (self.frozen, frozen))
            raise ValueError(
                f"the record was measured with other tensors frozen (then {then}, now {now}): requires_grad must be "
                "what it was in that step"
            )
        if not self.skipped and not all(0.0 <= error < math.inf for error in self.errors):
            raise ValueError(f"the record's squared standard errors must be finite and at least 0, got {self.errors}")
        if not self.skipped and not all(map(math.isfinite, self.losses)):
            raise ValueError(f"the record has a non-finite loss {self.losses} but is not marked as skipped")

    @staticmethod
    def size(n_lrs: int, n_losses: int, n_errors: int | None = None) -> int:
        """Bytes that a record packs into at most; `n_errors`: of an automatic step, which has a tau for every rate."""
        found = 0 if n_errors is None else _FOUND.size + 8 * (n_lrs + n_errors)
        return _HEAD.size + 8 * (n_lrs + n_losses) + _FROZEN.size + found + _CHECKSUM.size

    def pack(self) -> bytes:
        """The record as bytes, little-endian, with a CRC-32 at the end."""
        numbers = self.lrs + self.losses
        flags = _SKIPPED * self.skipped | _HAS_FROZEN * bool(self.frozen) | _HAS_FOUND * bool(self.taus)
        body = _HEAD.pack(self.step, flags, len(self.lrs), len(self.losses))
        body += struct.pack(f"<{len(numbers)}d", *numbers)
        if self.frozen:
            body += _FROZEN.pack(self.frozen)
        if self.taus:
            found = self.taus + self.errors
            body += _FOUND.pack(len(self.taus), len(self.errors), self.rows) + struct.pack(f"<{len(found)}d", *found)
        return body + _CHECKSUM.pack(zlib.crc32(body))

    @classmethod
    def unpack(cls, data: bytes) -> Record:
        """The record that `pack` wrote.

        Raises:
            ValueError: the bytes are cut short, too long, or do not meet their checksum.
        """
        if len(data) < _HEAD.size + _CHECKSUM.size:
            raise ValueError(f"a record has at least {_HEAD.size + _CHECKSUM.size} bytes, got {len(data)}")
        step, flags, n_lrs, n_losses = _HEAD.unpack_from(data)
        end = _HEAD.size + 8 * (n_lrs + n_losses)
        size = end + (_FROZEN.size if flags & _HAS_FROZEN else 0)
        n_taus = n_errors = rows = 0
        if flags & _HAS_FOUND:
            if len(data) < size + _FOUND.size:
                raise ValueError(f"this record has more than {size + _FOUND.size} bytes, got {len(data)}")
            n_taus, n_errors, rows = _FOUND.unpack_from(data, size)
            size += _FOUND.size + 8 * (n_taus + n_errors)
        if len(data) != size + _CHECKSUM.size:
            raise ValueError(f"this record has {size + _CHECKSUM.size} bytes, got {len(data)}")
        if _CHECKSUM.unpack_from(data, size)[0] != zlib.crc32(data[:size]):
            raise ValueError(f"the record of step {step} does not meet its checksum")
        numbers = struct.unpack_from(f"<{n_lrs + n_losses}d", data, _HEAD.size)
        frozen = _FROZEN.unpack_from(data, end)[0] if flags & _HAS_FROZEN else 0
        found = struct.unpack_from(f"<{n_taus + n_errors}d", data, size - 8 * (n_taus + n_errors))
        return cls(
            step, numbers[:n_lrs], numbers[n_lrs:], bool(flags & _SKIPPED), frozen, found[:n_taus], found[n_taus:], rows
        )
