"""An optimizer as text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jaguar.backends import ops
from jaguar.backends.polar import run as polar_run
from jaguar.method.directions import Sparse
from jaguar.method.method import Method
from jaguar.method.orthogonal import Orthogonal, ReleasedOrthogonal
from jaguar.method.params import Slot
from jaguar.method.rule import state_dtype
from jaguar.optimizers.parameter_groups import listed
from jaguar.optimizers.state import buffers_of, copies_of


def shown(
    optimizer: torch.optim.Optimizer, method: Method, slots: Sequence[Slot], n_frozen: int, backend: str, now: str
) -> str:
    """The repr: what an optimizer trains, how, and each group's values.

    Args:
        optimizer: its name and its groups are shown.
        method: what it computes.
        slots: what it trains.
        n_frozen: tensors that were left out.
        backend: what was asked for.
        now: where it stands.
    """
    count, total = (sum(getattr(slot, what) for slot in slots) for what in ("count", "total"))
    here = f"{count:,}" if count == total else f"{count:,} of {total:,}, the part that is here,"
    frozen = f", {n_frozen} frozen tensors left out" if n_frozen else ""
    later = sum(not slot.parameter.requires_grad for slot in slots)
    frozen += f", {later} of them frozen now" if later else ""
    lines = [f"parameters: {len(slots)} tensors, {here} elements{frozen}"]
    lines += _method(optimizer, method, slots)
    lines += _matrices(optimizer, method, slots, backend)
    launches = "auto" if backend == "cuda" else backend
    lines += [f"backend: {ops.summary(launches, method, slots, optimizer.param_groups)}, {now}"]
    lines += ["maximizes the loss"] * method.maximize
    if method.step_size is not None:
        lines.append(f"{' and '.join(method.step_size.chosen)} from the losses; the groups have factors")
    lines += [f"padding row {slot.kept} of {slot.name} stays as it is" for slot in slots if slot.kept is not None]
    for i, group in enumerate(optimizer.param_groups):
        # A learning rate may be a tensor of one element.
        values = [f"{key}={float(group[key]):g}" for key in method.keys]
        values += [f"{key}={group[key]}" for key in method.rule.flags if key in group]
        lines.append(f"group {i}: {len(group['params'])} tensors, {', '.join(values)}")
    return f"{type(optimizer).__name__}(\n  " + "\n  ".join(lines) + "\n)"


def _method(optimizer: torch.optim.Optimizer, method: Method, slots: Sequence[Slot]) -> list[str]:
    """Lines about the parts of a method, its cost and its state."""
    trained = [slot for slot in slots if slot.parameter.requires_grad]
    fraction = method.direction.fraction(sum(slot.total for slot in trained))
    sparse, estimator = isinstance(method.direction, Sparse), method.estimator
    how = f", update {method.rule.update}" if sparse else ", restored by a walk" if method.walk else ""
    precision = "parameter precision" if method.momentum_dtype is None else str(method.momentum_dtype)
    held = sum(
        slot.count * state_dtype(slot.tensor.dtype, buffer, method.momentum_dtype).itemsize
        for slot, own in zip(slots, buffers_of(method, slots, optimizer.param_groups), strict=True)
        for buffer in own
        if buffer.lasting
    )
    held += sum(
        len(names) * slot.count * slot.tensor.element_size()
        for slot, names in zip(slots, copies_of(method, slots, optimizer.param_groups), strict=True)
    )
    count = max(1, sum(slot.count for slot in slots))
    passes = estimator.evaluations([0.0] * estimator.n_losses)
    clip = "" if estimator.rho_clip is None else f", |rho| at most {estimator.rho_clip:g}"
    return [
        f"{method.direction.shown(trained)}{how}",
        *method.rule.shown(optimizer.param_groups, fraction, precision),
        f"estimator: {estimator.name}, {estimator.n_directions} direction(s), rounding {method.rounding}{clip}",
        f"evaluations per step: {passes}, state: {held / count:.4g} bytes per parameter",
    ]


def _matrices(optimizer: torch.optim.Optimizer, method: Method, slots: Sequence[Slot], backend: str) -> list[str]:
    rule, groups = method.rule, optimizer.param_groups
    if isinstance(rule, ReleasedOrthogonal):
        return ["all tensors: the closed form of the released code's ten quintic steps"]
    if not isinstance(rule, Orthogonal):
        return []
    matrices = [slot for slot in slots if rule.is_matrix(slot, groups[slot.group])]
    names = [polar_run.assigned(backend, s.tensor, rule.steps, rule.ns_dtype) for s in matrices]
    how = f"{rule.ns_coefficients}, {rule.steps} steps, {rule.ns_dtype}"
    how += "" if rule.adjust_lr is None else f", lr adjusted as {rule.adjust_lr}"
    turns = f", each in 1 of {rule.ns_period} steps" if rule.ns_period > 1 else ""
    return [
        f"Newton-Schulz: {how}{turns}, on {' and '.join(dict.fromkeys(names)) or 'nothing'}",
        f"  moves {listed(matrices)}",
        f"  the sign rule moves {listed([s for s in slots if not rule.is_matrix(s, groups[s.group])])}",
    ]
