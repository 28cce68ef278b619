"""Processes that measure a step together: each evaluates its share of the directions, on the same batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import distributed as dist

from jaguar.method.method import Method
from jaguar.method.probe import Probe, Trial


class DirectionGroup:
    """A process group whose processes have the same parameters, state and batch.

    Every process makes the same record, which is that of one process alone: to the bit, where all have the same device,
    library versions and number of threads.

    Args:
        group: a `torch.distributed.ProcessGroup`.
        method: what is measured.

    Raises:
        TypeError: `group` is none.
        ValueError: the method's directions cannot be measured apart; the message says why.
    """

    def __init__(self, group: Any, method: Method) -> None:
        if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"direction_group must be a torch.distributed.ProcessGroup that this process is in, got {group!r}: "
                "torch.distributed.group.WORLD is one of all processes"
            )
        what = (
            "restore='walk', whose parameters drift along all directions of a step"
            if method.walk
            else "an automatic step, which compares the rows of all directions"
            if method.step_size is not None
            else f"the estimator {method.estimator.name!r}, whose evaluations follow from one another"
            if method.estimator.shared is None
            else None
        )
        if what is not None:
            raise ValueError(
                f"direction_group measures the directions of a step apart, not possible with {what}: leave it out"
            )
        self.group, self._estimator = group, method.estimator
        self._rank, self._world = dist.get_rank(group), dist.get_world_size(group)
        self._on_gpu = "nccl" in str(dist.get_backend(group))

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copied optimizer evaluates all directions: the others know nothing of it

    def measured(
        self, evaluate: Callable[[], float], probes: Sequence[Probe], places: Trial, step: int
    ) -> tuple[float, ...]:
        """The losses of a step, of which this process evaluates a share; those of all directions are the first one's.

        Raises:
            RuntimeError: another process failed, or is at another step, or did not come within the group's timeout.
        """
        shares = [self._share(rank, len(probes)) for rank in range(self._world)]
        begin, end = shares[self._rank]
        try:
            own = self._estimator.measure(evaluate, probes[begin:end], False, places)
        except BaseException:
            with suppress(RuntimeError):  # the others wait; what happened here is the error to show
                self._gathered((), step, failed=True)
            raise
        shared = self._estimator.shared or 0
        found = self._gathered(own, step)
        return tuple(found[0][:shared]) + tuple(
            loss
            for losses, (first, last) in zip(found, shares, strict=True)
            for loss in losses[shared : shared + (last - first) * len(self._estimator.points)]
        )

    def _share(self, rank: int, n: int) -> tuple[int, int]:
        """The directions of a process: first, and one past the last; the first process has the larger share."""
        return -(-rank * n // self._world), -(-(rank + 1) * n // self._world)

    def _gathered(self, losses: Sequence[float], step: int, failed: bool = False) -> list[list[float]]:
        """The losses of every process, padded."""
        most = (self._estimator.shared or 0) + -(-self._estimator.n_directions // self._world) * len(
            self._estimator.points
        )
        row = [float(failed), float(step), *losses, *[0.0] * (most - len(losses))]
        device = torch.device("cuda", torch.cuda.current_device()) if self._on_gpu else torch.device("cpu")
        sent = torch.tensor(row, dtype=torch.float64, device=device)
        rows = [torch.empty_like(sent) for _ in range(self._world)]
        dist.all_gather(rows, sent, group=self.group)
        found = [row.tolist() for row in rows]
        for rank, (bad, at, *_) in enumerate(found):
            if bad and not failed:
                raise RuntimeError(f"process {rank} of the direction group failed while it measured step {step}")
            if at != step and not failed:
                raise RuntimeError(
                    f"process {rank} of the direction group is at step {int(at)}, process {self._rank} at step {step}: "
                    "all must take the same steps"
                )
        return [row[2:] for row in found]
