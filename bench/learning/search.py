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

from jaguar import ZerothOrder
from learning.contenders import Contender
from learning.works import Work

POINTS = 20  # of a curve
# A run is given up whose loss on dev rows has risen by this much: its setting is no good.
HOPELESS = 1.0
# Settings beyond an end of the grid, at most.
MORE = 4


# As `search`.
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
        self._path, self.results = path, dict[str, dict[str, Any]]()
        if path.exists():
            text = path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if whole != text:
                path.write_bytes(whole)
            for line in whole.splitlines():
                found = json.loads(line)
                if "point" in found:
                    self.results[Point(**found["point"]).key] = found

    def begin(self, about: Mapping[str, str]) -> None:
        """Writes down by what the lines after it were made."""
        self._append({"about": dict(about)})

    def add(self, point: Point, result: dict[str, Any]) -> None:
        """Writes a result, on the disk when it returns."""
        line = {"point": vars(point), **result}
        self._append(line)
        self.results[point.key] = json.loads(json.dumps(line))

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def run(
    work: Work,
    contender: Contender,
    point: Point,
    tick: Callable[[], None] = lambda: None,
    points: int | None = None,
) -> dict[str, Any]:
    """Held-out losses on the way of one run, by forward passes and by CPU seconds of its steps; lr falls linearly to 0.

    Args:
        tick: called after every step.
        points: of the curve, which take their time; None: `POINTS`.
    """
    points = POINTS if points is None else points
    net = work.network(point.variant)
    probe = contender.optimizer(net, 100, point.seed, point.setting)
    first_order = not isinstance(probe, ZerothOrder)
    each = contender.cost * (1 if first_order else probe.method.estimator.n_losses)
    steps = max(1, int(point.budget / each))
    optimizer = contender.optimizer(net, steps, point.seed, point.setting)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    losses = work.losses(net, point.seed)
    curve, seconds, passes = [[0.0, 0.0, work.held_out(net, False)]], 0.0, 0.0
    start = work.held_out(net, True)
    limit, ended = start + HOPELESS, "done"
    for step in range(steps):
        closure = next(losses)
        begin = time.process_time()
        if first_order:
            optimizer.zero_grad()
            closure().backward()
            optimizer.step()
            passes += contender.cost
        else:
            optimizer.step(closure)
            passes += contender.cost * probe.method.estimator.evaluations(optimizer.last_record.losses)
        schedule.step()
        seconds += time.process_time() - begin
        tick()
        if (step + 1) % max(1, steps // points) == 0 or step + 1 == steps:
            curve.append([passes, round(seconds, 3), work.held_out(net, False)])
            now = work.held_out(net, True)
            if not now <= limit:
                ended = "hopeless"
                break
    dev = work.held_out(net, True)
    return {
        "dev": dev if math.isfinite(dev) and ended == "done" else None,
        "dev_before": start,
        "held_out": curve[-1][2] if math.isfinite(curve[-1][2]) else None,
        "passes": passes,
        "steps": steps,
        "seconds": round(seconds, 3),
        "ended": ended,
        "curve": [[p, s, loss if math.isfinite(loss) else None] for p, s, loss in curve],
    }


def search(
    where: tuple[str, str], contender: Contender, budget: int, seeds: Sequence[int], done: Mapping[str, dict[str, Any]]
) -> Iterator[Point]:
    """The points that are still to be run, one after the other; each must be in `done` before the next is asked for.

    All settings with a quarter of the budget, and more of them while the best one is at an end of the grid; the best
    two with all of the budget, and the best one with the other seeds. Settings are judged by their dev rows.
    """
    early = [Point(*where, contender.name, s, budget // 4, seeds[0]) for s in contender.settings(" ".join(where))]
    yield from explored(early, contender, done)
    late = [Point(*where, contender.name, point.setting, budget, seeds[0]) for point in ranked(early, done)[:2]]
    yield from (point for point in late if point.key not in done)
    best = ranked(late, done)[0]
    more = [Point(*where, contender.name, best.setting, budget, seed) for seed in seeds[1:]]
    yield from (point for point in more if point.key not in done)


def explored(
    points: list[Point], contender: Contender, done: Mapping[str, dict[str, Any]], upwards: bool = True
) -> Iterator[Point]:
    """Those of `points` that are still to be run, and more of them, appended, while the best one is at an end.

    Args:
        upwards: False: at the end of the smallest lr only.
    """
    yield from (point for point in points if point.key not in done)
    for _ in range(MORE):
        rates, best = [point.setting["lr"] for point in points], ranked(points, done)[0].setting
        up = upwards and best["lr"] == max(rates)
        if not up and best["lr"] != min(rates):
            break
        points.append(replace(points[0], setting=contender.beyond(best, up=up)))
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
    own = [result["point"] for result in done.values() if result["point"]["contender"] == contender.name]
    late = [Point(**point) for point in own if (point["work"], point["variant"]) == where]
    best = ranked([point for point in late if (point.budget, point.seed) == (budget, seeds[0])], done)[0]
    return [Point(*where, contender.name, best.setting, budget, seed) for seed in seeds]


def ranked(points: Sequence[Point], done: Mapping[str, dict[str, Any]]) -> list[Point]:
    """Best first; those without a loss last, the smaller steps before the larger ones."""
    dev = {point.key: done[point.key]["dev"] for point in points}
    return sorted(points, key=lambda p: (dev[p.key] is None, dev[p.key] or 0.0, p.setting["lr"]))
