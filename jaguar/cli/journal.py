"""`jaguar journal show | verify | plot`: what a run did, read from its journal alone."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaguar.cli.output import say
from jaguar.models.errors import printable
from jaguar.record import JOURNAL, DamagedJournal, Journal, Record

ACTIONS = ("show", "verify", "plot")


def show(path: str, console: Console, last: int) -> None:
    """Prints the header, the last records and the marks."""
    with Journal.read(file_of(path)) as journal:
        table = Table(show_header=False, title=escape(path), title_justify="left")
        for name, text in _summary(journal).items():
            table.add_row(name, escape(printable(text)))
        console.print(table)
        rows: deque[Record] = deque(maxlen=last)
        rows.extend(journal.since(journal.next_step - last))
    table = Table(title=f"the last {len(rows)} of {len(journal)} steps", title_justify="left")
    for column in ("step", "loss", "learning rate", "losses", "note"):
        table.add_column(column, justify="left" if column in ("losses", "note") else "right", overflow="fold")
    for record in rows:
        losses = ", ".join(f"{loss:.6g}" for loss in record.losses[:8])
        more = f", ... ({len(record.losses)})" if len(record.losses) > 8 else ""
        rates = ", ".join(f"{lr:.3g}" for lr in dict.fromkeys(record.lrs))
        table.add_row(str(record.step + 1), f"{record.loss:.6g}", rates, losses + more, "skipped" * record.skipped)
    if rows:
        console.print(table)
    for mark in journal.marks[-5:]:
        say(console, f"after {mark.step} steps: fingerprint {mark.fingerprint}{', the end of a run' * mark.chosen}")


def verify(path: str, console: Console) -> int:
    """Reads all of it; returns 0 if it is whole, 1 if not."""
    try:
        with Journal.read(file_of(path)) as journal:
            skipped = sum(record.skipped for record in journal)
    except DamagedJournal as error:
        say(console, str(error), "red")
        return 1
    steps = f"steps {journal.first + 1} to {journal.next_step}" if len(journal) else "no step"
    say(
        console,
        f"{steps}, {skipped} skipped, {len(journal.marks)} fingerprints: every entry meets its checksum",
        "green",
    )
    if journal.dropped:
        say(console, f"the last {journal.dropped} bytes are no whole entry: a run that goes on cuts them off", "yellow")
    if not journal.ended:
        say(console, "the run has not come to its end", "yellow")
    say(console, "that the weights are those of the run: jaguar replay")
    return 1 if journal.dropped else 0


def plot(path: str, out: str, console: Console) -> None:
    """Draws losses, differences of losses and learning rates of all steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from jaguar.cli.finetune.report import running_mean

    with Journal.read(file_of(path)) as journal:
        whole = (r for r in journal if r.losses and r.lrs)
        drawn = [(r.step + 1, r.loss, abs(r.losses[0] - r.losses[-1]), r.lrs[0]) for r in whole]
    if not drawn:
        raise ValueError(f"{path!r} has no steps to draw")
    steps, losses, spread, rates = (list(column) for column in zip(*drawn, strict=True))
    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    above, middle, below = figure.subplots(3, sharex=True)
    above.plot(steps, losses, ".", ms=3, color="0.7", label="each step")
    above.plot(steps, running_mean(losses), color="C0", label="mean of the last 25")
    above.set_ylabel("training loss")
    above.legend(frameon=False)
    positive = [value if value > 0 else math.nan for value in spread]
    middle.semilogy(steps, positive, ".", ms=3, color="C1")
    middle.set_ylabel("|first loss - last loss|")
    below.plot(steps, rates, color="C2")
    below.set(ylabel="learning rate", xlabel="step")
    for axes in (above, middle, below):
        axes.grid(alpha=0.3)
    name = printable(str(journal.header.get("optimizer", "")))
    above.set_title(f"{name}, {len(steps)} steps of {Path(path).parent.name or path}")
    out = out if Path(out).suffix else f"{out}.png"
    figure.savefig(out, dpi=120)
    say(console, f"drawn: {out}")


def file_of(path: str) -> Path:
    """The journal of a path, which may be a run's folder."""
    return Path(path) / JOURNAL if Path(path).is_dir() else Path(path)


def _summary(journal: Journal) -> dict[str, str]:
    header = journal.header
    base, environment = (_mapping(header.get(key)) for key in ("base", "environment"))
    parameters = header.get("parameters")
    shapes = [_mapping(entry).get("shape") for entry in parameters] if isinstance(parameters, list) else []
    # What a file says of itself is shown as it is, and never believed.
    known = [shape for shape in shapes if isinstance(shape, list) and all(isinstance(n, int) for n in shape)]
    elements = sum(math.prod(shape) for shape in known)
    parts = _mapping(header.get("method"))
    words = [_words(parts.get(part)) for part in ("direction", "rule", "estimator")]
    adapter = _mapping(base.get("adapter")).get("kind", "none")
    end = f"ended; its model is that of step {journal.chosen}" if journal.ended else "not at its end"
    return {
        "optimizer": str(header.get("optimizer", "unknown")),
        "method": "; ".join(filter(None, words)),
        "seed": f"{header.get('seed')}, random numbers {header.get('rng')}",
        "base model": f"{base.get('model') or 'unnamed'}" + (f", {adapter}" if adapter != "none" else ""),
        "trained": f"{len(shapes)} tensors, {elements:,} elements",
        "ran with": ", ".join(f"{key} {value}" for key, value in environment.items()),
        "steps": f"{journal.first + 1} to {journal.next_step}, {end}" if len(journal) else "none",
        "size": f"{journal.path.stat().st_size:,} bytes" + f", {journal.dropped} dropped" * bool(journal.dropped),
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _words(part: Any) -> str:
    values = dict(_mapping(part))
    kind = values.pop("kind", "")
    given = ", ".join(f"{key}={value}" for key, value in values.items() if value is not None)
    return f"{kind}({given})" if kind else ""
