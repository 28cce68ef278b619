"""Processes that each have a whole model: what they share of a step, and that they agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor

from jaguar.optimizers.base import ZerothOrder
from jaguar.optimizers.fingerprint import fingerprint
from jaguar.trainer.arguments import WHOLE_MODELS, ZOTrainingArguments
from jaguar.trainer.journaling import JournaledTrainer


class ReplicasDiffer(RuntimeError):
    """Processes that should have the same have not."""


class ReplicatedTrainer(JournaledTrainer):
    """A `JournaledTrainer` whose processes take the same steps: of rows that are spread over them, or of directions."""

    @property
    def _shares_directions(self) -> bool:
        return self.args.direction_parallel and self.args.world_size > 1

    def get_train_dataloader(self) -> Any:
        """Trainer's; with `direction_parallel` every process has all rows."""
        loader = super().get_train_dataloader()
        return all_rows(loader) if self._shares_directions else loader

    def get_total_train_batch_size(self, args: Any) -> int:
        """Rows of a step."""
        rows = super().get_total_train_batch_size(args)
        return int(rows * self.args.row_processes // self.args.world_size)

    @property
    def _run_facts(self) -> dict[str, Any]:
        facts = super()._run_facts
        if facts["rows_per_step"] is not None:
            facts["rows_per_step"] = facts["rows_per_step"] * self.args.row_processes // self.args.world_size
        return facts

    def _check_replicas(self, window: Sequence[Any]) -> None:
        """Compares the processes every `check_replicas_steps` steps, and at the end: weights, and rows that are shared.

        Args:
            window: the batches of the step to come; empty: there is none.

        Raises:
            ReplicasDiffer: (in all processes) some have others than most have.
        """
        every = self.args.check_replicas_steps
        if self.args.world_size == 1 or not every or not self._zeroth_order:
            return
        optimizer, device = self.zeroth_order, self.args.device
        if window and optimizer.steps_done % every:
            return
        if window and self._shares_directions:
            entries = [(f"{i}.{key}", value) for i, batch in enumerate(window) for key, value in dict(batch).items()]
            tensors = [(name, value) for name, value in entries if isinstance(value, Tensor)]
            check_equal(tensors, device, "rows", optimizer.steps_done)
        check_equal(((slot.name, slot.tensor) for slot in optimizer.slots), device, "weights", optimizer.steps_done)


def begin_alike(optimizer: ZerothOrder, args: ZOTrainingArguments) -> None:
    """Gives all processes the first one's parameters, as DDP would.

    Raises:
        ValueError: the optimizer shares directions and the trainer rows, or the reverse; or the model is sharded.
    """
    if sharded := [slot.name for slot in optimizer.slots if slot.spread is not None]:
        raise ValueError(f"{sharded[0]} is sharded: {WHOLE_MODELS}")
    if args.world_size == 1:
        return
    if args.direction_parallel != (optimizer.direction_group is not None):
        raise ValueError(
            "the optimizer that was handed over has no direction_group, and direction_parallel needs one: give it "
            "direction_group=torch.distributed.group.WORLD"
            if args.direction_parallel
            else "the optimizer that was handed over has a direction_group, whose processes need the same rows: give "
            "direction_parallel=True"
        )
    for slot in optimizer.slots:
        dist.broadcast(slot.tensor, 0)


def all_rows(loader: Any) -> Any:
    """A data loader of accelerate's that gives every process all batches, in the same order.

    Raises:
        ValueError: it reads a stream, or one process reads for all.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(sampler, BatchSamplerShard):
        raise ValueError(
            "direction_parallel needs a data set with a length, of which every process reads all rows: no stream, and "
            "no dispatch_batches"
        )
    # As Trainer does for samplers that know of processes; and the last batch stays as short as it is.
    sampler.num_processes, sampler.process_index, sampler.even_batches = 1, 0, False
    return loader


def check_equal(named: Iterable[tuple[str, Tensor]], device: torch.device, what: str, step: int) -> None:
    """Compares fingerprints of tensors over all processes: 16 bytes of each.

    Args:
        named: the tensors of this process.
        device: where the processes' group gathers.
        what: the tensors, in words.
        step: number of finished steps, for the message.

    Raises:
        ReplicasDiffer: (in all processes) some have others than most have; without a majority, than the first has.
    """
    own = torch.tensor(list(bytes.fromhex(fingerprint(named))), dtype=torch.uint8, device=device)
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    found = [bytes(row.tolist()) for row in rows]
    if others := disagreeing(found):
        raise ReplicasDiffer(
            f"after {step} steps process {' and '.join(map(str, others))} of {len(found)} had other {what} than the "
            "rest: all must have the same, so the run stops. Resume from an earlier checkpoint; unequal devices, "
            "library versions or numbers of threads may be the cause"
        )


def disagreeing(found: Sequence[bytes]) -> list[int]:
    """The positions of what differs from the majority; where there is none, from the first."""
    usual, count = Counter(found).most_common(1)[0]
    usual = usual if 2 * count > len(found) else found[0]
    return [i for i, one in enumerate(found) if one != usual]
