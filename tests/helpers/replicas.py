"""ZOTrainers in several processes, beside one alone: what the processes of a test do."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers.trainer_callback import TrainerCallback

from helpers.fully_sharded import said
from helpers.tensors import bits
from helpers.trainers import arguments
from jaguar import ZOSGD, Journal, ZOTrainer
from jaguar.record import JOURNAL

STEPS = 200


class Line(nn.Module):
    """A regression, small enough for hundreds of steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = self.down(torch.tanh(self.up(x)))[:, 0]
        return {"loss": (found - labels).square().mean(), "logits": found}


def rows(count: int = 48, seed: int = 0) -> list[dict[str, Any]]:
    values = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return [{"x": row, "labels": float(row.sum())} for row in values]


def trained(
    folder: Path,
    data: list[dict[str, Any]] | None = None,
    steps: int = STEPS,
    optimizer: Any = None,
    callbacks: Any = None,
    **more: Any,
) -> tuple[str, str]:
    """Digests of all records of a run, and of its weights."""
    given = {"per_device_train_batch_size": 4, "n_directions": 3, "learning_rate": 1e-3, "logging_steps": 1000}
    args = arguments(Path(tempfile.mkdtemp(dir=folder)), steps, **given | more)
    model = Line() if optimizer is None else optimizer.model
    data = rows() if data is None else data
    trainer = ZOTrainer(model, args, train_dataset=data, callbacks=callbacks, optimizers=(optimizer, None))
    records = hashlib.sha256()
    trainer.create_optimizer()
    trainer.zeroth_order.register_record_hook(lambda _, record: records.update(record.pack()))
    trainer.train()
    assert trainer.zeroth_order.steps_done == steps
    return records.hexdigest(), hashlib.sha256(b"".join(map(bits, model.parameters()))).hexdigest()


class Damage(TrainerCallback):
    """Changes the last bit of a weight of one process after a step."""

    def __init__(self, rank: int, step: int) -> None:
        self._rank, self._step = rank, step

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if args.process_index == self._rank and state.global_step == self._step:
            weight = others["model"].down.weight.detach().view(torch.int32)
            weight[0, 0] += 1


def handed(shard: bool = False, **more: Any) -> Any:
    """An optimizer that was made before its trainer, and its model."""
    model: Any = fully_shard(Line()) if shard else Line()
    optimizer: Any = ZOSGD(model.named_parameters(), lr=1e-3, **more)
    optimizer.model = model
    return optimizer


# Runs that one process takes as well: arguments of `trained`, and what is more in that process.
FEW_DIRECTIONS = {"data": rows(51), "steps": 30}
MANY_DIRECTIONS = {"data": rows(51), "steps": 20, "n_directions": 5, "gradient_accumulation_steps": 2}


def cases(rank: int, all_: bool) -> dict[str, Any]:
    """What processes find out, each for itself."""
    out, world = Path(tempfile.mkdtemp()), dist.get_world_size()
    found: dict[str, Any] = {
        "rows": trained(out),
        "few directions": trained(out, direction_parallel=True, **FEW_DIRECTIONS),
        "many directions": trained(out, direction_parallel=True, **MANY_DIRECTIONS),
        "noticed": said(lambda: trained(out, steps=9, callbacks=[Damage(world - 1, 3)], check_replicas_steps=2)),
    }
    if not all_:
        return found
    damaged: dict[str, Any] = {"callbacks": [Damage(1, 3)]}
    end = Path(tempfile.mkdtemp())
    return found | {
        "noticed at the end": said(lambda: trained(end, steps=5, **damaged)),
        "ended": [(len(journal), journal.ended) for journal in map(Journal.read, end.rglob(JOURNAL))],
        "not looked": trained(out, steps=9, check_replicas_steps=0, **damaged)[1],
        "other rows": said(lambda: trained(out, rows(seed=rank), direction_parallel=True, steps=3)),
        "sharded": said(lambda: trained(out, optimizer=handed(shard=True))),
        "rows and a group": said(lambda: trained(out, optimizer=handed(direction_group=dist.group.WORLD))),
        "directions and no group": said(lambda: trained(out, optimizer=handed(), direction_parallel=True)),
    }


class Died(Exception):
    """A run that is ended in its middle."""


class Dies(TrainerCallback):
    """Ends the run at the end of a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == self._step:
            raise Died


def going_on(rank: int, folder: str) -> dict[str, Any]:
    """Weights and evaluations of a run that never stopped, and of runs that died and went on, in one folder for all."""
    found = {}
    for name, options in (
        ("no checkpoint", {"save_strategy": "no"}),
        ("checkpoint", {"save_strategy": "steps", "save_steps": 5}),
        ("directions", {"save_strategy": "no", "direction_parallel": True}),
    ):
        weights, calls = [], []
        for kind in ("whole", "died", "died"):
            args = arguments(Path(folder, name, kind), 12, per_device_train_batch_size=4, n_directions=3, **options)
            model = Line()
            model.register_forward_hook(lambda *_: calls.append(kind))  # noqa: B023
            again = kind == "died" and "died" in calls
            callbacks: Any = [Dies(8)] if kind == "died" and not again else []
            trainer = ZOTrainer(model, args, train_dataset=rows(), callbacks=callbacks)
            before = len(calls)
            try:
                trainer.train(resume_from_checkpoint=again)
            except Died:
                continue
            weights.append(hashlib.sha256(b"".join(map(bits, model.parameters()))).hexdigest())
        found[name] = (weights, len(calls) - before)
    return found
