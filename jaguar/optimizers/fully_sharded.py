"""Modules of FSDP2: unsharded copies of their parameters must not outlive a change of the shards.

`fully_shard` drops a module's unsharded parameters in the backward pass, which never comes here, unless it was told
`reshard_after_forward=True`; the root module keeps them by default. Later forward passes would go on with the copies of
the first one: a derivative of 0, or of a part of the model.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jaguar.backends.launches import Lost
from jaguar.method.distributed import is_spread, processes_of
from jaguar.method.params import Slot


class FullySharded:
    """The FSDP2 modules of some trained tensors.

    Args:
        slots: the tensors.

    Raises:
        ValueError: one of them is an unsharded copy, which the next forward pass makes anew.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._modules: list[Any] = []
        names = {id(slot.parameter): slot.name for slot in slots}
        any_spread = any(slot.spread is not None for slot in slots)
        for module in _alive():
            before = [id(p) for p in _own(module) if id(p) in names]
            if not before and not any_spread:
                continue
            module.reshard()  # else it may show its copies instead of what the optimizer has
            after = {id(p): p for p in _own(module) if id(p) in names}
            if gone := [key for key in before if key not in after]:
                raise ValueError(
                    f"{names[gone[0]]} is a copy that FSDP2 gathered for a forward pass, and drops again: call "
                    "reshard() on every FSDPModule before model.named_parameters()"
                )
            if any(is_spread(p) for p in after.values()):
                self._modules.append(module)

    def reshard(self) -> None:
        """Drops the unsharded copies, so that the next forward pass gathers what the shards hold."""
        for module in self._modules:
            module.reshard()


def _alive() -> list[Any]:
    """The FSDP2 modules of this process: the optimizer has tensors only."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds: set[Any] = set(fsdp.FSDPModule.__subclasses__() if fsdp is not None else ())
    return [found for found in gc.get_referrers(*kinds) if type(found) in kinds] if kinds else []


def _own(module: nn.Module) -> Iterator[Tensor]:
    """Its parameters and those of the modules inside, but for the modules that are sharded on their own."""
    yield from (p for p in module._parameters.values() if p is not None)
    for child in module.children():
        if not isinstance(child, sys.modules["torch.distributed.fsdp"].FSDPModule):
            yield from _own(child)


def all_lost(lost: Sequence[Lost], slots: Sequence[Slot]) -> list[Lost]:
    """The counts of all processes that hold parts of these tensors: integers, whose sums have no order."""
    counts = {one.name: (one.lost, one.perturbed) for one in lost}
    by_group: dict[Any, list[Slot]] = {}
    for slot in slots:
        for group in processes_of(slot.spread) if slot.spread is not None and slot.name in counts else ():
            by_group.setdefault(group, []).append(slot)
    for group, members in by_group.items():
        sent = torch.tensor([counts[slot.name] for slot in members], device=members[0].tensor.device)
        torch.distributed.all_reduce(sent, group=group)
        counts |= {slot.name: (int(a), int(b)) for slot, (a, b) in zip(members, sent.tolist(), strict=True)}
    return [Lost(name, *found) for name, found in counts.items()]
