"""The journal of a run: a file with the run's header and the record of every finished step.

    file    = magic (8 bytes), length of the header (u32), header (JSON), CRC-32, entries
    entry   = kind (u8), length (u16), payload, zeros, CRC-32 over the file's header and the entry; all equally long
    payload = a packed `Record` or `Mark`

Little-endian. Reading needs no torch, executes nothing, and holds one entry in memory at a time.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

from jaguar.record import header as headers
from jaguar.record.files import lock, opened, placed, write
from jaguar.record.header import DamagedJournal
from jaguar.record.mark import Mark
from jaguar.record.record import Record

Packed = TypeVar("Packed", Record, Mark)

_ENTRY, _CHECKSUM = struct.Struct("<BH"), struct.Struct("<I")
_RECORD, _MARK = 1, 2  # kinds of entries


def entry_size(record_size: int) -> int:
    """Bytes of an entry that has room for records of so many bytes, and for marks."""
    return _ENTRY.size + max(record_size, Mark.SIZE) + _CHECKSUM.size


# Name of the journal in a run's folder.
JOURNAL = "journal.jaguar"


class Journal:
    """An append-only file of the records of a run: a header, and one checksummed entry of fixed size per step.

        weights after step N = base weights, moved by apply_(record) for each of the first N records

    `follow` keeps one of an optimizer, `read` only looks; `create` and `resume` are for writers of their own. What a
    killed process left half-written at the end is dropped and counted. Iterating reads records from the file, so memory
    does not grow with the run.

    Attributes:
        path: the file.
        header: the run as plain values: optimizer, method, seed, parameters, versions.
        first: number of the first record's step.
        dropped: bytes at the end that were no whole entry.
        marks: fingerprints in the order in which they were noted.

    Raises:
        DamagedJournal: (a ValueError) the file is no journal, or an entry in its middle is damaged; the message says
            what is whole.
        ValueError: the header is of another run, or another process writes to the file.
        OSError: the file cannot be opened or written.

    Example:

        with jaguar.Journal.follow(optimizer, "run.jaguar"):
            for batch in batches:
                optimizer.step(lambda: loss_of(batch))
        jaguar.replay(base_model, "run.jaguar")

    Equivalent to: `torch.save(records, path)` after every step, at the price of one small write.
    """

    def __init__(
        self, path: Path, file: BinaryIO, header: dict[str, Any], place: tuple[int, int], sync_every: int | None
    ) -> None:
        # `create`, `resume` and `read` call it.
        self.path, self.header, self.first = path, header, int(header["first"])
        self.dropped, self.marks = 0, list[Mark]()
        self._file, self._sync_every = file, sync_every
        self._start, self._salt = place
        self._size = int(header["entry"])
        self._n_records = self._n_entries = self._unsynced = 0
        self._marked: list[int] = []  # numbers of the entries that are marks
        self._ended = False
        self._following: Any = None  # the handle of a hook

    # -- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | os.PathLike[str], header: Mapping[str, Any], *, sync_every: int = 100) -> Journal:
        """Begins a journal in a new file.

        Args:
            header: JSON values. `entry` (`entry_size` of the longest record) and `first` (number of the first step)
                must be there; the rest is the caller's.
            sync_every: number of steps after which what was written is forced onto the disk, where a loss of power
                spares it; a process that is killed loses nothing in any case. 0: at marks and at the end only.

        Raises:
            FileExistsError: the file is there.
        """
        _check_sync(sync_every)
        own = {"format": headers.FORMAT} | dict(header)
        headers.check(Path(path), own)
        head, checksum = headers.packed(own)
        return cls(Path(path), placed(Path(path), [head]), own, (len(head), checksum), sync_every)

    @classmethod
    def resume(
        cls, path: str | os.PathLike[str], header: Mapping[str, Any] | None = None, *, sync_every: int = 100
    ) -> Journal:
        """Opens a journal to append to it; a torn end is cut off.

        Args:
            header: what the file's must be, but for keys that only inform; None: it is not compared.
            sync_every: as in `create`.
        """
        _check_sync(sync_every)
        file = opened(Path(path), "r+b")
        try:
            lock(file, Path(path))
            journal = cls._scanned(Path(path), file, sync_every)
            if header is not None:
                headers.compare(Path(path), journal.header, dict(header))
            if journal.dropped:
                file.truncate(journal._end)
        except BaseException:
            file.close()
            raise
        return journal

    @classmethod
    def follow(cls, optimizer: Any, path: str | os.PathLike[str], *, sync_every: int = 100) -> Journal:
        """Begins a journal of an optimizer, or goes on with it: every step that it applies is appended.

        Args:
            optimizer: a `jaguar.ZerothOrder`; at the step where the journal ends, if there is one.
            sync_every: as in `create`.

        Raises:
            ValueError: the file is of another optimizer, or of other steps.
        """
        header = optimizer.header()
        if Path(path).exists():
            journal = cls.resume(path, header, sync_every=sync_every)
            try:
                journal._check_goes_on(optimizer.steps_done, header["base"]["fingerprint"])
            except BaseException:
                journal.close()
                raise
        else:
            journal = cls.create(path, header, sync_every=sync_every)
        journal._following = optimizer.register_record_hook(lambda _, record: journal.append(record))
        return journal

    def _check_goes_on(self, step: int, fingerprint: str | None) -> None:
        """Raises ValueError unless a run after so many steps, with these weights, is the one that ends here."""
        if self.next_step != step:
            raise ValueError(
                f"the optimizer has finished {step} steps, and {str(self.path)!r} ends with {self.next_step}: "
                "jaguar.replay(optimizer, path) first, or choose another file"
            )
        wanted = self.noted(step)
        if None not in (wanted, fingerprint) and wanted != fingerprint:
            raise ValueError(
                f"the optimizer's tensors are not those that the run of {str(self.path)!r} had after {step} steps: "
                f"fingerprint {fingerprint}, not {wanted}; load that run's weights, or choose another file"
            )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Journal:
        """Opens a journal to look at it, also while a run writes to it."""
        file = opened(Path(path), "rb")
        try:
            return cls._scanned(Path(path), file, None)
        except BaseException:
            file.close()
            raise

    @classmethod
    def _scanned(cls, path: Path, file: BinaryIO, sync_every: int | None) -> Journal:
        """A journal whose entries were looked at up to the first that is not whole.

        Raises:
            DamagedJournal: whole entries follow that one, so that it is no torn end.
        """
        header, start, checksum = headers.unpacked(path, file)
        journal = cls(path, file, header, (start, checksum), sync_every)
        size = os.fstat(file.fileno()).st_size
        n_frames = (size - start) // journal._size
        for number in range(n_frames):
            found = journal._checked(number)
            if found is None:
                if any(journal._checked(later) for later in range(number + 1, n_frames)):
                    raise DamagedJournal(
                        f"{str(path)!r} is damaged: entry {number} does not meet its checksum, and whole ones follow. "
                        f"{journal._whole()} To go on from there cut the file to {journal._end} bytes (truncate -s)"
                    )
                break
            journal._take(*found)
        journal.dropped = size - journal._end
        return journal

    # -- reading ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._n_records

    @property
    def next_step(self) -> int:
        """Number of the step that the next record must be of."""
        return self.first + self._n_records

    @property
    def chosen(self) -> int:
        """Number of steps whose model is the run's: what its end noted, else all."""
        return self.marks[-1].step if self._ended else self.next_step

    @property
    def ended(self) -> bool:
        """True if the run came to its end, and no later run went on."""
        return self._ended

    def noted(self, step: int) -> Any:
        """The fingerprint of the trained tensors after so many steps; None: the run noted none."""
        for mark in reversed(self.marks):
            if mark.step == step:
                return mark.fingerprint
        return self.header.get("base", {}).get("fingerprint") if step == self.first else None

    def __iter__(self) -> Iterator[Record]:
        return self.since(self.first)

    def since(self, step: int) -> Iterator[Record]:
        """The records of step `step` and those after it."""
        marked = set(self._marked)
        for number in range(self._place_of(step), self._n_entries):
            if number not in marked:
                yield self._record(number)

    def record(self, step: int) -> Record:
        """The record of a step.

        Raises:
            IndexError: there is none.
        """
        if not self.first <= step < self.next_step:
            raise IndexError(f"no record of step {step}: {self._whole()}")
        return self._record(self._place_of(step))

    def _place_of(self, step: int) -> int:
        """Number of the entry that has the record of a step."""
        place = max(0, step - self.first)
        for mark in self._marked:  # each before it pushes it back by one
            if mark > place:
                break
            place += 1
        return place

    def _record(self, number: int) -> Record:
        found = self._checked(number)
        if found is None:  # somebody wrote into the file since it was opened
            raise DamagedJournal(f"{str(self.path)!r} is damaged: entry {number} does not meet its checksum")
        return self._unpacked(Record, found[1])

    def _unpacked(self, of: type[Packed], payload: bytes) -> Packed:
        try:
            return of.unpack(payload)
        except ValueError as error:
            raise DamagedJournal(f"{str(self.path)!r} is damaged: {error}") from None

    def _checked(self, number: int) -> tuple[int, bytes] | None:
        """Kind and payload of an entry; None: it is not whole."""
        self._file.seek(self._start + number * self._size)
        data = self._file.read(self._size)
        body = data[: -_CHECKSUM.size]
        if len(data) != self._size or _CHECKSUM.unpack_from(data, len(body))[0] != zlib.crc32(body, self._salt):
            return None
        kind, length = _ENTRY.unpack_from(body)
        return kind, body[_ENTRY.size : _ENTRY.size + length]

    def _take(self, kind: int, payload: bytes) -> None:
        """Counts an entry that was found, or written.

        Raises:
            DamagedJournal: it is not what can follow.
        """
        if kind == _MARK:
            mark = self._unpacked(Mark, payload)
            if not self.first <= mark.step <= self.next_step:
                raise DamagedJournal(f"{str(self.path)!r} is damaged: a mark after {mark.step} steps. {self._whole()}")
            self.marks.append(mark)
            self._marked.append(self._n_entries)
            self._ended = mark.chosen
        elif kind == _RECORD:
            if (found := self._unpacked(Record, payload).step) != self.next_step:
                raise DamagedJournal(
                    f"{str(self.path)!r} is damaged: a record of step {found} stands where step {self.next_step} is due"
                )
            self._n_records += 1
            self._ended = False
        else:
            raise DamagedJournal(f"{str(self.path)!r} is damaged, or of a later version: an entry of kind {kind}")
        self._n_entries += 1

    @property
    def _end(self) -> int:
        return self._start + self._n_entries * self._size

    def _whole(self) -> str:
        if not self._n_records:
            return "No step is whole."
        return f"Steps {self.first} to {self.next_step - 1} are whole."

    # -- writing ---------------------------------------------------------------------------------------------------

    def append(self, record: Record) -> None:
        """Adds the record of a finished step, which a killed process does not lose.

        Raises:
            ValueError: it is not of the step that is due, or too long, or the journal is open for reading.
            OSError: it could not be written, and the file ends with the entry before; or it could not be forced onto
                the disk.
        """
        if record.step != self.next_step:
            raise ValueError(f"the record is of step {record.step}, and step {self.next_step} is due")
        self._append(_RECORD, record.pack())
        self._unsynced += 1
        if self._sync_every and self._unsynced >= self._sync_every:
            self.sync()

    def mark(self, mark: Mark) -> None:
        """Notes a fingerprint, and forces everything onto the disk.

        Raises:
            ValueError: the journal has no such step, the fingerprint is none, or the journal is open for reading.
            OSError: it could not be written.
        """
        if not self.first <= mark.step <= self.next_step:
            raise ValueError(f"a mark after {mark.step} steps: {self._whole()}")
        self._append(_MARK, mark.pack())
        self.sync()

    def _append(self, kind: int, payload: bytes) -> None:
        if self._sync_every is None:
            raise ValueError(f"{str(self.path)!r} is open for reading: Journal.resume opens it for writing")
        room = self._size - _ENTRY.size - _CHECKSUM.size
        if len(payload) > room:
            raise ValueError(f"the record has {len(payload)} bytes, and an entry has room for {room}")
        body = _ENTRY.pack(kind, len(payload)) + payload + bytes(room - len(payload))
        if not os.fstat(self._file.fileno()).st_nlink:
            self._write_again()
        try:
            self._file.seek(self._end)
            write(self._file, body + _CHECKSUM.pack(zlib.crc32(body, self._salt)))
        except BaseException:  # half an entry must not stand before the next one
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise
        self._take(kind, payload)

    def _write_again(self) -> None:
        """Puts back the file, which somebody has removed, from the handle that still has it."""
        self._file.seek(0)
        again = placed(
            self.path, (self._file.read(min(1 << 20, self._end - at)) for at in range(0, self._end, 1 << 20))
        )
        self._file.close()
        self._file = again

    def sync(self) -> None:
        """Forces what was written onto the disk."""
        os.fsync(self._file.fileno())
        self._unsynced = 0

    def close(self) -> None:
        """Closes the file; what was written is on the disk then."""
        if self._following is not None:
            self._following.remove()
        with contextlib.closing(self._file):
            if self._sync_every is not None and not self._file.closed:
                self.sync()

    def __del__(self) -> None:
        if getattr(self, "_sync_every", 0) is None:  # a reader has nothing to lose
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Journal({str(self.path)!r}, {self._n_records} records from step {self.first}, {len(self.marks)} marks)"


def _check_sync(every: int) -> None:
    if not isinstance(every, int) or isinstance(every, bool) or every < 0:
        raise ValueError(f"sync_every={every!r}: give a number of steps, or 0")
