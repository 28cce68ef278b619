"""Fields of a result that its numbers depend on: processor, versions, commit, command line."""

from __future__ import annotations

import datetime
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from registry import ROOT

CPU = ("cpu", "threads", "torch", "python", "jaguar", "commit", "command")
# Of this tree and an earlier commit, side by side.
TWO_COMMITS = ("cpu", "threads", "torch", "python", "before", "after", "command")
GPU = ("gpu", "memory_gib", "multiprocessors", "driver", "cuda", "torch", "triton", "python", "system", "commit",
       "date", "command")  # fmt: skip


def machine(fields: Iterable[str] = CPU, **given: str | None) -> dict[str, Any]:
    """What the numbers depend on.

    Args:
        fields: names, in the order of the result.
        given: what to record in place of what this machine says, where it is not None.
    """
    return {name: given.get(name) or _SAID[name]() for name in fields}


def command(*without: str) -> str:
    """The command line, without these options and their values: folders are a matter of the machine."""
    kept, before = [], ""
    for word in sys.argv[1:]:
        if before not in without and word not in without and not word.startswith(tuple(f"{w}=" for w in without)):
            kept.append(word)
        before = word
    return " ".join(["python", sys.argv[0], *map(shlex.quote, kept)])


def _cpu() -> str:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return names[0] if names else platform.processor()


def _torch() -> Any:
    import torch

    return torch


def _jaguar() -> str:
    import jaguar

    return jaguar.__version__


def _gpu() -> Any:
    return _torch().cuda.get_device_properties(0)


def _described() -> str:
    """The commit of the repository, and whether files differ from it."""
    where = ("-c", "safe.directory=*", "-C", str(ROOT))
    return _printed("git", *where, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _printed(*words: str) -> str:
    """The first line that a command prints; "unknown" if it fails or is not there."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().partition("\n")[0] or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


_SAID: dict[str, Callable[[], Any]] = {
    "cpu": _cpu,
    "threads": lambda: str(_torch().get_num_threads()),
    "torch": lambda: str(_torch().__version__),
    "python": platform.python_version,
    "jaguar": _jaguar,
    "commit": _described,
    "command": command,
    "gpu": lambda: _gpu().name,
    "memory_gib": lambda: round(_gpu().total_memory / 2**30, 1),
    "multiprocessors": lambda: _gpu().multi_processor_count,
    "driver": lambda: _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    "cuda": lambda: _torch().version.cuda,
    "triton": lambda: _version("triton"),
    "system": platform.platform,
    "date": lambda: datetime.datetime.now().isoformat(timespec="seconds"),
}
