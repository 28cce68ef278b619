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
        OSError: writing failed (a full disk, say); `folder` is as it was.
    """
    with _staging(folder) as staging:
        write(staging)
        for path in sorted(
            staging.iterdir(), key=lambda path: path.suffix == ".json"
        ):  # config.json last, after its weights
            os.replace(path, folder / path.name)


def save_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Runs `write` on a new folder that then takes the place of `folder` as a whole.

    Raises:
        OSError: writing failed (a full disk, say); `folder` is as it was.
    """
    with _staging(folder.parent) as staging:
        write(staging)
        old = staging.with_name(staging.name + ".old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(staging, folder)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _staging(parent: Path) -> Iterator[Path]:
    from safetensors import SafetensorError

    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=parent))
    staging.chmod(0o755)
    try:
        yield staging
        _sync(staging if staging.exists() else parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"could not save to {str(parent)!r}: {reason}; what was there before is untouched") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """The model as safetensors and the tokenizer, in Hugging Face form."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        with path.open("rb+") as file:  # a rename must not be on disk before the bytes are
            os.fsync(file.fileno())
