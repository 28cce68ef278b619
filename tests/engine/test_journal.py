"""The journal's file: cut, damaged or hostile, reading it gives the longest valid prefix or a refusal, nothing else."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import journals
from helpers.journals import FIRST, HEADER, MARKS, RECORDS, SIZE, Read
from helpers.journals import path as path
from jaguar.record import DamagedJournal, Journal, Mark, Record
from jaguar.record.header import LONGEST_ENTRY

DATA = journals.file()
HEAD = len(journals.packed(HEADER))
THINGS = journals.things()
ENTRIES = [DATA[at : at + SIZE] for at in range(HEAD, len(DATA), SIZE)]


def prefix(n: int, dropped: int = 0) -> Read:
    """What is read where `n` entries are whole."""
    of = THINGS[:n]
    marks = [thing for thing in of if isinstance(thing, Mark)]
    return Read([thing.pack() for thing in of if isinstance(thing, Record)], marks, dropped)


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk."""
    monkeypatch.setattr("os.fsync", lambda _: None)


# -- the format --------------------------------------------------------------------------------------------------------


def write(journal: Journal, things: list[Record | Mark]) -> None:
    for thing in things:
        journal.append(thing) if isinstance(thing, Record) else journal.mark(thing)


def test_the_bytes_are_those_of_the_description(path: Path) -> None:
    with Journal.create(path, HEADER) as journal:
        write(journal, THINGS)
        assert len(journal) == 12 and journal.next_step == FIRST + 12
    data = path.read_bytes()
    length = struct.unpack_from("<I", data, 8)[0]
    assert json.loads(data[12 : 12 + length]) == HEADER
    assert data == journals.file(data[12 : 12 + length])


def test_what_was_written_is_read(path: Path) -> None:
    path.write_bytes(DATA)
    with Journal.read(path) as journal:
        assert list(journal) == RECORDS and journal.marks == MARKS and journal.dropped == 0
        assert journal.header == HEADER and journal.first == FIRST and len(journal) == 12
        assert [journal.record(FIRST + i) for i in range(12)] == RECORDS
        for i in range(13):
            assert list(journal.since(FIRST + i)) == RECORDS[i:]
        assert journal.ended and journal.chosen == FIRST + 9 and journal.next_step == FIRST + 12
        assert [journal.noted(FIRST + i) for i in (0, 3, 4, 9)] == ["00" * 16, "01" * 16, None, "23" * 16]
        for step in (FIRST - 1, FIRST + 12, -1):
            with pytest.raises(IndexError, match=f"no record of step {step}: Steps 5 to 16 are whole"):
                journal.record(step)
    assert "12 records from step 5, 4 marks" in repr(journal)


def test_a_run_that_goes_on_has_not_ended(path: Path) -> None:
    path.write_bytes(DATA)
    with Journal.resume(path) as journal:
        journal.append(Record(FIRST + 12, (0.5,), (1.0, 2.0)))
        assert not journal.ended and journal.chosen == journal.next_step == FIRST + 13


def test_the_base_is_noted_until_a_mark_says_otherwise(path: Path) -> None:
    path.write_bytes(journals.file(of=RECORDS))
    with Journal.read(path) as journal:
        assert journal.noted(FIRST) == "ab" * 16 and journal.noted(FIRST + 1) is None


# -- cut ---------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_quick")
def test_cut_at_every_byte(path: Path) -> None:
    for size in range(len(DATA)):
        path.write_bytes(DATA[:size])
        if size < HEAD:
            for open_ in (Journal.read, Journal.resume):
                with pytest.raises(DamagedJournal, match=r"no journal of jaguar|header is cut short"):
                    open_(path)
            assert path.read_bytes() == DATA[:size]
            continue
        n, left = divmod(size - HEAD, SIZE)
        assert journals.read(path) == prefix(n, left)
        with Journal.resume(path, HEADER) as journal:
            assert journal.dropped == left and path.stat().st_size == size - left
            write(journal, THINGS[n:])
        assert path.read_bytes() == DATA, size


def test_an_empty_file_is_no_journal(path: Path) -> None:
    path.touch()
    with pytest.raises(DamagedJournal, match="no journal of jaguar"):
        Journal.read(path)


# -- damaged -----------------------------------------------------------------------------------------------------------


def test_every_flipped_bit(path: Path) -> None:
    """The header's: refused. An entry's: refused where whole ones follow; else what is before it."""
    path.write_bytes(DATA)
    with open(path, "r+b", buffering=0) as file:
        for at in range(len(DATA)):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([DATA[at] ^ 1 << bit]), at)
                found = journals.read(path)
                assert found == (prefix(len(THINGS) - 1, SIZE) if at >= len(DATA) - SIZE else None), (at, bit)
            os.pwrite(file.fileno(), DATA[at : at + 1], at)
    assert journals.read(path) == prefix(len(THINGS))


def test_damage_in_the_middle_says_what_is_whole_and_how_to_go_on(path: Path) -> None:
    path.write_bytes(DATA[: HEAD + 6 * SIZE + 9] + b"?" + DATA[HEAD + 6 * SIZE + 10 :])
    with pytest.raises(DamagedJournal, match=r"entry 6 .* Steps 5 to 8 are whole. .* cut the file to (\d+)") as error:
        Journal.resume(path)
    os.truncate(path, int(str(error.value).split("cut the file to ")[1].split()[0]))
    assert journals.read(path) == prefix(6)


def swapped(data: bytes, a: int, b: int) -> bytes:
    found = bytearray(data)
    found[a], found[b] = found[b], found[a]
    return bytes(found)


def joined(entries: list[bytes]) -> bytes:
    return DATA[:HEAD] + b"".join(entries)


def damages() -> dict[str, bytes]:
    """Files that are damaged in other ways than a cut or a bit, by name."""
    found = {f"swap {a} {a + d}": swapped(DATA, a, a + d) for d in (1, 7, SIZE) for a in range(0, len(DATA) - d, 3)}
    for size in (1, 16, SIZE, 512):
        for at in range(0, len(DATA), 41):
            found[f"zeros {at} {size}"] = DATA[:at] + bytes(len(DATA[at : at + size])) + DATA[at + size :]
    for i, one in enumerate(ENTRIES):
        found[f"twice {i}"] = joined([*ENTRIES[: i + 1], one, *ENTRIES[i + 1 :]])
        found[f"without {i}"] = joined([*ENTRIES[:i], *ENTRIES[i + 1 :]])
        found[f"to the end {i}"] = joined([*ENTRIES[:i], *ENTRIES[i + 1 :], one])
        found[f"to the front {i}"] = joined([one, *ENTRIES[:i], *ENTRIES[i + 1 :]])
    found["backwards"] = joined(ENTRIES[::-1])
    for n in (1, 4, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE, 5000):
        found[f"garbage {n}"] = DATA + bytes(i * 37 % 251 for i in range(n))
        found[f"zeros behind {n}"] = DATA + bytes(n)
    other = journals.file(HEADER | {"seed": 4})
    strange = [other[at : at + SIZE] for at in range(HEAD, len(other), SIZE)]
    for i in range(len(ENTRIES)):
        found[f"another's {i}"] = joined([*ENTRIES[:i], *strange[i:]])
        found[f"one of another's {i}"] = joined([*ENTRIES[:i], strange[i], *ENTRIES[i + 1 :]])
    found["another's header"] = other[:HEAD] + DATA[HEAD:]
    return found


def test_other_damage(path: Path) -> None:
    """Records are never others than those that were written, and never out of order."""
    kept = {"refused": 0, "prefix": 0}
    for name, data in damages().items():
        path.write_bytes(data)
        found = journals.read(path)
        intact = data[:HEAD] == DATA[:HEAD]
        assert found == (journals.expected(data) if intact else found), name
        if found is None:
            kept["refused"] += 1
            continue
        kept["prefix"] += 1
        assert found.records == prefix(len(THINGS)).records[: len(found.records)], name
    assert min(kept.values()) > 100


def test_entries_of_another_run_are_none_of_this(path: Path) -> None:
    for name, data in damages().items():
        if name.startswith("another's"):
            path.write_bytes(data)
            found = journals.read(path)
            n = int(name.split()[-1]) if name[-1].isdigit() else 0
            assert found == (prefix(n, len(data) - HEAD - n * SIZE)), name


# -- hostile -----------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Any, str]] = {
    "list": ([1, 2], "no JSON object"),
    "text": (b"not json", "no JSON"),
    "encoding": (b'{"format": "\xff\xfe"}', "no JSON"),
    "nothing": (b"", "no JSON"),
    "deep lists": (b"[" * 100_000 + b"]" * 100_000, "no JSON"),
    "deeper than Python": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "no JSON"),
    "deeper than any header": (HEADER | {"a": json.loads("[" * 500 + "]" * 500)}, "deeper than"),
    "huge int": (b'{"format":1,"first":0,"entry":64,"a":' + b"9" * 100_000 + b"}", "100000 digits"),
    "longer than 64 bits": (HEADER | {"seed": 10**40}, "an integer of 41 digits"),
    "NaN": (b'{"format":1,"first":0,"entry":64,"a":NaN}', "NaN is no number"),
    "infinity": (b'{"format":1,"first":0,"entry":64,"a":-Infinity}', "-Infinity is no number"),
}
for key, values, said in (
    ("format", [None, 0, 2, True, 1.0, "1", [1], {}], "has format"),
    ("first", [None, -1, True, 0.0, "0", [0], {}, 2**63, 2**64, 1e300], "first="),
    ("base", [None, [], "x", 3], "'base' of its header"),
    ("environment", [None, [], "x", 3], "'environment' of its header"),
    ("entry", [None, 0, 31, -80, True, 80.0, "80", LONGEST_ENTRY + 1, 2**31, 2**40, 2**64], "entry="),
):
    for value in values:
        WRONG[f"{key} {value!r}"] = (HEADER | {key: value}, said)
    if key in ("format", "first", "entry"):
        WRONG[f"no {key}"] = ({k: v for k, v in HEADER.items() if k != key}, said)


@pytest.mark.parametrize("case", WRONG)
def test_a_header_with_wrong_values_and_the_right_checksum(case: str, path: Path) -> None:
    header, message = WRONG[case]
    path.write_bytes(journals.packed(header) + b"".join(ENTRIES))
    for open_ in (Journal.read, Journal.resume):
        with pytest.raises(DamagedJournal, match=message):
            open_(path)


@pytest.mark.parametrize("length", [2**32 - 1, 2**31, 2**24 + 1, len(DATA), 2, 0])
def test_a_length_that_is_not_the_header_s(length: int, path: Path) -> None:
    path.write_bytes(DATA[:8] + struct.pack("<I", length) + DATA[12:])
    with pytest.raises(DamagedJournal, match="header is cut short"):
        Journal.read(path)


def test_wrong_entries_with_right_checksums(path: Path) -> None:
    head = DATA[:HEAD]
    record, mark = RECORDS[0].pack(), journals.payload(MARKS[0])[1]
    wrong: dict[str, tuple[bytes, str]] = {
        "kind 0": (journals.entry(head, 0, record), "kind 0"),
        "kind 3": (journals.entry(head, 3, record), "kind 3"),
        "zeros": (journals.entry(head, 0, b""), "kind 0"),
        "short record": (journals.entry(head, 1, record[:-1]), "bytes"),
        "long length": (journals.entry(head, 1, record, length=2**16 - 1), "bytes"),
        "no length": (journals.entry(head, 1, record, length=0), "bytes"),
        "damaged record": (journals.entry(head, 1, record[:-1] + b"?"), "checksum"),
        "many losses": (journals.entry(head, 1, struct.pack("<QBHH", 0, 7, 2**16 - 1, 2**16 - 1) + record), "bytes"),
        "short mark": (journals.entry(head, 2, mark[:-1]), "a mark has 25 bytes, got 24"),
        "mark before": (journals.entry(head, 2, struct.pack("<QB16s", FIRST - 1, 0, b"")), "a mark after 4 steps"),
        "mark behind": (journals.entry(head, 2, struct.pack("<QB16s", FIRST + 1, 1, b"")), "a mark after 6 steps"),
        "late": (journals.entry(head, 1, Record(2**64 - 1, (), ()).pack()), "step 18446744073709551615 stands"),
    }
    for name, (bad, message) in wrong.items():
        path.write_bytes(head + bad + b"".join(ENTRIES))
        with pytest.raises(DamagedJournal, match=message):
            Journal.read(path)
        assert journals.expected(path.read_bytes()) is None, name


BIG = """
import resource, sys
from jaguar import Journal
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    journal = Journal.read(sys.argv[1])
    print(sum(1 for _ in journal), "records")
except ValueError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def in_bounds(path: Path) -> tuple[str, int]:
    """What a fresh process says of a file, and by how many MB it grew."""
    done = subprocess.run([sys.executable, "-c", BIG, str(path)], capture_output=True, text=True, check=True)
    said, grown = done.stdout.splitlines()
    return said, int(grown)


@pytest.mark.parametrize("length", [2**32 - 1, 2**24 + 1])
def test_a_long_header_is_refused_unread(length: int, path: Path) -> None:
    with open(path, "wb") as file:
        file.write(journals.MAGIC + struct.pack("<I", length))
        file.truncate(2**33)  # without blocks
    said, grown = in_bounds(path)
    assert "header is cut short" in said and grown < 16


def test_long_journals_take_no_memory(path: Path) -> None:
    head = journals.packed(HEADER | {"entry": LONGEST_ENTRY, "first": 0})
    with open(path, "wb") as file:
        file.write(head)
        for step in range(1000):
            file.write(journals.entry(head, *journals.payload(Record(step, (), ())), size=LONGEST_ENTRY))
    said, grown = in_bounds(path)
    assert said == "1000 records" and grown < 16


# -- what is no file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("open_", [Journal.read, Journal.resume], ids=["read", "resume"])
def test_what_is_no_file(open_: Callable[[Path], Journal], path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_(path)
    os.mkfifo(path)
    for other in (path.parent, Path("/dev/null"), Path("/dev/zero"), path):
        with pytest.raises(ValueError, match="no file, but a folder, a pipe or a device"):
            open_(other)


def test_reading_needs_no_torch() -> None:
    program = "import sys; from jaguar import Journal, Record; print({'torch', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
