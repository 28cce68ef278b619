"""The step protocol, once for all optimizers: measure(closure) -> Record, apply_(record)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from jaguar import ops, rng, rules
from jaguar.estimators import ESTIMATORS, Probe
from jaguar.interrupts import HeldInterrupts
from jaguar.isolation import Isolation
from jaguar.launches import Direction, Launches
from jaguar.module_state import ModuleState
from jaguar.optimizers.checkpoint import Saved, deciding, packed, unpacked
from jaguar.optimizers.contract import Contract, with_step_hooks
from jaguar.optimizers.embeddings import slots_of
from jaguar.optimizers.freezing import Frozen
from jaguar.optimizers.groups import Watch, check_group, prepared_group, split_groups
from jaguar.optimizers.guards import LossGuard, NonFiniteLoss, explained, warn_of_lost, warn_of_skipped
from jaguar.optimizers.options import checked_seed, common_options
from jaguar.optimizers.roster import Kind, Roster
from jaguar.optimizers.shown import shown
from jaguar.params import Slot
from jaguar.record import Record
from jaguar.rng import Draw

Closure = Callable[[], Tensor]


class ZerothOrder(Contract):
    """Base of the zero-order optimizers: a step is measured into a record, and a record is applied.

    Subclasses name their group keys and build their launches; everything that a step must guarantee is here:
    parameters bit-identical after `measure`, one record per step, skipped steps, Ctrl-C, broken states, exact
    state_dict.
    """

    group_keys: tuple[str, ...]  # numbers
    group_flags: tuple[str, ...] = ()  # everything else
    momentum_key: ClassVar[str]
    _direction: Direction  # set before the base is initialised

    # What happens to coordinates whose perturbation rounding swallows; a dense e cannot leave them out.
    _fate_of_lost = "move by chance only"

    # Non-finite losses in a row after which a run is given up.
    max_skipped = 25

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        options: dict[str, Any],
        estimator: str,
        n_directions: int,
        rho_clip: float | None,
        rounding: str | None,
        momentum_dtype: torch.dtype | None,
        maximize: bool,
        seed: int,
        backend: str,
    ) -> None:
        self._options = options | common_options(
            estimator=estimator,
            n_directions=n_directions,
            rho_clip=rho_clip,
            rounding=rounding,
            momentum_dtype=momentum_dtype,
            maximize=maximize,
        )
        self._maximize = maximize
        self._seed, self._backend = checked_seed(seed), ops.choose(backend)
        self._estimator, self._n_directions, self._rho_clip = ESTIMATORS[estimator], n_directions, rho_clip
        self._stochastic, self._momentum_dtype = rounding != "nearest", momentum_dtype
        self._step = self._skipped = self._skipped_in_a_row = self._n_frozen = 0
        self._last_finite: int | None = None
        self._broken = False
        self._pending: Record | None = None
        self._moved: Probe | None = None  # a probe that has not come back: a walk, or inside step()
        self._last_record: Record | None = None
        self._slots: list[Slot] = []
        self._frozen = Frozen()
        self._steps: Launches | None = None
        self._roster = Roster([], {})
        self._watch = Watch((*self.group_keys, *self.group_flags))
        self._guard, self._modules = LossGuard(), ModuleState()
        self.lost_share: dict[str, float] | None = None
        check_group(self.group_keys, defaults, "the optimizer", self.group_flags)
        super().__init__(split_groups(params), defaults)
        if not self._slots:
            raise ValueError(
                f"no parameter to train: all {self._n_frozen} tensors have requires_grad=False; call "
                "requires_grad_() on those that should train"
                if self._n_frozen
                else "the list of parameters is empty"
            )
        ops.require(self._backend, self._slots, self._direction, self._n_directions)

    # -- what a subclass says --------------------------------------------------------------------------------------

    def _make_steps(self, slots: list[Slot]) -> Launches:
        """The launches for these tensors."""
        raise NotImplementedError

    def _has_momentum(self, group: dict[str, Any]) -> bool:
        """Whether tensors of this group have a momentum buffer."""
        raise NotImplementedError

    def _with_roles(self, slots: list[Slot]) -> list[Slot]:
        """The tensors, each with what its launches do with it."""
        return slots

    # -- the step protocol -----------------------------------------------------------------------------------------

    def measure(self, closure: Closure) -> Record:
        """Evaluates the model along this step's directions and returns the record; parameters stay bit-identical.

        The counter does not advance: measuring again uses the same directions, and the latest record is the one that
        `step()` without a closure applies. (With restore="walk" the parameters are at x - tau e until `apply_` or
        `discard_`.)

        Args:
            closure: () -> scalar loss tensor; called under no_grad, several times, with the same random state.

        Raises:
            NonFiniteLoss: `max_skipped` steps in a row had a loss that was not finite.
            RuntimeError: the optimizer is broken by an earlier failure.
            TypeError, ValueError: the closure returned something that is no scalar.
        """
        steps = self._prepare(closure)
        with HeldInterrupts() as interrupts:
            return self._evaluate(closure, steps, interrupts, hold=self._walks)

    def apply_(self, record: Record) -> None:
        """Moves parameters and state by a measured step; needs no model, no data and no closure.

        Step hooks run around it, as they do around `step`.

        Raises:
            TypeError, ValueError: the record does not belong to this optimizer at this step; nothing was changed.
            RuntimeError: the optimizer is broken by an earlier failure.
        """
        self._hooked_apply(record)

    def _apply(self, record: Record) -> None:
        self._check_usable()
        if not isinstance(record, Record):
            raise TypeError(f"apply_ takes a jaguar.Record, got {type(record).__name__}")
        if record is not self._pending and self._moved is None:  # else a step has begun, and freezing is for the next
            self._read_frozen()
        n_losses = self._estimator.n_losses(self._n_directions)
        record.check(step=self._step, n_lrs=len(self.param_groups), n_losses=n_losses, frozen=self._frozen.mark)
        self._watch.check(self.param_groups)
        steps, draws, momenta = self._launches(), self._draws(), self._momenta()
        scalars = self._scalars(record)
        if not record.skipped and not all(s.finite for s in scalars.values()):
            raise ValueError(
                f"the losses {record.losses} give no finite derivative, but the record is not marked as skipped"
            )
        with HeldInterrupts(), torch.no_grad():
            held = self._moved
            try:
                if held is None and self._walks:
                    held = self._walked(steps, draws)
                if not record.skipped:
                    steps.update_(draws, self._roster.per_slot(scalars), momenta, held)
                elif held is not None:
                    held.abort()
                self._moved = None
            except BaseException:
                # A kernel that could not be launched has written nothing.
                self._broken = steps.wrote or (held is None and self._walks)
                raise
            self._finish(record)
            torch.clear_autocast_cache()
        if record.skipped:
            warn_of_skipped(record, self._skipped)

    _hooked_apply = with_step_hooks(_apply)

    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """measure(closure) and apply_ in one; without a closure, applies what was measured last.

        The bits are those of the two calls; where a kernel can restore and update in one launch, it does.

        Returns:
            Mean of the measured losses: 0-dim, fp32 (fp64 for fp64 models), detached; NaN if one was not finite.
        """
        if closure is not None:
            record = self._measure_and_apply(closure)
        elif self._pending is not None:
            record = self._pending
            self._apply(record)
        else:
            raise RuntimeError(
                "step() without a closure applies a measured step, and nothing was measured: call "
                "measure(closure) first or step(closure)"
            )
        dtype = torch.float64 if self._roster.double else torch.float32
        # Not torch.tensor: its copy to a GPU would wait for the update to end.
        return torch.full((), record.loss, dtype=dtype, device=self._slots[0].tensor.device)

    def discard_(self) -> None:
        """Forgets what was measured; a walk goes back to where it began, but for the roundings."""
        self._check_usable()
        self._pending = None
        if self._moved is not None:
            with HeldInterrupts(), torch.no_grad():
                self._moved.abort()
            self._moved = None

    def watch_dtype(self, dtype: torch.dtype) -> None:
        """Says once what a loss loses that was computed in `dtype`; for closures that widen it before they return."""
        self._guard.watch_dtype(dtype)

    @property
    def last_record(self) -> Record | None:
        """The record that was applied last."""
        return self._last_record

    @property
    def steps_done(self) -> int:
        """Number of finished steps; the next record has this number as its `step`."""
        return self._step

    @property
    def n_skipped(self) -> int:
        """Number of steps whose loss was not finite."""
        return self._skipped

    def rho(self, record: Record) -> list[float]:
        """The directional derivatives of a record, at the first group's tau."""
        return self._estimator.rho(record.losses, self.param_groups[0]["tau"], double=self._roster.double)

    # -- its parts -------------------------------------------------------------------------------------------------

    def _prepare(self, closure: Closure) -> Launches:
        """Everything that may fail, or take long, before the parameters are moved."""
        self._check_usable()
        if self._moved is not None:
            raise RuntimeError(
                "the parameters are still moved by the last walk: call apply_(record) or discard_() first"
            )
        if not callable(closure):
            raise TypeError(f"closure must be callable and return the loss, got {type(closure).__name__}")
        self._watch.check(self.param_groups)
        self._pending = None
        self._read_frozen()
        steps = self._launches()
        if self._step == 0 and self.lost_share is None:
            with torch.no_grad():
                lost = steps.lost(self._draws()[0], self._taus())
            self.lost_share = {part.name: part.share for part in lost}
            warn_of_lost(lost, self._fate_of_lost)
        return steps

    def _evaluate(self, closure: Closure, steps: Launches, interrupts: HeldInterrupts, hold: bool) -> Record:
        """The evaluations of a step; with `hold` the last probe stays where it is, and `_moved` knows it."""
        draws, double = self._draws(), self._roster.double
        seed = rng.closure_seed(self._seed, self._step)
        lrs = tuple(float(group["lr"]) for group in self.param_groups)
        surroundings = Isolation(closure, self._roster.devices, self._modules, self._step, self._roster.tensors)
        with surroundings as isolation, torch.no_grad():

            def evaluate() -> float:
                with interrupts.let_through(), explained():
                    return self._guard.as_float(isolation.evaluate(closure, seed), double)

            probes = steps.probes(draws, self._taus())
            losses = self._estimator.measure(evaluate, probes, hold)
            self._moved = probes[-1] if hold else None
            record = Record(
                self._step, lrs, losses, skipped=not all(map(math.isfinite, losses)), frozen=self._frozen.mark
            )
            if not record.skipped and not all(s.finite for s in self._scalars(record).values()):
                record = replace(record, skipped=True)  # finite losses, but rho overflows
            if record.skipped and self._skipped_in_a_row + 1 >= self.max_skipped:
                self.discard_()
                raise NonFiniteLoss(
                    f"{self.max_skipped} steps in a row had a non-finite loss (the last one {losses}); last "
                    f"finite step: {'none' if self._last_finite is None else self._last_finite}. Lower lr or tau, or "
                    "look at the data"
                )
            self._pending = record
        if self._roster.slots:
            self._guard.watch(losses, steps.n_perturbed(draws[0]))
        return record

    def _measure_and_apply(self, closure: Closure) -> Record:
        steps = self._prepare(closure)
        with HeldInterrupts() as interrupts:
            try:
                record = self._evaluate(closure, steps, interrupts, hold=self._walks or steps.takes_back)
                self._apply(record)
            except BaseException:
                if not self._broken:  # nothing was written: the parameters go back to where the step began
                    self.discard_()
                raise
        return record

    @property
    def _walks(self) -> bool:
        return self._options.get("restore") == "walk"

    def _draws(self) -> list[Draw]:
        return [Draw(self._seed, self._step, k) for k in range(self._n_directions)]

    def _launches(self) -> Launches:
        """The launches, over tensors that were seen to be in their places."""
        if self._steps is None:
            self._slots = self._with_roles(self._slots)
            trained = [slot for slot in self._slots if slot.tensor.requires_grad]
            self._steps, self._roster = self._make_steps(trained), Roster(trained, self.state)
        elif self._roster.state is not self.state:
            self._roster = Roster(self._roster.slots, self.state)
        if self._roster.check():
            self._steps.check(self._roster.momenta())
        return self._steps

    def _read_frozen(self) -> None:
        if self._frozen.read(self._slots):
            self._steps = None

    def _taus(self) -> list[float]:
        kinds = {k: rules.rounded(self.param_groups[k.group]["tau"], k.double) for k in self._roster.kinds}
        return self._roster.per_slot(kinds)

    def _scalars(self, record: Record) -> dict[Kind, rules.Scalars]:
        """The scalars of every parameter group and compute dtype."""
        made = {}
        for kind in self._roster.kinds:
            group = self.param_groups[kind.group]
            rho = [] if record.skipped else self._estimator.rho(record.losses, group["tau"], double=kind.double)
            made[kind] = rules.step_scalars(
                [-r for r in rho] if self._maximize else rho,
                lr=record.lrs[kind.group] * kind.rate,
                gain=kind.gain,
                beta=group.get(self.momentum_key, 0.0),
                tau=group["tau"],
                weight_decay=group["weight_decay"],
                rho_clip=self._rho_clip,
                double=kind.double,
            )
        return made

    def _momenta(self) -> list[Tensor | None]:
        """The momentum of every slot, made where it is missing: parameter precision, but bf16 for fp16."""
        momenta = self._roster.momenta()
        missing = [slot for slot, m in zip(self._roster.slots, momenta, strict=True) if m is None]
        for slot in missing:
            if self._has_momentum(self.param_groups[slot.group]):
                own = torch.bfloat16 if slot.tensor.dtype == torch.float16 else slot.tensor.dtype
                with torch.inference_mode(False):  # state made in inference mode could not be written to outside it
                    self.state[slot.tensor]["momentum"] = torch.zeros(
                        slot.tensor.shape, dtype=self._momentum_dtype or own, device=slot.tensor.device
                    )
        if missing:
            momenta = self._roster.momenta()
            self._launches().check(momenta)
        return momenta

    def _walked(self, steps: Launches, draws: list[Draw]) -> Probe | None:
        """Walks as `measure` did: a record is replayed."""
        probe = None
        for probe in steps.probes(draws, self._taus()):
            self._moved = probe
            probe.plus()
            if self._estimator.name == "two-sided":
                probe.minus()
        return probe

    def _finish(self, record: Record) -> None:
        self._step += 1
        self._pending, self._last_record = None, record
        self._opt_called = True  # what schedulers look for; they see step() only, and apply_ is a step too
        if record.skipped:
            self._skipped += 1
            self._skipped_in_a_row += 1
        else:
            self._skipped_in_a_row, self._last_finite = 0, record.step

    def _check_usable(self) -> None:
        if self._broken:
            raise RuntimeError(
                "an earlier step failed while it was writing, so parameters and state are not those of any step; "
                f"reload: last finished step {self._step - 1 if self._step else 'none'}"
            )

    # -- torch.optim.Optimizer -------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters; only before the first `measure`.

        Tied tensors count once and tensors with requires_grad=False are left out.
        """
        self._check_usable()
        if self._watch.started:
            raise RuntimeError(
                "a parameter group can be added only before the first measure: the records made so far would not fit it"
            )
        group, n_frozen = prepared_group(param_group, self.param_groups, self.group_keys, self.group_flags)
        groups = list(self.param_groups)
        super().add_param_group(group)
        try:
            self._slots = slots_of(self.param_groups, known=self._slots)
        except ValueError:
            self.param_groups[:] = groups
            raise
        self._n_frozen += n_frozen
        self._steps = None

    def _packed(self, state: dict[str, Any]) -> dict[str, Any]:
        self._check_usable()
        if self._moved is not None:
            raise RuntimeError("the parameters are moved by a walk: call apply_(record) or discard_() before saving")
        return packed(state, self.group_keys, self._saved())

    def _saved(self) -> Saved:
        options = deciding(self._options, type(self), self._slots)
        return Saved(self._step, self._seed, self._skipped, self._skipped_in_a_row, self._last_finite, options)

    def _unpack(self, state: dict[str, Any], load: Callable[[dict[str, Any]], None]) -> None:
        fitting, exact, saved = unpacked(state, self.param_groups, self._saved())
        load(fitting)
        self.state.update(exact)
        self._step, self._seed, self._last_finite = saved.step, saved.seed, saved.last_finite
        self._skipped, self._skipped_in_a_row = saved.skipped, saved.skipped_in_a_row
        self._broken, self._pending, self._moved, self._last_record = False, None, None, None
        self._watch.restart(self.param_groups if self._step else None)
        self._slots, self._steps = slots_of(self.param_groups, known=self._slots), None

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler puts a wrapper of this very object's step into the instance; a copy must not carry it.
        return {key: value for key, value in self.__dict__.items() if not key.endswith("_hooks") and key != "step"}

    def __repr__(self) -> str:
        backend = ops.summary(self._backend, self._slots, self._direction, self._n_directions)
        now = f"backend: {backend}, seed: {self._seed}, steps done: {self._step}, skipped: {self._skipped}"
        lines = [*self._describe(), now, *["maximizes the loss"] * self._maximize]
        return shown(self, self.group_keys, self.group_flags, self._slots, self._n_frozen, lines)

    def _describe(self) -> list[str]:
        return [", ".join(f"{key}={value}" for key, value in self._options.items())]
