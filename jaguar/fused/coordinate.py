"""JAGUAR's launches in Triton kernels; `jaguar.reference.coordinate` defines what they compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jaguar.directions import Coordinates, ReleasedBlock
from jaguar.estimators import Probe
from jaguar.fused.cuts import cuts_of
from jaguar.fused.plan import Key, Launch, Numbers, Plan, Pool, Table, alignment
from jaguar.launches import Lost
from jaguar.params import Slot
from jaguar.rng import Draw, Purpose
from jaguar.rules import Scalars
from jaguar.triton_kernels import coordinate as kernels
from jaguar.triton_kernels import tables as T
from jaguar.triton_kernels.launch import BLOCK, STRATA, TILE, launch

# What kernels choose places with; listed ones are chosen before.
_CHOICE = {
    "fraction": (Purpose.COORDINATES,),
    "count": (Purpose.COORDINATES,),
    "block": (Purpose.ROWS, Purpose.COLUMNS),
}


class CoordinateSteps:
    """Coordinate directions with JAGUAR's momentum and the sign rule: three launches a step.

    Args:
        slots: the tensors of these launches, in canonical order; contiguous, on GPUs or under the interpreter.
        everything: all tensors of the optimizer, over which a number of coordinates is counted.
        direction: how S is drawn.
        update: "sampled": the sign step moves S; "all": every coordinate.
        stochastic: round updates stochastically where storage is narrower than fp32.
        two_sided: the estimator visits x - tau e besides x + tau e.
        n_directions: directions per step.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        everything: Sequence[Slot],
        direction: Coordinates | ReleasedBlock,
        *,
        update: str,
        stochastic: bool,
        two_sided: bool,
        n_directions: int,
    ) -> None:
        self._slots, self._direction, self._update = slots, direction, update
        layout, cuts, common = cuts_of(slots, everything, direction)
        self._plan = Plan(slots, cuts, n_directions, common)
        self._numbers = Numbers(slots, n_directions, (*_CHOICE.get(layout, ()), Purpose.ROUND, Purpose.ROUND_STATE))
        # At least a lane for each thread: the accesses of a lane that several threads hold are not ordered.
        self._lanes = min(STRATA, max(128, 1 << (common[T.LANES.value] - 1).bit_length()))
        self._options = {"LAYOUT": layout, "ONES": direction.ones, "TWO_SIDED": two_sided, "STOCHASTIC": stochastic}
        share = direction.fraction(sum(slot.total for slot in everything))
        self._n_perturbed = round(share * sum(slot.count for slot in slots))
        # With several directions every entry update needs the parameters as they were before the step.
        self.takes_back = n_directions == 1
        self.wrote = False
        self._listed: dict[tuple[Draw, Pool], Tensor] = {}

    def n_perturbed(self, draw: Draw) -> int:
        """Number of coordinates in S, to within the strata that tensors end in."""
        return self._n_perturbed

    def probes(self, draws: Sequence[Draw], taus: Sequence[float]) -> list[Probe]:
        """What moves the parameters along each direction and back; `taus` has one length per slot."""
        return [CoordinateProbe(self, draw, taus) for draw in draws]

    def lost(self, draw: Draw, taus: Sequence[float]) -> list[Lost]:
        """The perturbations that rounding swallows, per tensor."""
        self._numbers.write([draw], taus=taus)
        report = [Lost(slot.name, 0, 0) for slot in self._slots]
        for table in self._plan.launch(STRATA).tables:
            counts = torch.zeros((len(table.members), 2), dtype=torch.int64, device=table.device)
            self._sparse_("lost", table, [draw], counts=counts)
            for i, (lost, perturbed) in zip(table.members, counts.tolist(), strict=True):
                report[i] = Lost(self._slots[i].name, lost, perturbed)
        return report

    def move_(self, job: str, draw: Draw, saved: dict[Pool, Tensor]) -> None:
        """One launch per table: "perturb" (saves the touched values), "flip" or "restore"."""
        work = self._plan.launch(STRATA)
        for table in work.tables:
            if job == "perturb":
                values = self._plan.saved(table.pool)
                self._sparse_(job, table, [draw], values)
                saved[table.pool] = values  # not before: a launch that failed has nothing to take back
            elif table.pool in saved:
                self._sparse_(job, table, [draw], saved[table.pool])
        work.done()

    def begin(self, draw: Draw, taus: Sequence[float]) -> None:
        """Writes the numbers that `move_` reads."""
        self._numbers.write([draw], taus=taus)

    def update_(
        self,
        draws: Sequence[Draw],
        scalars: Sequence[Scalars],
        momenta: Sequence[Tensor | None],
        held: Probe | None = None,
    ) -> None:
        """Entry updates of every direction in order, then one sign step; restores what `held` left moved."""
        assert held is None or isinstance(held, CoordinateProbe)
        self.wrote = False
        if held is not None and len(draws) > 1:
            held.finish()
        work = self._updating(momenta)
        self._numbers.write(draws, scalars)
        for table in work.tables:
            saved = held.saved.get(table.pool) if held is not None else None
            if self._update == "all":
                self._tiles_(table, draws, saved)
            elif len(draws) > 1:
                self._sparse_("several", table, draws, self._plan.saved(table.pool, len(draws)))
            else:
                self._sparse_("update" if saved is None else "fused", table, draws, saved)
            self.wrote = True
        if held is not None:
            held.saved.clear()
        work.done()
        self._listed.clear()

    def check(self, momenta: Sequence[Tensor | None]) -> None:
        """Looks at all tensors again; raises RuntimeError for those that kernels cannot be given."""
        self._plan.forget()
        if any(m is None for m in momenta):
            self._plan.launch(STRATA)
        else:
            self._updating(momenta)

    def _updating(self, momenta: Sequence[Tensor | None]) -> Launch:
        if self._update == "all":
            return self._plan.launch(BLOCK, momenta, _aligned, tiles=True)
        return self._plan.launch(STRATA, momenta, _stored)

    def _sparse_(
        self, job: str, table: Table, draws: Sequence[Draw], saved: Tensor | None = None, counts: Tensor | None = None
    ) -> None:
        listed = self._listing(draws, table)
        launch(
            kernels.sparse,
            table.programs.shape[0],
            *self._numbers.arguments(table),
            listed,
            table.geometry if saved is None else saved,
            table.geometry if counts is None else counts,
            JOB=job,
            X_FORMAT=T.FORMATS[table.pool[1]],
            M_FORMAT=table.key[2] if len(table.key) > 2 else "fp32",
            BLOCK=STRATA,
            **self._options,
        )

    def _tiles_(self, table: Table, draws: Sequence[Draw], saved: Tensor | None) -> None:
        m_format, hint, grouped = table.key[2:]
        launch(
            kernels.tiles,
            table.programs.shape[0],
            *self._numbers.arguments(table),
            self._listing(draws, table),
            table.geometry if saved is None else saved,
            RESTORE=saved is not None,
            SEVERAL=len(draws) > 1,
            X_FORMAT=T.FORMATS[table.pool[1]],
            M_FORMAT=m_format,
            HINT=hint,
            GROUPED=grouped,
            BLOCK=BLOCK,
            TILE=TILE,
            LANES=self._lanes,
            **self._options,
        )

    def _listing(self, draws: Sequence[Draw], table: Table) -> Tensor:
        """The drawn indices of the released code's block; of the other layouts kernels draw for themselves."""
        if not isinstance(self._direction, ReleasedBlock):
            return table.geometry
        (draw,) = draws
        if (draw, table.pool) not in self._listed:
            indices = [index for index, _ in self._direction.sample(draw, self._slots)]
            self._listed[draw, table.pool] = self._plan.listing(table.pool, indices)
        return self._listed[draw, table.pool]


class CoordinateProbe:
    """Saves the touched values and writes x + tau s, then x - tau s, then what was saved: one launch each."""

    def __init__(self, steps: CoordinateSteps, draw: Draw, taus: Sequence[float]) -> None:
        self._steps, self._draw, self._taus = steps, draw, taus
        self.saved: dict[Pool, Tensor] = {}

    def plus(self) -> None:
        """x_S <- x_S + tau s."""
        self._steps.begin(self._draw, self._taus)
        self._steps.move_("perturb", self._draw, self.saved)

    def minus(self) -> None:
        """x_S <- x_S - tau s, from the saved values."""
        self._steps.move_("flip", self._draw, self.saved)

    def finish(self) -> None:
        """x_S <- the saved values; tensors that a failed `plus` did not reach have none."""
        self._steps.move_("restore", self._draw, self.saved)
        self.saved.clear()

    abort = finish


def _stored(slot: Slot, m: Tensor | None) -> Key:
    assert m is not None
    return (T.FORMATS[m.dtype],)


def _aligned(slot: Slot, m: Tensor | None) -> Key:
    return (*_stored(slot, m), *alignment(slot, m))
