"""The interface of backends: inputs of a step, and protocols of launches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from torch import Tensor

from jaguar.method.params import Kind, Slot
from jaguar.method.probe import Probe
from jaguar.method.rng import Draw
from jaguar.method.rule import Scalars

# State buffers of every slot, in the order that the rule declares them; () where it has none.
State: TypeAlias = Sequence[tuple[Tensor, ...]]


@dataclass(frozen=True)
class StepInputs:
    """Everything that the launches of one step are given.

    Attributes:
        draws: one per direction.
        scalars: by kind of slot; they have weights once the losses are known.
        state: per slot.
        active: per slot, whether it takes part; None: all do. The others are neither read nor written.
        probe: a probe that is not back yet; its way back comes first, and may share a launch with the step.
    """

    draws: tuple[Draw, ...]
    scalars: Mapping[Kind, Scalars]
    state: State
    active: Sequence[bool] | None = None
    probe: Probe | None = None

    @property
    def known(self) -> bool:
        """Tells whether weights are known: then the update is launched next."""
        return any(s.weights for s in self.scalars.values())

    def of(self, where: Sequence[int], probe: Probe | None = None) -> StepInputs:
        """The inputs of the slots at these positions."""
        active = None if self.active is None else [self.active[i] for i in where]
        return replace(self, state=[self.state[i] for i in where], active=active, probe=probe)


@dataclass(frozen=True)
class Lost:
    """Number of perturbed coordinates of a tensor that rounding put back where they were."""

    name: str
    lost: int
    perturbed: int

    @property
    def share(self) -> float:
        """Lost coordinates / perturbed coordinates."""
        return self.lost / max(self.perturbed, 1)


class Launches(Protocol):
    """The launches of one method over one list of tensors.

    `check` looks at the tensors, when one of them has changed; `prepare` allocates and writes down the numbers of a
    step; what follows launches, and does nothing else.
    """

    @property
    def fuses_restore(self) -> bool:
        """Tells whether `update_` can end the last probe of a step."""

    @property
    def wrote(self) -> bool:
        """Tells whether the last `update_` came to write anything; asked when it failed."""

    def check(self, state: State) -> None:
        """Looks at all tensors again, for launches that move them and their state.

        Raises:
            RuntimeError: one cannot be moved; nothing was changed.
        """

    def prepare(self, inputs: StepInputs) -> None:
        """Makes ready for the launches below: before a step's probes, and again when the weights are known."""

    def n_perturbed(self, inputs: StepInputs) -> int:
        """Number of perturbed coordinates (exact on the reference, an estimate in kernels of coordinate directions)."""

    def probes(self, inputs: StepInputs) -> list[Probe]:
        """Probes, one per direction, that move the parameters and take them back."""

    def lost(self, inputs: StepInputs) -> list[Lost]:
        """The perturbations along the first direction that rounding swallows, per tensor that takes part."""

    def update_(self, inputs: StepInputs) -> None:
        """Moves state and parameters by one step, in place."""

    def forget(self) -> None:
        """Lets go of what was drawn and saved for a step, whatever became of it; what is needed again is made again."""


class Orthogonaliser(Protocol):
    """Newton-Schulz."""

    def prepare(self, matrices: Sequence[Tensor]) -> None:
        """Takes the memory that a call for these matrices needs."""

    def __call__(self, matrices: Sequence[Tensor]) -> Iterator[tuple[Sequence[int], Sequence[Tensor]]]:
        """Positions and polar factors, batch by batch; after `prepare` a batch is overwritten by the next."""

    def forget(self) -> None:
        """Lets go of that memory."""


class Moves(Protocol):
    """x <- (1 - lr wd) x - lr O."""

    def move_(self, slots: Sequence[Slot], factors: Sequence[Tensor], inputs: StepInputs) -> None:
        """One step; a contiguous matrix per slot."""
