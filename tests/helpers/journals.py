"""Journals as bytes, by the format's description and not by its implementation: made, taken apart, and read."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jaguar.record import DamagedJournal, Journal, Mark, Record

MAGIC = b"\x89JAGUAR\n"
RECORD, MARK = 1, 2
SIZE = 80  # of an entry
FIRST = 5
HEADER: dict[str, Any] = {
    "format": 1,
    "first": FIRST,
    "entry": SIZE,
    "seed": 3,
    "method": {"kind": "Method", "rate": 0.5},
    "base": {"fingerprint": "ab" * 16},
}
RECORDS = [Record(FIRST + i, (0.5,), (1.0 + i, 2.0), skipped=i == 4, frozen=7 * (i == 6)) for i in range(12)]
MARKS = [
    Mark(FIRST, "00" * 16),
    Mark(FIRST + 3, "01" * 16),
    Mark(FIRST + 12, "0f" * 16),
    Mark(FIRST + 9, "23" * 16, True),
]
# Where the marks stand: after so many records.
PLACES = [0, 3, 12, 12]


def packed(header: Any) -> bytes:
    """The beginning of a file: JSON values, or bytes in their place."""
    text = header if isinstance(header, bytes) else json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    head = MAGIC + struct.pack("<I", len(text)) + text
    return head + struct.pack("<I", zlib.crc32(head))


def entry(head: bytes, kind: int, payload: bytes, size: int = SIZE, length: int | None = None) -> bytes:
    """An entry of the file that begins with `head`."""
    body = struct.pack("<BH", kind, len(payload) if length is None else length) + payload
    body = body.ljust(size - 4, b"\0")[: size - 4]
    return body + struct.pack("<I", zlib.crc32(body, struct.unpack("<I", head[-4:])[0]))


def payload(thing: Record | Mark) -> tuple[int, bytes]:
    """Kind and payload of an entry."""
    if isinstance(thing, Record):
        return RECORD, thing.pack()
    return MARK, struct.pack("<QB16s", thing.step, thing.chosen, bytes.fromhex(thing.fingerprint))


def things() -> list[Record | Mark]:
    """Records, and marks among them, in the order in which they are written."""
    found: list[Record | Mark] = []
    for n in range(len(RECORDS) + 1):
        found += [mark for mark, place in zip(MARKS, PLACES, strict=True) if place == n]
        found += RECORDS[n : n + 1]
    return found


def file(header: Any = HEADER, of: Sequence[Record | Mark] | None = None, size: int = SIZE) -> bytes:
    """A whole file."""
    head = packed(header)
    return head + b"".join(entry(head, *payload(thing), size=size) for thing in (things() if of is None else of))


@dataclass(frozen=True)
class Read:
    """What reading a file gives.

    Attributes:
        records, marks: those of the longest valid prefix; records packed, for NaN is not equal to itself.
        dropped: bytes behind it.
    """

    records: list[bytes]
    marks: list[Mark]
    dropped: int


def expected(data: bytes) -> Read | None:
    """What reading a file gives by the format's description; its header is a valid one. None: it is refused."""
    length = struct.unpack_from("<I", data, 8)[0]
    start = 12 + length + 4
    header = json.loads(data[12 : start - 4])
    size, first = header["entry"], header["first"]
    salt = struct.unpack("<I", data[start - 4 : start])[0]
    frames = [data[at : at + size] for at in range(start, len(data), size)]
    whole = [len(f) == size and struct.unpack("<I", f[-4:])[0] == zlib.crc32(f[:-4], salt) for f in frames]
    n = whole.index(False) if False in whole else len(whole)
    if any(whole[n:]):
        return None
    records: list[Record] = []
    marks: list[Mark] = []
    for frame in frames[:n]:
        kind, used = struct.unpack_from("<BH", frame)
        inner = frame[3 : size - 4][:used]
        if kind == RECORD:
            try:
                record = Record.unpack(inner)
            except ValueError:
                return None
            if record.step != first + len(records):
                return None
            records.append(record)
        elif kind == MARK and len(inner) == 25:
            step, flags, digest = struct.unpack("<QB16s", inner)
            if not first <= step <= first + len(records):
                return None
            marks.append(Mark(step, digest.hex(), bool(flags & 1)))
        else:
            return None
    return Read([record.pack() for record in records], marks, len(data) - start - n * size)


def read(path: Path) -> Read | None:
    """What reading a file gives; None: it is refused."""
    try:
        with Journal.read(path) as journal:
            return Read([record.pack() for record in journal], journal.marks, journal.dropped)
    except DamagedJournal as error:
        assert str(path) in str(error)
        return None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A place for a journal."""
    return tmp_path / "run.jaguar"


def records(path: Path) -> list[Record]:
    """The records of a journal that is whole."""
    with Journal.read(path) as journal:
        assert journal.dropped == 0
        return list(journal)
