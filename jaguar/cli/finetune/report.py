"""Progress bars, the table of figures, and a picture of the run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaguar.cli.output import say

_WINDOW = 25  # steps in the running means


def running_mean(values: Sequence[float], window: int = _WINDOW) -> list[float]:
    """Mean of the last `window` values, at each place; values that are not finite are left out."""
    means = []
    for i in range(len(values)):
        part = [v for v in values[max(0, i + 1 - window) : i + 1] if v == v and abs(v) != float("inf")]
        means.append(sum(part) / len(part) if part else float("nan"))
    return means


class StepBar:
    """A progress bar with loss and steps per second; plain lines where there is no terminal."""

    def __init__(self, console: Console, total: int, done: int, every: int) -> None:
        self._console, self._total, self._every = console, total, every
        self._begin, self._first = time.monotonic(), done
        columns = (
            SpinnerColumn(),
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("training", total=total, completed=done, figures="")

    def __enter__(self) -> StepBar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, done: int, losses: Sequence[float], skipped: int = 0) -> None:
        """Shows the running mean of the last steps, and how many had no finite loss."""
        rate = (done - self._first) / max(time.monotonic() - self._begin, 1e-9)
        mean = f"loss {running_mean(losses[-_WINDOW:])[-1]:.4f}  " if losses else ""
        figures = f"{mean}{rate:.2f} steps/s" + f"  {skipped} skipped" * bool(skipped)
        self._bar.update(self._task, completed=done, figures=figures)
        if not self._console.is_terminal and (done % self._every == 0 or done == self._total):
            say(self._console, f"step {done}/{self._total}  {figures}")


def row_bar(console: Console, what: str, rows: int) -> tuple[Progress, Any]:
    """A progress bar over rows, to be used as a context manager, and the function that advances it."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    task = bar.add_task(what, total=rows)
    return bar, lambda count: bar.advance(task, count)


def score_table(
    title: str, columns: dict[str, dict[str, float]], change: dict[str, str] | None = None, skipped: str = ""
) -> Table:
    """Accuracy, AUC and loss, a column per model; `change` adds a last column by figure, `skipped` a last row."""
    table = Table(title=title, title_justify="left")
    table.add_column("held-out text")
    for name in columns:
        table.add_column(name, justify="right")
    if change:
        table.add_column("change", justify="right")
    for key, label, form in (("accuracy", "accuracy", "{:.2%}"), ("auc", "AUC", "{:.4f}"), ("loss", "loss", "{:.4f}")):
        if all(key in figures for figures in columns.values()):
            cells = [form.format(figures[key]) for figures in columns.values()]
            table.add_row(label, *cells, *([change.get(key, "")] if change else []))
    if skipped:
        table.add_row("skipped steps", *[""] * (len(columns) - 1), skipped)
    return table


@dataclass(frozen=True)
class Points:
    """Figures of a data set along the run: steps, losses, accuracies, and the accuracies' standard errors."""

    name: str
    steps: list[int]
    losses: list[float]
    accuracies: list[float]
    errors: list[float] | None = None


def curves(*, title: str, losses: Sequence[float], points: Sequence[Points]) -> Any:
    """A figure: training loss by step with its running mean, and loss and accuracy of dev and held-out rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, parse_math=False)
    left, right = figure.subplots(1, 2)
    if losses:
        steps = range(1, len(losses) + 1)
        one = "." if len(losses) == 1 else None  # a line shows nothing of one point
        left.plot(
            steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, marker=one, label="training batch, perturbed"
        )
        if one is None:
            mean = f"mean of {min(_WINDOW, len(losses))} batches"
            left.plot(steps, running_mean(losses), color="tab:blue", linewidth=1.6, label=mean)
    for color, found in zip(("tab:red", "tab:green"), points, strict=False):
        left.plot(found.steps, found.losses, color=color, marker="o", label=found.name)
        name = found.name + (", +- 1 standard error" if found.errors else "")
        right.errorbar(found.steps, found.accuracies, yerr=found.errors, color=color, marker="o", capsize=3, label=name)
    for axes, what in ((left, "loss"), (right, "accuracy")):
        axes.set_xlabel("step")
        axes.set_ylabel(what)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        # Below: "best" inside does not know of error bars.
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    return figure


def draw_curves(path: Path, *, title: str, losses: Sequence[float], points: Sequence[Points]) -> None:
    """The curves as a PNG."""
    curves(title=title, losses=losses, points=points).savefig(path, dpi=120)
