"""Checkpoints on the way to the disk: written in a folder beside their place, named at once, removed at once."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from jaguar.record.files import sync
from jaguar.trainer.saving import is_of_writing, reason, sync_all, unsaved

# What is written last of all, and lies in every checkpoint that is whole.
RECORD = "jaguar_checkpoint.json"
_LEFT = re.compile(rf"\.({PREFIX_CHECKPOINT_DIR}-\d+)\.(?:saving|old|removed)$")


def staged(folder: Path) -> Path:
    """The folder that is filled in the place of `folder`; it is in a folder of its own, as writers want it."""
    return _staging(folder) / folder.name


@contextmanager
def saving(folder: Path) -> Iterator[Path]:
    """For writers of a checkpoint: `staged(folder)`, which gets its name at once when they have ended well.

    Whenever the process is killed, `folder` is what it was before, or it is new and whole: its bytes are on the disk
    before it has that name. What is left then is removed by `recover`.

    Raises:
        OSError: writing failed (a full disk, say); an earlier checkpoint of that name is as it was.
    """
    recover(folder)
    made, old = staged(folder), _old(folder)
    try:
        made.mkdir(parents=True)
        yield made
        sync_all(made)
        if folder.exists():
            os.replace(folder, old)
        os.replace(made, folder)
        sync(folder.parent)
    except Exception as error:
        if not is_of_writing(error):
            raise
        why = reason(error, made.parent)
        recover(folder)
        raise unsaved(folder, why, _still(folder)) from error
    finally:
        recover(folder)


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints beside the one that was written last, so that `limit` are left (None or 0: all).

    Args:
        folder: written last; it stays.
        best: the best one so far, which stays too.
    """
    if limit is None or limit <= 0:
        return
    kept = {path.resolve() for path in (folder, Path(best or folder)) if path.is_dir()}
    others = [path for path in of(folder.parent) if path.resolve() not in kept]
    # Those of later steps are of a run before this one.
    others.sort(key=lambda path: (step_of(path) <= step_of(folder), step_of(path)))
    surplus = len(others) - max(limit - len(kept), 0)
    for path in others[: max(surplus, 0)]:
        _remove(path, _gone(path))


def _remove(folder: Path, gone: Path) -> None:
    """Removes a checkpoint; it gets another name at once, so that half of one never looks like a whole one."""
    _delete(gone)
    with contextlib.suppress(OSError):  # the run goes on with a checkpoint too many
        os.replace(folder, gone)
    _delete(gone)


def _delete(path: Path) -> None:
    """Removes a folder with its content, or the link if it is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def recover_all(parent: Path) -> list[str]:
    """Puts every checkpoint in `parent` back as it was before a process was killed while writing it.

    Returns:
        What was done, in words.
    """
    hidden = {found[1] for path in parent.glob(f".{PREFIX_CHECKPOINT_DIR}-*") if (found := _LEFT.match(path.name))}
    return [text for name in sorted(hidden) if (text := recover(parent / name))]


def recover(folder: Path) -> str:
    """Removes a half-written checkpoint, which never got its name; an earlier one of that name comes back.

    Returns:
        What was done, in words; empty: nothing.
    """
    staging, old, gone, text = _staging(folder), _old(folder), _gone(folder), ""
    if staging.exists():
        text = f"removed {staging}: a process was killed while it wrote {folder.name} there"
        _delete(staging)
    if old.exists() and not folder.exists():
        text = f"{folder} is as it was before a process was killed while it wrote it anew"
        os.replace(old, folder)
    if old.exists():
        _remove(old, gone)
    if gone.exists():
        text = text or f"removed {gone}: a process was killed while it removed {folder.name}"
        _delete(gone)
    return text


def of(parent: Path) -> list[Path]:
    """All checkpoints in a folder, by their step."""
    found = parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return sorted((path for path in found if path.is_dir() and path.name.rpartition("-")[2].isdecimal()), key=step_of)


def step_of(folder: Path) -> int:
    """The step that a checkpoint is of, by its name."""
    return int(folder.name.rpartition("-")[2])


def _still(folder: Path) -> str:
    # Those of later steps are of a run before this one.
    whole = [
        step_of(path) for path in of(folder.parent) if (path / RECORD).is_file() and step_of(path) <= step_of(folder)
    ]
    return f"the checkpoint of step {whole[-1]} is whole" if whole else "no checkpoint was written yet"


def _staging(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.saving")


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _gone(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.removed")
