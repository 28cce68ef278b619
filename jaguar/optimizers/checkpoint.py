"""Loading optimizer state exactly: torch's own load casts fp32 momentum to the parameter's dtype."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor

from jaguar.params import canonical_name

if TYPE_CHECKING:
    from jaguar.optimizers.base import ZerothOrder


def check_fits(optimizer: ZerothOrder, state_dict: dict[str, Any]) -> None:
    """Raises ValueError with the first difference between the optimizer and a state_dict that is to be loaded."""
    if "jaguar" not in state_dict:
        raise ValueError(
            "this state_dict was not made by a jaguar optimizer: it has no entry 'jaguar' (step counter and seed)"
        )
    saved, own = state_dict["jaguar"]["options"], optimizer._options
    for key in own | saved:
        # 1 and 1.0 are equal, but one is a count of coordinates and the other a fraction.
        if own.get(key) != saved.get(key) or type(own.get(key)) is not type(saved.get(key)):
            raise ValueError(
                f"the state_dict was saved with {key}={saved.get(key)!r}, this optimizer has {key}={own.get(key)!r}"
            )
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if len(groups) != len(saved_groups):
        raise ValueError(f"the state_dict has {len(saved_groups)} parameter groups, this optimizer has {len(groups)}")
    for i, (group, other) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(other["params"]):
            raise ValueError(
                f"parameter group {i} of the state_dict has {len(other['params'])} tensors, this optimizer's "
                f"{len(group['params'])}"
            )
        names, other_names = (g.get("param_names") or ["(unnamed)"] * len(g["params"]) for g in (group, other))
        for name, other_name in zip(names, other_names, strict=True):
            if canonical_name(name) != canonical_name(other_name):
                raise ValueError(
                    f"parameter group {i} of the state_dict has {other_name!r} where this optimizer has {name!r}"
                )


def exact_state(optimizer: ZerothOrder, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
    """The saved state by parameter, in the saved dtypes, on the parameters' devices.

    Raises:
        ValueError: a saved tensor does not have its parameter's shape.
    """
    tensors = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    state = {}
    for tensor, number in zip(tensors, ids, strict=True):
        values = state_dict["state"].get(number)
        if values is None:
            continue
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape != tensor.shape:
                raise ValueError(
                    f"the saved {key} of parameter {number} has shape {tuple(value.shape)}, the parameter "
                    f"{tuple(tensor.shape)}"
                )
        state[tensor] = {
            key: value.detach().to(tensor.device, copy=True) if isinstance(value, Tensor) else value
            for key, value in values.items()
        }
    return state
