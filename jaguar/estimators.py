"""Estimators: which points of a direction are evaluated, and the directional derivative that follows from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaguar.rules import rounded


class Probe(Protocol):
    """Moves the parameters along one direction and back."""

    def plus(self) -> None:
        """Parameters become x + tau e."""

    def minus(self) -> None:
        """Parameters become x - tau e."""

    def finish(self) -> None:
        """Both evaluations are done: parameters become x, bit for bit (a walk may leave them moved)."""

    def abort(self) -> None:
        """Something failed, `plus` and `minus` included: parameters become x."""


@dataclass(frozen=True)
class TwoSided:
    """rho = (f(x + tau e) - f(x - tau e)) / (2 tau), both losses on the same batch."""

    name = "two-sided"

    def n_losses(self, n_directions: int) -> int:
        """Evaluations per step."""
        return 2 * n_directions

    def measure(self, evaluate: Callable[[], float], probes: Sequence[Probe]) -> tuple[float, ...]:
        """The losses f+ and f- of every probe, in order; whatever fails, the probe is taken back."""
        losses = []
        for probe in probes:
            try:
                probe.plus()
                losses.append(evaluate())
                probe.minus()
                losses.append(evaluate())
                probe.finish()
            except BaseException:
                probe.abort()
                raise
        return tuple(losses)

    def rho(self, losses: Sequence[float], tau: float, *, double: bool) -> list[float]:
        """One directional derivative per direction: two roundings, to fp32 unless `double`."""
        pairs = zip(losses[0::2], losses[1::2], strict=True)
        return [rounded(rounded(f - g, double) / rounded(2.0 * tau, double), double) for f, g in pairs]


@dataclass(frozen=True)
class OneSided:
    """rho = (f(x + tau e) - f(x)) / tau; f(x) is shared by all directions of a step."""

    name = "one-sided"

    def n_losses(self, n_directions: int) -> int:
        """Evaluations per step."""
        return 1 + n_directions

    def measure(self, evaluate: Callable[[], float], probes: Sequence[Probe]) -> tuple[float, ...]:
        """The loss f(x), then f+ of every probe, in order; whatever fails, the probe is taken back."""
        losses = [evaluate()]
        for probe in probes:
            try:
                probe.plus()
                losses.append(evaluate())
                probe.finish()
            except BaseException:
                probe.abort()
                raise
        return tuple(losses)

    def rho(self, losses: Sequence[float], tau: float, *, double: bool) -> list[float]:
        """One directional derivative per direction: two roundings, to fp32 unless `double`."""
        return [rounded(rounded(f - losses[0], double) / rounded(tau, double), double) for f in losses[1:]]


ESTIMATORS = {e.name: e for e in (TwoSided(), OneSided())}
