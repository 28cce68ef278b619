"""Steps without a search against the best of five learning rates, on the byte-level language model.

    python bench step-size [--passes N] [--seeds N] [--out FOLDER] [--only WORD ...]

For weights of normalisation layers, LoRA and all weights, batches of 4, 16 and 64 rows, fp32 and bf16: ZO-SGD along
eight one-sided directions with lr="auto", tau="auto", and with five lr (tau 1e-3, 1e-2 in bf16) of which the one with
the lowest held-out loss counts: a choice that nobody could make beforehand. Runs are lines of FOLDER/step-size.jsonl;
what stands there is not run again. Nothing is downloaded.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from learning.byte_model import CONSOLE
from learning.contenders import CONTENDERS, GRID
from learning.search import Journal, Point, run
from learning.works import Bytes
from machine import machine
from registry import RESULTS, parser_of

# Middle of the grid for batches of 16 rows; the best lr grows with the batch.
LR = {"full": 3e-3, "lora": 6e-2, "norms": 1e-1}
NAME = "ZO-SGD, one-sided, 8"
CASES = list(product(("norms", "lora", "full"), ("float32", "bfloat16"), (4, 16, 64)))
ALLOWED, DIVERGED = 0.01, 0.05


def points(case: tuple[str, str, int], passes: int, seeds: int) -> tuple[list[Point], list[Point]]:
    """Runs of the grid with the first seed, and automatic ones with all seeds."""
    variant, dtype, batch = case
    work, tau = f"bytes {dtype} {batch}", 1e-3 if dtype == "float32" else 1e-2
    lrs = [float(f"{LR[variant] * factor * (batch / 16) ** 0.5:.3g}") for factor in GRID]
    grid = [Point(work, variant, NAME, {"lr": lr, "tau": tau}, passes, 0) for lr in lrs]
    return grid, [Point(work, variant, f"{NAME}, auto", {}, passes, seed) for seed in range(seeds)]


def table(done: dict[str, dict[str, Any]], passes: int, seeds: int) -> str:
    """The table of the cases that are complete."""
    lines = [
        f"ZO-SGD, eight one-sided directions, {passes} forward passes; automatic: seed 0, then the worst of {seeds}.",
        "",
        "| weights | dtype | rows | before | best of five lr | automatic | difference | worst seed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    met = whole = steady = 0
    for case in CASES:
        grid, own = points(case, passes, seeds)
        if any(point.key not in done for point in grid + own):
            continue
        before = done[own[0].key]["curve"][0][2]
        losses = {point.setting["lr"]: done[point.key]["held_out"] for point in grid}
        lr, best = min(((lr, loss) for lr, loss in losses.items() if loss is not None), key=lambda pair: pair[1])
        found = [done[point.key]["held_out"] for point in own]
        worst = max(float("inf") if loss is None else loss for loss in found)
        whole, met = whole + 1, met + (found[0] is not None and found[0] <= best + ALLOWED)
        steady += worst <= before + DIVERGED
        shown = "not finite" if found[0] is None else f"{found[0]:.4f} | {found[0] - best:+.4f}"
        lines.append(f"| {' | '.join(map(str, case))} | {before:.4f} | {best:.4f} ({lr:g}) | {shown} | {worst:.4f} |")
    lines += [
        "",
        f"At most {ALLOWED} above the best of five: {met} of {whole}. Never {DIVERGED} above the start: {steady}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--passes", type=int, default=400, help="forward passes of a run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="automatic runs of a case (default: %(default)s)")
    parser.add_argument("--pretraining", type=int, default=1000, help="steps of AdamW (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases with one of these: full 4 ...")
    parser.add_argument("--out", type=Path, default=RESULTS / "learning", help="folder of the results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    journal = Journal(args.out / "step-size.jsonl")
    about = machine()
    journal.begin(about)
    by_name = {contender.name: contender for contender in CONTENDERS}
    cases = [case for case in CASES if not args.only or set(args.only) & set(map(str, case))]
    for case in track(cases, "cases", console=CONSOLE):
        work = Bytes(args.out, args.pretraining, batch=case[2], dtype=getattr(torch, case[1]))
        for point in (point for part in points(case, args.passes, args.seeds) for point in part):
            if point.key not in journal.results:
                journal.add(point, run(work, by_name[point.contender], point, points=2))
    text = table(journal.results, args.passes, args.seeds)
    text += "\n" + ", ".join(f"{key} {value}" for key, value in about.items()) + "\n"
    (args.out / "step-size.md").write_text(text, encoding="utf-8")
    CONSOLE.print(text, markup=False, highlight=False)
    return 0
