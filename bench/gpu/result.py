"""The result file: what the numbers depend on, and the numbers; saved after every row, since a run may be cut off."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gpu import report


def no_gpu() -> str | None:
    """Why nothing can be measured here, in one line; None where there is a GPU."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch (another Python: make gpu PYTHON=...)"
    if not torch.cuda.is_available() or torch.version.hip:
        return "no NVIDIA GPU: torch finds none on this machine"
    return None


def path_of(info: dict[str, Any], folder: Path) -> Path:
    """The result file of this GPU and day: <gpu>-<date>.json."""
    gpu = re.sub(r"[^a-z0-9]+", "-", info["gpu"].lower().replace("nvidia", "")).strip("-")
    return folder / f"{gpu}-{info['date'][:10]}.json"


def save(path: Path, result: dict[str, Any]) -> None:
    """Writes the result and its Markdown; what is there is replaced at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in (
        (path, json.dumps(result, indent=1) + "\n"),
        (path.with_suffix(".md"), report.markdown(result)),
    ):
        fresh = target.with_name(target.name + ".new")
        fresh.write_text(text)
        os.replace(fresh, target)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def keep(
    rows: Iterable[dict[str, Any]],
    result: dict[str, Any],
    path: Path | None,
    begin: float,
    said: Callable[[dict[str, Any]], str],
) -> int:
    """Adds rows to a result as they come, each printed and saved at once; returns how many are failures.

    Args:
        path: the result's file; None: it is not saved.
        begin: when the program began, by `time.monotonic`.
        said: a row in words.
    """
    failed = 0
    for row in rows:
        print(f"[{time.monotonic() - begin:5.1f} s] {said(row)}", flush=True)
        failed += row["kind"] == "failure"
        result["rows"].append(row)
        if path:
            save(path, result)
    return failed


def check_begun(parser: argparse.ArgumentParser, into: Path | None) -> None:
    """Ends a program whose --into is no file that `make gpu` has begun."""
    if into and not into.is_file():
        parser.error(f"--into {into}: there is no such file; only `make gpu` begins one")
