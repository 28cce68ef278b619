"""What every method reaches with as many forward passes on the same work: a search of settings, a table, curves.

    python bench/bench_learning.py [--passes N] [--seeds N] [--only NAME ...] [--out FOLDER]

Work "bytes": a byte-level Llama of 0.12 M parameters, all of them or LoRA. Learning rates are chosen by successive
halving on dev rows; the table has held-out rows, by the seeds. Runs are lines of FOLDER/bytes.jsonl: what stands there
is not run again, so a search that was killed goes on where it was. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from bench_step import machine
from byte_model import CONSOLE
from commits import ROOT
from learning import report
from learning.contenders import CONTENDERS
from learning.search import Journal, run, search
from learning.works import Bytes
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

BASELINE = "ZO-SGD"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=2000, help="forward passes of a run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of the best setting (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="contenders with this in their names")
    parser.add_argument("--variants", nargs="+", default=list(Bytes.variants), choices=Bytes.variants)
    parser.add_argument("--pretraining", type=int, default=1000, help="steps of AdamW (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/learning", help="folder of the results")
    args = parser.parse_args()
    contenders = [c for c in CONTENDERS if not args.only or any(text in c.name for text in args.only)]
    if not contenders:
        parser.error(f"none is called {' or '.join(args.only)}; there are {', '.join(c.name for c in CONTENDERS)}")
    if args.passes < 40:
        parser.error("--passes: give at least 40, a quarter of which shows what a setting is worth")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    seeds = list(range(args.seeds))
    work = Bytes(args.out, args.pretraining)
    journal = Journal(args.out / f"{work.name}.jsonl")
    journal.begin(machine())
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=CONSOLE) as progress:
        task = progress.add_task("", total=None)
        for variant in args.variants:
            for contender in contenders:
                for point in search((work.name, variant), contender, args.passes, seeds, journal.results):
                    setting = ", ".join(f"{key} {value:g}" for key, value in point.setting.items())
                    text = f"{variant}: {contender.name}, {setting}, {point.budget} passes, seed {point.seed}"
                    progress.update(task, description=text)
                    journal.add(point, run(work, contender, point))
    texts: list[str] = []
    tables: dict[str, Any] = {}
    for variant in args.variants:
        table = report.rows((work.name, variant), contenders, args.passes, seeds, journal.results)
        title = f"{work.name}, {variant}: {args.passes} forward passes, {args.seeds} seeds"
        texts.append(report.markdown(title, table, BASELINE))
        report.draw(table, title, args.out / f"{work.name}-{variant}.png")
        tables[variant] = [{key: value for key, value in row.items() if key != "curves"} for row in table]
    (args.out / f"{work.name}.md").write_text("\n".join(texts), encoding="utf-8")
    (args.out / f"{work.name}.json").write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    CONSOLE.print("\n".join(texts), markup=False, highlight=False)
    CONSOLE.print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
