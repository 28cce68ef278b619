"""Marks: what the weights of a run were after some step.

number of finished steps (u64), flags (u8), fingerprint (16 bytes); little-endian
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

_LAYOUT = struct.Struct("<QB16s")
_CHOSEN = 1


@dataclass(frozen=True)
class Mark:
    """The fingerprint of the trained tensors after some step, which a replay must meet.

    Attributes:
        step: number of finished steps.
        fingerprint: 32 hexadecimal digits, by `jaguar.optimizers.fingerprint`.
        chosen: the run ended, and its model is the one of this step.
    """

    step: int
    fingerprint: str
    chosen: bool = False

    SIZE: ClassVar[int] = _LAYOUT.size

    def pack(self) -> bytes:
        """The mark as bytes.

        Raises:
            ValueError: the fingerprint is none.
        """
        digest = bytes.fromhex(self.fingerprint)
        if len(digest) != 16:
            raise ValueError(f"fingerprint={self.fingerprint!r}: give 32 hexadecimal digits")
        return _LAYOUT.pack(self.step, _CHOSEN * self.chosen, digest)

    @classmethod
    def unpack(cls, data: bytes) -> Mark:
        """The mark that `pack` wrote.

        Raises:
            ValueError: the bytes are cut short or too long.
        """
        if len(data) != cls.SIZE:
            raise ValueError(f"a mark has {cls.SIZE} bytes, got {len(data)}")
        step, flags, digest = _LAYOUT.unpack(data)
        return cls(step, digest.hex(), bool(flags & _CHOSEN))
