"""SST-2 (Socher et al. 2013; GLUE): is a sentence of a film review positive?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaguar.tasks.questions import Question
from jaguar.tasks.rows import Row
from jaguar.tasks.task import Sizes, Task, index_of


@dataclass(frozen=True)
class SST2(Task):
    """`{sentence} It was` terrible / great; a masked LM reads `{sentence} It was [MASK] .`

    Source: prompts of MeZO (arXiv 2305.17333), after LM-BFF (Gao et al. 2021).
    """

    name: ClassVar[str] = "sst2"
    objective: ClassVar[str] = "classification"
    columns: ClassVar[dict[str, str]] = {"sentence": "sentence", "label": "label"}
    sizes: ClassVar[Sizes] = Sizes(1000, 500, 1000)
    hub: ClassVar[tuple[str, str | None]] = ("nyu-mll/glue", "sst2")

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels as GLUE numbers them: negative, positive."""
        return ("0", "1")

    def question(self, row: Row, masked: bool) -> Question:
        """The sentence and what it was."""
        sentence = row["sentence"]
        return Question(
            f"{sentence} It was",
            (" terrible", " great"),
            index_of(row["label"], self.classes, row.where),
            row.where,
            suffix=" ." if masked else "",
            text=sentence,
            around=(("", " It was"), (" ." if masked else "",)),
        )
