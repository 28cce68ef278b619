"""Modules that a function can reach by the names it uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

_DEPTH = 6  # a closure, its helper, an object, a dict, a list, a model
_MOST = 100  # entries of a container, beyond which it holds data


def reached(function: Callable[..., Any]) -> list[nn.Module]:
    """The outermost modules among what a function closes over, is bound to, or finds in its globals.

    Looks through other functions, plain objects and short containers; not into modules.
    """
    found: list[nn.Module] = []
    seen: dict[int, Any] = {}
    here: list[Any] = [function]
    for _ in range(_DEPTH):
        beyond: list[Any] = []
        for value in here:
            if id(value) in seen:
                continue
            seen[id(value)] = value  # kept, so that no other object takes its number
            if issubclass(type(value), nn.Module):  # not isinstance, which asks proxies for what they stand for
                found.append(value)
            else:
                beyond += _held(value)
        here = beyond
    return found


def _held(value: Any) -> Iterable[Any]:
    kind = type(value)
    if kind is FunctionType:
        named = (value.__globals__.get(name) for name in value.__code__.co_names)
        return [
            *map(_content, value.__closure__ or ()),
            *(value.__defaults__ or ()),
            *(value.__kwdefaults__ or {}).values(),
            *named,
        ]
    if kind is MethodType:
        return [value.__self__, value.__func__]
    if kind is partial:
        return [value.func, *value.args, *value.keywords.values()]
    if issubclass(kind, (list, tuple, dict)):
        return [] if len(value) > _MOST else list(dict.values(value) if issubclass(kind, dict) else value)
    if issubclass(kind, (type, ModuleType, Tensor)):
        return []
    try:
        return list(object.__getattribute__(value, "__dict__").values())
    except AttributeError:  # numbers, strings and the like have none
        return []


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing in it yet
        return None
