"""A step is a record: the handful of numbers from which everything else of a zero-order step follows.

Reading a record needs no torch and executes nothing: the bytes are fixed-size fields and a checksum.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass

_HEAD = struct.Struct("<QBHH")  # step, flags, number of learning rates, number of losses
_CHECKSUM = struct.Struct("<I")
_SKIPPED = 1


@dataclass(frozen=True, slots=True)
class Record:
    """One zero-order step: what was measured, and the learning rates it is to be applied with.

    Attributes:
        step: number of steps finished before this one, uint64.
        lrs: learning rate of each parameter group, fp64.
        losses: measured losses in order of evaluation, exact in the loss dtype; two-sided: f(x + tau e), f(x - tau e)
            for each direction; one-sided: f(x), then f(x + tau e) for each direction.
        skipped: a loss was not finite; the step counts, and nothing moves.
    """

    step: int
    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    skipped: bool = False

    @property
    def loss(self) -> float:
        """Mean of the losses."""
        finite = bool(self.losses) and all(map(math.isfinite, self.losses))
        return math.fsum(self.losses) / len(self.losses) if finite else math.nan

    def check(self, *, step: int, n_lrs: int, n_losses: int) -> None:
        """Raises ValueError unless this is the record of step number `step` with so many rates and losses."""
        if self.step != step:
            raise ValueError(f"this record is of step {self.step}, but the optimizer has finished {step} steps")
        if len(self.lrs) != n_lrs:
            raise ValueError(f"the record has {len(self.lrs)} learning rates for {n_lrs} parameter groups")
        if not all(lr >= 0 and math.isfinite(lr) for lr in self.lrs):
            raise ValueError(f"the record's learning rates must be finite and at least 0, got {self.lrs}")
        if len(self.losses) != n_losses:
            raise ValueError(f"the record has {len(self.losses)} losses; this optimizer measures {n_losses} a step")
        if not self.skipped and not all(map(math.isfinite, self.losses)):
            raise ValueError(f"the record has a non-finite loss {self.losses} but is not marked as skipped")

    def pack(self) -> bytes:
        """The record as bytes, little-endian, with a CRC-32 at the end."""
        numbers = self.lrs + self.losses
        body = _HEAD.pack(self.step, _SKIPPED * self.skipped, len(self.lrs), len(self.losses))
        body += struct.pack(f"<{len(numbers)}d", *numbers)
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
        size = _HEAD.size + 8 * (n_lrs + n_losses)
        if len(data) != size + _CHECKSUM.size:
            raise ValueError(f"this record has {size + _CHECKSUM.size} bytes, got {len(data)}")
        if _CHECKSUM.unpack_from(data, size)[0] != zlib.crc32(data[:size]):
            raise ValueError(f"the record of step {step} does not meet its checksum")
        numbers = struct.unpack_from(f"<{n_lrs + n_losses}d", data, _HEAD.size)
        return cls(step, numbers[:n_lrs], numbers[n_lrs:], bool(flags & _SKIPPED))
