"""An optimizer as text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jaguar.params import Slot


def shown(
    optimizer: torch.optim.Optimizer,
    numbers: Sequence[str],
    flags: Sequence[str],
    slots: Sequence[Slot],
    n_frozen: int,
    how: Sequence[str],
) -> str:
    """What an optimizer trains, how, and each group's values.

    Args:
        optimizer: its name and its groups are shown.
        numbers: keys of the groups that have a number.
        flags: further keys, which a group may have.
        slots: what it trains.
        n_frozen: tensors that were left out.
        how: lines between those of the tensors and those of the groups.
    """
    count = sum(slot.count for slot in slots)
    frozen = f", {n_frozen} frozen tensors left out" if n_frozen else ""
    later = sum(not slot.tensor.requires_grad for slot in slots)
    frozen += f", {later} of them frozen now" if later else ""
    lines = [f"parameters: {len(slots)} tensors, {count:,} elements{frozen}", *how]
    lines += [f"padding row {slot.kept} of {slot.name} stays as it is" for slot in slots if slot.kept is not None]
    for i, group in enumerate(optimizer.param_groups):
        # A learning rate may be a tensor of one element.
        values = [f"{key}={float(group[key]):g}" for key in numbers]
        values += [f"{key}={group[key]}" for key in flags if key in group]
        lines.append(f"group {i}: {len(group['params'])} tensors, {', '.join(values)}")
    return f"{type(optimizer).__name__}(\n  " + "\n  ".join(lines) + "\n)"
