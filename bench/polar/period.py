"""Orthogonalising less often: loss against forward passes and against time for `ns_period` = 1, 4, 8, 16.

A byte-level Llama of 0.12 M parameters is pretrained with AdamW on the source code of Python's standard library and
then fine-tuned by JAGUAR Muon on the text of Python's documentation (`pydoc_data.topics`), two forward passes a step.
Every run sees the same batches and the same coordinates. Nothing is downloaded.

    python bench period [--steps N] [--seeds N] [--out FOLDER]
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

import jaguar
from learning.byte_model import BATCH, CONSOLE, documents, model, pretrained, rows
from machine import machine
from registry import RESULTS, parser_of

PERIODS = (1, 4, 8, 16)
HELD_OUT = 64  # rows


def held_out_loss(net: Any, batch: Tensor) -> float:
    with torch.no_grad():
        return float(net(input_ids=batch, labels=batch).loss)


def optimizer_of(net: Any, method: str, options: dict[str, Any], args: Any, seed: int) -> Any:
    params = jaguar.param_groups(net) if method == "muon" else net.named_parameters()
    make = jaguar.JaguarMuon if method == "muon" else jaguar.JaguarSignSGD
    return make(params, coordinates=args.coordinates, seed=seed, **options)


def run(state: dict[str, Tensor], prose: Tensor, method: str, options: dict[str, Any], args: Any, seed: int) -> dict:
    """One fine-tuning: held-out loss along the way."""
    net = model()
    net.load_state_dict(state)
    held_out = rows(prose[: prose.numel() // 10], HELD_OUT, torch.Generator().manual_seed(2))
    train = prose[prose.numel() // 10 :]
    optimizer = optimizer_of(net, method, options, args, seed)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.steps)
    generator = torch.Generator().manual_seed(seed)
    points = [(0, held_out_loss(net, held_out))]
    for step in track(range(args.steps), f"{method} {options.get('ns_period', '')} seed {seed}", console=CONSOLE):
        ids = rows(train, BATCH, generator)
        optimizer.step(lambda ids=ids: net(input_ids=ids, labels=ids).loss)
        scheduler.step()
        if (step + 1) % max(1, args.steps // 20) == 0:
            points.append((2 * (step + 1), held_out_loss(net, held_out)))
    return {"method": method, "options": options, "seed": seed, "points": points}


def paces(state: dict[str, Tensor], prose: Tensor, kinds: list[tuple[str, dict[str, Any]]], args: Any) -> list[float]:
    """Median seconds of a step of each kind, taken in turns of 16 steps, so that a busy machine is busy for all."""
    nets, ids = [model() for _ in kinds], rows(prose, BATCH, torch.Generator().manual_seed(0))
    optimizers = [optimizer_of(net, *kind, args, 0) for net, kind in zip(nets, kinds, strict=True)]
    seconds: list[list[float]] = [[] for _ in kinds]
    for net in nets:
        net.load_state_dict(state)
    for turn in track(range(9), "timing", console=CONSOLE):
        for net, optimizer, own in zip(nets, optimizers, seconds, strict=True):
            begin = time.perf_counter()
            for _ in range(max(PERIODS)):  # whole rotations: steps of a rotation have different numbers of matrices
                optimizer.step(lambda net=net: net(input_ids=ids, labels=ids).loss)
            if turn:
                own.append((time.perf_counter() - begin) / max(PERIODS))
    return [statistics.median(own) for own in seconds]


def draw(results: list[dict], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, label in enumerate(dict.fromkeys(named(r) for r in results)):
        same = [r for r in results if named(r) == label]
        forwards = [x for x, _ in same[0]["points"]]
        losses = [statistics.fmean(values) for values in zip(*([y for _, y in r["points"]] for r in same), strict=True)]
        pace = statistics.fmean(r["step_seconds"] for r in same) / 2
        left.plot(forwards, losses, color=f"C{number}", label=label)
        right.plot([x * pace for x in forwards], losses, color=f"C{number}", label=label)
    left.set(xlabel="forward passes", ylabel="held-out loss (mean of seeds)")
    right.set(xlabel="seconds of steps (median step x steps)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def named(result: dict) -> str:
    return f"Muon, ns_period {result['options']['ns_period']}" if result["method"] == "muon" else "JAGUAR SignSGD"


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=1500, help="two forward passes each (default: %(default)s)")
    parser.add_argument("--pretraining", type=int, default=1000, help="steps of AdamW (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--periods", type=int, nargs="+", default=PERIODS)
    parser.add_argument(
        "--lr", type=float, default=1e-4, help="of Muon; the sign rule has a hundredth (default: %(default)s)"
    )
    parser.add_argument("--sign_lr", type=float, default=3e-3, help="of JAGUAR SignSGD (default: %(default)s)")
    parser.add_argument("--coordinates", type=float, default=0.01, help="fraction (default: %(default)s)")
    parser.add_argument("--vector_lr", type=float, help="of the sign rule in Muon")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    code, prose = documents()
    net = pretrained(code, args.pretraining)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    # fp32: bf16 products are emulated on CPUs, and slow.
    common = {"lr": args.lr, "ns_dtype": torch.float32, "vector_lr": args.vector_lr}
    kinds = [("muon", common | {"ns_period": r}) for r in args.periods] + [("signsgd", {"lr": args.sign_lr})]
    pace_of = paces(state, prose, kinds, args)
    results = [
        run(state, prose, *kind, args, seed) | {"step_seconds": pace}
        for seed in range(args.seeds)
        for kind, pace in zip(kinds, pace_of, strict=True)
    ]
    table = Table(title=f"held-out loss after {2 * args.steps} forward passes (mean of {args.seeds} seeds)")
    for column in ("method", "before", "after", "ms a step"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for label in dict.fromkeys(named(r) for r in results):
        same = [r for r in results if named(r) == label]
        ends = [statistics.fmean(r["points"][i][1] for r in same) for i in (0, -1)]
        pace = statistics.fmean(r["step_seconds"] for r in same)
        table.add_row(label, *(f"{end:.4f}" for end in ends), f"{1e3 * pace:.1f}")
    CONSOLE.print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    for result in results:
        result["options"] = {key: str(value) for key, value in result["options"].items()}
    about = machine()
    (args.out / "ns-period.json").write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    draw([r | {"options": {"ns_period": r["options"].get("ns_period")}} for r in results], args.out / "ns-period.png")
    return 0
