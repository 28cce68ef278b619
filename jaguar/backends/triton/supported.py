"""Methods that have kernels, and the reasons of those that have none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaguar.method import rules
from jaguar.method.directions import DENSE, Coordinates, Dense, Mixed, ReleasedBlock
from jaguar.method.method import Method
from jaguar.method.rng import STATE_PURPOSES
from jaguar.triton_kernels import rules as kernels


def unsupported(method: Method, groups: Sequence[Mapping[str, Any]]) -> str | None:
    """The reason why a method has no kernels, as the end of a sentence; None: it has them."""
    direction, rule = method.direction, method.rule
    if isinstance(direction, Dense):
        if direction.drawn not in DENSE.values() and type(direction) is not Mixed:
            return f"{type(direction.drawn).__name__} is drawn by the reference only"
    elif type(direction) not in (Coordinates, ReleasedBlock):
        return f"{type(direction).__name__} is drawn by the reference only"
    elif isinstance(direction, ReleasedBlock) and method.estimator.n_directions > 1:
        # Their blocks overlap anywhere, so the programs of one launch would meet in the same elements.
        return "released=True with several directions has no kernel"
    elif any(len(rule.state(group)) != 1 for group in groups):
        return "kernels of coordinate directions hold one state buffer"
    if any(len(rule.state(group)) > len(STATE_PURPOSES) for group in groups):
        return f"kernels hold up to {len(STATE_PURPOSES)} state buffers"
    stateful = any(rule.state(group) for group in groups)
    for function in (rule.entry, rule.step) if stateful else (rule.step,):
        name = function.__name__
        if not hasattr(kernels, name):
            return f"the rule's {name} has no kernel in jaguar.triton_kernels.rules"
        if getattr(rules, name, function) is not function:
            return f"the rule's {name} is not jaguar.rules.{name}, which has a kernel: give it a name of its own"
    return None
