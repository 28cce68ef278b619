"""The base class of tasks: columns, questions, loss, and where the data are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from jaguar.tasks.questions import Question
from jaguar.tasks.rows import Row


@dataclass(frozen=True)
class Sizes:
    """Numbers of rows to train on, to choose the model by, and to test with; None: all there are."""

    train: int | None = None
    dev: int = 0
    test: int | None = None


@dataclass(frozen=True)
class Task:
    """A task: its columns, its questions, its loss, and where its data are.

    Attributes:
        name: on the command line.
        objective: "classification": cross-entropy over the options' mean log-probabilities; "answer": cross-entropy
            of the right option's tokens.
        columns: field -> column of a data file.
        label_field: the field that says which option is right.
        sizes: the benchmark's sample.
        hub: data set and configuration on the hub, or None; its splits are train and validation.
    """

    name: ClassVar[str]
    objective: ClassVar[str]
    columns: ClassVar[dict[str, str]]
    label_field: ClassVar[str] = "label"
    sizes: ClassVar[Sizes] = Sizes()
    hub: ClassVar[tuple[str, str | None] | None] = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels, in the order of the options, where every row has the same."""
        return ()

    def question(self, row: Row, masked: bool) -> Question:
        """The row as text, for a causal or a masked language model.

        Raises:
            ValueError: the row does not fit the task; the row is named.
        """
        raise NotImplementedError

    def description(self) -> dict[str, Any]:
        """The task as plain values; `tasks.described` makes it again."""
        return {"task": self.name, **asdict(self)}


def index_of(label: str, known: Sequence[str], where: str) -> int:
    """Number of the label among those that are known.

    Raises:
        ValueError: it is none of them; the row is named.
    """
    if label not in known:
        raise ValueError(f"{where}: the label {label!r} is not one of {', '.join(known)}")
    return list(known).index(label)
