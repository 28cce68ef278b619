"""Models for whole steps on the Triton backend, and the launches of a step: counted, and their tables changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.kernels import MOMENTUM
from helpers.tensors import FORMS, Bag, all_bits, state_bits
from jaguar.backends.triton.plan import Plan, Table
from jaguar.triton_kernels import tables as T
from jaguar.triton_kernels.launch import around


def bag_of(*dtypes: torch.dtype) -> Bag:
    """Parameters of some contiguous forms and every dtype."""
    return Bag([FORMS[form](dtype) for dtype in dtypes for form in ("contiguous", "empty", "cube")])


def parameters(module: nn.Module) -> list[Tensor]:
    return list(module.parameters())


def everything(module: nn.Module, optimizer: Any) -> tuple[list[bytes], list[bytes]]:
    return all_bits(parameters(module)), state_bits(optimizer, parameters(module))


@contextmanager
def counted(run: bool) -> Iterator[list[dict[str, Any]]]:
    """What is launched meanwhile, and whether it runs too: kernels' names and compile-time options."""
    seen: list[dict[str, Any]] = []

    def note(name: str, programs: Any, constants: dict[str, Any], launch: Callable[[], None]) -> None:
        seen.append({"name": name, **constants})
        if run:
            launch()

    with around(note):
        yield seen


def jobs(launches: list[dict[str, Any]]) -> list[str]:
    """The jobs since the last call."""
    names = [launch.get("JOB", launch["name"]) for launch in launches]
    launches.clear()
    return names


def edit_tables(monkeypatch: pytest.MonkeyPatch, edit: Callable[[Plan, Table, bool], None]) -> list[Table]:
    """Lets `edit(plan, table, of elements rather than strata)` change every table before a kernel reads it."""
    real, edited = Plan._table, []

    def table(self: Plan, key: Any, options: Any, members: Any, state: Any, block: int, tiles: bool) -> Table:
        edited.append(real(self, key, options, members, state, block, tiles))
        edit(self, edited[-1], tiles)
        return edited[-1]

    monkeypatch.setattr(Plan, "_table", table)
    return edited


def as_the_end(
    plan: Plan, table: Table, tiles: bool, momentum: str, first: dict[str, int] | None = None, dense: bool = False
) -> None:
    """For `edit_tables`: shards become the ends of tensors that are held from their beginning, of which only the last
    programs run. So kernels address element 2^31 and on, of memory that is not there.

    Args:
        first: by name, the first stratum whose coordinate is in the shard, where the table does not begin there.
    """  # fmt: skip
    for t, i in enumerate(table.members):
        slot, row = plan.slots[i], table.tensors[t]
        dtype = MOMENTUM[momentum](slot.tensor.dtype)
        row[T.COUNT.value] += slot.start
        row[T.X.value] -= slot.start * slot.tensor.itemsize
        row[T.S0.value] -= slot.start * dtype.itemsize if dtype and row[T.S0.value] else 0
        row[T.START.value] -= slot.start
        row[T.ORIGIN.value] -= slot.start
        row[T.SAVED.value] -= slot.start if dense else 0
        mine = table.programs[:, T.TENSOR.value] == t
        if tiles:
            table.programs[mine, T.FIRST.value] += slot.start
        elif first:
            assert int(mine.sum()) == 1
            table.programs[mine, T.FIRST.value] = first[slot.name]
