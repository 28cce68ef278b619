"""Steps that need no search: learning rate and length of the perturbation from losses that are measured anyway.

With e ~ (0, C), g the gradient and H the Hessian, a step of length lr rho e lowers the loss by
lr g'Cg - lr^2 / 2 E[rho^2] tr(CH): most where lr = g'Cg / (E[rho^2] tr(CH)). The three are means of what steps measure.
They change during a run, so the means forget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from jaguar.method.estimators import Estimator, OneSided, TwoSided
from jaguar.method.probe import Probe, evaluated
from jaguar.method.rule import Rule, Seen
from jaguar.record import Record

AUTO = "auto"

V = TypeVar("V", float, Any)  # a loss, or a tensor with a loss for every row

# The curvature is looked at in each of the first steps, then in one of so many that it costs about a twentieth.
_FIRST, _SHARE = 6, 20
# The resolution of the loss is seen where the curvature is not: at this share of tau.
_NEARBY = 1.0 / 16.0
# Means are over half of the steps so far, and not over fewer than this: g'Cg falls as 1 / steps in the end, by the same
# share over any such window.
_SHORTEST = 40
# Before it was measured, g'Cg / E[rho^2] is thought to be B / (B + _NOISE) for batches of B rows, as strongly as if
# _PRIOR steps had said so.
_NOISE, _PRIOR = 100.0, 40.0
# So often a mean is taken again with the standard error that it has itself.
_ROUNDS = 3
# tau is at most this share of 2 |rho| / tr(CH), where the curvature alone would make the difference of two losses, and
# at least so many resolutions of the loss / |rho|.
_MOST, _LEAST = 0.3, 5.0
# tau stays where another one would not be longer or shorter by more than this factor.
_STAYS = 1.5


@dataclass
class Estimates:
    """Running means of what the length of a step depends on: plain numbers, as they stand in a state_dict.

    Attributes:
        steps: that were measured.
        signal: g'Cg: the mean of rho_i rho_j over pairs of different rows i, j of a batch.
        square: E[rho^2].
        weight: number of equally weighted steps whose means would be as sure. Directions of one step see the same rows,
            whose noise may have few dimensions: they do not count as several.
        looks: evaluations of the curvature.
        curvature: tr(CH): the mean of (f(x + tau e) + f(x - tau e) - 2 f(x)) / tau^2.
        spread: mean square of the same.
        doubt: mean of its squared standard error over the rows of its batch.
        grain: mean square of what the arithmetic of the model adds to a loss.
        least: tau where the parameters' own rounding leaves most of the perturbation; 0 for fp32 and fp64.
        rows: rows of the last batch.
        tau: length of the perturbation.
    """

    steps: float = 0.0
    signal: float = 0.0
    square: float = 0.0
    weight: float = 0.0
    looks: float = 0.0
    curvature: float = 0.0
    spread: float = 0.0
    doubt: float = 0.0
    grain: float = 0.0
    least: float = 0.0
    rows: float = 0.0
    tau: float = 1e-3

    @property
    def share(self) -> float:
        """g'Cg / E[rho^2]: how much of what is measured is not the batch's noise; as measured, below 0 by chance."""
        return self.signal / self.square if self.square > 0.0 else 0.0

    @property
    def sure_share(self) -> float:
        """`share` as a mean with what was thought before, and not below a tenth of that.

        Its standard error is about (1 - share) sqrt(2 / weight): the nearer to 1, the less the prior has to say. That
        is of this mean itself, not of what was measured, which a lucky step may have brought near 1.
        """
        before = self.rows / (self.rows + _NOISE)
        mean = self.share
        for _ in range(_ROUNDS):
            weight = self.weight / (self.weight + _PRIOR * (1.0 - min(max(mean, 0.0), 1.0)) ** 2)
            mean = weight * self.share + (1.0 - weight) * before
        return min(1.0, max(0.1 * before, mean))

    @property
    def sure_curvature(self) -> float:
        """`curvature` and its standard error; infinite where nothing is known of it.

        The variance is that of the looks among each other, and as of two looks more that of the rows in one: a few
        looks may agree by chance, and one alone may be near 0.
        """
        if not self.looks:
            return math.inf
        variance = self.spread - self.curvature**2 if self.looks > 1.0 else self.spread
        variance = max(0.0, variance * self.looks + 2.0 * self.doubt) / (self.looks + 2.0)
        if self.looks <= 1.0:
            variance = max(self.spread, self.doubt)
        above = max(self.curvature, 0.0) + math.sqrt(variance / self.looks)
        return above if above > 0.0 else math.inf

    def add(self, rhos: Sequence[float], errors: Sequence[float], rows: int, bias: float = 0.0) -> None:
        """A step's derivatives, and the squared standard errors over the rows that they have.

        Args:
            bias: what all rows' derivatives have in common and the gradient has not.
        """
        self.steps += 1.0
        self.rows = float(rows)
        share = 1.0 / min(self.steps, max(_SHORTEST, 0.5 * self.steps))
        n = len(rhos)
        signal = math.fsum(r * r - e for r, e in zip(rhos, errors, strict=True)) / n - bias * bias
        square = math.fsum(r * r for r in rhos) / n
        self.signal += share * (signal - self.signal)
        self.square += share * (square - self.square)
        before = (1.0 - share) ** 2 / self.weight if self.weight else 0.0
        self.weight = 1.0 / (before + share**2)

    def add_curvature(self, second: float, error: float, tau: float) -> None:
        """A second difference of losses, and its squared standard error over the rows."""
        share = 1.0 / min(self.looks + 1.0, max(10.0, 0.5 * self.looks))
        value = second / tau**2
        self.looks += 1.0
        self.curvature += share * (value - self.curvature)
        self.spread += share * (value * value - self.spread)
        self.doubt += share * (error / tau**4 - self.doubt)

    def fit_tau(self, estimator: Estimator) -> None:
        """Another length of the perturbation, between what the curvature and what the loss's resolution allow.

        Two-sided differences do not see the curvature, so theirs is the longer one.
        """
        rho, first = math.sqrt(self.square), self.looks == 1.0
        if not rho:
            return
        least = max(self.least, _LEAST * math.sqrt(self.grain) / rho)
        between = math.sqrt(least * _MOST * 2.0 * rho / self.sure_curvature)
        if not isinstance(estimator, OneSided):
            between = math.sqrt(between * _MOST * 2.0 * rho / self.sure_curvature)
        wanted = max(least, between) / self.tau
        if not first and 1.0 / _STAYS < wanted < _STAYS:
            return
        grown = wanted if first else min(max(wanted, 0.5), 2.0)
        self.tau *= grown
        if grown > 1.0:
            # What the resolution of the loss adds to a derivative falls as 1 / tau, to a curvature as 1 / tau^2; a mean
            # counts what it has by the inverse of its variance.
            self.looks /= grown**4
            self.steps, self.weight = self.steps / grown**2, self.weight / grown**2


@dataclass(frozen=True)
class StepSize:
    """Chooses lr, tau or both from the losses: what `lr="auto"` and `tau="auto"` mean.

        lr = n g'Cg / (E[rho^2] tr(CH))                         along rho e, the mean of n directions
        lr = sqrt(2 / pi) g'Cg / (sqrt(E[rho^2]) tr(CH))        along signs

    Both are changed by momentum, as the rules say (`best_lr`). g'Cg and E[rho^2] need the loss of each row of a batch:
    closures return a vector. tr(CH) needs one evaluation more in each of the first 6 steps, and a twentieth more later;
    tau needs two more in the first step, for the resolution of the loss. The first step moves nothing. A group's lr
    (and tau) are factors then, 1 unless given, so that schedules work as always.

    Attributes:
        lr, tau: True for those that are chosen.

    Source: the second-order expansion of the loss; pairs of rows as in the gradient noise scale of arXiv 1812.06162.
    """

    lr: bool = True
    tau: bool = True

    def __post_init__(self) -> None:
        if not self.chosen or not all(isinstance(value, bool) for value in (self.lr, self.tau)):
            raise ValueError(f"{self!r}: choose lr=True, tau=True or both")

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of what it chooses."""
        return tuple(name for name in ("lr", "tau") if getattr(self, name))

    def options(self) -> dict[str, Any]:
        """Options as they stand in a checkpoint."""
        return {AUTO: ", ".join(self.chosen)}

    def check(self, rule: Rule, estimator: Estimator, walk: bool) -> None:
        """Raises ValueError for a rule, an estimator or a walk whose best step is not known."""
        what = " and ".join(f"{name}='auto'" for name in self.chosen)
        if "best_lr" not in vars(type(rule)):  # what moves otherwise than its base has another best step
            raise ValueError(f"{what}: the best step along {rule!r} is not known; give a number")
        if type(estimator) not in (TwoSided, OneSided):
            raise ValueError(f"{what}: takes a two-sided or a one-sided estimator, not {estimator!r}; give a number")
        if walk:
            raise ValueError(f"{what}: looks at the loss at x, which restore='walk' leaves; choose another way")

    def looks(self, estimator: Estimator, number: int) -> tuple[bool, bool]:
        """Tells whether a step looks at the curvature, and at the resolution of the loss.

        Args:
            number: index of the step among those whose losses were finite, from 0.
        """
        return number < _FIRST or number % max(1, _SHARE // estimator.n_losses) == 0, self.tau and number == 0

    def look(
        self, estimator: Estimator, evaluate: Callable[[], float], probes: Sequence[Probe], number: int, nearby: bool
    ) -> tuple[float, ...]:
        """The losses that second differences need and the estimator does not measure; parameters stay.

        Args:
            nearby: the parameters have the digits for a small part of tau.
        """
        curvature, resolution = self.looks(estimator, number)
        scale = _NEARBY if nearby else 1.0
        found: tuple[float, ...] = ()
        if resolution:
            found = evaluated((scale, -scale), evaluate, probes[:1])
        if curvature:
            found += evaluated((-1.0,), evaluate, probes[:1]) if isinstance(estimator, OneSided) else (evaluate(),)
        return found

    def lr_of(self, found: Estimates, rule: Rule, group: Mapping[str, Any], n: int, fraction: float) -> float:
        """Learning rate of the next step for a group."""
        curvature = found.sure_curvature
        if not found.steps or not math.isfinite(curvature):
            return 0.0
        return rule.best_lr(Seen(found.sure_share, found.square, curvature), group, n, fraction)

    def learn(
        self, found: Estimates, estimator: Estimator, record: Record, factor: float, sign: float, itemsize: int
    ) -> None:
        """Enters a step into the estimates.

        Args:
            factor: the first group's multiple of tau.
            sign: -1 where the loss is made larger.
            itemsize: bytes of an element of the shortest dtype.
        """
        firsts, seconds = differences(estimator, record.losses)
        tau, n = record.taus[0], len(firsts)
        one_sided = isinstance(estimator, OneSided)
        width = tau if one_sided else 2.0 * tau
        if seconds:
            found.add_curvature(sign * seconds[-1], record.errors[-1], tau)
        bias = 0.5 * tau * found.curvature if one_sided else 0.0
        found.add([d / width for d in firsts], [e / width**2 for e in record.errors[:n]], record.rows, bias)
        if self.tau:
            found.tau = tau / factor
        if len(seconds) > 1:
            # At half precision the evaluation was not nearby, and has the curvature in it.
            seen = record.errors[n] if itemsize < 4 else max(record.errors[n], seconds[0] ** 2)
            rounding = record.loss * (2.0**-52 if itemsize > 4 else 2.0**-23)
            found.grain, found.least = seen / 6.0 + rounding**2, found.tau if itemsize < 4 else 0.0
        if seconds and self.tau:
            found.fit_tau(estimator)


def differences(estimator: Estimator, losses: Sequence[V]) -> tuple[list[V], list[V]]:
    """First differences along each direction, and second differences: nearby, if there is one, then at tau.

    Args:
        losses: those of `StepSize.look`, and then the estimator's; numbers, or tensors of rows.
    """
    more, own = losses[: -estimator.n_losses], losses[-estimator.n_losses :]
    if isinstance(estimator, OneSided):
        middle, firsts = own[0], [f - own[0] for f in own[1:]]
        both = [own[1] + f for f in more[-1:]]
    else:
        pairs = list(zip(own[0::2], own[1::2], strict=True))
        middle, firsts = more[-1] if more else own[0], [f - g for f, g in pairs]
        both = [sum(f + g for f, g in pairs) / len(pairs) for _ in more[-1:]]
    nearby = [more[0] + more[1]] if len(more) > 2 else []
    return firsts, [pair - 2.0 * middle for pair in nearby + both]


def standard_errors(estimator: Estimator, rows: Sequence[Tensor]) -> tuple[float, ...]:
    """Squared standard errors, over the rows, of the differences; the loss of each row for every evaluation.

    Raises:
        ValueError: there are no two rows, or not always as many.
    """
    if len(counts := {row.numel() for row in rows}) > 1:
        raise ValueError(
            f"the closure returned the losses of {' and '.join(map(str, sorted(counts)))} rows in one step"
        )
    if rows[0].numel() < 2:
        raise ValueError(
            "lr='auto' and tau='auto' compare the rows of a batch: the closure must return the loss of each row, a "
            "vector of two or more (reduction='none' and a mean over each row's tokens), or give lr and tau as numbers"
        )
    firsts, seconds = differences(estimator, [row.detach().double() for row in rows])
    return tuple((torch.stack(firsts + seconds).var(1) / rows[0].numel()).tolist())
