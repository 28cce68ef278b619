"""The file beside a tuned model with its task's prompt, and the number of tokens at which texts were cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "jaguar_task.json"


def read(name: str) -> dict[str, Any] | None:
    """Content of that file, or None where there is none."""
    path = Path(name) / FILE
    if not path.is_file():
        return None
    try:
        saved = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise damaged(name) from None
    cut = saved.get("max_length")
    if cut is not None and (type(cut) is not int or cut < 1):
        raise damaged(name)
    return saved


def damaged(name: str) -> ValueError:
    """The error of a file that cannot be read."""
    return ValueError(f"{Path(name) / FILE} is damaged; delete it and say what to do with --task or --template")
