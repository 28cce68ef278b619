"""Binds a method and its tensors to launches on one or several backends, as one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from jaguar.backends import availability, ops, reference
from jaguar.backends.availability import Groups
from jaguar.backends.kept import KeptProbe, Rows
from jaguar.backends.launches import Launches, Lost, Moves, State, StepInputs
from jaguar.backends.orthogonal import MatrixStage, stacked
from jaguar.method.method import Method
from jaguar.method.orthogonal import Orthogonal
from jaguar.method.params import Slot
from jaguar.method.probe import Probe

if TYPE_CHECKING:  # kernels are imported where there are some
    from jaguar.backends.triton import DeviceScalars

# Positions in the list of slots, and the launches for them.
Part = tuple[Sequence[int], Launches]


def bind(method: Method, slots: Sequence[Slot], groups: Groups, backend: str, restore: str) -> Bound:
    """The launches of a method over its tensors.

    Args:
        slots: in canonical order, in their roles.
        groups: their parameter groups.
        backend: which `availability.choose` returned.
        restore: how dense directions get back: "copy", "module" or "walk".

    Raises:
        Unavailable: the named backend cannot.
    """
    ops.require(backend, method, slots, groups)
    names = ops.assign(backend, method, slots, groups)
    _say_slow(backend, method, slots, groups, names)
    matrices = isinstance(method.rule, Orthogonal)
    missing = availability.unavailable()
    kernels = backend == "triton" or (matrices and backend != "reference" and "triton" not in missing)
    numbers: DeviceScalars | None = None
    if kernels or "triton" in names:
        from jaguar.backends.triton import DeviceScalars as Table

        numbers = Table(slots, method)
    parts: list[Part] = []
    for name in dict.fromkeys(names):
        where = [i for i, chosen in enumerate(names) if chosen == name]
        make = availability.named(name).bind
        assert make is not None
        parts.append((where, make(method, [slots[i] for i in where], slots, restore, numbers)))
    stage = None
    if isinstance(method.rule, Orthogonal):
        moves = _MatrixMoves(backend, method, numbers)
        orthogonalise = ops.orthogonaliser(backend, method.rule)
        stage = MatrixStage(slots, stacked(slots, groups), orthogonalise, moves, method.rule.ns_period)
    return Bound(slots, parts, numbers, stage, restore == "module")


def _say_slow(backend: str, method: Method, slots: Sequence[Slot], groups: Groups, names: Sequence[str]) -> None:
    """Warns where "auto" leaves a GPU's tensors to the reference."""
    slow = [s for s, name in zip(slots, names, strict=True) if name == "reference" and s.tensor.is_cuda]
    if slow and backend in ("auto", "cuda") and "triton" not in availability.unavailable():
        reasons = [f"{slot.name} {availability.unfit(slot)}" for slot in slots if availability.unfit(slot)]
        warnings.warn(
            f"the reference backend moves {len(slow)} of {len(slots)} tensors, slowly: "
            + (reasons[0] if reasons else f"{availability.undrawable(method, groups)}"),
            stacklevel=2,
        )


class Bound:
    """The launches of one optimizer.

    Args:
        slots: all tensors.
        parts: the launches of every backend that got some of them.
        numbers: what kernels read in a step, where there are kernels.
        stage: what follows the launches.
        in_modules: parameters move while their modules run.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        parts: Sequence[Part],
        numbers: DeviceScalars | None,
        stage: MatrixStage | None,
        in_modules: bool,
    ) -> None:
        self.parts, self._numbers, self._stage, self._in_modules = parts, numbers, stage, in_modules
        self._places = {slot.name: i for i, slot in enumerate(slots)}
        # Positions, tensors and the row that stays.
        self._kept = [(i, slot.tensor, row) for i, slot in enumerate(slots) if (row := slot.kept_here) is not None]

    @property
    def fuses_restore(self) -> bool:
        """Tells whether `update_` can end the last probe of a step."""
        return all(launches.fuses_restore for _, launches in self.parts)

    @property
    def wrote(self) -> bool:
        """Tells whether the last `update_` came to write anything."""
        return any(launches.wrote for _, launches in self.parts)

    def check(self, state: State) -> None:
        """Looks at all tensors again; raises RuntimeError for those that `update_` could not move."""
        for where, launches in self.parts:
            launches.check(state if len(self.parts) == 1 else [state[i] for i in where])

    def prepare(self, inputs: StepInputs) -> None:
        """Makes ready for the launches of a step."""
        if self._numbers is not None:
            self._numbers.fill(inputs)
        for launches, own in self._each(inputs):
            launches.prepare(own)
        if self._stage is not None and inputs.known:
            self._stage.prepare(inputs)

    def n_perturbed(self, inputs: StepInputs) -> int:
        """Number of coordinates that a direction moves; those of kept rows are among them."""
        return sum(launches.n_perturbed(own) for launches, own in self._each(inputs))

    def probes(self, inputs: StepInputs) -> list[Probe]:
        """Probes, one per direction, that move the parameters and take them back."""
        made = [launches.probes(own) for launches, own in self._each(inputs)]
        probes: list[Probe] = made[0] if len(made) == 1 else [JointProbe([]) for _ in inputs.draws]
        if len(made) > 1:
            probes = [JointProbe(each) for each in zip(*made, strict=True)]
        rows = [(tensor, row) for _, tensor, row in self._taking_part(inputs)]
        return [KeptProbe(probe, rows, self._in_modules) for probe in probes] if rows else probes

    def lost(self, inputs: StepInputs) -> list[Lost]:
        """The perturbations that rounding swallows, per tensor."""
        found = [lost for launches, own in self._each(inputs) for lost in launches.lost(own)]
        return sorted(found, key=lambda lost: self._places[lost.name])

    def update_(self, inputs: StepInputs) -> None:
        """Moves state and parameters by one step, in place, but for the kept rows."""
        if not self._kept:
            self._update_(inputs)
            return
        probe, kept = inputs.probe, self._taking_part(inputs)
        rows = Rows([(t, row) for i, tensor, row in kept for t in (tensor, *inputs.state[i])])
        self._update_(replace(inputs, probe=probe.probe) if isinstance(probe, KeptProbe) else inputs)
        rows.put_back()

    def forget(self) -> None:
        """Lets go of what was drawn and saved for a step."""
        for _, launches in self.parts:
            launches.forget()
        if self._stage is not None:
            self._stage.forget()

    def _update_(self, inputs: StepInputs) -> None:
        for launches, part in self._each(inputs):
            launches.update_(part)
        if self._stage is not None:
            self._stage.update_(inputs)

    def _each(self, inputs: StepInputs) -> list[tuple[Launches, StepInputs]]:
        """Every part's launches with what is theirs of the inputs."""
        if len(self.parts) == 1:
            return [(self.parts[0][1], inputs)]
        joint = inputs.probe
        assert joint is None or isinstance(joint, JointProbe)
        own = [None] * len(self.parts) if joint is None else joint.probes
        return [(part, inputs.of(where, probe)) for (where, part), probe in zip(self.parts, own, strict=True)]

    def _taking_part(self, inputs: StepInputs) -> list[tuple[int, Tensor, int]]:
        """Positions and tensors of kept rows, and the rows, where the tensors take part."""
        return [kept for kept in self._kept if inputs.active is None or inputs.active[kept[0]]]


@dataclass(frozen=True)
class JointProbe:
    """The probes of one direction, one for every part."""

    probes: Sequence[Probe]

    def to(self, scale: float) -> None:
        """Parameters become x + scale tau e."""
        for probe in self.probes:
            probe.to(scale)

    def finish(self) -> None:
        """Parameters become x."""
        for probe in self.probes:
            probe.finish()

    def abort(self) -> None:
        """Parameters become x, also those of parts that were not reached."""
        for probe in self.probes:
            probe.abort()


class _MatrixMoves:
    """The step along given matrices, each on the backend that moves its tensor's other launches."""

    def __init__(self, backend: str, method: Method, numbers: DeviceScalars | None) -> None:
        self._named = backend == "triton"
        self._reference = reference.MatrixLaunches(method)
        self._kernels: Moves | None = None
        if numbers is not None:
            from jaguar.backends.triton import MatrixLaunches

            self._kernels = MatrixLaunches(method, numbers)

    def move_(self, slots: Sequence[Slot], factors: Sequence[Tensor], inputs: StepInputs) -> None:
        """x <- (1 - lr wd) x - lr O."""
        fused = self._kernels is not None
        by_kernel = [self._named or (fused and slot.tensor.is_cuda and not availability.unfit(slot)) for slot in slots]
        for moves, wanted in ((self._kernels, True), (self._reference, False)):
            where = [i for i, kernel in enumerate(by_kernel) if kernel is wanted]
            if where and moves is not None:
                moves.move_([slots[i] for i in where], [factors[i] for i in where], inputs)
