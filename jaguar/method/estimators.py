"""Estimators: which points of a direction are evaluated, the directional derivative, and whether a step moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

from jaguar.method.directions import Direction
from jaguar.method.params import is_int
from jaguar.method.probe import Probe, Trial, evaluated
from jaguar.method.rule import plain, rounded
from jaguar.record import mean


@dataclass(frozen=True)
class Estimator:
    """A derivative estimator: points to evaluate, and the directional derivative that their losses give.

    A subclass is a frozen dataclass whose fields decide bits. The losses are all that a record has of a step: `rho`,
    `along` and `moves` are functions of them.

    Attributes:
        n_directions: directions per step.
        rho_clip: bound on |rho|, or None.
        name: name in checkpoints.
        points: places along a direction, in order of evaluation, in units of tau e; the last one is where a walk ends.
        shared: number of losses that come first and are of no direction; None: directions cannot be measured apart.
            Where they can, `measure` takes some of a step's probes too: its losses are these, and len(points) for each.
    """

    n_directions: int = 1
    rho_clip: float | None = None

    name: ClassVar[str]
    points: ClassVar[tuple[float, ...]]
    shared: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if not is_int(self.n_directions) or not 1 <= self.n_directions <= 1000:
            raise ValueError(f"n_directions={self.n_directions!r}: give an int from 1 to 1000")
        clip = self.rho_clip
        if clip is not None and not (isinstance(clip, (int, float)) and clip > 0):
            raise ValueError(f"rho_clip={clip!r}: give a positive bound, or None for no clipping")

    @property
    def two_sided(self) -> bool:
        """Tells whether x - tau e is visited: else x + tau e is compared with x."""
        return -1.0 in self.points

    @property
    def n_losses(self) -> int:
        """Evaluations per step."""
        raise NotImplementedError

    def measure(
        self, evaluate: Callable[[], float], probes: Sequence[Probe], hold: bool, trial: Trial
    ) -> tuple[float, ...]:
        """The losses of a step, in order; whatever fails, the parameters go back to x.

        Args:
            evaluate: the loss at the parameters as they are.
            probes: one per direction.
            hold: leave the last probe where it is; the caller ends it.
            trial: other places to look at.
        """
        raise NotImplementedError

    def rho(self, losses: Sequence[float], tau: float, double: bool) -> list[float]:
        """One directional derivative per direction: two roundings, to fp32 unless `double`."""
        raise NotImplementedError

    def along(self, losses: Sequence[float], tau: float, double: bool) -> list[float]:
        """The derivatives that the step moves along: `rho`, unless the losses ask for another step."""
        return self.rho(losses, tau, double)

    def evaluations(self, losses: Sequence[float]) -> int:
        """Forward passes behind the losses of a step."""
        return len(losses)

    def loss(self, losses: Sequence[float]) -> float:
        """Loss that a step returns: the mean of the losses, NaN if one is not finite."""
        return mean(losses)

    def moves(self, losses: Sequence[float]) -> bool:
        """Tells whether these losses, all finite, move anything."""
        return True

    def check(self, direction: Direction, walk: bool) -> None:
        """Raises ValueError if it cannot measure along `direction`, or not where the way back is a walk."""

    def options(self) -> dict[str, Any]:
        """The name, and the fields as plain values."""
        return {"estimator": self.name} | {f.name: plain(getattr(self, f.name)) for f in fields(self)}


@dataclass(frozen=True)
class TwoSided(Estimator):
    """rho = (f(x + tau e) - f(x - tau e)) / (2 tau), both losses on the same batch."""

    name: ClassVar[str] = "two-sided"
    points: ClassVar[tuple[float, ...]] = (1.0, -1.0)
    shared: ClassVar[int | None] = 0

    @property
    def n_losses(self) -> int:
        """Two per direction."""
        return 2 * self.n_directions

    def measure(
        self, evaluate: Callable[[], float], probes: Sequence[Probe], hold: bool, trial: Trial
    ) -> tuple[float, ...]:
        """f+ and f- of every probe."""
        return evaluated(self.points, evaluate, probes, hold)

    def rho(self, losses: Sequence[float], tau: float, double: bool) -> list[float]:
        """(f+ - f-) / (2 tau)."""
        pairs = zip(losses[0::2], losses[1::2], strict=True)
        return [rounded(rounded(f - g, double) / rounded(2.0 * tau, double), double) for f, g in pairs]


@dataclass(frozen=True)
class OneSided(Estimator):
    """rho = (f(x + tau e) - f(x)) / tau; f(x) is shared by all directions of a step."""

    name: ClassVar[str] = "one-sided"
    points: ClassVar[tuple[float, ...]] = (1.0,)
    shared: ClassVar[int | None] = 1

    @property
    def n_losses(self) -> int:
        """One, and one per direction."""
        return 1 + self.n_directions

    def measure(
        self, evaluate: Callable[[], float], probes: Sequence[Probe], hold: bool, trial: Trial
    ) -> tuple[float, ...]:
        """f(x), then f+ of every probe."""
        return (evaluate(), *evaluated(self.points, evaluate, probes, hold))

    def rho(self, losses: Sequence[float], tau: float, double: bool) -> list[float]:
        """(f+ - f(x)) / tau."""
        return [rounded(rounded(f - losses[0], double) / rounded(tau, double), double) for f in losses[1:]]


@dataclass(frozen=True)
class Normalised(OneSided):
    """rho_k / sigma in place of rho_k, sigma the standard deviation of the losses f(x + tau e_k) of the step.

        paper       (f(x + tau e_k) - f(x)) / (tau sigma),   sigma^2 = sum (f_k - mean f)^2 / (n - 1)
        released    (f(x + tau e_k) - f(x)) / sigma,         sigma^2 = sum (f_k - mean f)^2 / n

    Made in fp64, rounded once. Equal losses (sigma = 0) move nothing.

    Attributes:
        scale: "paper" or "released": what the authors' code divides by.

    Source: arXiv 2506.09034 (FZOO), Algorithm 1, and the released code.
    """

    scale: str = "paper"

    name: ClassVar[str] = "normalised"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_directions < 2:
            raise ValueError(f"n_directions={self.n_directions}: a standard deviation takes at least 2 directions")
        if self.scale not in ("paper", "released"):
            raise ValueError(f"scale={self.scale!r}: choose 'paper', or 'released' as the authors' code")

    def along(self, losses: Sequence[float], tau: float, double: bool) -> list[float]:
        """The derivatives over sigma."""
        length = self._sigma(losses) * (tau if self.scale == "paper" else 1.0)
        if not math.isfinite(length):  # the step is skipped
            return [math.nan] * self.n_directions
        return [rounded((f - losses[0]) / length if length else 0.0, double) for f in losses[1:]]

    def moves(self, losses: Sequence[float]) -> bool:
        """Tells whether the losses differ."""
        return self._sigma(losses) > 0.0

    def _sigma(self, losses: Sequence[float]) -> float:
        n = len(losses) - 1
        mean = math.fsum(losses[1:]) / n
        return math.sqrt(
            math.fsum((f - mean) * (f - mean) for f in losses[1:]) / (n - 1 if self.scale == "paper" else n)
        )


@dataclass(frozen=True)
class ForwardMode(Estimator):
    """rho = d/dh f(x + h e) at h = 0, exactly, from a forward pass of dual numbers: one per direction.

    Measured are f(x) and the derivatives; an optimizer that has the modules measures them (`jaguar.ForwardGrad`).

    Source: arXiv 2202.08587.
    """

    name: ClassVar[str] = "forward-mode"
    points: ClassVar[tuple[float, ...]] = ()

    @property
    def n_losses(self) -> int:
        """f(x), and one derivative per direction."""
        return 1 + self.n_directions

    def check(self, direction: Direction, walk: bool) -> None:
        """Raises ValueError for a walk: nothing is moved."""
        if walk:
            raise ValueError("restore='walk': forward mode moves nothing before the step; leave it out")

    def measure(
        self, evaluate: Callable[[], float], probes: Sequence[Probe], hold: bool, trial: Trial
    ) -> tuple[float, ...]:
        """Raises TypeError: losses alone have no derivatives."""
        raise TypeError("ForwardMode() needs the modules of the model: use jaguar.ForwardGrad")

    def rho(self, losses: Sequence[float], tau: float, double: bool) -> list[float]:
        """The derivatives as they were measured."""
        return [rounded(r, double) for r in losses[1:]]

    def evaluations(self, losses: Sequence[float]) -> int:
        """One per direction."""
        return self.n_directions

    def loss(self, losses: Sequence[float]) -> float:
        """f(x), NaN if it or a derivative is not finite."""
        return losses[0] if all(map(math.isfinite, losses)) else math.nan


@dataclass(frozen=True)
class TwoPlaces(TwoSided):
    """rho at x_t and at x_t-1, where the last step began, along one direction.

    Measured are f(x_t + tau e), f(x_t - tau e), f(x_t-1 + tau e), f(x_t-1 - tau e), all on the same batch.

    Source: Huang, Gao, Pei, Huang, JMLR 23 (2022), Algorithm 1 (Acc-ZOM).
    """

    name: ClassVar[str] = "two-places"
    shared: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_directions != 1:
            raise ValueError(
                f"n_directions={self.n_directions}: the two estimates that momentum subtracts share one direction"
            )

    @property
    def n_losses(self) -> int:
        """Two at each place."""
        return 4

    def check(self, direction: Direction, walk: bool) -> None:
        """Raises ValueError for a walk, which does not come back to x."""
        if walk:
            raise ValueError("restore='walk' leaves x, and x_t-1 is a copy of it: choose another way")

    def measure(
        self, evaluate: Callable[[], float], probes: Sequence[Probe], hold: bool, trial: Trial
    ) -> tuple[float, ...]:
        """f+ and f- at x_t, then at x_t-1."""
        losses = evaluated(self.points, evaluate, probes)
        with trial.previous():
            return losses + evaluated(self.points, evaluate, probes)


@dataclass(frozen=True)
class Conservative(TwoSided):
    """Looks where a step would lead, and takes it, its opposite, or none: whichever has the lowest loss.

    Measured are f(x + tau e) and f(x - tau e) for each direction, then f(x), f(x - lr g) and f(x + lr g), with the very
    bits that the step would leave. The step is the argmin of the last three; ties go to staying, then to x - lr g.
    Trials need a copy of all trained tensors.

    Source: arXiv 2402.11592 (ZO-Bench), ZO-SGD-Cons.
    """

    name: ClassVar[str] = "conservative"
    shared: ClassVar[int | None] = None

    @property
    def n_losses(self) -> int:
        """Two per direction, and three."""
        return 2 * self.n_directions + 3

    def check(self, direction: Direction, walk: bool) -> None:
        """Raises ValueError for a walk, which does not come back to x."""
        if walk:
            raise ValueError(
                "restore='walk' leaves x, and f(x) is one of the three losses compared: choose another way"
            )

    def measure(
        self, evaluate: Callable[[], float], probes: Sequence[Probe], hold: bool, trial: Trial
    ) -> tuple[float, ...]:
        """f+ and f- of every probe, then f at x, at x - lr g and at x + lr g."""
        losses = evaluated(self.points, evaluate, probes)
        tried = [evaluate()]
        for side in (1.0, -1.0):
            with trial(partial(self._along, losses, side)):
                tried.append(evaluate())
        return (*losses, *tried)

    def rho(self, losses: Sequence[float], tau: float, double: bool) -> list[float]:
        """(f+ - f-) / (2 tau)."""
        return super().rho(losses[: 2 * self.n_directions], tau, double)

    def along(self, losses: Sequence[float], tau: float, double: bool) -> list[float]:
        """rho, or -rho where x + lr g has the lower loss."""
        _, minus, plus = losses[-3:]
        return self._along(losses, 1.0 if minus <= plus else -1.0, tau, double)

    def moves(self, losses: Sequence[float]) -> bool:
        """Tells whether one of the two steps lowers the loss."""
        stay, minus, plus = losses[-3:]
        return min(minus, plus) < stay

    def _along(self, losses: Sequence[float], side: float, tau: float, double: bool) -> list[float]:
        return [side * r for r in self.rho(losses, tau, double)]


ESTIMATORS: dict[str, type[Estimator]] = {kind.name: kind for kind in (TwoSided, OneSided)}


def estimator(name: str, n_directions: int = 1, rho_clip: float | None = None) -> Estimator:
    """The estimator of that name.

    Raises:
        ValueError: there is none, or an argument is out of range.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"estimator={name!r}: choose {' or '.join(map(repr, ESTIMATORS))}")
    return ESTIMATORS[name](n_directions, rho_clip)
