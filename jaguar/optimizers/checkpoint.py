"""Saving and loading optimizer state exactly: torch's own load casts fp32 momentum to the parameter's dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

from torch import Tensor

from jaguar.method.distributed import local
from jaguar.method.method import Method
from jaguar.method.params import Slot, canonical_name
from jaguar.optimizers.state import buffers_of, copies_of

# Options that earlier versions did not have, and what they did.
_SINCE = {"maximize": False}


@dataclass(frozen=True)
class Saved:
    """An optimizer's part of a state_dict, besides torch's state and groups.

    Attributes:
        step: number of the next step.
        seed: key of the directions.
        skipped: steps whose loss was not finite.
        skipped_in_a_row: the last of them without one between that was.
        last_finite: the last step whose loss was, if there was one.
        options: those that decide bits: a `Method` as plain values, and the rows that stay.
        stayed: steps whose losses were finite and moved nothing; not written where there are none, as in 0.2.0.
        estimates: what an automatic step goes by, numbers by name; not written where lr and tau are numbers.
    """

    step: int
    seed: int
    skipped: int
    skipped_in_a_row: int
    last_finite: int | None
    options: dict[str, Any]
    stayed: int = 0
    estimates: dict[str, float] | None = None

    @property
    def moved(self) -> int:
        """Number of steps that moved something."""
        return self.step - self.skipped - self.stayed

    def entry(self) -> dict[str, Any]:
        """As it stands in a state_dict: ints, strings and the options as plain values."""
        entry = vars(self) | {"last_finite": -1 if self.last_finite is None else self.last_finite}
        return {key: value for key, value in entry.items() if key not in ("stayed", "estimates") or value}

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Saved:
        """The value of an `entry`; entries of later versions may have more."""
        known = {field.name: entry[field.name] for field in fields(cls) if field.name in entry}
        return cls(**known | {"last_finite": None if entry["last_finite"] < 0 else entry["last_finite"]})


def packed(state_dict: dict[str, Any], numbers: Sequence[str], own: Saved) -> dict[str, Any]:
    """Torch's state_dict with the optimizer's own part; the groups' `numbers` load with weights_only=True."""
    for group in state_dict["param_groups"]:
        for key in (*numbers, "initial_lr"):
            if key in group and not isinstance(group[key], Tensor):
                group[key] = float(group[key])  # a numpy scalar would not load
    return state_dict | {"jaguar": own.entry()}


def unpacked(
    state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], own: Saved
) -> tuple[dict[str, Any], dict[Tensor, dict[str, Any]], Saved]:
    """Takes apart what `packed` gave, for these groups: torch's part, the state by parameter, the rest.

    Raises:
        ValueError: it does not fit; the first difference is named.
    """
    fitting = validate_state_dict(state_dict, groups, own)
    torch_part = {key: fitting[key] for key in ("state", "param_groups")}
    return torch_part, exact_state(fitting, groups), Saved.of(fitting["jaguar"])


def validate_state_dict(state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], own: Saved) -> dict[str, Any]:
    """The state_dict, its parameters in the order of the groups.

    Raises:
        ValueError: it does not fit; the first difference is named.
    """
    saved, entry = state_dict.get("jaguar"), own.entry()
    given: dict[str, Any] = {"stayed": 0} | saved if isinstance(saved, dict) else {}
    if any(not isinstance(given.get(key), type(entry[key])) for key in entry):
        raise ValueError(
            "this state_dict was not made by a jaguar optimizer: its entry 'jaguar' (step counter, seed, options) is "
            "missing or incomplete"
        )
    options = _SINCE | given["options"]
    for key in own.options | options:
        a, b = own.options.get(key), options.get(key)
        if a != b or type(a) is not type(b):  # 1 and 1.0 are equal, but one is a count and the other a fraction
            raise ValueError(f"the state_dict was saved with {key}={b!r}, this optimizer has {key}={a!r}")
    saved_groups = state_dict["param_groups"]
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


def exact_state(state_dict: dict[str, Any], groups: Sequence[dict[str, Any]]) -> dict[Tensor, dict[str, Any]]:
    """The saved state by parameter, in the saved dtypes, on the parameters' devices.

    Raises:
        ValueError: a saved tensor does not have its parameter's shape.
    """
    tensors = chain.from_iterable(group["params"] for group in groups)
    ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    state = {}
    for tensor, number in zip(tensors, ids, strict=True):
        values = state_dict["state"].get(number)
        if values is None:
            continue
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape != local(tensor).shape:
                raise ValueError(
                    f"the saved {key} of parameter {number} has shape {tuple(value.shape)}, the parameter "
                    f"{tuple(local(tensor).shape)}"
                )
        state[tensor] = {
            key: value.detach().to(tensor.device, copy=True) if isinstance(value, Tensor) else value
            for key, value in values.items()
        }
    return state


def check_complete(
    state: Mapping[Tensor, Mapping[str, Any]],
    method: Method,
    slots: Sequence[Slot],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Raises ValueError where the saved state of steps that moved something lacks what they kept of a tensor."""
    kept = zip(slots, buffers_of(method, slots, groups), copies_of(method, slots, groups), strict=True)
    for slot, buffers, copies in kept:
        held = state.get(slot.parameter, {})
        missing = [name for name in (*(b.name for b in buffers if b.lasting), *copies) if name not in held]
        if missing and slot.parameter.requires_grad:
            raise ValueError(
                f"the state_dict has steps that moved something, and no {missing[0]} of {slot.name}, which they keep "
                f"of every tensor that they move: it is incomplete. If {slot.name} was frozen in all of them, freeze "
                "it (requires_grad_(False)) while loading"
            )
