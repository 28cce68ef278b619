"""Probes: moving the trained tensors along a direction and back, and the losses on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeAlias

from jaguar.method.params import Slot, free_bytes

# (tau, double) -> one derivative per direction.
Derivatives: TypeAlias = Callable[[float, bool], list[float]]


class Trial(Protocol):
    """Other places to look at: each a context in which the parameters are there, and after which they are back."""

    def __call__(self, derivatives: Derivatives) -> AbstractContextManager[None]:
        """Context in which they are where a step along these derivatives would take them, bit for bit."""

    def previous(self) -> AbstractContextManager[None]:
        """Context in which they are where the last step began, by the rule's copy "previous"; at first, as they are."""


class Probe(Protocol):
    """Moves the parameters along one direction and back."""

    def to(self, scale: float) -> None:
        """Parameters become x + scale tau e."""

    def finish(self) -> None:
        """The evaluations are done: parameters become x, bit for bit (a walk stays where it is)."""

    def abort(self) -> None:
        """Parameters become x, also if `to` failed half-way (a walk: but for its roundings)."""


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


def evaluated(
    points: Sequence[float], evaluate: Callable[[], float], probes: Sequence[Probe], hold: bool = False
) -> tuple[float, ...]:
    """The loss at every point of every probe, in order; whatever fails, the probe is taken back.

    Args:
        hold: leave the last probe where it is; the caller ends it.
    """
    losses = []
    for probe in probes:
        with _taken_back(probe, hold and probe is probes[-1]):
            for point in points:
                probe.to(point)
                losses.append(evaluate())
    return tuple(losses)


def choose_restore(slots: Sequence[Slot]) -> str:
    """ "copy" where the trained tensors need under a tenth of the free memory of their device, else "module".

    Parts of sharded tensors are copied: their modules gather them before anything could move them.
    """
    if any(slot.spread is not None for slot in slots):
        return "copy"
    for device in {slot.tensor.device for slot in slots}:
        size = sum(slot.count * slot.tensor.element_size() for slot in slots if slot.tensor.device == device)
        if size > _COPY_SHARE * free_bytes(device):
            return "module"
    return "copy"
