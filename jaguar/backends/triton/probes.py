"""Probes of kernels: two ways to move all tensors of some launches along a direction and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from jaguar.backends.triton.plan import Launch, Table

# move(job, table, factor): one launch, by factor tau e.
Move: TypeAlias = Callable[[str, Table, float], None]
# The tables of tensors as they are now: a closure may have moved one.
Work: TypeAlias = Callable[[], Launch]


class SavedProbe:
    """Saves values with its first move; the moves after that, and the way back, begin at what was saved.

    Args:
        work: the tables.
        first: the job that saves and moves.
        move: launches a job.
        release: lets go of the buffers of saved values.
        last: no other probe of the step will use them.

    Attributes:
        moved: there is something to restore.
    """

    def __init__(self, work: Work, first: str, move: Move, release: Callable[[], None], last: bool) -> None:
        self._work, self._first, self._move, self._release, self._last = work, first, move, release, last
        self.moved = False

    def to(self, scale: float) -> None:
        """x <- x + scale tau e."""
        if self.moved:
            self._launch("flip", scale)
        else:
            self._launch(self._first, scale)
            self.moved = True

    def finish(self) -> None:
        """x <- what was saved."""
        self._restore()
        if self._last:
            self._release()

    def abort(self) -> None:
        """As `finish`; there will be no other probe."""
        self._restore()
        self._release()

    def forget(self) -> None:
        """Another launch has restored what was saved."""
        self.moved = False

    def _restore(self) -> None:
        if self.moved:
            self._launch("restore", 0.0)
        self.moved = False

    def _launch(self, job: str, scale: float) -> None:
        work, done = self._work(), []
        if job == self._first:
            work.written()  # the first of several moves, of which the last one takes all back
        try:
            for table in work.tables:
                self._move(job, table, scale)
                done.append(table)
        except BaseException:
            if job == self._first:  # what was not saved must not be restored
                for table in done:
                    self._move("restore", table, 0.0)
            raise


class WalkProbe:
    """Walks from point to point and back, each step rounded, as `jaguar.backends.reference.probes.WalkProbe`."""

    def __init__(self, work: Work, move: Move, before: WalkProbe | None) -> None:
        self._work, self._move, self._before = work, move, before
        self._at = 0.0

    @property
    def back(self) -> float:
        """The way back, in units of tau e."""
        return -self._at

    def to(self, scale: float) -> None:
        """x <- x + (scale - where it is) tau e, after the walk back of the direction before."""
        if self._before is not None:
            self._before.abort()
        self._walk(scale)

    def finish(self) -> None:
        """Nothing: the parameters stay moved."""

    def abort(self) -> None:
        """Back to where it began, but for the roundings."""
        self._walk(0.0)

    def _walk(self, to: float) -> None:
        if self._at == to:
            return
        work, done = self._work(), []
        work.written()
        try:
            for table in work.tables:
                self._move("walk", table, to - self._at)
                done.append(table)
        except BaseException:
            for table in done:
                self._move("walk", table, self._at - to)
            raise
        self._at = to
