"""Compilers that only pretend, and modules loaded from their files."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]

NVCC = """#!/bin/sh
echo "$@" >> "$0.log"
case "$*" in --version) echo "Cuda compilation tools, release ${NVCC_IS:-99.1}, V99.1.7"; exit 0;; esac
if [ -n "$NVCC_FAILS" ]; then echo "warming up"; echo "csrc/a.cu(3): error: no such thing"; exit 2; fi
while [ $# -gt 1 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done
"""


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem + "_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tool(path: Path, text: str = NVCC) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines that are ours."""
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("jaguar: ")]
