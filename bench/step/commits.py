"""Two commits side by side: what both benchmarks that compare with an earlier one need."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from registry import ROOT


def git(*words: str) -> str:
    """What git prints."""
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def has(commit: str, path: str) -> bool:
    """Whether there is a file in a commit; of an unknown commit there is none."""
    return not subprocess.run(["git", "cat-file", "-e", f"{commit}:{path}"], cwd=ROOT, capture_output=True).returncode


@contextmanager
def trees(baseline: str) -> Iterator[dict[str, Path]]:
    """The files of "before", a commit that is checked out meanwhile, and of "after", this tree."""
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        git("worktree", "add", "--detach", str(before), baseline)
        try:
            yield {"before": before, "after": ROOT}
        finally:
            git("worktree", "remove", "--force", str(before))


def names(baseline: str) -> dict[str, str]:
    """The two commits as a result has them."""
    return {"before": git("rev-parse", "--short", baseline), "after": git("describe", "--always", "--dirty")}
