"""Slopes with their intervals, the table and the plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from theorems.sweeps import Sweep, bound

NEAR = 0.1  # what a slope may be off: other terms of the sum have their shares at both ends of a sweep
T95 = {1: 12.706, 2: 4.303, 3: 3.182}  # quantile 0.975 of Student's t, by degrees of freedom


def slope(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """The slope of log y over log x, and half of its 95 % interval: scatter and lack of fit are both in it."""
    x, y = [math.log(v) for v in xs], [math.log(v) for v in ys]
    found = statistics.linear_regression(x, y)
    residual = sum((b - found.intercept - found.slope * a) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((a - statistics.fmean(x)) ** 2 for a in x)
    return found.slope, T95[len(x) - 2] * (residual / (len(x) - 2) / spread) ** 0.5


def row(sweep: Sweep, left: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What a sweep has shown; `left`: of each value the left sides, one a seed."""
    xs, means = [sweep.abscissa(v) for v in sweep.values], [statistics.fmean(values) for values in left]
    terms = [sweep.term_at(v) for v in sweep.values]
    bounds = [sum(bound(sweep.setting(v)).values()) for v in sweep.values]
    of_term, (measured, half) = slope(xs, terms)[0], slope(xs, means)
    expected = of_term if sweep.expected is None else sweep.expected
    within = max(half, NEAR)
    return {
        "name": sweep.name,
        "method": sweep.method,
        "term": sweep.term,
        "regime": sweep.regime,
        "variable": sweep.variable,
        "values": xs,
        "left": [list(values) for values in left],
        "share": min(t / b for t, b in zip(terms, bounds, strict=True)),
        "of_bound": max(m / b for m, b in zip(means, bounds, strict=True)),
        "term_slope": of_term,
        "expected": expected,
        "slope": measured,
        "half": half,
        "attained": abs(measured - of_term) <= within,
        "as_expected": abs(measured - expected) <= within,
        "why": sweep.why,
    }


def markdown(rows: Sequence[Mapping[str, Any]], about: Mapping[str, str]) -> str:
    """The table, and why slopes are not the terms'."""
    reasons = list(dict.fromkeys(r["why"] for r in rows if r["why"]))
    lines = [
        "# The theorems, measured",
        "",
        "Left sides of Theorems 1 and 2 of arXiv 2506.04430 (the mean over the steps of the l1 or the nuclear norm of "
        "the gradient) in runs of `jaguar.JaguarSignSGD` and `jaguar.JaguarMuon` on quadratics, one variable at a "
        "time, where the term that is named is most of the bound. Slopes are those of logarithms, with 95 % intervals "
        f"(regression over the values). A slope agrees if it is in the interval or within {NEAR:g}. Share: the least "
        "that the term has of the bound with constants 1. Left / bound: the largest.",
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        "",
        "| method | term | regime | over | term's slope | expected | measured | agrees with | share | left / bound "
        "| note |",
        "|---|---|---|---|--:|--:|--:|---|--:|--:|---|",
    ]
    for r in rows:
        agrees = "the term" if r["attained"] else "the calculation" if r["as_expected"] else "neither"
        note = f"[{reasons.index(r['why']) + 1}]" if r["why"] else ""
        lines.append(
            f"| {r['method']} | {r['term']} | {r['regime']} | {r['variable']} | {r['term_slope']:+.2f} | "
            f"{r['expected']:+.2f} | {r['slope']:+.2f} +- {r['half']:.2f} | {agrees} | {r['share']:.2f} | "
            f"{r['of_bound']:.2f} | {note} |"
        )
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel for each variable of each regime: the runs, and the slope of the term through their middle."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panels = list(dict.fromkeys((r["term"], r["regime"], r["variable"]) for r in rows))
    terms = [term for term, *_ in panels]
    panels.sort(key=lambda panel: terms.index(panel[0]))
    width = min(5, len(panels))
    height = math.ceil(len(panels) / width)
    figure = Figure(figsize=(3.2 * width + 0.4, 2.9 * height + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(height, width, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for axes, panel in zip(grid, panels, strict=False):
        slopes = []
        for r in (r for r in rows if (r["term"], r["regime"], r["variable"]) == panel):
            color = "C0" if r["method"] == "SignSGD" else "C1"
            for x, values in zip(r["values"], r["left"], strict=True):
                axes.plot([x] * len(values), values, ".", color=color, alpha=0.4)
            means = [statistics.fmean(values) for values in r["left"]]
            (handles[f"JAGUAR {r['method']}, mean of the seeds"],) = axes.plot(r["values"], means, color=color)
            middle = [statistics.geometric_mean(of) for of in (r["values"], means)]
            (handles["slope of the term"],) = axes.plot(
                r["values"], [middle[1] * (x / middle[0]) ** r["term_slope"] for x in r["values"]], "--", color="0.5"
            )
            slopes.append(f"{r['method']} {r['slope']:+.2f} (term {r['term_slope']:+.2f})")
        axes.set(xscale="log", yscale="log", xlabel=panel[2])
        axes.set_title(
            "\n".join([f"{panel[0]}: {panel[1]}" if panel[0] != "all" else "tuned by the corollary", *slopes]),
            fontsize=9,
        )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
            axis.set_tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.supylabel("mean norm of the gradient")
    figure.savefig(path, dpi=110)
