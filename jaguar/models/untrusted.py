"""Files of others: their code runs only where the user says so, and they name no files but those beside them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any


@contextlib.contextmanager
def unasked() -> Iterator[None]:
    """Turns transformers' questions on standard input, where a pipe may say yes, into errors.

    It asks where no trust was given or denied, and models that are made of other models load these so.
    """
    from transformers import dynamic_module_utils

    waited = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = waited


def wants_code(error: Exception) -> bool:
    """True if the error asks for code that comes with the model."""
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


def code_of(name: str) -> list[str]:
    """The Python files that come with a model or its tokenizer, as their configurations name them."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    found: dict[str, None] = {}
    readers: list[Callable[[str], Any]] = [PreTrainedConfig.get_config_dict, get_tokenizer_config]
    for read in readers:
        with contextlib.suppress(Exception):  # the error that these files explain is the one to be told
            found |= dict.fromkeys(_files(read(name)))
    return list(found)


def _files(value: Any, mapped: bool = False) -> Iterator[str]:
    """Files of every `auto_map`, also of inner configurations: of "module.Class", or "repository--module.Class"."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _files(inner, mapped or key == "auto_map")
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _files(inner, mapped)
    elif mapped and isinstance(value, str):
        repository, _, reference = value.rpartition("--")
        yield f"{reference.rpartition('.')[0]}.py" + f" of {repository}" * bool(repository)


def check_kernels(config: Any) -> None:
    """Raises ValueError if a configuration, or one inside, names an attention kernel of a repository, which is code."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for kernel in (str(getattr(part, "_attn_implementation", None)) for part in parts):
        if "/" in kernel:
            raise ValueError(
                f"its attn_implementation is code of the repository {kernel}, which was not run: take it out"
            )


def inside(file: Any) -> bool:
    """True if a name that was read from a file of a folder stays in that folder."""
    return isinstance(file, str) and not PurePath(file).is_absolute() and ".." not in PurePath(file).parts


def check_weight_files(folder: Path, named: Any) -> None:
    """Looks where the weights of a folder are said to lie, in its indices of shards and in its config.json.

    Args:
        folder: the model's.
        named: the file or index that its config.json names in place of the usual ones, if it does.

    Raises:
        ValueError: not in there.
    """
    places: dict[Path, Iterable[Any]] = {folder / "config.json": [] if named is None else [named]}
    for index in [*folder.glob("*.index.json"), *([folder / named] if inside(named) else [])]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # it is no index
            places[index] = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    for place, files in places.items():
        if outside := sorted({str(file) for file in files if not inside(file)}):
            raise ValueError(f"{place} names weights outside its folder: {outside[0]}")
