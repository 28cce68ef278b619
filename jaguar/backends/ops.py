"""Assigns tensors to backends: the one that was named, or the first that can."""

from __future__ import annotations

from collections.abc import Sequence

from jaguar.backends import availability
from jaguar.backends.availability import Groups, Unavailable
from jaguar.backends.polar import run
from jaguar.method.directions import Coordinates
from jaguar.method.method import Method
from jaguar.method.orthogonal import Orthogonal
from jaguar.method.params import Slot


def assign(backend: str, method: Method, slots: Sequence[Slot], groups: Groups) -> list[str]:
    """The backend of every slot's launches: what was named, or the first that has launches for it."""
    able = [b for b in availability.BACKENDS if b.bind is not None]
    if backend in [b.name for b in able]:
        return [backend] * len(slots)
    missing = availability.unavailable()
    able = [b for b in able if b.name not in missing and not b.emulated() and not b.refuses(method, groups)]
    names = [next(b.name for b in able if not b.unfit(slot)) for slot in slots]
    # The strata of a number of coordinates run across tensors: one backend draws them all.
    across = isinstance(method.direction, Coordinates) and isinstance(method.direction.coordinates, int)
    return [able[-1].name] * len(slots) if across and len(set(names)) > 1 else names


def require(backend: str, method: Method, slots: Sequence[Slot], groups: Groups) -> None:
    """Raises Unavailable where a named backend cannot do this; the message has the tensor, if any, and the reason."""
    rule = method.rule
    if isinstance(rule, Orthogonal):
        for slot in slots:
            if rule.is_matrix(slot, groups[slot.group]):
                run.assigned(backend, slot.tensor, rule.steps, rule.ns_dtype)
    if backend == "auto":
        return
    chosen = availability.named(backend)
    if chosen.bind is None:
        if not isinstance(rule, Orthogonal):
            raise Unavailable(
                f"backend={backend!r} has Newton-Schulz only, which this optimizer does not use; 'triton' has its "
                "launches"
            )
        return
    reasons = [f"cannot take {slot.name}: it {reason}" for slot in slots if (reason := chosen.unfit(slot))]
    if reason := chosen.refuses(method, groups):
        reasons.append(f"cannot draw this: {reason}")
    if reasons:
        raise Unavailable(f"backend={backend!r} {reasons[0]}; backend='auto' uses the reference for it")


def summary(backend: str, method: Method, slots: Sequence[Slot], groups: Groups) -> str:
    """The backend that runs, or how many tensors each of several has."""
    names = assign(backend, method, slots, groups)
    if len(set(names)) == 1:
        return names[0]
    return " and ".join(f"{name} ({names.count(name)} tensors)" for name in dict.fromkeys(names))


def orthogonaliser(backend: str, rule: Orthogonal) -> run.NewtonSchulz:
    """Newton-Schulz as a rule wants it."""
    return run.NewtonSchulz(backend, steps=rule.steps, coefficients=rule.ns_coefficients, dtype=rule.ns_dtype)
