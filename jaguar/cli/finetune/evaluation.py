"""`jaguar eval`, and the evaluation that `jaguar finetune` shares with it."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import jaguar
from jaguar.cli.finetune.data import Data
from jaguar.cli.finetune.report import row_bar, score_table
from jaguar.cli.output import say
from jaguar.cli.rebuilding import journal_in, load_tuned
from jaguar.models.load import Loaded
from jaguar.scoring import Scorer, evaluate
from jaguar.tasks import Example, Task


def make_scorer(loaded: Loaded, task: Task, examples: Sequence[Example]) -> Scorer:
    """The scorer of a model, compared with the model's own forward on a few examples."""
    scorer = Scorer(loaded.model, loaded.pad_id, loaded.kind, task.objective)
    scorer.verify(examples)
    return scorer


def evaluate_model(model: str, data: Data, console: Console, *, batch_size: int, **loading: Any) -> dict[str, float]:
    """Scores a model on a task, prints the figures and returns them; `loading` are options of `models.load`."""
    rows = data.test_rows(model)
    with nullcontext() if journal_in(model) else console.status(f"loading {model}"):
        loaded = load_tuned(model, console, **loading)
    task = data.make_task(model, loaded, rows)
    examples = data.examples(task, rows, loaded)
    scorer = make_scorer(loaded, task, examples)
    begin = time.monotonic()
    bar, advance = row_bar(console, "scoring", len(examples))
    with bar:
        figures = evaluate(scorer, examples, batch_size, advance).figures()
    note = {"accuracy": f"standard error {100 * figures['accuracy_se']:.2f} points"}
    source = data.test_file or data.dataset or task.name
    console.print(score_table(f"{model}, {len(examples)} rows of {source}", {"": figures}, note))
    seconds, memory = time.monotonic() - begin, peak_memory(next(loaded.model.parameters()).device) / 2**30
    passes = scorer.forward_passes
    say(console, f"{len(examples)} rows in {seconds:.0f} s, {passes} forward passes, peak memory {memory:.2f} GiB")
    return figures


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU at most, or resident in this process at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # the kernel's own high-water mark: getrusage's also counts the process that started this one
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions() -> dict[str, str]:
    """Versions of software and hardware on which a measured number depends."""
    import transformers

    return {
        "jaguar": jaguar.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }
