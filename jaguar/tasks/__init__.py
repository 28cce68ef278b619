"""Tasks: how rows of data become questions that a language model answers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from jaguar.tasks.copa import COPA
from jaguar.tasks.questions import Choice, Encoder, Example, Question
from jaguar.tasks.sst2 import SST2
from jaguar.tasks.tables import MultipleChoice, TextClassification
from jaguar.tasks.task import Sizes, Task
from jaguar.tasks.winogrande import WinoGrande

TASKS: dict[str, type[Task]] = {
    kind.name: kind for kind in (SST2, COPA, WinoGrande, TextClassification, MultipleChoice)
}

__all__ = [
    "COPA",
    "SST2",
    "TASKS",
    "Choice",
    "Encoder",
    "Example",
    "MultipleChoice",
    "Question",
    "Sizes",
    "Task",
    "TextClassification",
    "WinoGrande",
    "described",
]


def described(description: dict[str, Any]) -> Task:
    """The task that `Task.description` wrote down.

    Raises:
        ValueError: the description is of no known task.
    """
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in description.items()}
    name = values.pop("task", None)
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; there is: {', '.join(TASKS)}")
    for field in fields(TASKS[name]):
        value = values.get(field.name, "" if field.type == "str" else ())
        words = (value,) if field.type == "str" else value
        if not isinstance(words, tuple) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"this is no description of {name}: {field.name} is {value!r}")
    try:
        return TASKS[name](**values)
    except TypeError as error:
        raise ValueError(f"this is no description of {name}: {error}") from None
