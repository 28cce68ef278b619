"""The step along given matrices in a Triton kernel; `jaguar.backends.reference.matrix` defines what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from jaguar.backends.launches import StepInputs
from jaguar.backends.triton.device_scalars import DeviceScalars
from jaguar.backends.triton.plan import Cut, Launch, Options, Plan, alignment
from jaguar.backends.uploads import for_replays
from jaguar.method.method import Method
from jaguar.method.params import Slot
from jaguar.triton_kernels import matrix as kernels
from jaguar.triton_kernels import tables as T
from jaguar.triton_kernels.launch import BLOCK, TILE, launch

# The table's entries that matter to other launches only: strata, lanes, saved values.
_COMMON = (0, 0, 0, 0)

# Where tensors lie, and as what.
_Places: TypeAlias = tuple[tuple[int, torch.dtype, int], ...]


class MatrixLaunches:
    """x <- (1 - lr wd) x - lr O: one launch for every batch of matrices; scalars by kind, noise of the first direction.

    Args:
        method: how values are rounded.
        numbers: a step's numbers, filled for these and other launches.
    """

    def __init__(self, method: Method, numbers: DeviceScalars) -> None:
        self._numbers = numbers
        self._common = {"STOCHASTIC": method.stochastic, "BLOCK": BLOCK, "TILE": TILE}
        self._made: dict[_Places, tuple[_Places, Launch]] = {}

    def move_(self, slots: Sequence[Slot], factors: Sequence[Tensor], inputs: StepInputs) -> None:
        """One step; a contiguous matrix per slot."""
        work = self._work(slots, factors)
        for table in work.tables:
            keys, scalars = self._numbers.keys(table.device), self._numbers.scalars(table.device)
            options: dict[str, Any] = table.options | self._common
            for_replays(table.device, table, self._numbers)
            launch(kernels.along, table.programs.shape[0], table.tensors, table.programs, keys, scalars,
                   table.geometry, **options)  # fmt: skip
        work.written()

    def _work(self, slots: Sequence[Slot], factors: Sequence[Tensor]) -> Launch:
        """Tables are kept for every batch: the same ones come back at every step (or every `ns_period`)."""
        batch = tuple((slot.tensor.data_ptr(), slot.tensor.dtype, slot.start) for slot in slots)
        given = tuple((factor.data_ptr(), factor.dtype, 0) for factor in factors)
        if batch not in self._made or self._made[batch][0] != given:
            plan = Plan(slots, [Cut(0, 0)] * len(slots), _COMMON, self._numbers)
            state = [(o.view(slot.tensor.shape),) for slot, o in zip(slots, factors, strict=True)]
            plan.check(state)
            # The factors are not written to, and must not be kept: their memory is that of the next ones.
            self._made[batch] = given, replace(plan.launch(BLOCK, state, _options, tiles=True), state=[])
        return self._made[batch][1]


def _options(slot: Slot, own: tuple[Tensor, ...]) -> Options:
    (factor,) = own
    formats = {"X_FORMAT": T.FORMATS[slot.tensor.dtype], "O_FORMAT": T.FORMATS[factor.dtype]}
    return formats | alignment(slot, own)
