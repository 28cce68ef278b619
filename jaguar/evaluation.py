"""`jaguar eval`, and what it shares with `jaguar finetune`: from rows and a loaded model to prompts and a scorer."""

from __future__ import annotations

import platform
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

import jaguar
from jaguar.models import Loaded, load, load_task
from jaguar.report import row_bar, say, score_table
from jaguar.scoring import OptionScorer, evaluate
from jaguar.tasks.text_classification import Example, Row, Task, class_names, read_rows


@dataclass(frozen=True)
class Data:
    """Where labelled text comes from and how it becomes a prompt; None means: as saved beside the model."""

    text_column: str = "text"
    label_column: str = "label"
    template: str | None = None
    verbalizers: tuple[str, ...] | None = None
    max_length: int = 512
    eval_batch_size: int = 32

    def task(self, source: str, loaded: Loaded, rows: list[Row]) -> Task:
        """The prompt: what was given, else what lies beside the model, else the text and the labels themselves."""
        saved = load_task(source)
        if saved and not {row.label for row in rows} <= set(saved.labels):
            saved = None  # it was tuned for other labels
        template = self.template or (saved.template if saved else "{text}")
        if loaded.is_classifier:
            if self.verbalizers:
                raise ValueError("--verbalizers are for causal LMs; a sequence classifier has its own classes")
            return Task(template, saved.labels if saved else _classifier_labels(loaded, rows))
        labels = saved.labels if saved else tuple(class_names(rows))
        verbalizers = self.verbalizers or (saved.verbalizers if saved else tuple(f" {label}" for label in labels))
        return Task(template, labels, verbalizers)

    def examples(self, task: Task, rows: list[Row], loaded: Loaded, path: str) -> list[Example]:
        """The rows of the file `path` as prompts.

        Raises:
            ValueError: a row does not fit the task or the model; file and line are named.
        """
        try:
            return task.examples(rows, loaded.tokenizer, min(self.max_length, loaded.max_length))
        except ValueError as error:
            raise ValueError(f"{path}, {error}") from None


def _classifier_labels(loaded: Loaded, rows: list[Row]) -> tuple[str, ...]:
    """The classes in the order of the model's outputs: by its own names, by number, or sorted if it has no names yet.

    Raises:
        ValueError: the data has other labels than the model has classes; guessing an order could invert them.
    """
    config, found = loaded.model.config, class_names(rows)
    own = [str(config.id2label[i]) for i in range(config.num_labels)]
    spelling = {label.casefold(): label for label in found}
    if set(spelling) <= {name.casefold() for name in own}:
        return tuple(spelling.get(name.casefold(), name) for name in own)
    numbers = [str(i) for i in range(config.num_labels)]
    if set(found) <= set(numbers):
        return tuple(numbers)
    if own == [f"LABEL_{i}" for i in range(config.num_labels)] and len(found) == config.num_labels:
        return tuple(found)
    raise ValueError(f"the classes of the model are {', '.join(own)}, the labels of the data {', '.join(found)}")


def make_scorer(loaded: Loaded, task: Task, example: Example) -> OptionScorer:
    """The scorer of a model, checked on one example."""
    options = None if loaded.is_classifier else task.option_ids(loaded.tokenizer)
    scorer = OptionScorer(loaded.model, loaded.pad_id, options)
    scorer.check_head(example)
    return scorer


def evaluate_model(
    model: str, test_file: str, data: Data, console: Console, *, dtype: str, use_cpu: bool
) -> dict[str, float]:
    """Scores a model on labelled text, prints the figures and returns them."""
    rows = read_rows(test_file, data.text_column, data.label_column)
    with console.status(f"loading {model}"):
        loaded = load(model, dtype=dtype, use_cpu=use_cpu)
    task = data.task(model, loaded, rows)
    examples = data.examples(task, rows, loaded, test_file)
    scorer = make_scorer(loaded, task, examples[0])
    begin = time.monotonic()
    bar, advance = row_bar(console, "scoring", len(examples))
    with bar:
        figures = evaluate(scorer, examples, data.eval_batch_size, advance).figures()
    note = {"accuracy": f"standard error {100 * figures['accuracy_se']:.2f} points"}
    console.print(score_table(f"{model}, {len(examples)} rows of {test_file}", {"": figures}, note))
    seconds, memory = time.monotonic() - begin, peak_memory(scorer.device) / 2**30
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
    """What a measured number depends on."""
    import transformers

    return {
        "jaguar": jaguar.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }
