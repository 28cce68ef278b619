"""Files that are whole or not there, held by one process, and written to the end."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO
from weakref import WeakSet

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCKS = fcntl is not None
_held: WeakSet[BinaryIO] = WeakSet()


def write(file: BinaryIO, data: bytes) -> None:
    """Writes all of it; an unbuffered file may take less at a time."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def opened(path: Path, mode: str) -> BinaryIO:
    """A file that is there, unbuffered.

    Raises:
        ValueError: it is no regular file; opening a pipe would wait for somebody at its other end.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{str(path)!r} is no file, but a folder, a pipe or a device: give the path of a file")
    return open(path, mode, buffering=0)  # type: ignore[return-value]


def placed(path: Path, parts: Iterable[bytes]) -> BinaryIO:
    """A new file that gets its name when all of it is on the disk: a killed process leaves no half of one.

    Raises:
        FileExistsError: there is one of that name.
    """
    made = path.with_name(f".{path.name}.new")
    file = os.fdopen(os.open(made, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
    try:
        lock(file, path)
    except BaseException:  # it is another process's
        file.close()
        raise
    try:
        # Before anything is written: another process may have given this very file its name, and closed it.
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        file.truncate()
        for part in parts:
            write(file, part)
        os.fsync(file.fileno())
        os.rename(made, path)
        with contextlib.suppress(OSError):  # of systems that open no folders
            sync(path.resolve().parent)
    except BaseException:
        file.close()
        with contextlib.suppress(OSError):
            made.unlink()
        raise
    return file


def lock(file: BinaryIO, path: Path) -> None:
    """Holds a file for this process, as long as it is open.

    Raises:
        ValueError: another process holds it.
    """
    _held.add(file)
    if not taken(file.fileno()):
        raise ValueError(f"a run is writing to {str(path)!r}: wait for its end, or choose another file")


def taken(handle: int) -> bool:
    """Takes the lock of an open file or folder, which ends with the handle; False: another process has it."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # of file systems without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
    return True


def sync(path: Path) -> None:
    """Puts a file, or the names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _let_go() -> None:
    """Closes the files in a child, which would hold them when its parent is killed."""
    for file in list(_held):
        file.close()


if LOCKS:
    os.register_at_fork(after_in_child=_let_go)
