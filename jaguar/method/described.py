"""A method as nested plain values, and back: what a journal's header holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from jaguar.method import directions, estimators, orthogonal, rules
from jaguar.method.method import Method
from jaguar.method.step_size import StepSize

# The only classes that a description can name; nothing else of a file is looked up.
_PARTS = (directions.Direction, rules.Rule, estimators.Estimator)
KINDS: dict[str, type] = {
    kind.__name__: kind
    for module in (directions, rules, orthogonal, estimators)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, _PARTS) and kind not in _PARTS
}
KINDS |= {kind.__name__: kind for kind in (Method, StepSize)}


def described(value: Any) -> Any:
    """A method, or a part of one, as JSON values: `{"kind": its class, field: value, ...}`.

    Raises:
        TypeError: a field has a value that is none of JSON's, no dtype and no part.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__} | {f.name: described(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{value!r} has no description in plain values")


def rebuilt(plain: Any, kinds: Mapping[str, type] = KINDS) -> Any:
    """The value that was described.

    Args:
        kinds: the classes that may be named, by name.

    Raises:
        ValueError: a class is none of them, or does not take what is said.
    """
    if isinstance(plain, list):
        return tuple(rebuilt(item, kinds) for item in plain)
    if not isinstance(plain, dict):
        return plain
    if plain.keys() == {"dtype"}:
        dtype = getattr(torch, str(plain["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{plain['dtype']!r} is no dtype of torch")
        return dtype
    kind = kinds.get(str(plain.get("kind")))
    if kind is None:
        raise ValueError(f"{plain.get('kind')!r} is no class of jaguar: its own program can make it, and replay there")
    values = {name: rebuilt(value, kinds) for name, value in plain.items() if name != "kind"}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{plain['kind']} of another version: {error}") from None
