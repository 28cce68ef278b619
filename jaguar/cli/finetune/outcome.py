"""Figures of a finished run: metrics.json, the picture, and what is printed."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from jaguar.cli.finetune.evaluation import peak_memory, versions
from jaguar.cli.finetune.report import Points, draw_curves, score_table
from jaguar.cli.output import say
from jaguar.scoring import Scores, paired_se
from jaguar.tasks import Example
from jaguar.trainer.optimizer import unwrap


class Job(Protocol):
    """Protocol of a finished run: `jaguar.cli.finetune.job.Finetuning`."""

    run: Any
    console: Console
    folder: Path
    trainer: Any
    task: Any
    losses: Any
    train_set: list[Example]
    dev_set: list[Example]
    test_set: list[Example]
    result: Any
    seconds: float


def metrics(job: Job, before: Scores, after: Scores) -> dict[str, Any]:
    """Contents of metrics.json."""
    run, trainer, args = job.run, job.trainer, job.trainer.args
    first, last = before.figures(), after.figures()
    steps = trainer.state.global_step
    optimizer = unwrap(trainer.optimizer)
    dev = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    best = trainer.state.best_metric if args.load_best_model_at_end else None
    return {
        "task": job.task.name,
        "method": args.optim_zo,
        "adapter": run.adapter.kind,
        "train": run.train,
        "seed": args.seed,
        "steps": steps,
        "skipped_steps": getattr(optimizer, "n_skipped", 0),
        "batch_size": args.per_device_train_batch_size,
        "processes": args.world_size,
        "train_rows": len(job.train_set),
        "dev_rows": len(job.dev_set),
        "test_rows": len(job.test_set),
        "before": first,
        "after": last,
        "accuracy_change": last["accuracy"] - first["accuracy"],
        "paired_se": paired_se(before, after),
        "evaluations": [
            {key.removeprefix("eval_"): entry.get(key) for key in ("step", "eval_loss", "eval_accuracy")}
            for entry in dev
        ],
        "best_metric": str(args.metric_for_best_model).removeprefix("eval_") if best is not None else None,
        "best_value": best,
        "best_step": trainer.state.best_global_step if best is not None else None,
        "training_seconds": job.seconds + job.result.metrics["train_runtime"],
        "training_forward_passes": trainer.forward_passes,
        "peak_memory_bytes": peak_memory(args.device),
        "command": shlex.join(["jaguar", *sys.argv[1:]]),
        "versions": versions(),
    }


def draw(job: Job, path: Path, metrics: dict[str, Any]) -> None:
    """The picture of a run."""
    run, first, last = job.run, metrics["before"], metrics["after"]
    what = metrics["method"] + ("" if run.adapter.kind == "none" else f" ({run.adapter.kind})")
    found = metrics["evaluations"]
    kept = metrics["best_step"] if metrics["best_step"] is not None else metrics["steps"]
    ends = Points(
        f"{metrics['test_rows']} held-out rows",
        [0, kept],
        [first["loss"], last["loss"]],
        [first["accuracy"], last["accuracy"]],
        [first["accuracy_se"], last["accuracy_se"]],
    )
    name = f"{metrics['dev_rows']} dev rows" if job.dev_set else "held-out rows on the way"
    way = Points(name, *([entry[key] for entry in found] for key in ("step", "loss", "accuracy")))
    draw_curves(
        path,
        losses=job.losses.values,
        points=[ends, way] if found else [ends],
        title=f"{what} on {Path(run.model).name}, {job.task.name}, seed {metrics['seed']}: held-out "
        f"accuracy {first['accuracy']:.1%} to {last['accuracy']:.1%}",
    )


def show(job: Job, metrics: dict[str, Any]) -> None:
    """Prints the table, and what a run took."""
    before, after = metrics["before"], metrics["after"]
    points, se = 100 * metrics["accuracy_change"], 100 * metrics["paired_se"]
    change = {
        "accuracy": f"{points:+.2f} points, paired SE {se:.2f}",
        "loss": f"{after['loss'] - before['loss']:+.4f}",
    }
    if "auc" in before and "auc" in after:
        change["auc"] = f"{after['auc'] - before['auc']:+.4f}"
    columns = {"zero-shot": before, "tuned": after}
    count = metrics["skipped_steps"]
    skipped = f"{count} of {metrics['steps']}" if count else ""
    title = f"{metrics['method']}, {len(job.test_set)} held-out rows"
    job.console.print(score_table(title, columns, change, skipped))
    if skipped:
        say(
            job.console,
            f"warning: {skipped} steps were skipped, because their loss was not finite: lower the learning rate or "
            "tau, or look at the data",
            "yellow",
        )
    if metrics["best_step"] is not None:
        value = f"dev {metrics['best_metric']} {metrics['best_value']:.4f}"
        say(job.console, f"the model is that of step {metrics['best_step']}, {value}")
    memory = metrics["peak_memory_bytes"] / 2**30
    say(
        job.console,
        f"{metrics['steps']} steps in {metrics['training_seconds']:.0f} s, {metrics['training_forward_passes']} "
        f"forward passes of {metrics['batch_size']} rows, peak memory {memory:.2f} GiB",
    )
    say(job.console, f"model, training_curves.png and metrics.json are in {job.folder}")


def finite(value: Any) -> Any:
    """`value` with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
