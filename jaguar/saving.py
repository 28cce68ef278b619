"""Saving so that nothing half-written ever stands in the place of something good."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

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


def unsaved(place: Path, error: Exception) -> OSError:
    """What to raise when writing to `place` failed, and what was there before was put back."""
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return OSError(f"could not save to {str(place)!r}: {reason}; what was there before is untouched")


@contextmanager
def _staged(parent: Path, write: Callable[[Path], None]) -> Iterator[Path]:
    """A new folder in `parent` that `write` has filled, its bytes on disk: a rename must not get there before them."""
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=parent))
    staging.chmod(0o755)
    try:
        write(staging)
        for path in [*staging.iterdir(), staging]:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        yield staging
    except Exception as error:  # a full disk is an OSError, a SafetensorError, a RuntimeError or a plain Exception
        raise unsaved(parent, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """The model as safetensors and the tokenizer, in Hugging Face form."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
