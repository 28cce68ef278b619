"""The table and the curves of a search."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from learning.contenders import Contender
from learning.search import Plan


def rows(plan: Plan, contenders: Sequence[Contender], done: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every contender whose search has ended, the best first, and for every one that cannot run."""
    found: list[dict[str, Any]] = []
    refused = []
    for contender in contenders:
        if reason := contender.refusal(plan.name):
            refused.append({"contender": contender.name, "refusal": reason})
            continue
        points = plan.finals(contender, done)
        if not points:
            continue
        results = [done[point.key] for point in points]
        losses = [result["held_out"] for result in results]
        finite = [loss for loss in losses if loss is not None]
        found.append(
            {
                "contender": contender.name,
                "setting": dict(points[0].setting),
                "before": results[0]["curve"][0][2],
                "losses": losses,
                "after": statistics.fmean(finite) if len(finite) == len(losses) else None,
                "se": statistics.stdev(finite) / len(finite) ** 0.5 if len(finite) > 1 else None,
                "seconds": statistics.fmean(result["seconds"] for result in results),
                "passes": statistics.fmean(result["passes"] for result in results),
                "curves": [result["curve"] for result in results],
            }
        )
    return sorted(found, key=lambda row: (row["after"] is None, row["after"])) + refused


def paired(losses: Sequence[float | None], baseline: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean difference of two contenders' losses with the same seeds, and its standard error; None: not known."""
    if None in losses or None in baseline:
        return None, None
    differences = [own - other for own, other in zip(losses, baseline, strict=True)]  # type: ignore[operator]
    n = len(differences)
    return statistics.fmean(differences), statistics.stdev(differences) / n**0.5 if n > 1 else None


def compare(table: Sequence[dict[str, Any]], baseline: str) -> None:
    """Adds to every row its paired difference to the baseline's and its share of the baseline's forward passes."""
    own = next((row for row in table if row["contender"] == baseline and "after" in row), None)
    for row in table:
        if own is None or "after" not in row:
            continue
        row["difference"], row["difference_se"] = paired(row["losses"], own["losses"])
        reached = None if own["after"] is None else to_reach(row, own["after"])
        row["share"] = None if reached is None else reached / own["passes"]


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


def markdown(title: str, table: Sequence[Mapping[str, Any]], baseline: str, clock: str) -> str:
    """The table; passes to the baseline's final loss are in shares of the baseline's."""
    names = f"held-out loss (SE) | change | difference to {baseline} (SE) | passes to {baseline}'s final loss"
    lines = [f"## {title}", "", f"| method | lr, tau | {names} | {clock} seconds |", "|---|---|---|---|---|---|---|"]
    for row in table:
        if "refusal" in row:
            lines.append(f"| {row['contender']} | | cannot run: {row['refusal']} | | | | |")
            continue
        cells = [
            row["contender"],
            ", ".join(f"{row['setting'][key]:g}" for key in ("lr", "tau") if key in row["setting"]),
            "not finite" if row["after"] is None else _with_se(f"{row['after']:.4f}", row["se"]),
            "" if row["after"] is None else f"{row['after'] - row['before']:+.4f}",
            _difference(row, baseline),
            _share(row),
            f"{row['seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# What a command says of its share of the work alone.
_SHARE = re.compile(r" --(part|commit|minutes) \S+")


def about(parts: Sequence[Mapping[str, str]]) -> list[str]:
    """What the runs were made by: all values that the parts of a search have, in their order."""
    found: dict[str, dict[str, None]] = {}
    for part in parts:
        for key, value in part.items():
            text = _SHARE.sub("", value) if key == "command" else value
            found.setdefault(key, {})[text] = None
    return (
        [", ".join(f"{key} {' and '.join(values)}" for key, values in found.items() if any(values)) + "\n"]
        if found
        else []
    )


def _with_se(text: str, se: float | None) -> str:
    return text if se is None else f"{text} ({se:.4f})"


def _difference(row: Mapping[str, Any], baseline: str) -> str:
    if row["contender"] == baseline or row.get("difference") is None:
        return ""
    return _with_se(f"{row['difference']:+.4f}", row["difference_se"])


def _share(row: Mapping[str, Any]) -> str:
    if "share" not in row:
        return ""
    return "not reached" if row["share"] is None else f"{row['share']:.2f}"


def draw(table: Sequence[Mapping[str, Any]], title: str, path: Path, clock: str) -> None:
    """Held-out loss against forward passes and against the seconds of the steps, means over the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    table = [row for row in table if "curves" in row]
    lowest = min((row["after"] for row in table if row["after"] is not None), default=0.0)
    start = table[0]["before"] if table else 1.0
    for number, row in enumerate(table):
        mean = mean_curve(row["curves"])
        style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10], "label": row["contender"]}
        left.plot([p for p, _, _ in mean], [loss for *_, loss in mean], **style)
        right.plot([s for _, s, _ in mean], [loss for *_, loss in mean], **style)
    left.set(xlabel="forward passes", ylabel="held-out loss, mean of the seeds")
    left.set_ylim(lowest - 0.05 * (start - lowest), start + 0.1 * (start - lowest))
    right.set(xlabel=f"{clock} seconds of steps (held-out evaluations left out)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside right upper")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
