"""The step along given matrices in a Triton kernel; `jaguar.reference.matrix` defines what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from jaguar.fused.plan import Cut, Key, Numbers, Plan, alignment
from jaguar.params import Slot
from jaguar.rng import Draw, Purpose
from jaguar.rules import Scalars
from jaguar.triton_kernels import matrix as kernels
from jaguar.triton_kernels import tables as T
from jaguar.triton_kernels.launch import BLOCK, TILE, launch

# The table's entries that matter to other launches only: strata, lanes, saved values.
_COMMON = (0, 0, 0, 0)


class MatrixSteps:
    """x <- (1 - lr wd) x - lr O: one launch for every batch of matrices.

    Args:
        stochastic: round stochastically where storage is narrower than fp32.
    """

    def __init__(self, stochastic: bool) -> None:
        self._stochastic = stochastic
        self._made: dict[tuple[tuple[int, int], ...], tuple[Plan, Numbers]] = {}

    def move_(self, slots: Sequence[Slot], factors: Sequence[Tensor], scalars: Sequence[Scalars], draw: Draw) -> None:
        """One step; a contiguous matrix and a Scalars per slot."""
        plan, numbers = self._of(slots)
        work = plan.launch(BLOCK, [o.view(s.tensor.shape) for s, o in zip(slots, factors, strict=True)], _key, True)
        # Without the derivatives, of which there are as many as directions: this launch reads decay and lr only.
        numbers.write([draw], [replace(s, rho=(), entry=()) for s in scalars])
        for table in work.tables:
            o_format, hint, grouped = table.key[2:]
            launch(
                kernels.along,
                table.programs.shape[0],
                *numbers.arguments(table),
                X_FORMAT=T.FORMATS[table.pool[1]],
                O_FORMAT=o_format,
                STOCHASTIC=self._stochastic,
                HINT=hint,
                GROUPED=grouped,
                BLOCK=BLOCK,
                TILE=TILE,
            )
        work.done()

    def _of(self, slots: Sequence[Slot]) -> tuple[Plan, Numbers]:
        """Tables are kept for every batch: the same ones come back at every step (or every `ns_period`)."""
        key = tuple((slot.tensor.data_ptr(), slot.start) for slot in slots)
        if key not in self._made:
            plan = Plan(slots, [Cut(0, 0)] * len(slots), 1, _COMMON)
            self._made[key] = plan, Numbers(slots, 1, (Purpose.ROUND,))
        return self._made[key]


def _key(slot: Slot, factor: Tensor | None) -> Key:
    assert factor is not None
    return (T.FORMATS[factor.dtype], *alignment(slot, factor))
