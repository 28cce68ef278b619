"""JAGUAR SignSGD and JAGUAR Muon with one beta, and what momentum does in their steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learning.contenders import NS_OPTIONS, Contender
from learning.search import Point, explored, ranked
from learning.works import Work

METHODS = {"JAGUAR SignSGD": "jaguar-signsgd", "JAGUAR Muon": "jaguar-muon"}
UPDATES = ("sampled", "all")
# Learning rates that are tried first, by method, update and coordinates. With larger betas smaller ones are better, and
# the search goes there.
MIDDLES = {
    ("JAGUAR SignSGD", "sampled"): {"1": 2e-1, "0.01": 3e-3, "0.1": 1e-3, "1.0": 3e-4},
    ("JAGUAR SignSGD", "all"): {"1": 1e-3, "0.01": 5e-5, "0.1": 1e-4},
    ("JAGUAR Muon", "sampled"): {"1": 1e-3, "0.01": 5e-4, "0.1": 1e-3, "1.0": 1e-3},
    ("JAGUAR Muon", "all"): {"1": 1e-3, "0.01": 5e-4, "0.1": 1e-3},
}
# Neighbours differ by 10^(1/4): between two of them a quadratic's gain is at least 0.92 of its best.
_RATIO = 10**0.25
_MEASURED = 20  # steps of a run
_ROWS = 10**6  # seed of the rows whose gradient is measured: those of no run


@dataclass(frozen=True)
class Cell(Contender):
    """A method with one number of coordinates, one update and one beta.

    Three learning rates are tried first; the search goes on from there while the best is at an end.

    Attributes:
        watch: sees the steps.
    """

    watch: Watch | None = None

    def settings(self, where: str) -> list[dict[str, float]]:
        """Three of them."""
        middle = {"lr": self.lr[""], "tau": self.tau[""]}
        return [self.beyond(middle, up=False), middle, self.beyond(middle, up=True)]

    @staticmethod
    def beyond(setting: Mapping[str, float], up: bool) -> dict[str, float]:
        """The setting next to another one."""
        lr = setting["lr"] * _RATIO if up else setting["lr"] / _RATIO
        return dict(setting) | {"lr": float(f"{lr:.3g}")}

    def optimizer(self, net: Any, steps: int, seed: int, setting: Mapping[str, float]) -> Any:
        """A new one, which is seen by the watch."""
        optimizer = super().optimizer(net, steps, seed, setting)
        if self.watch is not None:
            self.watch.attach(optimizer, net, steps)
        return optimizer


def cell(method: str, update: str, coordinates: int | float, beta: float) -> Cell:
    """The contender of a method with these options.

    Where all coordinates are sampled, "all" is "sampled": there is one contender for both.
    """
    if coordinates == 1 and isinstance(coordinates, float):
        update = "sampled"
    options = {"coordinates": coordinates, "update": update, "beta": beta}
    if method == "JAGUAR Muon":
        options |= NS_OPTIONS
    middle = {"": MIDDLES[method, update][repr(coordinates)]}
    return Cell(f"{method}, {update}, {coordinates!r}, beta {beta:g}", METHODS[method], middle, options)


def search(
    where: tuple[str, str], contender: Contender, budget: int, seeds: Sequence[int], done: Mapping[str, dict[str, Any]]
) -> Iterator[Point]:
    """The points that are still to be run, as `learning.search.search`.

    With all of the budget the best setting of a quarter and its neighbours, as far as they are better: momentum that
    remembers more steps than a quarter has is another one there, in either direction.
    """
    early = [Point(*where, contender.name, s, budget // 4, seeds[0]) for s in contender.settings(" ".join(where))]
    yield from explored(early, contender, done)
    late = [Point(*where, contender.name, ranked(early, done)[0].setting, budget, seeds[0])]
    yield from explored(late, contender, done)
    best = ranked(late, done)[0].setting
    more = [Point(*where, contender.name, best, budget, seed) for seed in seeds[1:]]
    yield from (point for point in more if point.key not in done)


class Watch:
    """Sees some steps of a run from the optimizer's own state: the run itself does not change by a bit.

    Where a step has sampled, momentum has changed, and what came in has the sign of m_after - beta m_before.
    """

    def __init__(self, work: Work) -> None:
        self._work = work

    def attach(self, optimizer: Any, net: Any, steps: int) -> None:
        """Forgets what it has seen, and looks at the steps of another run."""
        self._params = [p for p in net.parameters() if p.requires_grad]
        self._every, self._steps, self._before = max(1, steps // _MEASURED), steps, list[tuple[Tensor, Tensor]]()
        self._losses = self._work.losses(net, _ROWS)
        self._seen, self._sampled, self._flipped, self._moved, self._cosines = 0, 0, 0, 0, list[float]()
        optimizer.register_step_pre_hook(self._begin)
        optimizer.register_step_post_hook(self._end)

    def _begin(self, optimizer: Any, *args: Any) -> None:
        if (optimizer.steps_done + 1) % self._every == 0:
            self._before = [(p.detach().clone(), _momentum(optimizer, p).clone()) for p in self._params]
            # Here, not after the step: a step that is too long for the curvature would seem to go uphill.
            with torch.enable_grad():
                self._gradients = torch.autograd.grad(next(self._losses)(), self._params)

    def _end(self, optimizer: Any, *args: Any) -> None:
        if not self._before:
            return
        beta = optimizer.param_groups[0]["beta"]
        along = length = slope = 0.0
        for p, gradient, (x, m) in zip(self._params, self._gradients, self._before, strict=True):
            now, moved = _momentum(optimizer, p), (p.detach() - x).double()
            sampled = now != m
            self._sampled += int(sampled.sum())
            self._flipped += int((now.sign() != (now - beta * m).sign())[sampled].sum())
            self._moved += int((moved != 0).sum())
            along -= float((moved * gradient).sum())
            length += float(moved.square().sum())
            slope += float(gradient.double().square().sum())
        self._seen, self._before = self._seen + 1, []
        if length > 0:
            self._cosines.append(along / (length * slope) ** 0.5)

    def summary(self) -> dict[str, float | None]:
        """Numbers of the run.

        entries: of a coordinate's momentum in the run, in the mean over all coordinates.
        flips: share of the sampled coordinates at which momentum has another sign than what came in.
        moved: share of all coordinates that a step moves.
        cosine: of the angle between a step and the downhill direction on other training rows.
        """
        seen = max(1, self._seen) * sum(p.numel() for p in self._params)
        return {
            "entries": self._sampled / seen * self._steps,
            "flips": self._flipped / self._sampled if self._sampled else None,
            "moved": self._moved / seen,
            "cosine": sum(self._cosines) / len(self._cosines) if self._cosines else None,
        }


def _momentum(optimizer: Any, p: Tensor) -> Tensor:
    found = optimizer.state[p].get("momentum") if p in optimizer.state else None
    return torch.zeros_like(p) if found is None else found.detach()
