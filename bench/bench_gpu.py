"""Everything that needs an NVIDIA GPU, in one go and under nine minutes: build, tests, compute-sanitizer, benchmark.

Uses the Python it is started with and what that has (torch, triton, pytest); installs and downloads nothing. A stage
that fails does not stop the later ones; the exit status is 1 if one did. Writes bench/results/<gpu>-<date>.json after
every row, and the same as Markdown. `make gpu` runs it.

    python bench/bench_gpu.py [--stages build tests memcheck racecheck kernels] [--out bench/results]
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu import report, result, stages

# Seconds from the start after which everything has ended: jobs on shared machines are often cut off at ten minutes.
LIMIT = 525.0
# Of which the benchmark, which comes last, gets at least what these leave.
CAPS = {"build": 30.0, "tests": 210.0, "memcheck": 50.0, "racecheck": 50.0}
# Time in which the benchmark ends the measurement that it is at.
_GRACE = 20.0


class Run:
    """One run: the stages in order, their results on disk, and what the time was used for."""

    def __init__(self, commit: str | None, folder: Path) -> None:
        self._begin = time.monotonic()
        info = result.machine(commit, shlex.join(["python3", *sys.argv]))
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

    def stage(self, name: str, make: Callable[[float], stages.Stage], cap: float) -> None:
        """Runs a stage for at most `cap` seconds and writes down how it ended."""
        seconds = min(cap, self.left)
        self.say(f"{name}: at most {seconds:.0f} s")
        try:
            done = make(seconds)
        except Exception as error:  # a stage that fails does not stop the later ones
            done = stages.Stage(name, "failed", 0.0, f"{type(error).__name__}: {error}")
        if name == "kernels" and self.path.is_file():
            self.result = result.load(self.path)
        self.result["stages"].append(stages.as_row(done))
        result.save(self.path, self.result)
        self.say(f"{name}: {done.status}; {done.note}")

    def kernels(self, seconds: float) -> stages.Stage:
        """The benchmark, in a process of its own: an illegal access ends it and not the run."""
        begin = time.monotonic()
        command = [sys.executable, result.ROOT / "bench" / "bench_kernels.py"]
        words = ["--into", self.path.resolve(), "--seconds", f"{max(seconds - _GRACE, 1.0):.0f}"]
        code = stages.run([*command, *words], seconds)
        rows = result.load(self.path)["rows"]
        measured = sum(row["kind"] in ("kernel", "step") for row in rows)
        failed = sum(row["kind"] == "failure" for row in rows)
        note = f"{measured} measurements"
        if code is None:
            note += f"; ended after {seconds:.0f} s"
        elif code:
            note += f"; {failed} failures" if failed else f"; exit status {code}"
        return stages.Stage("kernels", "failed" if code != 0 else "passed", time.monotonic() - begin, note)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*CAPS, "kernels")
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="which stages to run (default: all)")
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: bench/results; build for some stages)"
    )
    parser.add_argument("--commit", help="what to record as the commit where there is no git repository")
    args = parser.parse_args(arguments)
    if reason := result.no_gpu():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is running is ended with us
    os.environ.pop("TRITON_INTERPRET", None)
    # A part of a run must not replace the day's result.
    folder = result.ROOT / ("bench/results" if set(args.stages) == set(names) else "build")
    run = Run(args.commit, args.out or folder)
    works = {
        "build": stages.build,
        "tests": lambda seconds: stages.tests("tests", seconds),
        "memcheck": lambda seconds: stages.sanitizer("memcheck", seconds),
        "racecheck": lambda seconds: stages.sanitizer("racecheck", seconds),
        "kernels": run.kernels,
    }
    for name in names:
        if name in args.stages:
            run.stage(name, works[name], CAPS.get(name, LIMIT))
    for line in report.table(("target", "wanted", "measured", ""), report.target_rows(run.result)):
        print(line)
    failed = report.failures(run.result)
    for line in failed:
        print(f"FAILED {line}")
    run.say(f"written to {run.path} and {run.path.with_suffix('.md').name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
