"""The measuring half of a step: what every optimizer evaluates, and the record that it makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from jaguar.backends.bind import Bound
from jaguar.backends.launches import Lost, StepInputs
from jaguar.method import rng
from jaguar.method.method import Method
from jaguar.method.params import Kind, Slot
from jaguar.method.probe import Derivatives, Probe
from jaguar.method.rng import Draw
from jaguar.method.rule import Scalars, all_finite
from jaguar.method.step_size import Estimates, standard_errors
from jaguar.optimizers.contract import Contract
from jaguar.optimizers.direction_group import DirectionGroup
from jaguar.optimizers.groups import FrozenGroups
from jaguar.optimizers.guards import LossGuard, NonFiniteLoss, explained, warn_of_lost
from jaguar.optimizers.interrupts import HeldInterrupts
from jaguar.optimizers.isolation import Isolation
from jaguar.optimizers.module_state import ModuleState
from jaguar.optimizers.state import Roster
from jaguar.optimizers.trained import Measured, Sizes, Trained
from jaguar.optimizers.trials import Trials, trial
from jaguar.record import Record

Closure = Callable[[], Tensor]

# Losses of the second differences of a step that has them all: one for the curvature, two for the resolution.
_LOOKS = 3
# An automatic tau begins where rounding swallows less than this share of the perturbation.
_SWALLOWED = 0.2


class Evaluate(Protocol):
    """Evaluates the model as it is now."""

    def __call__(self, read: Callable[[Tensor], None] | None = None) -> float:
        """The loss; `read` sees the tensor."""


class Measuring(Contract):
    """Evaluates a model along a step's directions; parameters stay, bit for bit."""

    # Non-finite losses in a row after which a run is given up.
    max_skipped = 25

    method: Method
    lost_share: dict[str, float] | None
    _seed: int
    _step: int
    _skipped: int
    _skipped_in_a_row: int
    _stayed: int
    _last_finite: int | None
    _measured: Measured | None
    _trained: Trained
    _frozen_groups: FrozenGroups
    _guard: LossGuard
    _modules: ModuleState
    _estimates: Estimates | None
    _direction_group: DirectionGroup | None

    @property
    def fraction(self) -> float:
        """p: the probability that a coordinate is perturbed in a step (of a matrix, with a block layout)."""
        total = sum(slot.total for slot in self.slots if slot.parameter.requires_grad)
        return self.method.direction.fraction(total)

    def loss(self, record: Record) -> float:
        """The loss of a record: the mean of those that were measured near x; NaN if one was not finite."""
        return self.method.estimator.loss(self._own(record.losses))

    def rho(self, record: Record) -> list[float]:
        """The directional derivatives of a record, at the first group's tau."""
        double = any(slot.kind.double for slot in self.slots if slot.parameter.requires_grad)
        tau = record.taus[0] if record.taus else self.param_groups[0]["tau"]
        return self.method.estimator.rho(self._own(record.losses), tau, double)

    @property
    def seed(self) -> int:
        """Key of all directions and rounding noise."""
        return self._seed

    @property
    def direction_group(self) -> Any:
        """The processes that share the directions of a step; None: this one evaluates all."""
        return None if self._direction_group is None else self._direction_group.group

    @property
    def steps_done(self) -> int:
        """Number of finished steps; the next record has this number as its `step`."""
        return self._step

    @property
    def estimates(self) -> Estimates | None:
        """Estimates behind an automatic step; None where lr and tau are numbers."""
        return self._estimates

    def _begin(self, closure: Closure) -> tuple[StepInputs, Sizes]:
        """Everything that may fail, or take long, before the parameters are moved."""
        self._check_usable()
        if self._measured is not None and self._measured.probe is not None:
            raise RuntimeError(
                "the parameters are still where the last step was measured: call apply_(record) or discard_() first"
            )
        if not callable(closure):
            raise TypeError(f"closure must be callable and return the loss, got {type(closure).__name__}")
        self._frozen_groups.check(self.param_groups)
        self._measured = None
        self._trained.read_frozen()
        bound = self._launches()
        sizes = self._sizes()
        inputs = self._inputs(sizes)
        bound.prepare(inputs)
        if self._step == 0 and self.lost_share is None and self.method.estimator.points:
            with torch.no_grad():
                lost = self._trained.lost(inputs)
                while self._grows(lost):
                    sizes = self._sizes()
                    inputs = self._inputs(sizes)
                    bound.prepare(inputs)
                    lost = self._trained.lost(inputs)
            self.lost_share = {part.name: part.share for part in lost}
            if self.method.step_size is None or not self.method.step_size.tau:  # else nobody could raise it
                warn_of_lost(lost, self.method.direction.fate_of_lost)
        return inputs, sizes

    def _grows(self, lost: Sequence[Lost]) -> bool:
        """Makes an automatic tau longer where rounding swallows much of the perturbation; returns whether it did."""
        auto, found = self.method.step_size, self._estimates
        if auto is None or not auto.tau or found is None or found.tau > 0.1:
            return False
        share = sum(part.lost for part in lost) / max(1, sum(part.perturbed for part in lost))
        found.tau *= 2.0 if share > _SWALLOWED else 1.0
        return share > _SWALLOWED

    def _sizes(self) -> Sizes:
        """Learning rates and taus of the next step: the numbers of the groups, times what is automatic."""
        lrs, taus = (tuple(float(group[key]) for group in self.param_groups) for key in ("lr", "tau"))
        auto, found = self.method.step_size, self._estimates
        if auto is None or found is None:
            return Sizes(lrs, taus)
        if auto.lr:
            lrs = tuple(lr * self._automatic_lr(group) for lr, group in zip(lrs, self.param_groups, strict=True))
        if auto.tau:
            taus = tuple(tau * found.tau for tau in taus)
        return Sizes(lrs, taus)

    def _automatic_lr(self, group: Mapping[str, Any]) -> float:
        method, found = self.method, self._estimates
        assert method.step_size is not None and found is not None
        return method.step_size.lr_of(found, method.rule, group, method.estimator.n_directions, self.fraction)

    def _evaluate(
        self, closure: Closure, inputs: StepInputs, sizes: Sizes, interrupts: HeldInterrupts, hold: bool
    ) -> Measured:
        """The evaluations of a step; with `hold` the last probe stays where it is."""
        trained, roster = self._trained, self._trained.roster
        seed = rng.closure_seed(self._seed, self._step)
        rows: list[Tensor] = []  # losses of each evaluation
        reshard = trained.sharded.reshard
        surroundings = Isolation(closure, roster.devices, self._modules, self._step, roster.tensors, reshard)
        with surroundings as isolation, torch.no_grad():

            def evaluate(read: Callable[[Tensor], None] | None = None) -> float:
                try:
                    with interrupts.let_through():
                        loss = isolation.evaluate(closure, seed)
                        value = self._guard.as_float(loss, roster.double)
                        if self._estimates is not None:
                            rows.append(torch.as_tensor(loss))
                        if read is not None:
                            read(loss)
                        return value
                except RuntimeError as error:
                    if (better := explained(error)) is error:
                        raise
                    raise better from error
                finally:
                    if roster.left():  # the closure has moved a tensor
                        self._launches()

            def stepped(derivatives: Derivatives) -> AbstractContextManager[None]:
                trained.make_state()
                scalars = self._scalars(sizes, self.method.downhill(derivatives))
                tried = replace(inputs, scalars=scalars, state=roster.state)
                return trial(trained.bound, tried, roster.tensors)

            losses, held = self._losses(evaluate, inputs, hold, Trials(stepped, lambda: roster.copies("previous")))
            try:
                record, scalars = self._recorded(losses, sizes, rows)
                if roster.slots:
                    self._guard.watch(losses, trained.n_perturbed(inputs))
            except BaseException:  # a warning may be an error
                if held is not None:
                    held.abort()
                raise
        return Measured(record, held, scalars)

    def _losses(
        self, evaluate: Evaluate, inputs: StepInputs, hold: bool, places: Trials
    ) -> tuple[tuple[float, ...], Probe | None]:
        """The losses of a step in order, and the probe that is held."""
        probes, method = self._trained.bound.probes(inputs), self.method
        more: tuple[float, ...] = ()
        if method.step_size is not None:
            number, nearby = self._step - self._skipped, self._itemsize >= 4
            more = method.step_size.look(method.estimator, evaluate, probes, number, nearby)
        if self._direction_group is not None:
            return self._direction_group.measured(evaluate, probes, places, self._step), None
        losses = method.estimator.measure(evaluate, probes, hold, places)
        return more + losses, probes[-1] if hold else None

    def _n_losses(self, step: int) -> int:
        """Number of losses in the record of a step."""
        curvature, resolution = self._looks(step)
        return self.method.estimator.n_losses + curvature + 2 * resolution

    @property
    def _most_losses(self) -> int:
        """Losses of the record that has the most."""
        return self.method.estimator.n_losses + (0 if self._estimates is None else _LOOKS)

    @property
    def record_size(self) -> int:
        """Bytes of the longest record of a step."""
        n_errors = None if self._estimates is None else self.method.estimator.n_directions + 2
        return Record.size(len(self.param_groups), self._most_losses, n_errors)

    def _n_errors(self, step: int) -> int:
        """Number of standard errors in the record of a step."""
        return 0 if self._estimates is None else self.method.estimator.n_directions + sum(self._looks(step))

    @property
    def _itemsize(self) -> int:
        """Bytes of a parameter that takes part, of the shortest; where none does, nothing depends on it."""
        return min((tensor.dtype.itemsize for tensor in self._roster.tensors), default=8)

    def _looks(self, step: int) -> tuple[bool, bool]:
        auto = self.method.step_size
        return (False, False) if auto is None else auto.looks(self.method.estimator, step - self._skipped)

    def _own(self, losses: tuple[float, ...]) -> tuple[float, ...]:
        """The losses that the estimator measured: the last ones."""
        return losses[len(losses) - self.method.estimator.n_losses :]

    def _recorded(
        self, losses: tuple[float, ...], sizes: Sizes, rows: Sequence[Tensor]
    ) -> tuple[Record, Mapping[Kind, Scalars]]:
        """The record of a step, and what its launches will read."""
        finite = all(map(math.isfinite, losses))
        scalars = self._scalars(sizes, self.method.derivatives(self._own(losses)) if finite else None)
        finite = finite and all_finite(scalars)  # finite losses, but rho may overflow
        record = Record(self._step, sizes.lrs, losses, skipped=not finite, frozen=self._trained.frozen.mark)
        if self._estimates is not None:
            errors = standard_errors(self.method.estimator, rows)
            record = replace(record, taus=sizes.taus, errors=errors, rows=rows[0].numel())
        if record.skipped and self._skipped_in_a_row + 1 >= self.max_skipped:
            raise NonFiniteLoss(
                f"{self.max_skipped} steps in a row had a non-finite loss (the last one {losses}); last finite step: "
                f"{'none' if self._last_finite is None else self._last_finite}. Lower lr or tau, or look at the data"
            )
        return record, scalars

    def _inputs(self, sizes: Sizes, derivatives: Derivatives | None = None) -> StepInputs:
        """Inputs of the launches; without derivatives before the losses are known."""
        draws = tuple(Draw(self._seed, self._step, k) for k in range(self.method.estimator.n_directions))
        return self._trained.inputs(draws, self._scalars(sizes, derivatives))

    def _scalars(self, sizes: Sizes, derivatives: Derivatives | None = None) -> dict[Kind, Scalars]:
        t = self._step - self._skipped - self._stayed + 1
        return self._trained.scalars(Draw(self._seed, self._step, 0), self.param_groups, sizes, t, derivatives)

    def _launches(self) -> Bound:
        return self._trained.launches(self.param_groups, self.state)

    @property
    def slots(self) -> list[Slot]:
        """The trained tensors in canonical order: names, shapes, and which part of each is held here."""
        return self._trained.slots

    @property
    def _roster(self) -> Roster:
        return self._trained.roster

    def _check_usable(self) -> None:
        """Raises RuntimeError where an earlier step failed while it was writing."""
        raise NotImplementedError
