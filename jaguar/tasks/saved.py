"""The task that a tuned model was asked, saved beside it."""

from __future__ import annotations

import json
from pathlib import Path

from jaguar import tasks
from jaguar.models import saved as files
from jaguar.tasks.task import Task


def save_task(task: Task, folder: Path, max_length: int | None) -> None:
    """Writes the prompt beside the model, so that `jaguar eval` asks as the training did."""
    text = json.dumps(task.description() | {"max_length": max_length}, indent=2, ensure_ascii=False)
    (folder / files.FILE).write_text(text + "\n", encoding="utf-8")


def load_task(name: str) -> Task | None:
    """The task that lies beside a model, or None."""
    saved = files.read(name)
    if saved is None:
        return None
    try:
        return tasks.described({key: value for key, value in saved.items() if key != "max_length"})
    except (ValueError, TypeError):
        raise files.damaged(name) from None
