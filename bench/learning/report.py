"""The table and the curves of a search."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from learning.contenders import Contender
from learning.search import finals


def rows(
    where: tuple[str, str],
    contenders: Sequence[Contender],
    budget: int,
    seeds: Sequence[int],
    done: Mapping[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """A row for every contender whose search has ended, the best first."""
    found = []
    for contender in contenders:
        points = finals(where, contender, budget, seeds, done)
        if not points:
            continue
        results = [done[point.key] for point in points]
        losses = [result["held_out"] for result in results if result["held_out"] is not None]
        found.append(
            {
                "contender": contender.name,
                "setting": dict(points[0].setting),
                "before": results[0]["curve"][0][2],
                "after": statistics.fmean(losses) if len(losses) == len(results) else None,
                "se": statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else None,
                "seconds": statistics.fmean(result["seconds"] for result in results),
                "passes": statistics.fmean(result["passes"] for result in results),
                "curves": [result["curve"] for result in results],
            }
        )
    return sorted(found, key=lambda row: (row["after"] is None, row["after"]))


def to_reach(row: Mapping[str, Any], loss: float) -> float | None:
    """Forward passes after which the mean of the curves is at most `loss`, between two points of them."""
    mean = mean_curve(row["curves"])
    for (before, _, above), (passes, _, below) in pairwise(mean):
        if below <= loss:
            return before + (passes - before) * min(1.0, max(0.0, (above - loss) / max(above - below, 1e-12)))
    return None


def mean_curve(curves: Sequence[Sequence[Sequence[float | None]]]) -> list[list[float]]:
    """Means of forward passes, seconds and losses over the runs, point by point, as far as all have a loss."""
    mean = []
    for points in zip(*curves, strict=False):
        if any(point[2] is None for point in points):
            break
        mean.append([statistics.fmean(column) for column in zip(*points, strict=True)])  # type: ignore[arg-type]
    return mean


def markdown(title: str, table: Sequence[Mapping[str, Any]], baseline: str) -> str:
    """The table; passes to the baseline's final loss are in shares of the baseline's."""
    own = next((row for row in table if row["contender"] == baseline), None)
    goal = own["after"] if own else None
    lines = [
        f"## {title}",
        "",
        f"| method | lr, tau | held-out loss (SE) | change | passes to {baseline}'s final loss | CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in table:
        setting = ", ".join(f"{row['setting'][key]:g}" for key in ("lr", "tau") if key in row["setting"])
        loss = "not finite" if row["after"] is None else f"{row['after']:.4f}"
        se = "" if row["se"] is None else f" ({row['se']:.4f})"
        change = "" if row["after"] is None else f"{row['after'] - row['before']:+.4f}"
        reached = to_reach(row, goal) if goal is not None else None
        share = f"{reached / own['passes']:.2f}" if own and reached is not None else "not reached"
        lines.append(f"| {row['contender']} | {setting} | {loss}{se} | {change} | {share} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def draw(table: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Held-out loss against forward passes and against the CPU seconds of the steps, means over the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    lowest = min((row["after"] for row in table if row["after"] is not None), default=0.0)
    start = table[0]["before"] if table else 1.0
    for number, row in enumerate(table):
        mean = mean_curve(row["curves"])
        style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10], "label": row["contender"]}
        left.plot([p for p, _, _ in mean], [loss for *_, loss in mean], **style)
        right.plot([s for _, s, _ in mean], [loss for *_, loss in mean], **style)
    left.set(xlabel="forward passes", ylabel="held-out loss, mean of the seeds")
    left.set_ylim(lowest - 0.05 * (start - lowest), start + 0.1 * (start - lowest))
    right.set(xlabel="CPU seconds of steps (held-out evaluations left out)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside right upper")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
