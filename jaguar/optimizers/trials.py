"""Steps on trial: the parameters go where a step would take them, are looked at, and come back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from jaguar.launches import Launches, StepInputs


@contextmanager
def trial(launches: Launches, inputs: StepInputs, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, parameters and state are what `update_` makes of them; afterwards what they were, bit for bit.

    Needs a copy of all trained tensors and of their state.

    Args:
        tensors: the parameters.
    """
    active = inputs.active or [True] * len(tensors)
    touched = [t for t, moves in zip(tensors, active, strict=True) if moves]
    touched += [m for own, moves in zip(inputs.state, active, strict=True) if moves for m in own]
    copies = [tensor.detach().clone() for tensor in touched]
    try:
        launches.prepare(inputs)
        launches.update_(inputs)
        yield
    finally:
        for tensor, copy in zip(touched, copies, strict=True):
            tensor.copy_(copy)
