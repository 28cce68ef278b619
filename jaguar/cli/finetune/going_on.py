"""Runs that go on: the checkpoint or the journal where they do, and the words that say how."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaguar.cli.finetune.run import KEPT, Run
from jaguar.cli.flags import underscored
from jaguar.record import JOURNAL, Journal
from jaguar.trainer.checkpoints import check_kind, newest
from jaguar.trainer.journaling import steps_of
from jaguar.trainer.staging import of as checkpoints_of

_FLAG = "--resume_from_checkpoint"


def found(run: Run, folder: Path, processes: int, journals: bool) -> tuple[Run, str | bool]:
    """The run with the checkpoint from which it goes on, and that; True: there is none, and the journal has its steps.

    Args:
        folder: the run's output folder; named in place of a checkpoint it means the newest one in it.
        journals: the run keeps a journal; without one the steps of another are not taken.

    Raises:
        ValueError: there is nothing to go on with.
    """
    given = Path(str(run.resume_from_checkpoint))
    if given.resolve() != folder.resolve():
        return run, str(given)
    if checkpoints_of(folder):
        try:
            checkpoint = str(newest(folder, processes))
            return replace(run, resume_from_checkpoint=checkpoint), checkpoint
        except ValueError:
            if not journals or steps_of(folder) is None:
                raise
    elif not journals or steps_of(folder) is None:
        lacks = f"neither a checkpoint nor a {JOURNAL}" if journals else "no checkpoint, and --journal is false"
        raise ValueError(f"{str(given)!r} has {lacks}: begin without {_FLAG}")
    return run, True


def facts_of_journal(folder: Path) -> dict[str, Any]:
    """Settings and facts that `jaguar finetune` wrote into the journal of a folder.

    Raises:
        ValueError: another program wrote it.
    """
    path = folder / JOURNAL
    with Journal.read(path) as journal:
        base: dict[str, Any] = journal.header.get("base", {})
    check_kind(path, base, {key: KEPT[key] for key in ("settings", "facts")})
    return base


def go_on(folder: Path) -> str:
    """The command that goes on with this one."""
    words = []
    for before, word in itertools.pairwise(sys.argv):
        if underscored(word).partition("=")[0] != _FLAG and underscored(before) != _FLAG:
            words.append(word)
    return f"go on with: {_program()} {shlex.join([*words, _FLAG, str(folder)])}"


def _program() -> str:
    """Command by which a shell here calls this program."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']} -m jaguar"
    return "jaguar" if shutil.which("jaguar") else f"{shlex.quote(sys.executable)} -m jaguar"
