"""Groups that share a step's directions, beside one process that evaluates all: what the processes of a test do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from datetime import timedelta
from time import monotonic
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers.fully_sharded import said
from helpers.laws import make
from helpers.tensors import all_bits, state_bits, weights
from jaguar import ZOSGD, AccZOM, DiZO, ForwardGrad, JaguarSignSGD, ZerothOrder, ZOSGDCons
from jaguar.optimizers.direction_group import DirectionGroup

# Seconds that a group waits for a process that does not come.
PATIENCE = 3
CONFIGS = {
    "fraction": {},
    "count": {"estimator": "one-sided"},
    "all": {},
    "rademacher-copy": {},
    "rademacher-module": {},
    "muon": {},
    "signs": {},
    "fzoo": {},
    "zo-muon": {"estimator": "one-sided"},
    "adam": {},
    "composed": {},
}


class Model(nn.Module):
    """Counts its evaluations, has dropout, and may fail or return what is not finite in one of them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.p0, self.p1 = (nn.Parameter(weights(dtype, *shape, seed=i)) for i, shape in enumerate([(9, 7), (11,)]))
        self.log: Any = Log()

    def forward(self) -> Tensor:
        self.log.calls += 1
        if self.log.calls == self.log.fails_at:
            raise ZeroDivisionError("this evaluation fails")
        x = torch.cat([p.float().reshape(-1) for p in self.parameters()])
        loss = (nn.functional.dropout(x, 0.3) - torch.linspace(-1, 1, x.numel())).square().sum()
        return loss * (float("nan") if self.log.calls == self.log.nan_at else 1.0)


class Log:
    """Outside the state of the module, which evaluations leave as it was."""

    calls = 0
    fails_at = nan_at = -1

    def __deepcopy__(self, memo: Any) -> Log:
        return Log()


def entirely(optimizer: ZerothOrder, model: Model) -> Any:
    params = list(model.parameters())
    return all_bits(params), state_bits(optimizer, params), optimizer.last_record, optimizer.n_skipped


def differences(config: str, k: int, group: Any, dtype: torch.dtype) -> list[Any]:
    """Where three steps of the group are not those of one process, and what each process evaluates."""
    alone, together = Model(dtype), Model(dtype)
    more = CONFIGS[config] | ({} if config == "fzoo" and k == 1 else {"n_directions": k})
    one = make(config, alone.named_parameters(), backend="reference", **more)
    other = make(config, together.named_parameters(), backend="reference", direction_group=group, **more)
    for _ in range(3):
        one.step(alone)
        other.step(together)
        if entirely(one, alone) != entirely(other, together):
            return [one.last_record, other.last_record]
    estimator, world, rank = one.method.estimator, dist.get_world_size(group), dist.get_rank(group)
    n = estimator.n_directions
    mine = len(range(n)[-(-rank * n // world) : -(-(rank + 1) * n // world)])
    wanted = 3 * (estimator.shared + mine * len(estimator.points))
    return [] if together.log.calls == wanted else [together.log.calls, wanted]


def other_bits(rank: int) -> bytes:
    """The record where every process finds another f(x), as other devices do in the last bits."""
    model = Model(torch.float32)
    named, group = model.named_parameters(), dist.group.WORLD
    optimizer = ZOSGD(named, estimator="one-sided", n_directions=3, direction_group=group, backend="reference")
    return optimizer.measure(lambda: model() + rank).pack()


def out_of_order() -> list[Any]:
    """`differences`, with shares that are put together in another order."""
    real = DirectionGroup._share

    def reversed_(self: DirectionGroup, rank: int, n: int) -> tuple[int, int]:
        return real(self, dist.get_world_size() - 1 - rank, n)

    with patch.object(DirectionGroup, "_share", reversed_):
        return differences("fraction", 3, dist.group.WORLD, torch.float32)


def skipped(rank: int) -> list[Any]:
    """A loss that is not finite in one process, and its steps after that."""
    model = Model(torch.float32)
    optimizer = JaguarSignSGD(
        model.named_parameters(), n_directions=3, coordinates=0.5, direction_group=dist.group.WORLD, backend="reference"
    )
    start = all_bits(list(model.parameters()))
    model.log.nan_at = 1 if rank == 1 else -1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step(model)
    stayed = all_bits(list(model.parameters())) == start
    optimizer.step(model)
    return [stayed, optimizer.n_skipped, optimizer.last_record.pack(), all_bits(list(model.parameters()))]


def failed(rank: int) -> list[Any]:
    """What every process says when the closure of the second one fails, and whether all go on after it."""
    model = Model(torch.bfloat16)
    optimizer = ZOSGD(
        model.named_parameters(), lr=1e-3, n_directions=3, direction_group=dist.group.WORLD, backend="reference"
    )
    start = all_bits(list(model.parameters()))
    model.log.fails_at = 2 if rank == 1 else -1
    try:
        optimizer.step(model)
    except (RuntimeError, ZeroDivisionError) as error:
        words = str(error)
    stayed = all_bits(list(model.parameters())) == start
    optimizer.step(model)
    return [words, stayed, optimizer.last_record.pack(), all_bits(list(model.parameters()))]


def apart(rank: int) -> str:
    """What is said where a process is at another step."""
    model = Model(torch.float32)
    optimizer = ZOSGD(model.named_parameters(), direction_group=dist.group.WORLD, n_directions=3, backend="reference")
    record = optimizer.measure(model)
    if rank == 2:
        optimizer.apply_(record)
    return said(lambda: optimizer.measure(model))


def left_alone(rank: int, group: Any) -> tuple[bool, str, float]:
    """What the others do when the third process does not come: whether they are as before, the error, the seconds."""
    model = Model(torch.float32)
    optimizer = ZOSGD(model.named_parameters(), direction_group=group, n_directions=3, backend="reference")
    start, begun = all_bits(list(model.parameters())), monotonic()
    words = said(lambda: optimizer.step(model)) if rank < 2 else ""
    return all_bits(list(model.parameters())) == start, words, monotonic() - begun


def refused(group: Any) -> dict[str, str]:
    named = list(Model(torch.float32).named_parameters())
    calls: dict[str, Callable[[], Any]] = {
        "walk": lambda: ZOSGD(named, restore="walk", direction_group=group),
        "automatic": lambda: ZOSGD(named, lr="auto", direction_group=group),
        "conservative": lambda: ZOSGDCons(named, direction_group=group),
        "two places": lambda: AccZOM(named, direction_group=group),
        "search": lambda: DiZO(named, project=("p0",), direction_group=group),
        "dual numbers": lambda: ForwardGrad(named, direction_group=group),
    }
    found = {name: said(call) for name, call in calls.items()}
    try:
        ZOSGD(named, direction_group="WORLD")
    except TypeError as error:
        found["no group"] = str(error)
    return found


def cases(rank: int) -> dict[str, Any]:
    """All that three processes find out, the first two also as a pair."""
    warnings.filterwarnings("ignore", "tau is too small")
    pair, short = dist.new_group([0, 1]), dist.new_group(timeout=timedelta(seconds=PATIENCE))
    found: dict[str, Any] = {}
    for group in [dist.group.WORLD, *([pair] if rank < 2 else [])]:
        world = dist.get_world_size(group)
        for i, config in enumerate(CONFIGS):
            for k in (1, 4) if (i + world) % 2 else (2, 5):
                dtype = (torch.float32, torch.bfloat16)[(i + k) % 2]
                found[f"{config} {k} {world}"] = differences(config, k, group, dtype)
    found |= {"other bits": other_bits(rank), "out of order": out_of_order()}
    found |= {"skipped": skipped(rank), "failed": failed(rank), "apart": apart(rank)}
    optimizer = ZOSGD(Model(torch.float32).named_parameters(), direction_group=dist.group.WORLD)
    found["copied"] = copy.deepcopy(optimizer).direction_group is None
    found["refused"] = refused(dist.group.WORLD)
    found["left alone"] = left_alone(rank, short)
    return found
