"""One run of a contender with one setting, and the search of the best setting by successive halving.

Every finished run is a line of a journal; what stands there is not run again, so a search that was killed goes on.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learning.contenders import GRID, Contender
from learning.works import Work

# A run is given up whose loss on dev rows has risen by this much: its setting is no good.
HOPELESS = 1.0
# Settings beyond an end of the grid, at most.
MORE = 4
# Settings with all of the budget: the best one of a quarter is often too bold for four times as many steps.
_FINALISTS = 2


# As `search` without its last argument.
Search = Callable[[tuple[str, str], Contender, int, Sequence[int], Mapping[str, dict[str, Any]]], Iterator["Point"]]


@dataclass(frozen=True)
class Point:
    """A run: what decides its result."""

    work: str
    variant: str
    contender: str
    setting: Mapping[str, float]
    budget: int
    seed: int

    @property
    def key(self) -> str:
        """The same in every process."""
        return json.dumps(vars(self), sort_keys=True)


class Journal:
    """Lines of JSON, one for each finished run; a line that a kill has cut is no line."""

    def __init__(self, path: Path) -> None:
        self._path, self.results, self.abouts = path, dict[str, dict[str, Any]](), list[dict[str, str]]()
        if path.exists():
            text = path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if whole != text:
                path.write_bytes(whole)
            for line in whole.splitlines():
                found = json.loads(line)
                if "point" in found:
                    self.results[Point(**found["point"]).key] = found
                else:
                    self.abouts.append(found["about"])

    def begin(self, about: Mapping[str, str]) -> None:
        """Writes down by what the lines after it were made."""
        self._append({"about": dict(about)})
        self.abouts.append(dict(about))

    def add(self, point: Point, result: dict[str, Any]) -> None:
        """Writes a result, on the disk when it returns."""
        line = {"point": vars(point), **result}
        self._append(line)
        self.results[point.key] = json.loads(json.dumps(line))

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("ab", buffering=0) as file:  # one write: lines of processes side by side stay whole
            file.write(json.dumps(line).encode() + b"\n")
            os.fsync(file.fileno())


def run(
    work: Work,
    contender: Contender,
    point: Point,
    reported: bool = True,
    tick: Callable[[], None] = lambda: None,
    points: int | None = None,
) -> dict[str, Any]:
    """Held-out losses on the way of one run, by forward passes and by seconds of its steps; lr falls linearly to 0.

    Args:
        reported: the run may stand in the table: it has a curve also where dev rows are not watched.
        tick: called after every step.
        points: of the curve, which take their time; None: as many as the work says.
    """
    points = work.points if points is None else points
    net = work.network(point.variant)
    probe = contender.optimizer(net, 100, point.seed, point.setting)
    steps = contender.steps(probe, point.budget)
    optimizer = contender.optimizer(net, steps, point.seed, point.setting)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    losses, first_order = work.losses(net, point.seed, contender.by_row), isinstance(optimizer, torch.optim.SGD)
    clock = time.perf_counter if work.device.type == "cuda" else time.process_time
    reported |= work.watched
    curve = [[0.0, 0.0, work.before(point.variant, False)]] if reported else []
    start = work.before(point.variant, True)
    seconds, passes, ended, dev = 0.0, 0.0, "done", math.nan
    for step in range(steps):
        closure = _Counted(next(losses))
        begin = clock()
        if first_order:
            optimizer.zero_grad()
            closure().backward()
            optimizer.step()
        else:
            optimizer.step(closure)
        passes += contender.cost * closure.calls
        schedule.step()
        seconds += clock() - begin
        tick()
        last = step + 1 == steps
        if last or (reported and (step + 1) % max(1, steps // points) == 0):
            if reported:
                curve.append([passes, round(seconds, 3), work.held_out(net, False)])
            if last or work.watched:
                dev = work.held_out(net, True)
            if work.watched and not dev <= start + HOPELESS:
                ended = "hopeless"
                break
    return {
        "dev": dev if math.isfinite(dev) and ended == "done" else None,
        "dev_before": start,
        "held_out": curve[-1][2] if reported and math.isfinite(curve[-1][2]) else None,
        "passes": passes,
        "steps": steps,
        "seconds": round(seconds, 3),
        "ended": ended,
        "curve": [[p, s, loss if math.isfinite(loss) else None] for p, s, loss in curve],
    }


class _Counted:
    """A closure that counts its evaluations."""

    def __init__(self, closure: Callable[[], Tensor]) -> None:
        self._closure, self.calls = closure, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return self._closure()


def search(
    where: tuple[str, str],
    contender: Contender,
    budget: int,
    seeds: Sequence[int],
    done: Mapping[str, dict[str, Any]],
    grid: Sequence[float] = GRID,
) -> Iterator[Point]:
    """The points that are still to be run, one after the other; each must be in `done` before the next is asked for.

    All settings with a quarter of the budget, and more of them while the best one is at an end of the grid; the best
    two with all of the budget, and the better one with the other seeds. Settings are judged by their dev rows.
    """
    settings = contender.settings(" ".join(where), grid)
    early = [Point(*where, contender.name, setting, budget // 4, seeds[0]) for setting in settings]
    if len(early) > 1:
        yield from explored(early, contender, done)
        early = ranked(early, done)[:_FINALISTS]
    late = [Point(*where, contender.name, point.setting, budget, seeds[0]) for point in early]
    yield from (point for point in late if point.key not in done)
    best = ranked(late, done)[0]
    more = [Point(*where, contender.name, best.setting, budget, seed) for seed in seeds[1:]]
    yield from (point for point in more if point.key not in done)


def explored(points: list[Point], contender: Contender, done: Mapping[str, dict[str, Any]]) -> Iterator[Point]:
    """Those of `points` that are still to be run, and more of them, appended, while the best one is at an end."""
    yield from (point for point in points if point.key not in done)
    for _ in range(MORE):
        rates, best = [point.setting["lr"] for point in points], ranked(points, done)[0].setting
        if best["lr"] not in (min(rates), max(rates)):
            break
        points.append(replace(points[0], setting=contender.beyond(best, up=best["lr"] == max(rates))))
        if points[-1].key not in done:
            yield points[-1]


def finals(
    where: tuple[str, str],
    contender: Contender,
    budget: int,
    seeds: Sequence[int],
    done: Mapping[str, dict[str, Any]],
    searched: Search = search,
) -> list[Point]:
    """The points of the table: the best setting with every seed; none while some are missing."""
    if next(searched(where, contender, budget, seeds, done), None) is not None:
        return []
    late = [point for point in _own(where, contender, done) if (point.budget, point.seed) == (budget, seeds[0])]
    best = ranked(late, done)[0]
    return [Point(*where, contender.name, best.setting, budget, seed) for seed in seeds]


def _own(where: tuple[str, str], contender: Contender, done: Mapping[str, dict[str, Any]]) -> list[Point]:
    """The points of a contender that are done."""
    points = [result["point"] for result in done.values() if result["point"]["contender"] == contender.name]
    return [Point(**point) for point in points if (point["work"], point["variant"]) == where]


@dataclass(frozen=True)
class Plan:
    """A search for many contenders: where, with how many forward passes a run, and by which seeds and grid."""

    where: tuple[str, str]
    budget: int
    seeds: Sequence[int]
    grid: Sequence[float] = GRID

    @property
    def name(self) -> str:
        """Work and variant, as settings are looked up by."""
        return " ".join(self.where)

    def search(
        self, where: tuple[str, str], contender: Contender, budget: int, seeds: Sequence[int], done: Any
    ) -> Iterator[Point]:
        """`search` by this grid."""
        return search(where, contender, budget, seeds, done, self.grid)

    def missing(self, contender: Contender, done: Mapping[str, dict[str, Any]]) -> Iterator[Point]:
        """Points that are still to be run, as `search`."""
        return self.search(self.where, contender, self.budget, self.seeds, done)

    def finals(self, contender: Contender, done: Mapping[str, dict[str, Any]]) -> list[Point]:
        """The points of the table, as `finals`."""
        return finals(self.where, contender, self.budget, self.seeds, done, self.search)

    def expected(self, contender: Contender, done: Mapping[str, dict[str, Any]]) -> tuple[int, int]:
        """Runs that are still to be made, as far as can be known: with a quarter of the budget, and with all of it."""
        if next(self.missing(contender, done), None) is None:
            return 0, 0
        budgets = [point.budget for point in _own(self.where, contender, done)]
        tried = len(contender.settings(self.name, self.grid))
        early = (tried + 1 if tried > 1 else 0) - budgets.count(self.budget // 4)
        late = min(tried, _FINALISTS) + len(self.seeds) - 1 - budgets.count(self.budget)
        return max(0, early), max(1, late)


def ranked(points: Sequence[Point], done: Mapping[str, dict[str, Any]]) -> list[Point]:
    """Best first; those without a loss last, the smaller steps before the larger ones."""
    dev = {point.key: done[point.key]["dev"] for point in points}
    return sorted(points, key=lambda p: (dev[p.key] is None, dev[p.key] or 0.0, p.setting.get("lr", 0.0)))
