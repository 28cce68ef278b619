"""An optimizer as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaguar import ops

if TYPE_CHECKING:
    from jaguar.optimizers.base import ZerothOrder


def shown(optimizer: ZerothOrder) -> str:
    """What an optimizer trains, how, on which backend, and each group's values."""
    slots, n_frozen = optimizer._slots, optimizer._n_frozen
    count = sum(slot.count for slot in slots)
    backend = ops.summary(optimizer._backend, slots, optimizer._direction, optimizer._n_directions)
    frozen = f", {n_frozen} frozen tensors left out" if n_frozen else ""
    later = sum(not slot.tensor.requires_grad for slot in slots)
    frozen += f", {later} of them frozen now" if later else ""
    lines = [f"parameters: {len(slots)} tensors, {count:,} elements{frozen}", *optimizer._describe()]
    lines += [
        f"backend: {backend}, seed: {optimizer._seed}, steps done: {optimizer.steps_done}, "
        f"skipped: {optimizer.n_skipped}"
    ]
    lines += ["maximizes the loss"] * optimizer._maximize
    lines += [f"padding row {slot.kept} of {slot.name} stays as it is" for slot in slots if slot.kept is not None]
    for i, group in enumerate(optimizer.param_groups):
        # A learning rate may be a tensor of one element.
        values = [f"{key}={float(group[key]):g}" for key in optimizer.group_keys]
        values += [f"{key}={group[key]}" for key in optimizer.group_flags if key in group]
        lines.append(f"group {i}: {len(group['params'])} tensors, {', '.join(values)}")
    return f"{type(optimizer).__name__}(\n  " + "\n  ".join(lines) + "\n)"
