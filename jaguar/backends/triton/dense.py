"""Launches of dense directions in Triton kernels; `jaguar.backends.reference.dense` defines what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from jaguar.backends.launches import Lost, State, StepInputs
from jaguar.backends.reference.probes import ModuleProbe
from jaguar.backends.triton.device_scalars import DeviceScalars, arithmetic
from jaguar.backends.triton.family import Family
from jaguar.backends.triton.plan import Cut, Launch, Options, Plan, Table, alignment, formats
from jaguar.backends.triton.probes import SavedProbe, WalkProbe
from jaguar.method.directions import Dense
from jaguar.method.method import Method
from jaguar.method.params import Slot
from jaguar.method.probe import Probe
from jaguar.triton_kernels import dense as kernels
from jaguar.triton_kernels import tables as T
from jaguar.triton_kernels.launch import BLOCK, dense_tile, launch


class DenseLaunches(Family):
    """Dense directions with any rule of up to three state buffers: z is made in registers.

    Args:
        method: what is computed; its direction is `Gaussian` or `Rademacher`.
        slots: the tensors, contiguous, on GPUs or under the interpreter.
        restore: "copy": from copies of all trained tensors; "module": perturb and restore one module at a time while
            it runs; "walk": step back, which rounds differently and leaves a drift that `update_` reproduces.
        numbers: a step's numbers, for these and other launches.
    """

    # The module of their `move` and `step`.
    _kernels: ClassVar[Any] = kernels

    def __init__(self, method: Method, slots: Sequence[Slot], restore: str, numbers: DeviceScalars) -> None:
        assert isinstance(method.direction, Dense)
        cuts = [Cut(0, slot.count) for slot in slots]
        super().__init__(method, slots, Plan(slots, cuts, (0, 0, 0, 0), numbers), numbers)
        self._restore, self._distribution = restore, method.direction.drawn.name
        self.fuses_restore = restore != "module"
        self._several = method.estimator.n_directions > 1
        self._of_moves, self._of_steps = self._constants()
        self._count = sum(slot.count for slot in slots)
        self._places: dict[Slot, tuple[Table, tuple[int, int]]] = {}

    def n_perturbed(self, inputs: StepInputs) -> int:
        """Number of perturbed coordinates."""
        if inputs.active is None:
            return self._count
        return sum(slot.count for slot, active in zip(self._slots, inputs.active, strict=True) if active)

    def probes(self, inputs: StepInputs) -> list[Probe]:
        """Probes, one per direction, that move the parameters and take them back."""
        probes: list[Probe] = []
        walk: WalkProbe | None = None
        last, masked = len(inputs.draws) - 1, inputs.active is not None
        for k in range(last + 1):
            if self._restore == "walk":
                walk = WalkProbe(self._now, partial(self._walk_, k, masked), walk)
                probes.append(walk)
            elif self._restore == "copy":
                move = partial(self._move_, k, masked)
                probes.append(SavedProbe(self._now, "save", move, self._release, k == last))
            else:  # lengths in units of tau, which the kernel knows
                self._now()  # the tables whose parts modules launch
                slots = self._active(inputs)
                probes.append(ModuleProbe(slots, [1.0] * len(slots), partial(self._move_one_, k)))
        return probes

    def lost(self, inputs: StepInputs) -> list[Lost]:
        """The perturbations along the first direction that rounding swallows, per tensor that takes part."""
        swallowed: dict[Slot, int] = {}
        for table in self._now().tables:
            counts = torch.zeros(len(table.members), dtype=torch.int64, device=table.device)
            self._launch_move(0, inputs.active is not None, "lost", table, counts=counts)
            swallowed.update(zip([self._slots[i] for i in table.members], counts.tolist(), strict=True))
        return [Lost(slot.name, swallowed.get(slot, 0), slot.count) for slot in self._active(inputs)]

    def update_(self, inputs: StepInputs) -> None:
        """g = mean over directions of weight e, in order; entry into state; the step.

        Takes back what the probe left moved in the same launch.
        """
        job, factor, held = "plain", 0.0, inputs.probe
        assert self._updating is not None
        work = self._launched(self._updating)
        if isinstance(held, SavedProbe) and held.moved:
            job = "saved"
        elif isinstance(held, WalkProbe):
            job, factor = "walked", held.back
        self.wrote = False
        masked = inputs.active is not None
        for table in work.tables:
            launch(
                self._kernels.step,
                table.programs.shape[0],
                *self._arguments(table, 0),
                table.geometry,
                self._saved(table.pool) if job == "saved" else table.geometry,
                factor,
                JOB=job,
                MASKED=masked,
                BLOCK=BLOCK,
                **table.options,
                **self._of_steps,
            )
            self.wrote = True
        work.written(again=job == "saved")
        if isinstance(held, SavedProbe):
            held.forget()
        self._release()

    def _constants(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Compile-time constants of moves and of steps that no tensor decides."""
        method, drawn = self._method, {"DISTRIBUTION": self._distribution}
        rule = {"SEVERAL": self._several, "STOCHASTIC": method.stochastic, **arithmetic(method.rule)}
        return drawn | {"TWO_SIDED": method.estimator.two_sided}, drawn | rule

    def _moving_tables(self, state: State) -> Launch:
        """The tables of launches that move parameters."""
        return self._plan.launch(BLOCK, [()] * len(self._slots), self._moved, tiles=True)

    def _tables(self, state: State) -> tuple[Launch, Launch | None]:
        moving = self._moving_tables(state)
        self._places = {
            self._slots[i]: (table, part)
            for table in moving.tables
            for i, part in zip(table.members, table.ranges, strict=True)
        }
        return moving, self._plan.launch(BLOCK, state, self._stepped, tiles=True)

    def _allocate(self, inputs: StepInputs, known: bool) -> None:
        if self._restore == "copy" and not known:
            for pool in self._plan.pools:
                self._saved(pool)

    def _active(self, inputs: StepInputs) -> list[Slot]:
        """The slots that take part."""
        if inputs.active is None:
            return list(self._slots)
        return [slot for slot, active in zip(self._slots, inputs.active, strict=True) if active]

    def _moved(self, slot: Slot, own: tuple[Tensor, ...]) -> Options:
        found = {"FORMAT": T.FORMATS[slot.tensor.dtype], **alignment(slot)}
        return found | {"TILE": dense_tile("move", self._distribution, found["GROUPED"])}

    def _stepped(self, slot: Slot, own: tuple[Tensor, ...]) -> Options:
        found = {"X_FORMAT": T.FORMATS[slot.tensor.dtype], **formats(own), **alignment(slot, own)}
        return found | {"TILE": dense_tile("step", self._distribution, found["GROUPED"], self._several or len(own) > 1)}

    def _move_(self, k: int, masked: bool, job: str, table: Table, factor: float) -> None:
        self._launch_move(k, masked, job, table, factor, self._saved(table.pool))

    def _walk_(self, k: int, masked: bool, job: str, table: Table, factor: float) -> None:
        self._launch_move(k, masked, job, table, factor)

    def _move_one_(self, k: int, slot: Slot, scale: float) -> None:
        """x <- x + scale tau e for one slot: the programs of that slot alone."""
        if slot.count:
            table, part = self._places[slot]
            self._launch_move(k, False, "walk", table, scale, part=part)
        torch.autograd.graph.increment_version([] if slot.tensor.is_inference() else [slot.tensor])

    def _launch_move(
        self,
        k: int,
        masked: bool,
        job: str,
        table: Table,
        factor: float = 1.0,
        saved: Tensor | None = None,
        counts: Tensor | None = None,
        part: tuple[int, int] | None = None,
    ) -> None:
        first, n_programs = part or (0, table.programs.shape[0])
        launch(
            self._kernels.move,
            n_programs,
            *self._arguments(table, k),
            table.geometry if saved is None else saved,
            table.geometry if counts is None else counts,
            first,
            factor,
            JOB=job,
            MASKED=masked,
            BLOCK=BLOCK,
            **table.options,
            **self._of_moves,
        )

    def _arguments(self, table: Table, k: int) -> tuple[Tensor, ...]:
        """The first arguments of every launch along the k-th direction."""
        numbers, device = self._numbers, table.device
        return table.tensors, table.programs, numbers.keys(device, k), numbers.scalars(device), numbers.active(device)
