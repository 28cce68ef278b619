"""COPA (Roemmele et al. 2011; SuperGLUE): which of two sentences is the cause, or the effect, of a premise?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaguar.tasks.questions import Question
from jaguar.tasks.rows import Row
from jaguar.tasks.task import Sizes, Task, index_of

_LINKS = {"effect": " so", "cause": " because"}


@dataclass(frozen=True)
class COPA(Task):
    """`{premise without its period} so` (effect) or `because` (cause), then the choice, its first word lower-cased.

    Source: prompts of MeZO (arXiv 2305.17333).
    """

    name: ClassVar[str] = "copa"
    objective: ClassVar[str] = "answer"
    columns: ClassVar[dict[str, str]] = {name: name for name in ("premise", "choice1", "choice2", "question", "label")}
    sizes: ClassVar[Sizes] = Sizes(1000, 100, 1000)
    hub: ClassVar[tuple[str, str | None]] = ("aps/super_glue", "copa")

    def question(self, row: Row, masked: bool) -> Question:
        """The premise and its two choices."""
        if row["question"] not in _LINKS:
            raise ValueError(f"{row.where}: the question {row['question']!r} is not one of {', '.join(_LINKS)}")
        return Question(
            row["premise"].rstrip(".").rstrip() + _LINKS[row["question"]],
            (_lowered(row["choice1"]), _lowered(row["choice2"])),
            index_of(row["label"], ("0", "1"), row.where),
            row.where,
        )


def _lowered(choice: str) -> str:
    first, *rest = choice.split(" ")
    return " " + " ".join([first if first == "I" else first.lower(), *rest])
