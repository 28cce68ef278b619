"""Writing of journals: full disks, removed files, what does not fit, and when the disk is waited for."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers import journals
from helpers.journals import FIRST, HEADER, MARKS, RECORDS, SIZE, records
from helpers.journals import path as path
from jaguar.record import Journal, Mark, Record

HEAD = len(journals.packed(HEADER))


# -- failing disks -----------------------------------------------------------------------------------------------------


@contextmanager
def no_longer_than(size: int) -> Iterator[None]:
    """Files may not grow beyond so many bytes, as on a full disk: what fits of a write is written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 1, SIZE - 1])
def test_a_full_disk_leaves_whole_entries(path: Path, room: int) -> None:
    with Journal.create(path, HEADER) as journal:
        for record in RECORDS[:3]:
            journal.append(record)
        for thing in (RECORDS[3], MARKS[0]):
            with no_longer_than(HEAD + 3 * SIZE + room), pytest.raises(OSError, match="File too large"):
                journal.append(thing) if isinstance(thing, Record) else journal.mark(thing)
            assert records(path) == RECORDS[:3] and path.stat().st_size == HEAD + 3 * SIZE
            assert len(journal) == 3 and not journal.marks
        journal.append(RECORDS[3])  # there is room again
    assert records(path) == RECORDS[:4]


def test_half_an_entry_that_cannot_be_cut_off_is_written_over(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal.create(path, HEADER) as journal:
        journal.append(RECORDS[0])
        real = journal._file

        class Stuck:
            def __getattr__(self, name: str) -> object:
                return getattr(real, name)

            def truncate(self, size: int) -> None:
                raise OSError(errno.EIO, "truncate")

        monkeypatch.setattr(journal, "_file", Stuck())
        with no_longer_than(HEAD + SIZE + 40), pytest.raises(OSError, match="File too large"):
            journal.append(RECORDS[1])
        with Journal.read(path) as reader:
            assert list(reader) == RECORDS[:1] and reader.dropped == 40
        journal.append(RECORDS[1])
    assert records(path) == RECORDS[:2]


@pytest.mark.parametrize("room", [0, 10, HEAD - 1])
def test_no_file_is_begun_on_a_full_disk(path: Path, room: int) -> None:
    with no_longer_than(room), pytest.raises(OSError, match="File too large"):
        Journal.create(path, HEADER)
    assert [*path.parent.iterdir()] == []
    Journal.create(path, HEADER).close()


def test_what_cannot_be_forced_onto_the_disk_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal.create(path, HEADER, sync_every=2) as journal:
        journal.append(RECORDS[0])
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "fsync")))
            with pytest.raises(OSError, match="fsync"):
                journal.append(RECORDS[1])
        journal.append(RECORDS[2])
    assert records(path) == RECORDS[:3]


@contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder that others may enter, and this process another's: the administrator may write anywhere."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    own = os.geteuid()
    try:
        if own == 0:
            os.seteuid(65534)
        yield folder
    finally:
        os.seteuid(own)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_read_only_folders_and_files() -> None:
    with unprivileged() as folder:
        own, path = os.geteuid(), folder / "run.jaguar"
        os.seteuid(os.getuid())
        path.write_bytes(journals.file())
        path.chmod(0o444)
        folder.chmod(0o555)
        os.seteuid(own)
        with pytest.raises(PermissionError):
            Journal.create(folder / "other.jaguar", HEADER)
        with pytest.raises(PermissionError):
            Journal.resume(path)
        assert records(path) == RECORDS


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Journal.create(tmp_path / "no" / "run.jaguar", HEADER)


# -- removed -----------------------------------------------------------------------------------------------------------


def test_a_removed_file_comes_back_with_everything(path: Path) -> None:
    with Journal.create(path, HEADER) as journal:
        for record in RECORDS[:3]:
            journal.append(record)
        path.unlink()
        journal.append(RECORDS[3])
        assert records(path) == RECORDS[:4]
        path.unlink()
        with no_longer_than(HEAD + 2 * SIZE), pytest.raises(OSError, match="File too large"):
            journal.append(RECORDS[4])
        assert [*path.parent.iterdir()] == []
        journal.append(RECORDS[4])
        with pytest.raises(ValueError, match="a run is writing to"):
            Journal.resume(path)
    assert records(path) == RECORDS[:5] and [*path.parent.iterdir()] == [path]


def test_a_removed_file_does_not_take_the_place_of_another(path: Path) -> None:
    with Journal.create(path, HEADER) as journal:
        journal.append(RECORDS[0])
        path.unlink()
        path.write_text("notes")
        with pytest.raises(FileExistsError):
            journal.append(RECORDS[1])
    assert path.read_text() == "notes"


def test_a_file_that_has_another_name_is_written_on(path: Path) -> None:
    with Journal.create(path, HEADER) as journal:
        journal.append(RECORDS[0])
        path.rename(path.with_name("other"))
        journal.append(RECORDS[1])
    assert records(path.with_name("other")) == RECORDS[:2] and not path.exists()


# -- the disk is waited for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "expected"), [(0, 0), (1, 12), (5, 2), (12, 1), (100, 0)])
def test_the_disk_is_waited_for_every_so_many_steps(
    path: Path, every: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, [0]

    def counted(handle: int) -> None:
        calls[0] += 1
        real(handle)

    with Journal.create(path, HEADER, sync_every=every) as journal:
        monkeypatch.setattr("os.fsync", counted)
        for record in RECORDS:
            journal.append(record)
        assert calls == [expected]
        journal.mark(MARKS[0])
        assert calls == [expected + 1]
    assert calls == [expected + 2]


def test_the_name_of_a_file_is_on_the_disk_after_its_bytes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that a loss of power needs: bytes, their fsync, the name, its folder's fsync."""
    seen: list[str] = []
    sync, rename = os.fsync, os.rename

    def synced(handle: int) -> None:
        where = Path(os.readlink(f"/proc/self/fd/{handle}"))
        seen.append(f"{where.name} {where.stat().st_size}" if where.is_file() else f"folder {path.exists()}")
        sync(handle)

    def renamed(old: Path, new: Path) -> None:
        seen.append(f"{old.name} -> {new.name}")
        rename(old, new)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr("os.rename", renamed)
    Journal.create(path, HEADER)._file.close()
    assert seen == [f".run.jaguar.new {HEAD}", ".run.jaguar.new -> run.jaguar", "folder True"]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [-1, 1.0, True, None, "1"])
def test_sync_every_is_a_number_of_steps(path: Path, every: object) -> None:
    with pytest.raises(ValueError, match="give a number of steps, or 0"):
        Journal.create(path, HEADER, sync_every=every)  # type: ignore[arg-type]
    assert not path.exists()


def test_things_that_do_not_fit_leave_the_file_as_it_is(path: Path) -> None:
    path.write_bytes(journals.file())
    step = FIRST + 12
    with Journal.resume(path) as journal:
        for record, message in (
            (Record(step + 1, (0.5,), (1.0, 2.0)), "is of step 18, and step 17 is due"),
            (Record(step - 1, (0.5,), (1.0, 2.0)), "is of step 16, and step 17 is due"),
            (Record(step, (0.5,) * 40, (1.0, 2.0)), "has 353 bytes, and an entry has room for 73"),
        ):
            with pytest.raises(ValueError, match=message):
                journal.append(record)
        for mark, message in (
            (Mark(step + 1, "00" * 16), "a mark after 18 steps: Steps 5 to 16 are whole"),
            (Mark(FIRST - 1, "00" * 16), "a mark after 4 steps"),
            (Mark(step, "00" * 15), "give 32 hexadecimal digits"),
            (Mark(step, "00" * 17), "give 32 hexadecimal digits"),
            (Mark(step, "xy" * 16), "hexadecimal"),
        ):
            with pytest.raises(ValueError, match=message):
                journal.mark(mark)
    assert path.read_bytes() == journals.file()


@pytest.mark.parametrize("change", [{"first": -1}, {"entry": 10}, {"entry": 2**20}, {"format": 2}, {"a": float("nan")}])
def test_no_file_is_begun_with_a_header_that_cannot_be_read(path: Path, change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Journal.create(path, HEADER | change)
    assert not path.exists()


def test_true_is_another_value_than_1(path: Path) -> None:
    Journal.create(path, HEADER | {"a": 1}).close()
    Journal.resume(path, HEADER | {"a": 1.0}).close()
    with pytest.raises(ValueError, match="a is 1 there, True here"):
        Journal.resume(path, HEADER | {"a": True})


def test_a_header_with_other_values_is_refused_and_the_file_stays(path: Path) -> None:
    torn = journals.file()[:-7]
    path.write_bytes(torn)
    with pytest.raises(
        ValueError, match=r"another run: method\.rate is 0\.5 there, 0\.25 here; seed is 3 there, 4 here"
    ):
        Journal.resume(path, HEADER | {"seed": 4, "method": {"kind": "Method", "rate": 0.25}})
    assert path.read_bytes() == torn
