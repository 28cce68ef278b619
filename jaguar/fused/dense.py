"""Launches of dense directions in Triton kernels; `jaguar.reference.dense` defines what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from jaguar.directions import Gaussian, Rademacher
from jaguar.estimators import Probe
from jaguar.fused.plan import Cut, Key, Launch, Numbers, Plan, Pool, Table, alignment
from jaguar.launches import Lost
from jaguar.params import Slot
from jaguar.reference.probes import ModuleProbe
from jaguar.rng import Draw, Purpose
from jaguar.rules import Scalars
from jaguar.triton_kernels import dense as kernels
from jaguar.triton_kernels import tables as T
from jaguar.triton_kernels.launch import BLOCK, dense_tile, launch


class DenseSteps:
    """Dense directions with the SGD or the sign rule: z is made in registers, and one launch moves all tensors.

    Args:
        slots: the tensors, contiguous, on GPUs or under the interpreter.
        direction: Gaussian or Rademacher.
        restore: "copy": from copies of all trained tensors; "module": perturb and restore one module at a time while
            it runs; "walk": step back, which rounds differently and leaves a drift that `update_` reproduces.
        rule: "sgd" or "sign".
        stochastic: round updates stochastically where storage is narrower than fp32.
        two_sided: the estimator visits x - tau e besides x + tau e.
        n_directions: directions per step.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        direction: Gaussian | Rademacher,
        *,
        restore: str,
        rule: str,
        stochastic: bool,
        two_sided: bool,
        n_directions: int,
    ) -> None:
        self._slots, self._restore, self._rule, self._two_sided = slots, restore, rule, two_sided
        self._plan = Plan(slots, [Cut(0, slot.count) for slot in slots], n_directions, (0, 0, 0, 0))
        self._numbers = Numbers(slots, n_directions, (Purpose.DIRECTION, Purpose.ROUND, Purpose.ROUND_STATE))
        self._distribution, self._stochastic = direction.name, stochastic
        self.takes_back = restore != "module"
        self.wrote = False

    def n_perturbed(self, draw: Draw) -> int:
        """Number of perturbed coordinates."""
        return sum(slot.count for slot in self._slots)

    def probes(self, draws: Sequence[Draw], taus: Sequence[float]) -> list[Probe]:
        """What moves the parameters along each direction and back; `taus` has one length per slot."""
        probes: list[Probe] = []
        walk: WalkProbe | None = None
        for draw in draws:
            if self._restore == "walk":
                walk = WalkProbe(self, draw, taus, before=walk)
                probes.append(walk)
            elif self._restore == "copy":
                probes.append(CopyProbe(self, draw, taus))
            else:
                lengths = dict(zip(self._slots, taus, strict=True))
                probes.append(ModuleProbe(self._slots, taus, partial(self._move_one_, draw=draw, taus=lengths)))
        return probes

    def lost(self, draw: Draw, taus: Sequence[float]) -> list[Lost]:
        """The perturbations that rounding swallows, per tensor."""
        self.begin(draw, taus)
        report = [Lost(slot.name, 0, slot.count) for slot in self._slots]
        for table in self._moving().tables:
            counts = torch.zeros(len(table.members), dtype=torch.int64, device=table.device)
            self._launch_move(table, "lost", counts=counts)
            for i, lost in zip(table.members, counts.tolist(), strict=True):
                report[i] = Lost(self._slots[i].name, lost, self._slots[i].count)
        return report

    def begin(self, draw: Draw, taus: Sequence[float]) -> None:
        """Writes the numbers that `move_` reads."""
        self._numbers.write([draw], taus=taus)

    def save_(self, saved: dict[Pool, Tensor]) -> None:
        """Copies x to `saved` and x <- x + tau e, in one launch per table."""
        done = []
        try:
            for table in self._moving().tables:
                if table.pool not in saved:
                    saved[table.pool] = self._plan.saved(table.pool)
                self._launch_move(table, "save", 1.0, saved[table.pool])
                done.append(table)
        except BaseException:  # what was not copied must not be restored
            for table in done:
                self._launch_move(table, "restore", 0.0, saved[table.pool])
            saved.clear()
            raise
        self._moving().done()

    def from_saved_(self, job: str, saved: dict[Pool, Tensor]) -> None:
        """x <- what was saved - tau e ("flip"), x <- what was saved ("restore")."""
        for table in self._moving().tables:
            self._launch_move(table, job, -1.0, saved[table.pool])
        self._moving().done()

    def walk_(self, at: dict[Key, float], to: float) -> None:
        """x <- x + (to - at) tau e; `at` says where the tensors of each table are, in units of tau e."""
        for table in self._moving().tables:
            if at.get(table.key, 0.0) != to:
                self._launch_move(table, "walk", to - at.get(table.key, 0.0))
                at[table.key] = to
        self._moving().done()

    def update_(
        self,
        draws: Sequence[Draw],
        scalars: Sequence[Scalars],
        momenta: Sequence[Tensor | None],
        held: Probe | None = None,
    ) -> None:
        """g = mean over directions of rho e, in order; heavy ball where there is momentum; the rule.

        Takes back what `held` left moved in the same launch.
        """
        job, factor = "plain", 0.0
        saved: dict[Pool, Tensor] = {}
        if isinstance(held, CopyProbe):
            job, saved = "saved", held.saved
        elif isinstance(held, WalkProbe):
            job, factor = "walked", held.back
        self.wrote = False
        work = self._updating(momenta)
        self._numbers.write(draws, scalars)
        for table in work.tables:
            m_format, hint, grouped = table.key[2:]
            launch(
                kernels.step,
                table.programs.shape[0],
                *self._numbers.arguments(table),
                saved.get(table.pool, table.geometry),
                factor,
                JOB=job,
                RULE=self._rule,
                SEVERAL=len(draws) > 1,
                X_FORMAT=T.FORMATS[table.pool[1]],
                M_FORMAT=m_format,
                DISTRIBUTION=self._distribution,
                STOCHASTIC=self._stochastic,
                HINT=hint,
                GROUPED=grouped,
                BLOCK=BLOCK,
                TILE=dense_tile("step", self._distribution, grouped, len(draws) > 1),
            )
            self.wrote = True
        saved.clear()
        work.done()

    def check(self, momenta: Sequence[Tensor | None]) -> None:
        """Looks at all tensors again; raises RuntimeError for those that kernels cannot be given."""
        self._plan.forget()
        self._updating(momenta)

    def _moving(self) -> Launch:
        return self._plan.launch(BLOCK, compiled_for=alignment, tiles=True)

    def _updating(self, momenta: Sequence[Tensor | None]) -> Launch:
        return self._plan.launch(BLOCK, momenta, _stored, tiles=True)

    def _launch_move(
        self,
        table: Table,
        job: str,
        factor: float = 1.0,
        saved: Tensor | None = None,
        counts: Tensor | None = None,
        part: tuple[int, int] | None = None,
    ) -> None:
        hint, grouped = table.key[2:]
        first, n_programs = part or (0, table.programs.shape[0])
        launch(
            kernels.move,
            n_programs,
            *self._numbers.arguments(table)[:4],
            table.geometry if saved is None else saved,
            table.geometry if counts is None else counts,
            first,
            factor,
            JOB=job,
            FORMAT=T.FORMATS[table.pool[1]],
            DISTRIBUTION=self._distribution,
            TWO_SIDED=self._two_sided,
            HINT=hint,
            GROUPED=grouped,
            BLOCK=BLOCK,
            TILE=dense_tile("move", self._distribution, grouped),
        )

    def _move_one_(self, slot: Slot, scale: float, *, draw: Draw, taus: dict[Slot, float]) -> None:
        """x <- x + scale e for one slot: the programs of that slot alone."""
        self._numbers.write([draw], taus=list(taus.values()))
        for table in self._moving().tables:
            for i, part in zip(table.members, table.ranges, strict=True):
                if self._slots[i] is slot:
                    self._launch_move(table, "walk", scale / taus[slot], part=part)
        torch.autograd.graph.increment_version([] if slot.tensor.is_inference() else [slot.tensor])


class CopyProbe:
    """Restores from a copy of all trained tensors, which the first launch makes on its way."""

    def __init__(self, steps: DenseSteps, draw: Draw, taus: Sequence[float]) -> None:
        self._steps, self._draw, self._taus = steps, draw, taus
        self.saved: dict[Pool, Tensor] = {}

    def plus(self) -> None:
        """x <- x + tau e."""
        self._steps.begin(self._draw, self._taus)
        self._steps.save_(self.saved)

    def minus(self) -> None:
        """x <- x - tau e, from the copies."""
        self._steps.from_saved_("flip", self.saved)

    def finish(self) -> None:
        """x <- the copies."""
        if self.saved:
            self._steps.from_saved_("restore", self.saved)
        self.saved.clear()

    abort = finish


class WalkProbe:
    """Steps +tau, -2 tau and, later, +tau, each rounded, as `jaguar.reference.probes.WalkProbe`."""

    def __init__(self, steps: DenseSteps, draw: Draw, taus: Sequence[float], before: WalkProbe | None) -> None:
        self._steps, self._draw, self._taus, self._before = steps, draw, taus, before
        self._at: dict[Key, float] = {}

    @property
    def back(self) -> float:
        """What takes the parameters back, in units of tau e."""
        return -next(iter(self._at.values()), 0.0)

    def plus(self) -> None:
        """x <- x + tau e, after the walk back of the direction before."""
        if self._before is not None:
            self._before.abort()
        self._walk(1.0)

    def minus(self) -> None:
        """x <- x - 2 tau e."""
        self._walk(-1.0)

    def finish(self) -> None:
        """Nothing: the parameters stay moved."""

    def abort(self) -> None:
        """x <- x + tau e (or x - tau e): back, but for the roundings."""
        self._walk(0.0)

    def _walk(self, to: float) -> None:
        self._steps.begin(self._draw, self._taus)
        self._steps.walk_(self._at, to)


def _stored(slot: Slot, m: Tensor | None) -> Key:
    return ("none" if m is None else T.FORMATS[m.dtype], *alignment(slot, m))
