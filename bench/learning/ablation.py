"""Ablation of momentum: held-out loss of JAGUAR SignSGD and JAGUAR Muon against beta, by coordinates and update.

    python bench ablation [--passes N] [--seeds N] [--only TEXT ...] [--out FOLDER]

Work "bytes" of `python bench learning`, all weights, with 4 rows a step: many steps, and noise to average. For every
cell of the table lr is searched on dev rows; held-out rows are reported. Runs are lines of FOLDER/ablation.jsonl: what
stands there is not run again, so a computation that was killed goes on where it was, and one with more seeds or betas
takes what is there. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from learning.byte_model import CONSOLE
from learning.momentum import METHODS, UPDATES, Watch, cell, search
from learning.search import Journal, finals, run
from learning.works import Bytes
from machine import machine
from registry import RESULTS, parser_of

PANELS = [(method, update) for method in METHODS for update in UPDATES]
COORDINATES = (1, 0.01, 0.1, 1.0)
BETAS = (0.0, 0.5, 0.9, 0.99)
_LEGEND = {"1": "1 of them all", "0.01": "0.01", "0.1": "0.1", "1.0": "1.0: all"}
_POINTS = 2  # of a curve: ends are what is compared
_MEASURED = ("entries", "flips", "moved", "cosine")
_EXPLAINED = (
    "What momentum did. Entries: of a coordinate's momentum in a run. Moved: share of the coordinates that a step",
    "moves. Flips: share of the sampled coordinates at which momentum has another sign than what came in. Cosine: of",
    "the angle between a step and the downhill direction on other rows, in thousandths.",
)


class FourRows(Bytes):
    """`Bytes` with 4 rows a step."""

    name, batch = "bytes, 4 rows a step", 4


WHERE = (FourRows.name, "full")


def rows(args: argparse.Namespace, done: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every cell whose search has ended, by panel, coordinates and beta.

    "against" is the loss above that of the smallest beta, which has the same batches and coordinates by the seeds.
    """
    found = []
    for method, update in args.panels:
        for coordinates in args.coordinates:
            first: list[float] = []
            for beta in sorted(args.betas):
                contender = cell(method, update, coordinates, beta)
                points = finals(WHERE, contender, args.passes, range(args.seeds), done, search)
                results = [done[point.key] for point in points]
                losses = [result["held_out"] for result in results]
                if not losses or None in losses:
                    continue
                first = first or losses
                row = {"method": method, "update": update, "coordinates": repr(coordinates), "beta": beta}
                row |= {"lr": points[0].setting["lr"], "tau": points[0].setting["tau"]}
                row |= {"before": results[0]["curve"][0][2], "after": statistics.fmean(losses), "se": error(losses)}
                differences = [loss - other for loss, other in zip(losses, first, strict=True)]
                row |= {"against": statistics.fmean(differences), "against_se": error(differences)}
                for name in _MEASURED:
                    values = [result["momentum"][name] for result in results]
                    row[name] = None if None in values else statistics.fmean(values)
                    row[f"{name}_se"] = None if None in values else error(values)
                found.append(row)
    return found


def error(values: Sequence[float]) -> float | None:
    """Standard error of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def markdown(title: str, table: Sequence[Mapping[str, Any]]) -> str:
    """One table of what is reached, and one of what momentum did."""
    betas = sorted({row["beta"] for row in table})
    lines = [f"## {title}", "", "Change of the held-out loss, mean of the seeds (standard error).", ""]
    lines += ["| method | update | coordinates | " + " | ".join(f"beta {beta:g}" for beta in betas) + " |"]
    lines += ["|---" * (3 + len(betas)) + "|"]
    for key in dict.fromkeys((row["method"], row["update"], row["coordinates"]) for row in table):
        own = {row["beta"]: row for row in table if (row["method"], row["update"], row["coordinates"]) == key}
        texts = [number(own[b]["after"] - own[b]["before"], own[b]["se"]) if b in own else "" for b in betas]
        lines.append("| " + " | ".join((*key, *texts)) + " |")
    lines += ["", *_EXPLAINED, ""]
    heads = f"method | update | coordinates | beta | lr | loss above beta {betas[0]:g} (paired SE)"
    lines += [f"| {heads} | entries | moved | flips | cosine (SE) |"]
    lines += ["|---" * 10 + "|"]
    for row in table:
        texts = [row["method"], row["update"], row["coordinates"], f"{row['beta']:g}", f"{row['lr']:.2g}"]
        texts += ["" if row["beta"] == betas[0] else number(row["against"], row["against_se"])]
        texts += [f"{row['entries']:.3g}", f"{row['moved']:.2g}"]
        texts += ["" if row["flips"] is None else f"{row['flips']:.1%}"]
        share = None if row["cosine_se"] is None else 1e3 * row["cosine_se"]
        texts += ["" if row["cosine"] is None else number(1e3 * row["cosine"], share, 2)]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def number(value: float, se: float | None, digits: int = 4) -> str:
    return f"{value:+.{digits}f}" + ("" if se is None else f" ({se:.{digits}f})")


def draw(title: str, table: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss, sign flips and cosine against beta: a column for each method and update, a line for each coordinates."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["method"], row["update"]) for row in table))
    labels = list(dict.fromkeys(row["coordinates"] for row in table))
    betas = sorted({row["beta"] for row in table})
    figure = Figure(figsize=(3.6 * len(panels) + 1.4, 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(panels), sharex=True, sharey="row", squeeze=False)
    names = {
        "after": ("held-out loss", 1.0),
        "flips": ("sampled coordinates whose momentum\nhas another sign than what came in, %", 100.0),
        "cosine": ("cosine of a step and downhill, 1/1000", 1000.0),
    }
    for column, panel in enumerate(panels):
        for line, (name, (label, unit)) in enumerate(names.items()):
            one = axes[line][column]
            for place, coordinates in enumerate(labels):
                key = (*panel, coordinates)
                own = [row for row in table if (row["method"], row["update"], row["coordinates"]) == key]
                own = [row for row in own if row[name] is not None]
                se = "se" if name == "after" else f"{name}_se"
                x = [betas.index(row["beta"]) + 0.06 * (place - 1.5) for row in own]
                y, bars = [unit * row[name] for row in own], [unit * (row[se] or 0.0) for row in own]
                style = {"color": f"C{place}", "marker": "osD^"[place % 4], "capsize": 3, "markersize": 5}
                one.errorbar(x, y, bars, label=_LEGEND[coordinates], **style)
            one.grid(alpha=0.3)
            if column == 0:
                one.set_ylabel(label)
        axes[0][column].axhline(table[0]["before"], color="gray", linestyle=":")
        axes[0][column].set_title(", ".join(panel), fontsize=10)
        axes[2][column].axhline(0.0, color="gray", linestyle=":")
        axes[2][column].set(xlabel="beta", xticks=range(len(betas)), xticklabels=[f"{beta:g}" for beta in betas])
    handles, texts = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, texts, title="coordinates", loc="outside right upper")
    figure.suptitle(f"{title}\n(bars: standard errors; dotted: before the run)", fontsize=11)
    figure.savefig(path, dpi=110)


def options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--passes", type=int, default=800, help="forward passes of a run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of the best setting (default: %(default)s)")
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    one = {"type": lambda text: int(text) if text.isdigit() else float(text), "choices": COORDINATES}
    parser.add_argument("--coordinates", **one, nargs="+", default=COORDINATES, help="1: one of them all; 1.0: all")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="panels with this in method, update")
    parser.add_argument("--pretraining", type=int, default=1000, help="steps of AdamW (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "learning", help="folder of the results")
    args = parser.parse_args()
    args.panels = [p for p in PANELS if not args.only or any(text in ", ".join(p) for text in args.only)]
    if not args.panels:
        parser.error(f"none is called {' or '.join(args.only)}; there are {'; '.join(map(', '.join, PANELS))}")
    if args.passes < 40:
        parser.error("--passes: give at least 40, a quarter of which shows what a setting is worth")
    return args


def main() -> int:
    args = options()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    work = FourRows(args.out, args.pretraining)
    journal = Journal(args.out / "ablation.jsonl")
    journal.begin(about := machine())
    watch = Watch(work)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=CONSOLE) as progress:
        task = progress.add_task("", total=None)
        for panel in args.panels:
            for coordinates in args.coordinates:
                for beta in args.betas:
                    contender = cell(*panel, coordinates, beta)
                    for point in search(WHERE, contender, args.passes, range(args.seeds), journal.results):
                        text = f"{contender.name}, lr {point.setting['lr']:g}, {point.budget} passes, seed {point.seed}"
                        progress.update(task, description=text)
                        if point.budget < args.passes:
                            journal.add(point, run(work, contender, point, points=_POINTS))
                        else:
                            result = run(work, replace(contender, watch=watch), point, points=_POINTS)
                            journal.add(point, result | {"momentum": watch.summary()})
    table = rows(args, journal.results)
    title = f"{', '.join(WHERE)}: {args.passes} forward passes, {args.seeds} seeds, lr searched for each cell"
    text = markdown(title, table)
    draw(title, table, args.out / "ablation.png")
    (args.out / "ablation.md").write_text(text, encoding="utf-8")
    whole = json.dumps({"about": about, "rows": table}, indent=1) + "\n"
    (args.out / "ablation.json").write_text(whole, encoding="utf-8")
    CONSOLE.print(text, markup=False, highlight=False)
    CONSOLE.print(f"written to {args.out}")
    return 0
