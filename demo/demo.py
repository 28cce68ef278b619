"""The demo: fine-tunes SmolLM2-135M on movie reviews with one of the optimizers, or compares them.

Matrix products are in bf16 (autocast; the trained weights stay fp32) where this processor is faster with them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import prepare
import torch
from rich.console import Console
from rich.table import Table

# 400 forward passes each. JAGUAR: 80 steps of 5 (f(x) is shared by four directions, which is worth more here than two
# points per direction); ZO-SGD: 200 steps of 2. See docs/learning.md for where the numbers come from; below a tau of
# 5e-3 the loss does not have the digits in bf16.
SETTINGS = {
    "jaguar-signsgd": "--coordinates 1.0 --estimator one-sided --n_directions 4 --tau 5e-3 --learning_rate 1.2e-3 "
    "--lr_scheduler_type linear --max_steps 80",
    "zo-sgd": "--tau 1e-2 --learning_rate 3e-4 --lr_scheduler_type constant --max_steps 200",
}
# JAGUAR SignSGD on an adapter, by PEFT, instead of the normalisation weights.
_EVERY = "--coordinates 1.0 --estimator one-sided --n_directions 4 --max_steps 80 --report_to tensorboard"
ADAPTERS = {
    "lora": f"--lora --tau 1e-2 --learning_rate 4e-3 {_EVERY}",
    "prefix": f"--prefix_tuning --tau 1e-2 --learning_rate 8e-3 {_EVERY}",
}
RUNS = Path("runs")

# Multiplications and additions of a run: 400 passes of 16 rows and 2 x 1,000 rows to score, 31 tokens on average, two
# for each of the 106 M weights of the layers. About a third of the time goes into the products.
_OPERATIONS, _OF_THE_TIME, _START = (400 * 16 + 2000) * 31 * 2 * 106e6, 0.32, 15.0


def speed(dtype: torch.dtype) -> float:
    """Operations per second in products of the model's size, on all threads."""
    a, b = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
    a @ b
    done, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < 0.3:
        a @ b
        done += 1
    return done * 2.0 * 512 * 576 * 1536 / passed


def precision() -> tuple[list[str], float]:
    """Flags of the faster precision, and about how many seconds a run takes with it."""
    if torch.cuda.is_available():
        return [], 60.0
    full, half = speed(torch.float32), speed(torch.bfloat16)
    flags = ["--bf16", "true", "--use_cpu", "true"] if half > 1.5 * full else []
    return flags, _START + _OPERATIONS / max(full, half) / _OF_THE_TIME


def command(method: str, seed: int, flags: list[str], adapter: str | None = None) -> list[str]:
    """The `jaguar finetune` command line of one run, with the flags of `precision`."""
    what = ADAPTERS[adapter] if adapter else f"--train norm {SETTINGS[method]}"
    return [
        "finetune",
        "--method",
        method,
        "--model",
        str(prepare.MODEL),
        "--train_file",
        str(prepare.TRAIN),
        "--test_file",
        str(prepare.TEST),
        "--output_dir",
        str(_folder(adapter or method, seed)),
        "--overwrite_output_dir",
        "--template",
        r"Review: {text}\nSentiment:",
        "--verbalizers",
        " negative",
        " positive",
        *what.split(),
        "--seed",
        str(seed),
        *flags,
    ]


def _folder(name: str, seed: int) -> Path:
    return RUNS / f"demo-{name}-{seed}"


def _run(method: str, seed: int, flags: list[str], adapter: str | None = None) -> int:
    words = command(method, seed, flags, adapter)
    print(f"$ jaguar {shlex.join(words)}", flush=True)
    child = subprocess.Popen([sys.executable, "-m", "jaguar", *words])
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue  # the child was told too: it is saving, and says how to go on


def compare(seed: int, flags: list[str]) -> int:
    """Both optimizers with the same number of forward passes; a finished run of the same command is not repeated."""
    table = Table(title=f"400 forward passes of 16 rows, seed {seed}", title_justify="left")
    for column in ("method", "accuracy %", "points (SE)", "AUC", "s", "GiB"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for method in SETTINGS:
        path = _folder(method, seed) / "metrics.json"
        same = shlex.join(["jaguar", *command(method, seed, flags)])
        done = path.is_file() and json.loads(path.read_text())["command"] == same
        if not done and (code := _run(method, seed, flags)):
            return code
        m = json.loads(path.read_text())
        table.add_row(
            method,
            f"{100 * m['before']['accuracy']:.1f} to {100 * m['after']['accuracy']:.1f}",
            f"{100 * m['accuracy_change']:+.1f} ({100 * m['paired_se']:.1f})",
            f"{m['before']['auc']:.3f} to {m['after']['auc']:.3f}",
            f"{m['training_seconds']:.0f}",
            f"{m['peak_memory_bytes'] / 2**30:.2f}",
        )
    Console().print(table)
    return 0


def main() -> int:
    """Prepares, then runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of directions and batch order (default: 0); the test set is the same for all",
    )
    parser.add_argument("--compare", action="store_true", help="run ZO-SGD too and print both")
    parser.add_argument("--adapter", choices=tuple(ADAPTERS), help="train this instead of the normalisation weights")
    args = parser.parse_args()
    prepare.prepare()
    flags, seconds = precision()
    how = "with products in bf16" if flags else "in fp32"
    print(f"about {seconds / 60:.1f} minutes a run on this machine as it is now, {how}", flush=True)
    return compare(args.seed, flags) if args.compare else _run("jaguar-signsgd", args.seed, flags, args.adapter)


if __name__ == "__main__":
    sys.exit(main())
