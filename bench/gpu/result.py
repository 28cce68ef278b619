"""The result file: what the numbers depend on, and the numbers; saved after every row, since a run may be cut off."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from registry import ROOT

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


def machine(commit: str | None, command: str) -> dict[str, Any]:
    """What the numbers depend on.

    Args:
        commit: what to record in place of what git says, if there is git.
        command: the command line.
    """
    import torch

    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "memory_gib": round(device.total_memory / 2**30, 1),
        "multiprocessors": device.multi_processor_count,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": commit or described() or "unknown",
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "command": command,
    }


def described() -> str | None:
    """The commit of the repository, and whether files differ from it."""
    where = ("-c", "safe.directory=*", "-C", str(ROOT))
    return _said("git", *where, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


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


def check_begun(parser: argparse.ArgumentParser, into: Path | None) -> None:
    """Ends a program whose --into is no file that `make gpu` has begun."""
    if into and not into.is_file():
        parser.error(f"--into {into}: there is no such file; only `make gpu` begins one")


def _said(*command: str) -> str | None:
    """The first line that a command prints, None if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
