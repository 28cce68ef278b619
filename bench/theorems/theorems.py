"""Theorems 1 and 2 of arXiv 2506.04430, measured: slopes of their left sides over every variable of their terms.

    python bench theorems [--seeds N] [--only TEXT ...] [--out FOLDER]

JAGUAR SignSGD and JAGUAR Muon run on functions of which every constant is known (bench/theorems/quadratics.py), in a
regime for each term (bench/theorems/sweeps.py, with the theorems). The table says which slopes are the terms', and
why others are not: the theorems are upper bounds.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from machine import machine
from registry import RESULTS, parser_of
from theorems import report
from theorems.quadratics import left_side
from theorems.sweeps import SWEEPS

CONSOLE = Console(stderr=True)


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each value (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="sweeps with this in their names")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    sweeps = [s for s in SWEEPS if not args.only or any(text in s.name for text in args.only)]
    if not sweeps:
        parser.error(
            f"no sweep has {' or '.join(args.only)} in its name; there are: {'; '.join(s.name for s in SWEEPS)}"
        )
    if args.seeds < 1:
        parser.error("--seeds: give at least 1")
    torch.set_num_threads(1)
    about = machine() | {"seeds": str(args.seeds)}
    begin, rows = time.process_time(), []
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=CONSOLE) as progress:
        steps = sum(s.setting(v).steps for s in sweeps for v in s.values) * args.seeds
        task = progress.add_task("", total=steps)
        for sweep in sweeps:
            left: list[list[float]] = []
            for value in sweep.values:
                progress.update(task, description=f"{sweep.name} = {value:g}")
                left.append([])
                for seed in range(args.seeds):
                    left[-1].append(left_side(sweep.setting(value), seed))
                    progress.advance(task, sweep.setting(value).steps)
            rows.append(report.row(sweep, left))
    about["CPU seconds"] = f"{time.process_time() - begin:.0f}"
    args.out.mkdir(parents=True, exist_ok=True)
    text = report.markdown(rows, about)
    (args.out / "theorems.md").write_text(text, encoding="utf-8")
    (args.out / "theorems.json").write_text(
        json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )
    report.draw(rows, args.out / "theorems.png")
    CONSOLE.print(text, markup=False, highlight=False)
    CONSOLE.print(f"written to {args.out}")
    return 0
