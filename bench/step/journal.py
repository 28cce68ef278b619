"""Price of a run's journal: time per step and peak memory with and without it, and replay against training.

Each run is a process of its own, with and without the journal in turns: `jaguar.ScoringTrainer` on SmolLM2-135M's movie
reviews, 16 rows a step, fsync after every 100 steps as by default. Time per step is the median over the steps after the
fifth; memory is the resident set's peak (on a GPU, what torch had allocated at most). Parity is asserted first: both
leave the same weights, and so does the replay of the journal.

    python bench journal [--steps 60] [--repeats 3] [--variants norm lora all] [--model DIR] [--out bench/results]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from machine import CPU, GPU, command, machine
from registry import BENCH, RESULTS, ROOT, parser_of

VARIANTS = ("norm", "lora", "all")
WARM_UP = 5
RATES = {"norm": "1e-3", "lora": "1e-3", "all": "1e-5"}


def child(variant: str, kind: str, steps: int, model: Path, folder: Path) -> dict[str, Any]:
    """One run, `kind` "with" or "without" a journal, or the replay of the one in `folder`."""
    from transformers import TrainerCallback, set_seed
    from transformers.utils import logging

    import jaguar
    from jaguar.cli.finetune.evaluation import peak_memory
    from jaguar.models.adapters import Adapter
    from jaguar.models.load import adapted, load, select_trainable
    from jaguar.optimizers.identity import fingerprint_of
    from jaguar.tasks import Encoder, TextClassification
    from jaguar.tasks.rows import read_rows

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded = load(str(model), dtype="float32", use_cpu=not torch.cuda.is_available())
    if variant == "lora":
        set_seed(0)
        loaded = adapted(loaded, Adapter("lora").applied(loaded.model, "causal"))
    else:
        select_trainable(loaded.model, variant)
    device = next(loaded.model.parameters()).device
    if kind == "replay":
        begin = time.monotonic()
        optimizer = jaguar.replay(loaded.model, folder / "journal.jaguar")
        _wait(device)
        return {"seconds": (time.monotonic() - begin) / steps, "fingerprint": fingerprint_of(optimizer)}
    task = TextClassification("Review: {text}\nSentiment:", ("negative", "positive"), (" negative", " positive"))
    rows = read_rows(model.parent / "movie_reviews_train.csv", task.columns)[: 16 * (steps + 1)]
    encode = Encoder(loaded.tokenizer, loaded.kind, loaded.max_length)
    examples = encode([task.question(row, masked=False) for row in rows])
    scorer = jaguar.Scorer(loaded.model, loaded.pad_id, loaded.kind, task.objective)
    times: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **others: Any) -> None:
            _wait(device)
            times.append(time.monotonic())

    args = jaguar.ZOTrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=16, learning_rate=float(RATES[variant]), tau=1e-3,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no", journal=kind == "with",
        use_cpu=device.type == "cpu", dataloader_pin_memory=device.type == "cuda",
    )  # fmt: skip
    trainer = jaguar.ScoringTrainer(
        loaded.model, args, scorer=scorer, train_dataset=examples, processing_class=loaded.tokenizer
    )
    trainer.add_callback(Watch())
    trainer.train()
    later = [b - a for a, b in zip(times[WARM_UP - 1 :], times[WARM_UP:], strict=False)]
    journal = folder / "journal.jaguar"
    return {
        "seconds": statistics.median(later),
        "peak_bytes": peak_memory(device),
        "fingerprint": fingerprint_of(trainer.zeroth_order),
        "journal_bytes": journal.stat().st_size if journal.exists() else 0,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(variant: str, kind: str, steps: int, model: Path, folder: Path) -> dict[str, Any]:
    """The result of a `child` in a process of its own."""
    words = ["--variants", variant, "--child", kind, "--steps", str(steps), "--model", str(model)]
    line = [sys.executable, str(BENCH), "journal", *words, "--out", str(folder)]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"})
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def measured(variant: str, steps: int, repeats: int, model: Path) -> dict[str, Any]:
    """Runs with and without, in turns, then the replay."""
    found: dict[str, list[dict[str, Any]]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as folder:
        for i in track(range(2 * repeats), f"{variant}: with and without"):
            kind = ("with", "without", "without", "with")[i % 4]
            found[kind].append(run(variant, kind, steps, model, Path(folder)))
        replays = [run(variant, "replay", steps, model, Path(folder)) for _ in range(repeats)]
    prints = {r["fingerprint"] for r in [*found["with"], *found["without"], *replays]}
    if len(prints) != 1:
        raise SystemExit(f"{variant}: the runs left {len(prints)} different models")
    medians = {
        f"{kind} {key}": statistics.median(r[key] for r in found[kind])
        for kind in found
        for key in ("seconds", "peak_bytes")
    }
    replay = statistics.median(r["seconds"] for r in replays)
    return {
        "variant": variant,
        "steps": steps,
        "repeats": repeats,
        **medians,
        "time_ratio": medians["with seconds"] / medians["without seconds"],
        "memory_ratio": medians["with peak_bytes"] / medians["without peak_bytes"],
        "journal_bytes": found["with"][-1]["journal_bytes"],
        "replay_seconds": replay,
        "replay_ratio": medians["with seconds"] / replay,
        "fingerprint": prints.pop(),
    }


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="what trains")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2, its rows beside it (default: the demo's)")
    parser.add_argument("--commit", help="what to record as the commit in place of what git says")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model is None:
        sys.path.append(str(ROOT / "demo"))
        import prepare

        prepare.prepare()
        args.model = prepare.MODEL
    if args.child:
        print(json.dumps(child(args.variants[0], args.child, args.steps, args.model, args.out)))
        return 0
    rows = [measured(variant, args.steps, args.repeats, args.model) for variant in args.variants]
    on_gpu = torch.cuda.is_available()
    line = command("--out", "--model", "--commit")
    info = machine(GPU if on_gpu else CPU, commit=args.commit, command=line)
    table = Table(title="With the journal over without, and replay")
    for column in ("trains", "ms a step", "time", "memory", "journal bytes", "replay ms a step", "times as fast"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["variant"], f"{1e3 * row['with seconds']:.2f}", f"{row['time_ratio']:.4f}",
            f"{row['memory_ratio']:.4f}", f"{row['journal_bytes']:,}", f"{1e3 * row['replay_seconds']:.2f}",
            f"{row['replay_ratio']:.1f}",
        )  # fmt: skip
    Console().print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"journal-{'gpu' if on_gpu else 'cpu'}.json"
    path.write_text(json.dumps({"machine": info, "rows": rows}, indent=2) + "\n")
    print(f"written to {path}")
    return 0
