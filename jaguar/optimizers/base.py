"""The step protocol, once for all optimizers: measure(closure) -> Record, apply_(record)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from jaguar.backends import availability, ops
from jaguar.backends.launches import StepInputs
from jaguar.method.distributed import part_of
from jaguar.method.method import Method
from jaguar.method.params import Kind, Shard, check_shards
from jaguar.method.probe import Probe
from jaguar.method.rule import Scalars, all_finite
from jaguar.method.step_size import AUTO, Estimates, StepSize
from jaguar.optimizers.checkpoint import Saved, check_complete, packed, unpacked
from jaguar.optimizers.contract import with_step_hooks
from jaguar.optimizers.direction_group import DirectionGroup
from jaguar.optimizers.embeddings import slots_of
from jaguar.optimizers.groups import FrozenGroups, check_any, check_group, prepared_group, split_groups, validate_seed
from jaguar.optimizers.guards import LossGuard, warn_of_skipped
from jaguar.optimizers.identity import deciding, environment, fingerprint_of
from jaguar.optimizers.interrupts import HeldInterrupts
from jaguar.optimizers.measuring import Closure, Measuring
from jaguar.optimizers.module_state import ModuleState
from jaguar.optimizers.shown import shown
from jaguar.optimizers.trained import Measured, Sizes, Trained
from jaguar.record import Record


class ZerothOrder(Measuring):
    """Runs a method: a step is measured into a record, and a record is applied.

        record = measure(closure)       evaluates the model, leaves every parameter bit-identical
        apply_(record)                  moves parameters and state; needs no model, no data, no closure

    Args:
        params: tensors (fp32, bf16, fp16, fp64), dicts with numbers of their own, or model.named_parameters(), whose
            names make the random numbers independent of the order. DTensors (FSDP2) are moved part by part.
        method: what is computed, a `jaguar.Method`.
        seed: key of all directions and rounding noise, in [0, 2**64).
        backend: "auto", or a name that `jaguar info` lists.
        restore: how dense directions get back: "copy" of the trained tensors, or "module" by module while the model
            runs; None: a copy where it needs under a tenth of the free memory, else "module". No bit depends on it.
        shards: by name (`#position` where names are not known), the tensors that are parts of bigger ones.
        direction_group: a `torch.distributed.ProcessGroup` of processes that have the same model, batch and optimizer:
            each evaluates its share of a step's directions, and all take the step of one that evaluates them all.
        group_values: numbers that parameter groups may set for themselves: lr, tau (1e-3), weight_decay (0.0) and
            those that the method's rule declares. lr="auto" and tau="auto" choose them from the losses, as
            `jaguar.StepSize` says; a group's own are factors then.

    Raises:
        ValueError: an argument is out of range, or a number of the rule is missing; the message names what would be
            right.

    Equivalent to: `g = sum(rho * e for rho, e in zip(rhos, directions)) / n; rule(x, g)`.
    """

    # True if groups must say with `ns` what are matrices, as those of `jaguar.param_groups` do.
    by_role: ClassVar[bool] = False

    def __init__(
        self,
        params: Any,
        method: Method,
        *,
        seed: int = 0,
        backend: str = "auto",
        restore: str | None = None,
        shards: Mapping[str, Shard] | None = None,
        direction_group: Any = None,
        **group_values: Any,
    ) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"method must be a jaguar.Method, got {type(method).__name__}")
        if restore not in (None, "copy", "module"):
            raise ValueError(f"restore={restore!r}: choose 'copy' or 'module', or None")
        if AUTO in (asked := [group_values.get(key) for key in ("lr", "tau")]):
            method = replace(method, step_size=StepSize(*(value == AUTO for value in asked)))
        if method.step_size is not None:
            # What the groups have is a factor then, so that schedules of lr go on as ever.
            group_values |= {key: 1.0 for key in method.step_size.chosen if group_values.get(key, AUTO) == AUTO}
        self.method = method
        self._record_hooks = OrderedDict()
        self._estimates = Estimates() if method.step_size is not None else None
        self._direction_group = None if direction_group is None else DirectionGroup(direction_group, method)
        self._seed, self._backend = validate_seed(seed), availability.choose(backend)
        self._step = self._skipped = self._skipped_in_a_row = self._stayed = self._n_frozen = 0
        self._last_finite: int | None = None
        self._broken = False
        self._measured: Measured | None = None
        self._last_record: Record | None = None
        self._shards = dict(shards or {})
        self._trained = Trained(method, self._backend, restore)
        self._frozen_groups = FrozenGroups((*method.keys, *method.rule.flags))
        self._guard, self._modules = LossGuard(), ModuleState()
        self.lost_share: dict[str, float] | None = None
        defaults = method.rule.completed({"tau": 1e-3, "weight_decay": 0.0} | group_values)
        check_group(method.keys, defaults, "the optimizer", method.rule.flags)
        super().__init__(split_groups(params), defaults)
        check_any(len(self.slots), self._n_frozen)
        check_shards(self._shards, self.slots)
        method.direction.check(self.slots)
        ops.require(self._backend, method, self.slots, self.param_groups)

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
        return self._measure(closure, held=False)

    def measure_(self, closure: Closure) -> Record:
        """As `measure`, but the parameters may stay where the last evaluation was, so that `apply_` can be fused.

        Where a kernel restores and updates in one launch, `apply_(record)` is that launch. Until then, or `discard_`,
        the parameters are not those of the model.
        """
        return self._measure(closure, held=True)

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
        measured = self._measured
        if measured is None or (record is not measured.record and measured.probe is None):
            self._trained.read_frozen()  # else a step has begun, and freezing is for the next
        n_losses = self._n_losses(self._step)
        frozen = self._trained.frozen.mark
        n_errors = self._n_errors(self._step)
        record.check(step=self._step, n_lrs=len(self.param_groups), n_losses=n_losses, frozen=frozen, n_errors=n_errors)
        self._frozen_groups.check(self.param_groups)
        self._launches()
        sizes = Sizes(record.lrs, record.taus or self._sizes().taus)
        inputs = self._inputs(sizes, None if record.skipped else self.method.derivatives(self._own(record.losses)))
        if not all_finite(inputs.scalars):
            raise ValueError(
                f"the losses {record.losses} give no finite derivative, but the record is not marked as skipped"
            )
        with self._trained.forgets_failures(), HeldInterrupts():
            self._move(record, inputs, inputs.scalars)

    _hooked_apply = with_step_hooks(_apply)

    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """measure(closure) and apply_ in one; without a closure, applies what was measured last.

        The bits are those of the two calls; where a kernel can restore and update in one launch, it does.

        Returns:
            `loss` of the record: 0-dim, fp32 (fp64 for fp64 models), detached; NaN if one was not finite.
        """
        if closure is not None:
            record = self._measure_and_move(closure)
        elif self._measured is not None:
            record = self._measured.record
            self._apply(record)
        else:
            raise RuntimeError(
                "step() without a closure applies a measured step, and nothing was measured: call "
                "measure(closure) first or step(closure)"
            )
        dtype = torch.float64 if self._roster.double else torch.float32
        # Not torch.tensor: its copy to a GPU would wait for the update to end.
        return torch.full((), self.loss(record), dtype=dtype, device=self.slots[0].tensor.device)

    def take(self, record: Record) -> None:
        """Takes a record as if it had just been measured, so that `step()` without a closure applies it.

        Raises:
            RuntimeError: the parameters are where an earlier `measure_` left them, or the optimizer is broken.
            TypeError: it is no record.
        """
        self._check_usable()
        if not isinstance(record, Record):
            raise TypeError(f"take needs a jaguar.Record, got {type(record).__name__}")
        if self._measured is not None and self._measured.probe is not None:
            raise RuntimeError("a step is being measured: call apply_(record) or discard_() first")
        self._trained.read_frozen()
        self._measured = Measured(record, None, {})

    def discard_(self) -> None:
        """Forgets what was measured; a walk goes back to where it began, but for the roundings."""
        self._check_usable()
        measured, self._measured = self._measured, None
        if measured is not None and measured.probe is not None:
            if self._roster.left():
                self._launches()
            with HeldInterrupts(), torch.no_grad():
                measured.probe.abort()
        self._trained.forget()

    def watch_dtype(self, dtype: torch.dtype) -> None:
        """Says once what a loss loses that was computed in `dtype`; for closures that widen it before they return."""
        self._guard.watch_dtype(dtype)

    @property
    def last_record(self) -> Record | None:
        """The record that was applied last."""
        return self._last_record

    @property
    def n_skipped(self) -> int:
        """Number of steps whose loss was not finite."""
        return self._skipped

    @classmethod
    def of(cls, params: Any, method: Method, **options: Any) -> Self:
        """An optimizer of this class with a method as it is, in place of the class's own arguments.

        Args:
            options: those of `ZerothOrder`.
        """
        made = cls.__new__(cls)
        ZerothOrder.__init__(made, params, method, **options)
        return made

    def header(self, **more: Any) -> dict[str, Any]:
        """The header of a `jaguar.Journal` that begins with the optimizer and its weights as they are now.

        Args:
            more: further keys, of JSON values; those of `base` are added to its fingerprint.
        """
        base = {"fingerprint": fingerprint_of(self)} | more.pop("base", {})
        lrs = [float(group["lr"]) for group in self.param_groups]
        own = {"first": self._step, "base": base, "initial_lr": lrs, "environment": environment(self)}
        return deciding(self) | own | more

    # -- its parts -------------------------------------------------------------------------------------------------

    def _measure(self, closure: Closure, held: bool) -> Record:
        with self._trained.forgets_failures():
            inputs, sizes = self._begin(closure)
            with HeldInterrupts() as interrupts:
                hold = self._holds if held else self.method.walk
                self._measured = self._evaluate(closure, inputs, sizes, interrupts, hold)
        return self._measured.record

    @property
    def _holds(self) -> bool:
        """Tells whether the last probe of a step can stay where it is until the update."""
        # Copies of parameters that are missing must be made where the step begins.
        return self.method.walk or (self._trained.bound.fuses_restore and not self._roster.lacks_copies)

    def _measure_and_move(self, closure: Closure) -> Record:
        with self._trained.forgets_failures():
            inputs, sizes = self._begin(closure)
            with HeldInterrupts() as interrupts:
                try:
                    self._measured = measured = self._evaluate(closure, inputs, sizes, interrupts, self._holds)
                    self._move(measured.record, inputs, measured.scalars)
                except BaseException:
                    if not self._broken:  # nothing was written: the parameters go back to where the step began
                        self.discard_()
                    raise
        return measured.record

    def _move(self, record: Record, inputs: StepInputs, scalars: Mapping[Kind, Scalars]) -> None:
        """Moves parameters and state by a record that belongs here; interrupts are held."""
        bound, method = self._trained.bound, self.method
        self._trained.sharded.reshard()
        moves = not record.skipped and method.moves(self._own(record.losses))
        with torch.no_grad():
            if moves:
                self._trained.make_state()
            probe = None if self._measured is None else self._measured.probe
            inputs = replace(inputs, scalars=scalars, state=self._roster.state, probe=probe)
            replays = probe is None and method.walk
            if moves or replays:
                bound.prepare(inputs)
            led = False
            try:
                if replays:
                    probe = self._walked(inputs)
                if moves:
                    led = self._lead(record, inputs)
                    bound.update_(replace(inputs, probe=probe) if replays else inputs)
                elif probe is not None:
                    probe.abort()
            except BaseException:
                # A kernel that could not be launched has written nothing.
                self._broken = bound.wrote or replays or led
                raise
            self._measured, self._last_record = None, record
            self._trained.forget()
            self._trained.drop_state()
            self._finish(record)
            torch.clear_autocast_cache()
        for hook in list(self._record_hooks.values()):
            hook(self, record)
        if record.skipped:
            warn_of_skipped(record, self._skipped)

    def _lead(self, record: Record, inputs: StepInputs) -> bool:
        """Prepares the launches of a step that moves something; returns whether it wrote anything."""
        pairs = self._roster.copies("previous")
        for tensor, copy in pairs:
            copy.copy_(tensor)
        return bool(pairs)

    def _walked(self, inputs: StepInputs) -> Probe | None:
        """Walks as `measure` did: a record is replayed."""
        probe = None
        for probe in self._trained.bound.probes(inputs):
            for point in self.method.estimator.points:
                probe.to(point)
        return probe

    def _finish(self, record: Record) -> None:
        self._step += 1
        self._opt_called = True  # what schedulers look for; they see step() only, and apply_ is a step too
        if record.skipped:
            self._skipped += 1
            self._skipped_in_a_row += 1
        else:
            self._stayed += not self.method.moves(self._own(record.losses))
            self._skipped_in_a_row, self._last_finite = 0, record.step
            if self.method.step_size is not None and self._estimates is not None:
                sign, factor = -1.0 if self.method.maximize else 1.0, float(self.param_groups[0]["tau"])
                own = self.method.estimator, record, factor, sign, self._itemsize
                self.method.step_size.learn(self._estimates, *own)

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
        if self._frozen_groups.started:
            raise RuntimeError(
                "a parameter group can be added only before the first measure: the records made so far would not fit it"
            )
        method, number = self.method, len(self.param_groups)
        if isinstance(param_group, dict):
            param_group = method.rule.prepared(param_group, number, self.defaults)
        group, n_frozen = prepared_group(param_group, self.param_groups, method.keys, method.rule.flags)
        for key in method.keys:
            if key not in group and key not in self.defaults:
                raise ValueError(f"parameter group {number} has no {key}: pass {key}=... to the optimizer or the group")
        groups = list(self.param_groups)
        super().add_param_group(group)
        try:
            method.rule.check_numbers(self.param_groups[number])
            slots = slots_of(self.param_groups, self.slots, self._shards)
            self._trained.take(method.in_roles(slots, self.param_groups))
        except BaseException:
            self.param_groups[:] = groups
            raise
        self._n_frozen += n_frozen

    def _packed(self, state: dict[str, Any]) -> dict[str, Any]:
        self._check_usable()
        if self._measured is not None and self._measured.probe is not None:
            raise RuntimeError("the parameters are moved: call apply_(record) or discard_() before saving")
        return packed(state, tuple(self.method.keys), self._saved())

    def _saved(self) -> Saved:
        options = self.method.options()
        if rows := [f"{slot.name}[{slot.kept}]" for slot in self.slots if slot.kept is not None]:
            options["padding_rows"] = ", ".join(rows)
        if parts := sorted({part_of(slot.spread) for slot in self.slots if slot.spread is not None}):
            options["parts"] = "; ".join(parts)
        counts = self._step, self._seed, self._skipped, self._skipped_in_a_row, self._last_finite
        found = None if self._estimates is None else asdict(self._estimates)
        return Saved(*counts, options, self._stayed, found)

    def _unpack(self, state: dict[str, Any], load: Callable[[dict[str, Any]], None]) -> None:
        fitting, exact, saved = unpacked(state, self.param_groups, self._saved())
        if saved.moved:
            check_complete(exact, self.method, self.slots, fitting["param_groups"])
        load(fitting)
        self.state.update(exact)
        self._step, self._seed, self._last_finite = saved.step, saved.seed, saved.last_finite
        self._skipped, self._skipped_in_a_row, self._stayed = saved.skipped, saved.skipped_in_a_row, saved.stayed
        self._estimates = None if saved.estimates is None else Estimates(**saved.estimates)
        self._broken, self._measured, self._last_record = False, None, None
        self._frozen_groups.restart(self.param_groups if self._step else None)
        self._trained.take(slots_of(self.param_groups, self.slots, self._shards))

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler puts a wrapper of this very object's step into the instance; a copy must not carry it.
        return {key: value for key, value in self.__dict__.items() if not key.endswith("_hooks") and key != "step"}

    def __repr__(self) -> str:
        now = f"seed: {self._seed}, steps done: {self._step}, skipped: {self._skipped}"
        return shown(self, self.method, self.slots, self._n_frozen, self._backend, now)
