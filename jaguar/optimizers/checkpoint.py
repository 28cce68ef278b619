"""Saving and loading optimizer state exactly: torch's own load casts fp32 momentum to the parameter's dtype."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor

from jaguar.params import canonical_name

if TYPE_CHECKING:
    from jaguar.optimizers.base import ZerothOrder


# Options that earlier versions did not have, and what they did.
_SINCE = {"maximize": False}


def packed(optimizer: ZerothOrder, state: dict[str, Any]) -> dict[str, Any]:
    """Torch's state_dict with the optimizer's own part, and with numbers that load with weights_only=True."""
    for group in state["param_groups"]:
        for key in (*optimizer.group_keys, "initial_lr"):
            if key in group and not isinstance(group[key], Tensor):
                group[key] = float(group[key])  # a numpy scalar would not load
    return state | {"jaguar": counters(optimizer)}


def unpack(optimizer: ZerothOrder, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], None]) -> None:
    """Takes what `packed` gave, torch's part by `load`; state, counters and seed are set.

    Raises:
        ValueError: it does not fit the optimizer; nothing was changed.
    """
    fitting = checked(optimizer, state_dict)
    state = exact_state(optimizer, fitting)
    load({key: fitting[key] for key in ("state", "param_groups")})
    for tensor, values in state.items():
        optimizer.state[tensor] = values
    own = fitting["jaguar"]
    optimizer._step, optimizer._seed = own["step"], own["seed"]
    optimizer._skipped, optimizer._skipped_in_a_row = own["skipped"], own["skipped_in_a_row"]
    optimizer._last_finite = None if own["last_finite"] < 0 else own["last_finite"]


def counters(optimizer: ZerothOrder) -> dict[str, Any]:
    """What an optimizer knows besides torch's state and groups: ints, strings and the options as plain values."""
    return {
        "step": optimizer._step,
        "seed": optimizer._seed,
        "skipped": optimizer._skipped,
        "skipped_in_a_row": optimizer._skipped_in_a_row,
        "last_finite": -1 if optimizer._last_finite is None else optimizer._last_finite,
        "options": _deciding(optimizer),
    }


def _deciding(optimizer: ZerothOrder) -> dict[str, Any]:
    """The options that decide bits: not how a step gets back, unless it walks, nor the name of a subclass of a user."""
    options = dict(optimizer._options)
    if options.get("restore") != "walk" and "restore" in options:
        options["restore"] = None
    if "optimizer" in options:
        own = [kind.__name__ for kind in type(optimizer).__mro__ if kind.__module__.startswith("jaguar.")]
        options["optimizer"] = own[0]
    if rows := [f"{slot.name}[{slot.kept}]" for slot in optimizer._slots if slot.kept is not None]:
        options["padding_rows"] = ", ".join(rows)
    return options


def checked(optimizer: ZerothOrder, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state_dict, its parameters in the optimizer's order.

    Raises:
        ValueError: it does not fit the optimizer; the first difference is named.
    """
    saved, own = state_dict.get("jaguar"), counters(optimizer)
    if not isinstance(saved, dict) or any(not isinstance(saved.get(key), type(own[key])) for key in own):
        raise ValueError(
            "this state_dict was not made by a jaguar optimizer: its entry 'jaguar' (step counter, seed, options) is "
            "missing or incomplete"
        )
    options = _SINCE | saved["options"]
    for key in own["options"] | options:
        a, b = own["options"].get(key), options.get(key)
        if a != b or type(a) is not type(b):  # 1 and 1.0 are equal, but one is a count and the other a fraction
            raise ValueError(f"the state_dict was saved with {key}={b!r}, this optimizer has {key}={a!r}")
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if len(groups) != len(saved_groups):
        raise ValueError(f"the state_dict has {len(saved_groups)} parameter groups, this optimizer has {len(groups)}")
    ordered = [_ordered(i, group, other) for i, (group, other) in enumerate(zip(groups, saved_groups, strict=True))]
    return state_dict | {"param_groups": ordered}


def _ordered(number: int, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """A saved group with its parameters in the order of the optimizer's group."""
    count, saved_count = len(group["params"]), len(saved["params"])
    if count != saved_count:
        raise ValueError(
            f"parameter group {number} of the state_dict has {saved_count} tensors, this optimizer's {count}"
        )
    names, saved_names = group.get("param_names"), saved.get("param_names")
    if bool(names) != bool(saved_names):
        raise ValueError(
            f"parameter group {number} of the state_dict {'has names' if saved_names else 'has no names'}, this "
            f"optimizer's {'has' if names else 'has none'}; random numbers are keyed by them"
        )
    if not names or not saved_names:
        return saved
    ids = {canonical_name(name): i for name, i in zip(saved_names, saved["params"], strict=True)}
    wanted = [canonical_name(name) for name in names]
    for name, other in zip(sorted(wanted), sorted(ids), strict=True):
        if name != other:
            raise ValueError(
                f"parameter group {number} of the state_dict has {other!r} where this optimizer has {name!r}"
            )
    return saved | {"params": [ids[name] for name in wanted], "param_names": list(names)}


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
