"""Runs all that needs an NVIDIA GPU, in one go and under nine minutes: build, tests, compute-sanitizer, benchmark.

Uses the Python it is started with and what that has (torch, triton, pytest); installs and downloads nothing. A stage
that fails does not stop the later ones; the exit status is 1 if one did. Writes bench/results/<gpu>-<date>.json after
every row, and the same as Markdown. `make gpu` runs it.

    python bench gpu [--stages build tests ... kernels newton-schulz] [--out bench/results]
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpu import report, result, stages
from machine import GPU, command, machine
from registry import BENCH, RESULTS, parser_of

# Seconds from the start after which everything has ended: jobs on shared machines are often cut off at ten minutes.
LIMIT = 535.0
# None: what the others leave. Few builds take their 90 seconds: nvcc works on all files at once. The sanitizers' two
# tools run side by side: each is one process that waits for the compiler and for torch's own kernels.
CAPS: dict[str, float | None] = {
    "build": 75.0,
    "tests": 150.0,
    "sanitizers": 90.0,
    "kernels": None,
    "newton-schulz": 75.0,
    "models": 55.0,
}
# Stages that are a benchmark of the same name: its options, and the time in which it ends the measurement it is at.
_BENCHMARKS: dict[str, tuple[list[str], float]] = {
    "kernels": ([], 20.0),
    "newton-schulz": (["--speed"], 10.0),
    "models": ([], 10.0),
}
_MEASURED = {"kernels": ("kernel", "step"), "newton-schulz": ("ns", "product"), "models": ("model",)}
_SANITIZERS = ("memcheck", "racecheck")


class Run:
    """One run: the stages in order, their results on disk, and what the time was used for."""

    def __init__(self, commit: str | None, folder: Path) -> None:
        self._begin = time.monotonic()
        info = machine(GPU, commit=commit, command=command("--out"))
        self.path = result.path_of(info, folder)
        self.result: dict[str, Any] = {"machine": info, "stages": [], "lists": {}, "rows": []}
        for key, value in info.items():
            self.say(f"{key}: {value}")
        result.save(self.path, self.result)

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return LIMIT - (time.monotonic() - self._begin)

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{LIMIT - self.left:5.1f} s] {text}", flush=True)

    def stage(self, name: str, make: Callable[[float], list[stages.Stage]], cap: float) -> None:
        """Runs a stage for at most `cap` seconds and writes down how it (or what it consists of) ended."""
        seconds = max(min(cap, self.left), 1.0)
        self.say(f"{name}: at most {seconds:.0f} s")
        try:
            done = make(seconds)
        except Exception as error:  # a stage that fails does not stop the later ones
            done = [stages.Stage(name, "failed", 0.0, f"{type(error).__name__}: {error}")]
        if name in _BENCHMARKS and self.path.is_file():
            self.result = result.load(self.path)
        self.result["stages"] += map(stages.as_row, done)
        result.save(self.path, self.result)
        for each in done:
            self.say(f"{each.name}: {each.status}; {each.note}")

    def benchmark(self, name: str, seconds: float) -> list[stages.Stage]:
        """A benchmark, in a process of its own: an illegal access ends it and not the run."""
        begin = time.monotonic()
        options, grace = _BENCHMARKS[name]
        command = [sys.executable, BENCH, name, *options]
        words = ["--into", self.path.resolve(), "--seconds", f"{max(seconds - grace, 1.0):.0f}"]
        before = len(result.load(self.path)["rows"])
        code = stages.run([*command, *words], seconds)
        rows = result.load(self.path)["rows"][before:]
        measured = sum(row["kind"] in _MEASURED[name] for row in rows)
        failed = sum(row["kind"] == "failure" for row in rows)
        note = f"{measured} measurements"
        if code is None:
            note += f"; ended after {seconds:.0f} s"
        elif code:
            note += f"; {failed} failures" if failed else f"; exit status {code}"
        return [stages.Stage(name, "failed" if code != 0 else "passed", time.monotonic() - begin, note)]


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    names = tuple(CAPS)
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="which stages to run (default: all)")
    parser.add_argument(
        "--out", type=Path, help="folder of results and logs (default: bench/results and build; build for some stages)"
    )
    parser.add_argument("--commit", help="what to record as the commit in place of what git says")
    args = parser.parse_args(arguments)
    if reason := result.no_gpu():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is running is ended with us
    os.environ.pop("TRITON_INTERPRET", None)
    # A part of a run must not replace the day's result.
    folder = RESULTS if set(args.stages) == set(names) else stages.BUILD
    run, logs = Run(args.commit, args.out or folder), args.out or stages.BUILD
    works: dict[str, Callable[[float], list[stages.Stage]]] = {
        "build": lambda seconds: [stages.build(seconds, logs)],
        "tests": lambda seconds: [stages.tests("tests", seconds, logs)],
        "sanitizers": lambda seconds: stages.together(
            *(partial(stages.sanitizer, tool, seconds, logs) for tool in _SANITIZERS)
        ),
        **{name: partial(run.benchmark, name) for name in _BENCHMARKS},
    }
    chosen = [name for name in names if name in args.stages]
    for i, name in enumerate(chosen):
        later = sum(CAPS[other] or 0.0 for other in chosen[i + 1 :])
        run.stage(name, works[name], CAPS[name] or run.left - later)
    for line in report.table(("target", "wanted", "measured", ""), report.target_rows(run.result)):
        print(line)
    failed = report.failures(run.result)
    for line in failed:
        print(f"FAILED {line}")
    run.say(f"written to {run.path} and {run.path.with_suffix('.md').name}")
    return 1 if failed else 0
