"""The header of a journal: plain values behind a checksum, bounded, and compared key by key."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

FORMAT = 1
MAGIC = b"\x89JAGUAR\n"
LONGEST_ENTRY = 3 + 0xFFFF + 4  # kind and length, which is of 16 bits; payload; checksum
_LENGTH, _CHECKSUM = struct.Struct("<I"), struct.Struct("<I")
_LONGEST = 1 << 24  # names and shapes of a hundred thousand tensors; as Python objects, 30 times as much
_DEEPEST = 32
# Keys whose values may differ between two headers of the same optimizer.
INFORMATIVE = ("first", "initial_lr", "base", "run", "environment")


class DamagedJournal(ValueError):
    """A file that is no journal, or one with an entry in its middle that does not meet its checksum."""


def packed(header: Mapping[str, Any]) -> tuple[bytes, int]:
    """The beginning of a file with this header, and its checksum, which the entries contain.

    Raises:
        ValueError: a value is not finite, or the header too long.
        TypeError: a value is none of JSON.
    """
    encoded = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    if len(encoded) > _LONGEST:
        raise ValueError(f"the header has {len(encoded)} bytes, more than {_LONGEST}")
    head = MAGIC + _LENGTH.pack(len(encoded)) + encoded
    checksum = zlib.crc32(head)
    return head + _CHECKSUM.pack(checksum), checksum


def unpacked(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int, int]:
    """Header, number of its bytes and checksum of the file, which is open at its beginning.

    Raises:
        DamagedJournal: it is no journal, of another format, or damaged.
    """
    begin = _exactly(file, len(MAGIC) + _LENGTH.size)
    if not begin.startswith(MAGIC):
        raise DamagedJournal(f"{str(path)!r} is no journal of jaguar")
    (length,) = _LENGTH.unpack_from(begin.ljust(len(MAGIC) + _LENGTH.size, b"\xff"), len(MAGIC))
    # Not read before it is known to be short: a damaged length must not cost memory.
    rest = _exactly(file, length + _CHECKSUM.size) if length <= _LONGEST else b""
    encoded, checksum = rest[:length], rest[length:]
    found = zlib.crc32(begin + encoded)
    if len(checksum) < _CHECKSUM.size or _CHECKSUM.unpack(checksum)[0] != found:
        raise DamagedJournal(f"{str(path)!r} is damaged: its header is cut short or does not meet its checksum")
    try:
        header = json.loads(encoded, parse_int=_integer, parse_constant=_not_finite)
    except (ValueError, RecursionError) as error:
        raise DamagedJournal(f"{str(path)!r} is damaged: its header is no JSON: {error}") from None
    check(path, header)
    return header, len(begin) + len(rest), found


def check(path: Path, header: Any) -> None:
    """Raises DamagedJournal unless a header is one of this format."""
    if not isinstance(header, dict):
        raise DamagedJournal(f"{str(path)!r} is damaged: its header is no JSON object")
    if not _is_count(header.get("format"), FORMAT, FORMAT):
        raise DamagedJournal(
            f"{str(path)!r} has format {header.get('format')!r}, and this version of jaguar reads {FORMAT}"
        )
    first, entry = header.get("first"), header.get("entry")
    # Of so many steps that none can be reached whose number has more than 64 bits.
    if not (_is_count(first, 0, (1 << 63) - 1) and _is_count(entry, 32, LONGEST_ENTRY)):
        raise DamagedJournal(
            f"{str(path)!r} has a header with first={first!r} and entry={entry!r}: first is an int in [0, 2**63), "
            f"entry one from 32 to {LONGEST_ENTRY}"
        )
    for key in ("base", "run", "environment"):
        if not isinstance(header.get(key, {}), dict):
            raise DamagedJournal(f"{str(path)!r} is damaged: {key!r} of its header is no JSON object")
    if _deep(header, _DEEPEST):
        raise DamagedJournal(f"{str(path)!r} is damaged: its header is nested deeper than {_DEEPEST} levels")


def compare(path: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises ValueError, with what differs, unless two headers are of the same run."""
    before, now = dict(_flat(saved)), dict(_flat(own))
    other = [
        key
        for key in sorted({*before, *now})
        # 0 and 0.0 give the same bits; True is another option than 1.
        if (key in before) != (key in now)
        or before[key] != now[key]
        or isinstance(before[key], bool) != isinstance(now[key], bool)
    ]
    if other:
        said = [f"{k} is {_said(before, k)} there, {_said(now, k)} here" for k in other[:3]]
        more = f" (and {len(other) - 3} more)" if len(other) > 3 else ""
        raise ValueError(f"{str(path)!r} is the journal of another run: {'; '.join(said)}{more}")


def _said(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "nothing"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested values by dotted names, but for those of `INFORMATIVE`."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if name or key not in INFORMATIVE:
                yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)) and value:
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{name}[{number}]")
    else:
        yield name, [] if value == () else value


def _integer(digits: str) -> int:
    """A JSON integer; a longer one than any that is written would not fit a float."""
    if len(digits) > 20:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _not_finite(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _deep(value: Any, levels: int) -> bool:
    """Tells whether values are nested deeper than so many levels."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return not levels or any(_deep(item, levels - 1) for item in inner)


def _exactly(file: BinaryIO, n: int) -> bytes:
    """So many bytes, or fewer at the end of the file."""
    parts: list[bytes] = []
    while n and (part := file.read(min(n, 1 << 20))):
        parts.append(part)
        n -= len(part)
    return b"".join(parts)


def _is_count(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
