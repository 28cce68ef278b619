"""Published settings of a model, a task, a method and an adapter, with their sources: one YAML file per task."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import yaml


@dataclass(frozen=True)
class Preset:
    """Settings that somebody published.

    Attributes:
        model: last part of the model's name, in lower case and without "-hf".
        task: name of the task, which is the name of the file.
        method: name of the method on the command line.
        adapter: "none", "lora", "prefix" or "prompt".
        settings: flag of the command line -> value.
        source: where the numbers are from.
        grid: flag -> all values that were tried, where a search was published.
        note: the value that was taken of a grid and why, and cautions for comparing results.
    """

    model: str
    task: str
    method: str
    adapter: str
    settings: dict[str, Any]
    source: str
    grid: dict[str, list[Any]] = field(default_factory=dict)
    note: str = ""


def presets() -> list[Preset]:
    """All of them, sorted by task, then as in the files."""
    tables = sorted((path for path in files(__name__).iterdir() if path.name.endswith(".yaml")), key=lambda p: p.name)
    return [
        Preset(task=path.name.removesuffix(".yaml"), **entry)
        for path in tables
        for entry in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]


def find(model: str, task: str, method: str, adapter: str) -> Preset | None:
    """The preset of a model, named as on the hub or by its folder; None: nobody published settings."""
    wanted = (_short(model), task, method, adapter)
    return next((p for p in presets() if (p.model, p.task, p.method, p.adapter) == wanted), None)


def _short(model: str) -> str:
    # The hub has the Llama-2 weights in transformers' format as "Llama-2-7b-hf".
    return model.rstrip("/").rpartition("/")[2].lower().removesuffix("-hf")
