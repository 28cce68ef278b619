"""Other places to look at in a step: where it would lead, and where the last one began."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from jaguar.backends.launches import Launches, StepInputs
from jaguar.method.probe import Derivatives

_PATTERNS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Trials:
    """The `jaguar.estimators.Trial` of a step.

    Attributes:
        ahead: derivatives -> context in which the parameters are where a step would lead.
        pairs: () -> every parameter with the copy of where its last step began; none before the first.
    """

    ahead: Callable[[Derivatives], AbstractContextManager[None]]
    pairs: Callable[[], Sequence[tuple[Tensor, Tensor]]]

    def __call__(self, derivatives: Derivatives) -> AbstractContextManager[None]:
        """Context in which parameters are where a step along these derivatives would lead."""
        return self.ahead(derivatives)

    def previous(self) -> AbstractContextManager[None]:
        """Context in which parameters are where the last step began."""
        return exchanged(self.pairs())


@contextmanager
def exchanged(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside, the tensors of each pair have each other's values; afterwards their own, bit for bit."""
    done: list[tuple[Tensor, Tensor]] = []
    try:
        for pair in pairs:
            _exchange(*pair)
            done.append(pair)
        yield
    finally:
        for pair in done:
            _exchange(*pair)


def _exchange(one: Tensor, other: Tensor) -> None:
    """In place and without memory of its own, which the way back might not get."""
    a, b = (x.detach().view(_PATTERNS[x.itemsize]) for x in (one, other))
    a.bitwise_xor_(b)
    b.bitwise_xor_(a)
    a.bitwise_xor_(b)


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
    with kept(touched):
        launches.prepare(inputs)
        launches.update_(inputs)
        yield


@contextmanager
def kept(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Copies of tensors, which are what they were, bit for bit, when it ends."""
    copies = [tensor.detach().clone() for tensor in tensors]
    try:
        yield copies
    finally:
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.copy_(copy)
