"""`jaguar replay`: a tuned model from its base model and the journal of the run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaguar import tasks
from jaguar.cli.finetune.prepared import made_trainable, name_labels
from jaguar.cli.journal import file_of
from jaguar.cli.output import say
from jaguar.models.adapters import Adapter
from jaguar.models.load import Loaded, load
from jaguar.optimizers.base import ZerothOrder
from jaguar.optimizers.identity import fingerprint_of
from jaguar.optimizers.replay import replay
from jaguar.record import JOURNAL, Journal
from jaguar.tasks.saved import save_task
from jaguar.trainer.saving import check_space, only_run, prepare_folder, save_files, write_model


def base_of(journal: Journal) -> dict[str, Any]:
    """Facts of the base model that `jaguar finetune` wrote down.

    Raises:
        ValueError: the journal is of another program.
    """
    base = journal.header.get("base")
    if not isinstance(base, dict) or not isinstance(base.get("adapter"), dict):
        raise ValueError(
            f"{str(journal.path)!r} was not written by jaguar finetune, and does not say how the model was made: make "
            "it as that program did, and call jaguar.replay(model, journal)"
        )
    return base


def load_base(journal: Journal, name: str | None = None, **loading: Any) -> Loaded:
    """The base model of a journal as the run began with it.

    Args:
        name: folder or hub name in place of the journal's.
        loading: options of `models.load`; what is left out is the run's.

    Raises:
        ValueError: the model cannot be loaded, or made trainable as it was.
    """
    base = base_of(journal)
    try:
        options = {"dtype": base["dtype"], "in_4bit": base["in_4bit"]} | loading
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in base["adapter"].items()}
        adapter = Adapter(**values)
        loaded = load(name, **options) if name is not None else _load_named(base["model"], journal, options)
        loaded = made_trainable(loaded, adapter, base["train"], base["seed"], base["prompt"])
        task = tasks.described(base["task"])
        if not isinstance(base["max_length"], (int, NoneType)):
            raise TypeError(f"max_length is {base['max_length']!r}")
        if loaded.kind == "classifier":
            name_labels(loaded.model, task)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(journal.path)!r} is of another version of jaguar finetune: {error}") from None
    return loaded


def _load_named(name: str, journal: Journal, options: dict[str, Any]) -> Loaded:
    """The model that a journal names."""
    try:
        return load(name, **options)
    except ValueError as error:
        if Path(name).exists():
            raise
        where = f"the base model that {str(journal.path)!r} names"
        raise ValueError(f"{where}: {error}. If it is elsewhere: jaguar replay --base DIR") from None


def journal_in(name: str) -> Path | None:
    """The journal of a folder that has no weights beside it, so that it stands for the model; None: of no such one."""
    folder = Path(name)
    weights = any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))
    return folder / JOURNAL if (folder / JOURNAL).is_file() and not weights else None


def load_tuned(name: str, console: Console, **loading: Any) -> Loaded:
    """A model of a folder or the hub; of a folder that has a journal and no weights, the one that it rebuilds.

    Args:
        loading: options of `models.load`.

    Raises:
        ValueError: it cannot be loaded, or rebuilt.
    """
    path = journal_in(name)
    if path is None:
        return load(name, **loading)
    own = {key: value for key, value in loading.items() if (key, value) not in (("dtype", "auto"), ("in_4bit", False))}
    with Journal.read(path) as journal:
        loaded = load_base(journal, **own)
        optimizer = _replayed(loaded.model, journal, console, None, "auto")
        say(console, *_verdict(optimizer, journal))
        return replace(loaded, cut=base_of(journal)["max_length"])


def rebuild(
    path: str, out: str, console: Console, *, model: str | None, steps: int | None, backend: str, **loading: Any
) -> None:
    """Rebuilds the model of a run, compares it with the fingerprint that the run noted, and saves it.

    Raises:
        ValueError: the journal, the base model or their fingerprints do not fit.
        OSError: the model cannot be saved.
    """
    folder = Path(out)
    file = file_of(path)
    with Journal.read(file) as journal, ExitStack() as alone:
        base_of(journal)
        prepare_folder(folder)
        alone.enter_context(only_run(folder))
        if any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            raise ValueError(f"the folder {out!r} already holds a model; choose another")
        with console.status("loading the base model"):
            loaded = load_base(journal, model, **loading)
        check_space(folder, loaded.model)
        begin = time.monotonic()
        optimizer = _replayed(loaded.model, journal, console, steps, backend)
        seconds = time.monotonic() - begin
        done, size = optimizer.steps_done - journal.first, file.stat().st_size
        say(
            console,
            f"{done} steps in {seconds:.1f} s ({done / max(seconds, 1e-9):.1f} steps/s), journal {size:,} bytes",
        )
        say(console, *_verdict(optimizer, journal))

        def write(to: Path) -> None:
            write_model(to, loaded.model, loaded.tokenizer)
            base: Mapping[str, Any] = journal.header["base"]
            save_task(tasks.described(base["task"]), to, base["max_length"])

        save_files(folder, write)
    say(console, f"the model of step {optimizer.steps_done} is in {out}")


def _replayed(model: Any, journal: Journal, console: Console, steps: int | None, backend: str) -> ZerothOrder:
    if journal.dropped:
        say(console, f"the last {journal.dropped} bytes of {journal.path} are no whole step and are left out", "yellow")
    if steps is None and not journal.ended:
        say(console, f"the run has not come to its end: this is its model after {journal.next_step} steps", "yellow")
    last = journal.chosen if steps is None else steps
    columns = TextColumn("replaying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("replaying", total=last, completed=journal.first)
        return replay(model, journal, steps, backend=backend, progress=lambda done: bar.update(task, completed=done))


def _verdict(optimizer: ZerothOrder, journal: Journal) -> tuple[str, str]:
    """A line on the fingerprint, and its style."""
    step = optimizer.steps_done
    if (noted := journal.noted(step)) is not None:  # replay has compared it
        return f"verified: fingerprint {noted}, as the run had it after {step} steps", "green"
    return (
        f"fingerprint {fingerprint_of(optimizer)}; the run noted none after {step} steps to compare it with",
        "yellow",
    )
