"""Checkpoints of a run: whole or refused; the newest whole one is where a run goes on.

`finish` writes down, last of all, the files of a checkpoint and the facts of its run; `check` compares that record with
the folder and with the run that wants to go on. `jaguar.trainer.staging` puts them where they belong.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from jaguar.models.errors import Damaged, reading, said
from jaguar.models.untrusted import inside
from jaguar.trainer import staging, weights
from jaguar.trainer.staging import RECORD

# What else a run needs to go on as if it had never stopped.
_STATE = (OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME)
_COUNTED = {".safetensors", ".bin", ".pt", ".pth"}
_FREE_FILES = {"training_args.bin"}


# -- writing -----------------------------------------------------------------------------------------------------------


def finish(folder: Path, model: nn.Module | None, run: dict[str, Any]) -> None:
    """Makes sure that all weights come back (None: Trainer saves them itself), and lists the files and the run.

    Raises:
        OSError: the files read back other than they were written.
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
    """Raises ValueError, with the file's name, if one that was saved or that a run needs to go on is missing."""
    if lacking := _lacking(folder, processes):
        raise ValueError(f"cannot go on from {str(folder)!r}: {lacking}")


def check(folder: Path, run: dict[str, Any]) -> None:
    """Checks that `run` can go on from a checkpoint; warns of differences from a run that never stopped.

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
    """The missing files of a checkpoint, as a sentence; empty: none."""
    if not folder.is_dir():
        return "there is no such folder"
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
        progress(folder)
        return ""
    why = " (save_only_model=True saves none)" if OPTIMIZER_NAME in missing else ""
    return f"it has no {', '.join(missing)}{why}; the optimizer and the order of the rows would begin anew"


def newest(parent: Path, processes: int) -> Path:
    """The newest checkpoint from which a run can go on; says which newer ones it passes over.

    Raises:
        ValueError: there is none.
    """
    passed: list[str] = []
    for folder in reversed(staging.of(parent)):
        try:
            lacking = _lacking(folder, processes)
            if not lacking:
                check_states(folder, {})
                weights.check_readable(folder)
        except Damaged as error:
            lacking = str(error)
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
    saved = progress(folder).get("best_model_checkpoint")
    if saved is None:
        return
    beside = folder.parent / Path(saved).name  # of a run that was copied it is the copy
    if beside.is_dir() or Path(saved).is_dir():
        state.best_model_checkpoint = str(beside) if beside.is_dir() else saved
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


def check_states(folder: Path, scheduler: Mapping[str, Any]) -> None:
    """Checks that the files of optimizer and schedule have the form of such files.

    Args:
        folder: the checkpoint.
        scheduler: the state_dict of the schedule that goes on, as it begins.

    Raises:
        Damaged: one does not.
    """
    # Versions of torch differ in what they note for themselves.
    public = {name: value for name, value in scheduler.items() if not name.startswith("_")}
    for file, like in ((OPTIMIZER_NAME, {"state": {}, "param_groups": []}), (SCHEDULER_NAME, public)):
        path = folder / file
        with reading(path):
            check_kind(path, _loaded(path), like)


def _loaded(path: Path) -> Any:
    """The content of a torch file; tensors of the present format come as shapes, unread."""
    return torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))


def progress(folder: Path) -> dict[str, Any]:
    """Progress of a checkpoint's run: fields of TrainerState.

    Raises:
        Damaged: that cannot be read.
    """
    usual = vars(TrainerState()) | {"log_history": [], "stateful_callbacks": {}}
    best = {"best_metric": 0.0, "best_global_step": 0, "best_model_checkpoint": ""}  # None where there is none
    found = _json(folder / TRAINER_STATE_NAME, {key: usual[key] for key in ("global_step", "max_steps", "log_history")})
    if unknown := found.keys() - usual.keys():
        raise Damaged(f"{folder / TRAINER_STATE_NAME} is damaged, or of another transformers: it has {min(unknown)}")
    for key, value in (usual | best).items():
        if value is not None and key in found and not (key in best and found[key] is None):
            check_kind(folder / TRAINER_STATE_NAME, {key: found[key]}, {key: value})
    return found


def _record(folder: Path) -> dict[str, Any]:
    """The record that `finish` wrote; empty for checkpoints of other programs.

    Raises:
        Damaged: it cannot be read.
    """
    path = folder / RECORD
    if not path.is_file():
        return {}
    found = _json(path, {"run": {"processes": 1}, "files": {}})
    check_kind(path, found["files"], dict.fromkeys(found["files"], 0))
    if not all(map(inside, found["files"])):
        raise Damaged(f"{path} is damaged: it names files of another folder")
    if found.get("weights") is not None:
        check_kind(path, found["weights"], {"tensors": {}, "parts": {}, "beside": ""})
    return found


def _json(path: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """The object in a file, which has at least the keys of `like`, with values of their kinds.

    Raises:
        Damaged: it has not.
    """
    with reading(path):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise Damaged(f"{path} is damaged: it holds no JSON") from None
        check_kind(path, found, like)
        return dict(found)


def check_kind(path: Path, found: Any, like: Any, key: str = "") -> None:
    """Raises Damaged unless a value is of the kind of `like`: a number, a list, a dict with such values, ..."""
    kind = _kind(like)
    if isinstance(like, Mapping) and isinstance(found, Mapping):
        for name, value in like.items():
            if name not in found:
                raise Damaged(f"{path} is damaged: it has no {name}")
            check_kind(path, found[name], value, f"{name} ")
    elif kind and _kind(found) != kind:
        raise Damaged(f"{path} is damaged: its {key or 'content '}is {said(ValueError(repr(found)))}, no {kind}")


def _kind(value: Any) -> str:
    """A word for the kind of a value; empty for None, in whose place anything may be."""
    kinds = ((bool, "bool"), ((int, float), "number"), (str, "string"), ((list, tuple), "list"), (Mapping, "dict"))
    return next((word for kind, word in kinds if isinstance(value, kind)), "" if value is None else "object")
