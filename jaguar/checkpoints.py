"""Checkpoints of a run: whole or refused, and which of them a run goes on from.

`finish` writes down, last of all, what lies in a checkpoint and of which run it is; `check` compares that with what is
there and with the run that wants to go on. Folders that a killed process left half are recognised by `recover`.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from jaguar import weights
from jaguar.saving import unsaved

RECORD = "jaguar_checkpoint.json"
# What else a run needs to go on as if it had never stopped.
_STATE = (OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME)
_COUNTED = {".safetensors", ".bin", ".pt", ".pth"}
_FREE_FILES = {"training_args.bin"}


# -- writing -----------------------------------------------------------------------------------------------------------


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """For writers that fill the folder of a checkpoint themselves: until they end well, the folder counts as half.

    Raises:
        OSError: writing failed (a full disk, say); an earlier checkpoint of that name is back in its place.
    """
    recover(folder)
    old, mark = _old(folder), _mark(folder)
    if folder.exists():
        os.replace(folder, old)
    try:  # the order of these steps is what `recover` goes by
        mark.touch()
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        mark.unlink(missing_ok=True)
        if old.exists():
            os.replace(old, folder)
        if not isinstance(error, Exception):
            raise
        raise unsaved(folder, error) from error
    mark.unlink()
    shutil.rmtree(old, ignore_errors=True)


def finish(folder: Path, model: nn.Module | None, run: dict[str, Any]) -> None:
    """Makes sure that all weights come back (None: they are another's business), and writes down what there is.

    Raises:
        OSError: what was written is not what is read.
    """
    record: dict[str, Any] = {"run": run, "weights": None if model is None else weights.write(model, folder)}
    files = [path for path in [*folder.glob("*"), *folder.glob("*/*")] if path.suffix in _COUNTED]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    record["files"] = {file: size for file, size in sizes.items() if file not in _FREE_FILES}
    (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")


# -- reading -----------------------------------------------------------------------------------------------------------


def load_weights(model: nn.Module, folder: Path) -> None:
    """Puts the weights of a checkpoint into the model, bit for bit.

    Raises:
        ValueError: some are missing, or do not fit; they are named.
    """
    weights.read(model, folder, _record(folder).get("weights"))


def check_weights(model: nn.Module, folder: Path) -> None:
    """Raises ValueError if `load_weights` would."""
    weights.check(model, folder, _record(folder).get("weights"))


def check_whole(folder: Path, processes: int) -> None:
    """Raises ValueError if a checkpoint lacks what was saved, or what it takes to go on; it is named."""
    if lacking := _lacking(folder, processes):
        raise ValueError(f"cannot go on from {str(folder)!r}: {lacking}")


def check(folder: Path, run: dict[str, Any]) -> None:
    """Looks whether `run` can go on from a checkpoint; says what will differ from a run that never stopped.

    Raises:
        ValueError: something is missing that was saved, or that it takes to go on.
    """
    check_whole(folder, run["processes"])
    saved = _record(folder).get("run", {})
    known = [key for key in run if key in saved]  # nothing is known of checkpoints of others
    other = [f"{key.replace('_', ' ')} {saved[key]} then, {run[key]} now" for key in known if saved[key] != run[key]]
    if other:
        warnings.warn(
            f"going on from {str(folder)!r}, but not as a run that never stopped: {'; '.join(other)}", stacklevel=4
        )


def _lacking(folder: Path, processes: int) -> str:
    """What of a checkpoint is not there, in words; empty: nothing."""
    if not folder.is_dir():
        return "there is no such folder"
    if _mark(folder).exists():
        return "a process was killed while it wrote it, or is still writing"
    record = _record(folder)
    cut = [
        file
        for file, size in record.get("files", {}).items()
        if not (folder / file).is_file() or (folder / file).stat().st_size != size
    ]
    if cut:
        return f"{', '.join(cut[:3])} is missing or not as it was saved"
    needed = list(_STATE)
    if processes == record.get("run", {}).get("processes", processes):
        states = [f"rng_state_{i}.pth" for i in range(processes)] if processes > 1 else ["rng_state.pth"]
        needed += states
    missing = [file for file in needed if not (folder / file).is_file()]
    if not missing:
        return "" if "global_step" in _progress(folder) else f"{TRAINER_STATE_NAME} is damaged"
    why = " (save_only_model=True saves none)" if OPTIMIZER_NAME in missing else ""
    return f"it has no {', '.join(missing)}{why}; the optimizer and the order of the rows would begin anew"


def newest(parent: Path, processes: int) -> Path:
    """The newest checkpoint from which a run can go on; says which newer ones it passes over.

    Raises:
        ValueError: there is none.
    """
    passed: list[str] = []
    for folder in sorted(_all(parent), key=_step, reverse=True):
        lacking = _lacking(folder, processes)
        if not lacking:
            if passed:
                warnings.warn(f"going on from {folder.name}; {'; '.join(passed)}", stacklevel=3)
            return folder
        passed.append(f"{folder.name}: {lacking}")
    reason = f": {'; '.join(passed)}" if passed else ""
    raise ValueError(f"No valid checkpoint found in output directory ({parent}){reason}")


def find_best(state: TrainerState, folder: Path) -> None:
    """Puts the best checkpoint so far of the run that `folder` belongs to into `state`, also if it was moved since.

    Says so if there was one and it is gone.
    """
    saved = _progress(folder).get("best_model_checkpoint")
    if saved is None or Path(saved).is_dir():
        return
    moved = folder.parent / Path(saved).name
    if moved.is_dir():
        state.best_model_checkpoint = str(moved)
        return
    warnings.warn(f"the best checkpoint so far, {saved}, is gone: the best of what comes will be kept", stacklevel=4)
    state.best_model_checkpoint = state.best_metric = state.best_global_step = None


def say_what_stays(folder: Path, given: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> None:
    """Says which options of an optimizer are those of a checkpoint, where the run that goes on has others.

    Args:
        folder: the checkpoint.
        given: the optimizer's groups before its state was loaded.
        groups: and after; torch loads options, as it loads momentum.
    """
    # A scheduler moves lr, and keeps where it began.
    names = {key: key for key in groups[0] if key not in ("params", "param_names", "lr")} | {"initial_lr": "lr"}
    other = [
        f"{name}={now[key]}, not {then[key]}"
        for then, now in zip(given, groups, strict=True)
        for key, name in names.items()
        if key in then and key in now and then[key] != now[key]
    ]
    if other:
        warnings.warn(
            f"going on from {str(folder)!r} with what its optimizer had: {'; '.join(dict.fromkeys(other))}; for other "
            "options begin a new run with its weights",
            stacklevel=4,
        )


def _progress(folder: Path) -> dict[str, Any]:
    """How far the run was; empty if that cannot be read."""
    try:
        return dict(json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return {}


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        return {}  # of another program
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged") from None


# -- what a killed process leaves --------------------------------------------------------------------------------------


def recover_all(parent: Path) -> list[str]:
    """Puts every checkpoint in `parent` back to what it was before a process was killed while writing it.

    Returns:
        What was done, in words.
    """
    hidden = {path.name[1:].rpartition(".")[0] for path in parent.glob(f".{PREFIX_CHECKPOINT_DIR}-*")}
    return [text for name in sorted(hidden) if (text := recover(parent / name))]


def recover(folder: Path) -> str:
    """Removes a checkpoint that was left half; an earlier one of that name comes back.

    Returns:
        What was done, in words; empty: nothing.
    """
    old, mark, text = _old(folder), _mark(folder), ""
    if not old.exists() and not mark.exists():
        return text
    # Without the mark either nothing was written yet, or all of it.
    if mark.exists() or (folder.exists() and not (folder / TRAINER_STATE_NAME).is_file()):
        text = f"removed {folder}: a process was killed while it wrote it"
        shutil.rmtree(folder, ignore_errors=True)
        mark.unlink(missing_ok=True)
    if old.exists() and not folder.exists():
        text = f"{folder} is as it was before a process was killed while it wrote it anew"
        os.replace(old, folder)
    shutil.rmtree(old, ignore_errors=True)
    return text


def _mark(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.saving")


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _all(parent: Path) -> list[Path]:
    found = parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return [path for path in found if path.is_dir() and path.name.rpartition("-")[2].isdecimal()]


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])
