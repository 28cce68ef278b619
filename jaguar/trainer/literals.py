"""Keyword arguments as people write them: a dict, JSON, or key=value."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

# Words of YAML, JSON and shells that would be true if they were strings.
_WORDS = {"true": True, "false": False, "none": None, "null": None}


def keyword_arguments(given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """The arguments: lists are tuples, for JSON and YAML have no others.

    Args:
        given: a mapping, a JSON object, or "key=value,key=value" whose values are Python literals: numbers, True, False
            and None (in any case), "(0.9, 0.999)"; anything else is a string.

    Raises:
        ValueError: it is none of them, or a key has two values.
    """
    if isinstance(given, str):
        given = _object(given) if given.lstrip().startswith("{") else _pairs(given)
    return {key: tuple(value) if isinstance(value, list) else value for key, value in (given or {}).items()}


def _object(text: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{text!r} begins like a JSON object and is none: {error}") from None
    return found


def _pairs(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in re.split(r",(?=\s*\w+\s*=)", text):  # not the comma of a tuple
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not key.isidentifier():
            raise ValueError(f"{pair!r} is not key=value, as in betas=(0.9,0.999)")
        if key in found and found[key] != _value(value):
            raise ValueError(f"{key} has two values")
        found[key] = _value(value)
    return found


def _value(text: str) -> Any:
    if text.casefold() in _WORDS:
        return _WORDS[text.casefold()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
