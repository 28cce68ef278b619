"""Labelled text of your own: classification and multiple choice, from any CSV or JSONL file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaguar.tasks.questions import Question
from jaguar.tasks.rows import Row
from jaguar.tasks.task import Task, index_of


@dataclass(frozen=True)
class TextClassification(Task):
    """A text and its class.

    Attributes:
        template: the prompt; `{text}` stands for the text, `{mask}` for the place of the answer (a causal LM's is the
            end, where it can be left out).
        labels: class names as they stand in the data, in class order.
        verbalizers: the answers expected of a language model for each class, leading blank included; empty for
            sequence classifiers.
    """

    name: ClassVar[str] = "text-classification"
    objective: ClassVar[str] = "classification"
    columns: ClassVar[dict[str, str]] = {"text": "text", "label": "label"}

    template: str
    labels: tuple[str, ...]
    verbalizers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self.template)
        if len(self.labels) < 2:
            raise ValueError(f"the data has one label only ({', '.join(self.labels)}); there is nothing to tell apart")
        if self.verbalizers and len(self.verbalizers) != len(self.labels):
            raise ValueError(
                f"{len(self.verbalizers)} verbalizers for the {len(self.labels)} labels {', '.join(self.labels)}; give "
                "one for each, in this order"
            )
        if len(set(self.verbalizers)) < len(self.verbalizers):
            raise ValueError(f"two of the verbalizers {self.verbalizers} are the same")

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels, in the order of the options."""
        return self.labels

    def question(self, row: Row, masked: bool) -> Question:
        """The template with the text in its place."""
        label = index_of(row["label"], self.labels, row.where)
        return _filled(self.template, row["text"], self.verbalizers, label, row.where, masked)


@dataclass(frozen=True)
class MultipleChoice(Task):
    """A text and several continuations, one of which is right.

    Attributes:
        template: as of `TextClassification`.
        choice_columns: columns of the continuations; the label is the number of the right one, from 0, or its text.
    """

    name: ClassVar[str] = "multiple-choice"
    objective: ClassVar[str] = "answer"

    template: str
    choice_columns: tuple[str, ...]

    def __post_init__(self) -> None:
        _check(self.template)
        if len(self.choice_columns) < 2 or len(set(self.choice_columns)) < len(self.choice_columns):
            raise ValueError(f"--choice_columns {' '.join(self.choice_columns)}: give two or more different columns")

    @property
    def columns(self) -> dict[str, str]:  # type: ignore[override]
        """Text, choices and label."""
        return {"text": "text", **choice_fields(self.choice_columns), "label": "label"}

    def question(self, row: Row, masked: bool) -> Question:
        """The template with the text in its place, and the choices."""
        choices = tuple(row[field] for field in choice_fields(self.choice_columns))
        numbers = tuple(map(str, range(len(choices))))
        known = numbers if row["label"] in numbers else choices
        label = index_of(row["label"], known, row.where)
        return _filled(self.template, row["text"], [f" {choice}" for choice in choices], label, row.where, masked)


def choice_fields(columns: Sequence[str]) -> dict[str, str]:
    """Fields of the choices -> their columns; a column may be called like another field."""
    return {f"choice {i}": column for i, column in enumerate(columns)}


def _check(template: str) -> None:
    if "{text}" not in template:
        raise ValueError(f"the template {template!r} has no {{text}}, so every prompt would be the same")
    if template.count("{mask}") > 1:
        raise ValueError(f"the template {template!r} has more than one {{mask}}")


def _filled(template: str, text: str, options: Sequence[str], label: int, where: str, masked: bool) -> Question:
    before, _, after = template.partition("{mask}")
    if after.strip() and not masked and options:
        raise ValueError(
            f"the template {template!r} goes on after {{mask}}; a causal language model answers at the end, so "
            "{mask} must be last there, or be left out"
        )
    if "{mask}" in template:  # the options bring their own blank
        before = before.rstrip(" ")
    around = before.split("{text}"), (after if masked else "").split("{text}")
    return Question(text.join(around[0]), tuple(options), label, where, text.join(around[1]), text, around)
