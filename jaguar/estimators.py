"""Estimators: which points of a direction are evaluated, how to get back, and the directional derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from jaguar.params import Slot, free_bytes
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


@contextmanager
def _taken_back(probe: Probe, held: bool) -> Iterator[None]:
    """Ends the probe, whatever happens: BaseException, because Ctrl-C must not leave the parameters moved either.

    A held probe is left where it is if nothing happens: its end is up to the caller.
    """
    try:
        yield
        if not held:
            probe.finish()
    except BaseException:
        probe.abort()
        raise


RESTORES = ("copy", "module", "walk")

# A copy of the trained tensors is taken where it needs less than this share of the free memory.
_COPY_SHARE = 0.1


@dataclass(frozen=True)
class TwoSided:
    """rho = (f(x + tau e) - f(x - tau e)) / (2 tau), both losses on the same batch."""

    name = "two-sided"

    def n_losses(self, n_directions: int) -> int:
        """Evaluations per step."""
        return 2 * n_directions

    def measure(self, evaluate: Callable[[], float], probes: Sequence[Probe], hold: bool = False) -> tuple[float, ...]:
        """The losses f+ and f- of every probe, in order; whatever fails, the probe is taken back.

        Args:
            hold: leave the last probe where it is; the caller ends it.
        """
        losses = []
        for probe in probes:
            with _taken_back(probe, hold and probe is probes[-1]):
                probe.plus()
                losses.append(evaluate())
                probe.minus()
                losses.append(evaluate())
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

    def measure(self, evaluate: Callable[[], float], probes: Sequence[Probe], hold: bool = False) -> tuple[float, ...]:
        """The loss f(x), then f+ of every probe, in order; whatever fails, the probe is taken back.

        Args:
            hold: leave the last probe where it is; the caller ends it.
        """
        losses = [evaluate()]
        for probe in probes:
            with _taken_back(probe, hold and probe is probes[-1]):
                probe.plus()
                losses.append(evaluate())
        return tuple(losses)

    def rho(self, losses: Sequence[float], tau: float, *, double: bool) -> list[float]:
        """One directional derivative per direction: two roundings, to fp32 unless `double`."""
        return [rounded(rounded(f - losses[0], double) / rounded(tau, double), double) for f in losses[1:]]


ESTIMATORS = {e.name: e for e in (TwoSided(), OneSided())}


def choose_restore(slots: Sequence[Slot]) -> str:
    """ "copy" where the trained tensors need under a tenth of the free memory of their device, else "module"."""
    for device in {slot.tensor.device for slot in slots}:
        size = sum(slot.count * slot.tensor.element_size() for slot in slots if slot.tensor.device == device)
        if size > _COPY_SHARE * free_bytes(device):
            return "module"
    return "copy"
