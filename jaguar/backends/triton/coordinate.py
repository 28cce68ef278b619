"""Launches of coordinate directions in Triton kernels; `backends.reference.coordinate` defines what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jaguar.backends.launches import Lost, State, StepInputs
from jaguar.backends.triton.cuts import cuts_of
from jaguar.backends.triton.device_scalars import DeviceScalars, arithmetic
from jaguar.backends.triton.family import Family
from jaguar.backends.triton.plan import Launch, Options, Plan, Pool, Table, alignment
from jaguar.backends.triton.probes import SavedProbe
from jaguar.method.directions import Coordinates, ReleasedBlock
from jaguar.method.method import Method
from jaguar.method.params import Slot
from jaguar.method.probe import Probe
from jaguar.triton_kernels import coordinate as kernels
from jaguar.triton_kernels import tables as T
from jaguar.triton_kernels.launch import BLOCK, INTERPRETED, LEAST_LANES, STRATA, WIDE, WIDE_TILE, launch


class CoordinateLaunches(Family):
    """Coordinate directions with a rule of one state buffer: three launches a step.

    Args:
        method: what is computed; its direction is `Coordinates` or `ReleasedBlock`.
        slots: the tensors of these launches, in canonical order; contiguous, on GPUs or under the interpreter.
        everything: all tensors of the optimizer, over which a number of coordinates is counted.
        numbers: a step's numbers, for these and other launches.
    """

    def __init__(
        self, method: Method, slots: Sequence[Slot], everything: Sequence[Slot], numbers: DeviceScalars
    ) -> None:
        direction, rule = method.direction, method.rule
        assert isinstance(direction, (Coordinates, ReleasedBlock))
        layout, cuts, common = cuts_of(slots, everything, direction)
        super().__init__(method, slots, Plan(slots, cuts, common, numbers), numbers)
        self._direction, self._all, self._n = direction, rule.update == "all", method.estimator.n_directions
        # With several directions every entry needs the parameters as they were before the step.
        self.fuses_restore = self._n == 1
        self._options: dict[str, Any] = {
            "LAYOUT": layout,
            "ONES": direction.ones,
            "TWO_SIDED": method.estimator.two_sided,
            "STOCHASTIC": method.stochastic,
            **arithmetic(rule),
            **WIDE,
        }
        # At least a lane for each thread: the accesses of a lane that several threads hold are not ordered.
        lanes = min(STRATA, max(LEAST_LANES, 1 << (common[T.LANES.value] - 1).bit_length()))
        self._tiled = {
            "PREFETCH": not INTERPRETED,
            "SEVERAL": self._n > 1,
            "BLOCK": BLOCK,
            "TILE": WIDE_TILE,
            "LANES": lanes,
        }
        share = direction.fraction(sum(slot.total for slot in everything))
        self._n_perturbed = round(share * sum(slot.count for slot in slots))
        self._scratch: dict[Pool, Tensor] = {}
        self._listed: dict[Pool, Tensor] = {}
        self._listed_of: Any = None

    def n_perturbed(self, inputs: StepInputs) -> int:
        """Number of coordinates in S, to within the strata that tensors end in."""
        return self._n_perturbed

    def probes(self, inputs: StepInputs) -> list[Probe]:
        """Probes, one per direction, that move the parameters and take them back."""
        last = len(inputs.draws) - 1
        assert inputs.active is None, "kernels of coordinate directions have no mask"
        moves = [partial(self._move_, k) for k in range(last + 1)]
        return [SavedProbe(self._now, "perturb", move, self._release, k == last) for k, move in enumerate(moves)]

    def lost(self, inputs: StepInputs) -> list[Lost]:
        """The perturbations along the first direction that rounding swallows, per tensor."""
        report = [Lost(slot.name, 0, 0) for slot in self._slots]
        for table in self._now().tables:
            counts = torch.zeros((len(table.members), 2), dtype=torch.int64, device=table.device)
            self._sparse_("lost", table, counts=counts)
            for i, (lost, perturbed) in zip(table.members, counts.tolist(), strict=True):
                report[i] = Lost(self._slots[i].name, lost, perturbed)
        return report

    def update_(self, inputs: StepInputs) -> None:
        """Entries of every direction in order, then one step; restores what the probe left moved."""
        held = inputs.probe
        assert self._updating is not None and (held is None or isinstance(held, SavedProbe))
        work = self._launched(self._updating)
        self.wrote = False
        if held is not None and self._n > 1:
            held.finish()
        restore = held is not None and held.moved
        for table in work.tables:
            saved = self._saved(table.pool) if restore else None
            if self._all:
                self._tiles_(table, saved)
            elif self._n > 1:
                self._sparse_("several", table, saved=self._scratch[table.pool])
            else:
                self._sparse_("fused" if restore else "update", table, saved=saved)
            self.wrote = True
        work.written(again=restore)
        if held is not None:
            held.forget()
        self._release()
        self._scratch.clear()

    def forget(self) -> None:
        """The buffers, and a list of coordinates."""
        super().forget()
        self._scratch.clear()
        self._listed, self._listed_of = {}, None

    def _tables(self, state: State) -> tuple[Launch, Launch | None]:
        moving = self._plan.launch(STRATA, [()] * len(self._slots), _moved)
        if not all(len(own) == 1 for own in state):
            return moving, None
        if self._all:
            return moving, self._plan.launch(BLOCK, state, _tiled, tiles=True)
        return moving, self._plan.launch(STRATA, state, _sampled)

    def _allocate(self, inputs: StepInputs, known: bool) -> None:
        if isinstance(self._direction, ReleasedBlock) and inputs.draws[0] != self._listed_of:
            # The drawn indices of the released code's block; of the other layouts kernels draw for themselves.
            (draw,) = inputs.draws
            indices = [index for index, _ in self._direction.sample(draw, self._slots)]
            self._listed = {pool: self._plan.listing(pool, indices) for pool in self._plan.pools}
            self._listed_of = draw
        for pool in self._plan.pools:
            if not known:
                self._saved(pool)
            elif self._n > 1 and not self._all:
                self._scratch[pool] = self._plan.saved(pool, self._n)

    def _move_(self, k: int, job: str, table: Table, factor: float) -> None:
        self._sparse_(job, table, k, factor, self._saved(table.pool))

    def _sparse_(
        self,
        job: str,
        table: Table,
        k: int = 0,
        factor: float = 0.0,
        saved: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> None:
        launch(
            kernels.sparse,
            table.programs.shape[0],
            *self._arguments(table, k),
            table.geometry if saved is None else saved,
            table.geometry if counts is None else counts,
            factor,
            JOB=job,
            BLOCK=STRATA,
            **table.options,
            **self._options,
        )

    def _tiles_(self, table: Table, saved: Tensor | None) -> None:
        launch(
            kernels.tiles,
            table.programs.shape[0],
            *self._arguments(table, 0),
            table.geometry if saved is None else saved,
            RESTORE=saved is not None,
            **table.options,
            **self._options,
            **self._tiled,
        )

    def _arguments(self, table: Table, k: int) -> tuple[Tensor, ...]:
        """The first arguments of every launch along the k-th direction."""
        keys, scalars = self._numbers.keys(table.device, k), self._numbers.scalars(table.device)
        listed = self._listed.get(table.pool, table.geometry)
        return table.tensors, table.programs, keys, scalars, table.geometry, listed


def _sampled(slot: Slot, own: tuple[Tensor, ...]) -> Options:
    return {"X_FORMAT": T.FORMATS[slot.tensor.dtype], "S0": T.FORMATS[own[0].dtype]}


def _moved(slot: Slot, own: tuple[Tensor, ...]) -> Options:
    return {"X_FORMAT": T.FORMATS[slot.tensor.dtype], "S0": "fp32"}  # which is not read


def _tiled(slot: Slot, own: tuple[Tensor, ...]) -> Options:
    return {**_sampled(slot, own), **alignment(slot, own)}
