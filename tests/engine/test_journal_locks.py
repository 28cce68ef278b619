"""Writers of one journal: one at a time, whichever way the others came, and readers beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from helpers import journals
from helpers.journals import FIRST, HEADER, RECORDS, records
from helpers.journals import path as path
from jaguar.record import Journal, Mark, Record


def test_two_writers_in_one_process(path: Path) -> None:
    with Journal.create(path, HEADER) as journal:
        journal.append(RECORDS[0])
        with pytest.raises(ValueError, match="a run is writing to"):
            Journal.resume(path)
        journal.append(RECORDS[1])
    with Journal.resume(path) as journal:
        journal.append(RECORDS[2])
    assert records(path) == RECORDS[:3]


def test_a_journal_that_is_there_is_not_begun_again(path: Path) -> None:
    with Journal.create(path, HEADER) as journal:
        journal.append(RECORDS[0])
        with pytest.raises(FileExistsError):
            Journal.create(path, HEADER)
    assert records(path) == RECORDS[:1] and [*path.parent.iterdir()] == [path]


WRITER = """
import os, sys, time
from jaguar import Journal, Record
journal = Journal.resume(sys.argv[1])
journal.append(Record(5, (0.5,), (1.0, 2.0)))
if sys.argv[2] == "forks":
    if not (child := os.fork()):
        try:
            journal.append(Record(6, (0.5,), (1.0, 2.0)))
            os.write(1, b"appended\\n")
        except ValueError as error:
            os.write(1, f"{error}\\n".encode())
        sys.stdin.read()
        os._exit(0)
    os.write(1, f"forked {child}\\n".encode())
    os.read(0, 1)
else:
    print("open", flush=True)
    sys.stdin.read()
"""


def started(path: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), how]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_killed_writer_frees_the_file(path: Path) -> None:
    Journal.create(path, HEADER).close()
    with started(path, "alone") as other:
        assert other.stdout is not None and other.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match="a run is writing to"):
            Journal.resume(path)
        assert records(path) == [Record(5, (0.5,), (1.0, 2.0))]
        other.send_signal(signal.SIGKILL)
    with Journal.resume(path) as journal:
        assert len(journal) == 1


def test_a_child_neither_writes_nor_holds_the_file(path: Path) -> None:
    """Workers of a loader, which are forked, may outlive a killed run."""
    Journal.create(path, HEADER).close()
    with started(path, "forks") as other:
        assert other.stdout is not None
        lines = sorted(other.stdout.readline() for _ in range(2))
        assert lines[0].startswith("I/O operation on closed file") and lines[1].startswith("forked")
        with pytest.raises(ValueError, match="a run is writing to"):
            Journal.resume(path)
        other.send_signal(signal.SIGKILL)
        other.wait()
        child = int(lines[1].split()[1])
        os.kill(child, 0)  # it lives
        with Journal.resume(path) as journal:
            assert len(journal) == 1


def test_a_file_that_is_read_can_be_written(path: Path) -> None:
    """Whatever a reader sees in the middle of a write is a prefix."""
    done = threading.Event()
    n = 0

    def run() -> None:
        try:
            with Journal.create(path, HEADER | {"first": 0}, sync_every=0) as journal:
                for step in range(400):
                    journal.append(Record(step, (0.5,), (1.0, float(step))))
        finally:
            done.set()

    writer = threading.Thread(target=run)
    writer.start()
    while not done.is_set() or n < 400:
        if path.exists():
            with Journal.read(path) as journal:
                found = list(journal)
            assert [record.losses[1] for record in found] == list(range(len(found))) and len(found) >= n
            n = len(found)
    writer.join()


def test_readers_do_not_write(path: Path) -> None:
    path.write_bytes(journals.file())
    with Journal.read(path) as journal:
        for thing in (Record(FIRST + 12, (0.5,), (1.0, 2.0)), Mark(FIRST, "00" * 16)):
            with pytest.raises(ValueError, match=r"open for reading: Journal\.resume"):
                journal.append(thing) if isinstance(thing, Record) else journal.mark(thing)
    assert path.read_bytes() == journals.file()


def test_a_half_begun_file_is_taken_over(path: Path) -> None:
    """A process was killed before the new file had its name."""
    path.with_name(f".{path.name}.new").write_bytes(b"half" * 1000)
    with Journal.create(path, HEADER) as journal:
        journal.append(RECORDS[0])
    assert records(path) == RECORDS[:1] and [*path.parent.iterdir()] == [path]


def test_one_of_two_processes_begins_a_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other opened the unnamed file, and comes to its lock when it has its name and is closed."""
    from jaguar.record import files

    real, first = files.lock, [True]

    def late(file: object, of: Path) -> None:
        if first.pop():
            first.append(False)
            with Journal.create(path, HEADER) as journal:
                journal.append(RECORDS[0])
        else:
            first.append(False)
        real(file, of)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "lock", late)
    with pytest.raises(FileExistsError):
        Journal.create(path, HEADER)
    assert records(path) == RECORDS[:1]
