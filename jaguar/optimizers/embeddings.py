"""Facts that `nn.Embedding` and `nn.EmbeddingBag` have about their tables: an optimizer gets tensors, not modules."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

from torch import nn

from jaguar.method.params import Shard, Slot, build_slots, identity

# Names that a table may have; looking for the modules of a tensor takes a tenth of a second.
_TABLE = re.compile(r"#\d+|(?:.*\.)?[^.]*(?:weight|emb)[^.]*", re.IGNORECASE)


def slots_of(
    groups: list[dict[str, Any]], known: Sequence[Slot], shards: Mapping[str, Shard] | None = None
) -> list[Slot]:
    """The slots of parameter groups, those of embeddings with the row that stays as it is.

    A row of `padding_idx` has no gradient through its embedding, so it is neither perturbed nor moved nor decayed nor
    entered in momentum: it stays bit-identical (`torch.optim` decays it). Where another module has the same tensor (a
    tied output head, an embedding without `padding_idx`), the row has a gradient through that one, and trains.

    Args:
        groups: torch's.
        known: slots of tensors whose modules were looked for before.
        shards: as `build_slots`.

    Raises:
        ValueError: a table has `max_norm`, or as `build_slots`.
    """
    rows = {slot.parameter: slot.kept for slot in known}
    slots = [
        replace(s, kept=rows[s.parameter]) if rows.get(s.parameter) is not None else s
        for s in build_slots(groups, shards)
    ]
    tables = {
        identity(slot.parameter): slot
        for slot in slots
        if slot.parameter not in rows
        and isinstance(slot.parameter, nn.Parameter)
        and slot.tensor.dim() == 2
        and slot.total
        and _TABLE.fullmatch(slot.name)
    }
    # Only an embedding with options has anything to say, and few models have one.
    if not tables or not any(_has_options(e) and any(_held(e, tables)) for e in _embeddings()):
        return slots
    owners: dict[Slot, list[nn.Module]] = {}
    for module in _modules():
        for slot in _held(module, tables):
            owners.setdefault(slot, []).append(module)
    return [replace(slot, kept=_kept_row(slot, owners[slot])) if slot in owners else slot for slot in slots]


def _has_options(embedding: nn.Module) -> bool:
    own = vars(embedding)
    return any(own.get(name) is not None for name in ("padding_idx", "max_norm")) or bool(own.get("scale_grad_by_freq"))


def _held(module: nn.Module, tables: dict[Any, Slot]) -> Iterator[Slot]:
    """The tables among the module's own parameters."""
    for parameter in (vars(module).get("_parameters") or {}).values():
        if parameter is not None and parameter.dim() == 2 and parameter.numel() and not parameter.is_meta:
            slot = tables.get(identity(parameter))
            if slot is not None:
                yield slot


def _embeddings() -> list[nn.Module]:
    """All embeddings of this process, as what refers to their classes: a third of the time of `_modules`."""
    kinds: set[Any] = {nn.Embedding, nn.EmbeddingBag}
    new = list(kinds)
    while new:
        new = [kind for above in new for kind in above.__subclasses__() if kind not in kinds]
        kinds.update(new)
    return [found for found in gc.get_referrers(*kinds) if type(found) in kinds]


def _modules() -> list[nn.Module]:
    """All modules of this process."""
    objects = gc.get_objects()
    kinds = list(map(type, objects))
    wanted = {kind for kind in set(kinds) if issubclass(kind, nn.Module)}
    return list(compress(objects, map(wanted.__contains__, kinds)))


def _kept_row(slot: Slot, owners: Sequence[nn.Module]) -> int | None:
    rows: set[int | None] = set()
    for module in owners:
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            rows.add(None)
            continue
        rows.add(module.padding_idx)
        if module.max_norm is not None:
            raise ValueError(
                f"{slot.name} belongs to an {type(module).__name__} with max_norm={module.max_norm}, which rescales "
                "its rows in place in every forward pass, between the evaluations that are compared: freeze it, or "
                "set max_norm to None and normalise what it returns"
            )
        if module.scale_grad_by_freq:
            warnings.warn(
                f"scale_grad_by_freq of the {type(module).__name__} of {slot.name} has no effect: there are no "
                "gradients to scale",
                stacklevel=5,
            )
    return rows.pop() if len(rows) == 1 else None
