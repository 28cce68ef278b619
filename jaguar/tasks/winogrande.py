"""WinoGrande (Sakaguchi et al. 2020): which of two names fills the blank of a sentence?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaguar.tasks.questions import Question
from jaguar.tasks.rows import Row
from jaguar.tasks.task import Sizes, Task, index_of


@dataclass(frozen=True)
class WinoGrande(Task):
    """The sentence up to the blank, then an option with the rest of the sentence.

    A causal LM is scored on option and rest; a masked LM fills the blank and sees the rest.

    Source: prompts of ZO-Bench (arXiv 2402.11592).
    """

    name: ClassVar[str] = "winogrande"
    objective: ClassVar[str] = "answer"
    columns: ClassVar[dict[str, str]] = {name: name for name in ("sentence", "option1", "option2", "answer")}
    label_field: ClassVar[str] = "answer"
    sizes: ClassVar[Sizes] = Sizes(1000, 100, 1000)
    hub: ClassVar[tuple[str, str | None]] = ("allenai/winogrande", "winogrande_m")

    def question(self, row: Row, masked: bool) -> Question:
        """The sentence, cut at its blank."""
        before, *after = row["sentence"].split("_")
        if len(after) != 1:
            raise ValueError(f"{row.where}: the sentence has {len(after)} blanks (_) instead of one")
        prompt, blank = before.rstrip(), " " if before[-1:].isspace() else ""
        return Question(
            prompt,
            (blank + row["option1"], blank + row["option2"]),
            index_of(row["answer"], ("1", "2"), row.where),
            row.where,
            suffix=after[0],
        )
