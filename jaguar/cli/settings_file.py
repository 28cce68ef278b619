"""Files of settings: YAML or JSON, read as text, so that a value means what was written.

YAML 1.1 makes a boolean of `no`, eight of `010` and 750 of `12:30`. What a flag takes is the flag's business: its value
gets there as the text in the file. Only inside a mapping, which some fields of TrainingArguments are, have numbers and
booleans a type: there it is that of YAML's core schema, which is JSON's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

Setting = str | list[str] | dict[str, Any] | None

_NULL = ("", "~", "null", "Null", "NULL")
_BOOLEAN = {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def read(path: str) -> dict[str, Setting]:
    """The settings by name, with underscores; None: left out.

    Raises:
        ValueError: the file cannot be read, or does not say what to do; the message says where.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        found = _read_json(text) or _read_yaml(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    if found is None:
        raise ValueError("a file of settings has lines like 'learning_rate: 1e-4'")
    return found


def _unique(pairs: Iterable[tuple[str, Any]], places: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for (key, value), place in zip(pairs, places, strict=True):
        if key in found:
            raise ValueError(f"{key} is given twice{place}")
        found[key] = value
    return found


def _read_json(text: str) -> dict[str, Setting] | None:
    """Its own reader: to YAML, JSON's tabs are mistakes and an escaped emoji is two characters."""
    try:
        found = json.loads(text, object_pairs_hook=_Pairs, parse_float=_Number, parse_int=_Number)
    except ValueError:
        return None
    return _of_json(found) if isinstance(found, _Pairs) else None


def _read_yaml(text: str) -> dict[str, Setting] | None:
    node = yaml.compose(text, Loader=_Reader)
    return _of_yaml(node) if isinstance(node, yaml.MappingNode) else None


# -- YAML ----------------------------------------------------------------------------------------------------------


class _Reader(yaml.BaseLoader):  # type: ignore[misc]
    """Nodes of text; of lists of aliases of lists, nine lines would be millions of them."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node.

        Raises:
            ValueError: it is an alias of a list or a mapping.
        """
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            if isinstance(self.anchors.get(alias.anchor), yaml.CollectionNode):
                raise ValueError(f"the alias *{alias.anchor} stands for more than a word{_place(alias)}")
        return super().compose_node(parent, index)


def _place(node: Any) -> str:
    return f" (line {node.start_mark.line + 1})"


def _of_yaml(mapping: Any) -> dict[str, Setting]:
    pairs = [(_name(key).replace("-", "_"), _setting(value)) for key, value in mapping.value]
    return _unique(pairs, [_place(key) for key, _ in mapping.value])


def _name(key: Any) -> str:
    if not isinstance(key, yaml.ScalarNode):
        raise ValueError(f"the name of a setting is a word{_place(key)}")
    return str(key.value)


def _setting(node: Any) -> Setting:
    if isinstance(node, yaml.ScalarNode):
        return None if _is_null(node) else str(node.value)
    if isinstance(node, yaml.MappingNode):
        return dict(_typed(node))
    if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
        raise ValueError(f"a list of settings has words{_place(node)}")
    return [str(item.value) for item in node.value]


def _is_null(node: Any) -> bool:
    return node.style is None and node.value in _NULL


def _typed(node: Any) -> Any:
    """A value of YAML's core schema."""
    if isinstance(node, yaml.MappingNode):
        pairs = [(_name(key), _typed(value)) for key, value in node.value]
        return _unique(pairs, [_place(key) for key, _ in node.value])
    if isinstance(node, yaml.SequenceNode):
        return [_typed(item) for item in node.value]
    text = str(node.value)
    if node.style is not None:
        return text
    if _is_null(node):
        return None
    if text in _BOOLEAN:
        return _BOOLEAN[text]
    if _INTEGER.fullmatch(text):
        return int(text, 0) if text[1:2] in ("o", "x") else int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


# -- JSON ----------------------------------------------------------------------------------------------------------


class _Pairs(list[tuple[str, Any]]):
    """An object, with the keys that are there twice."""


class _Number(str):
    """A number as it was written."""

    __slots__ = ()


def _of_json(pairs: _Pairs) -> dict[str, Setting]:
    settings = [(key.replace("-", "_"), _flat(value)) for key, value in pairs]
    return _unique(settings, [""] * len(settings))


def _flat(value: Any) -> Setting:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, _Pairs):
        return dict(_plain(value))
    if isinstance(value, list):
        if any(isinstance(item, list) for item in value):
            raise ValueError("a list of settings has words")
        return [str(_flat(item)) if item is not None else "null" for item in value]
    return json.dumps(value)


def _plain(value: Any) -> Any:
    if isinstance(value, _Pairs):
        return _unique([(key, _plain(item)) for key, item in value], [""] * len(value))
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return json.loads(value) if isinstance(value, _Number) else value
