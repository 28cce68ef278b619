"""Atomic saving: a reader sees the old files or the new ones."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from jaguar.models.errors import said
from jaguar.record.files import LOCKS, sync, taken

# Room for what is saved beside the weights: tokenizer, state, pictures.
_EXTRA_BYTES = 64 << 20
_STAGING = ".saving-"


def prepare_folder(folder: Path) -> None:
    """Makes `folder` and writes to it once.

    Raises:
        ValueError: that is not possible; said before the work instead of after it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to the output folder {str(folder)!r}: {error.strerror or error}") from None


def remove_leftovers(folder: Path) -> list[str]:
    """Removes what `save_files` left in `folder` when its process was killed; returns what was done, in words."""
    left = [path for path in folder.glob(f"{_STAGING}*") if path.is_dir()]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return [f"removed {path}: a process was killed while it saved there" for path in left]


def check_space(folder: Path, model: nn.Module) -> None:
    """Raises ValueError if the file system of `folder` has no room for the model."""
    needed = sum(p.numel() * p.element_size() for p in model.parameters()) + _EXTRA_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"saving needs about {needed / 1e6:,.0f} MB in {str(folder)!r}, but only {free / 1e6:,.0f} MB are free"
        )


def save_files(folder: Path, write: Callable[[Path], None]) -> None:
    """Runs `write` on a new folder beside the files of `folder`, then moves the finished files in, each at once.

    Raises:
        OSError: writing failed (a full disk, say); the files of `folder` are as they were.
    """
    with _staged(folder, write) as staging:
        blocked = [path.name for path in staging.iterdir() if (folder / path.name).is_dir()]
        if blocked:
            raise IsADirectoryError(f"{blocked[0]} is a folder there")
        for path in sorted(staging.iterdir(), key=lambda path: path.suffix == ".json"):  # config.json after its weights
            os.replace(path, folder / path.name)
        sync(folder)


@contextmanager
def _staged(parent: Path, write: Callable[[Path], None]) -> Iterator[Path]:
    """A new folder in `parent` that `write` has filled, its bytes on disk: a rename must not get there before them."""
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=parent))
    staging.chmod(0o755)
    try:
        write(staging)
        sync_all(staging)
        yield staging
    except Exception as error:
        if not is_of_writing(error):
            raise
        raise unsaved(parent, reason(error, staging), "what was there before is untouched") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def is_of_writing(error: Exception) -> bool:
    """True if the disk may be the cause: torch, safetensors and tokenizers raise other errors than OSError, too."""
    libraries = type(error) is Exception or type(error).__name__ == "SafetensorError"
    return isinstance(error, OSError) or libraries or type(error) is RuntimeError


def unsaved(place: Path, why: str, still: str) -> OSError:
    """The error to raise when writing to `place` failed; `still` says what is saved nevertheless."""
    return OSError(f"could not save to {str(place)!r}: {why}; {still}")


def reason(error: BaseException, place: Path) -> str:
    """The reason why writing in `place` failed; to be asked before the files are removed.

    On a full disk libraries say such things as "unexpected pos 64 vs 0": another attempt to write tells.
    """
    if isinstance(error, OSError) and error.errno is not None:
        failed: OSError | None = error
    else:
        failed = _failure(place)
    if failed is None:
        return said(error)
    if failed.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left on the disk"
    return failed.strerror or said(error)


def _failure(place: Path) -> OSError | None:
    """The error of writing a megabyte there, if it is one."""
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def sync_all(folder: Path) -> None:
    """Puts a folder and all that is in it on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def write_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """The model as safetensors and the tokenizer, in Hugging Face form."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


_locks: dict[tuple[int, int], int] = {}  # device and inode of a folder -> an open handle of it


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """While it is open no other process opens it for the same folder; it ends with the process, however that ends.

    Raises:
        ValueError: another process has it open.
    """
    if not LOCKS:  # on systems without such locks
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    at = os.fstat(handle)
    key = at.st_dev, at.st_ino
    if key in _locks:  # of this very run
        os.close(handle)
        yield
        return
    try:
        if not taken(handle):
            raise ValueError(f"another run is writing to {str(folder)!r}: wait for its end, or choose another folder")
        _locks[key] = handle
        yield
    finally:
        _locks.pop(key, None)
        os.close(handle)


def _let_go() -> None:
    """Closes the handles in a child, which would keep the locks of a parent that is killed."""
    while _locks:
        os.close(_locks.popitem()[1])


if LOCKS:
    os.register_at_fork(after_in_child=_let_go)
