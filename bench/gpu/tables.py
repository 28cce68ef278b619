"""Parts of the reports: targets, tables, times. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """A number that a result should reach.

    Attributes:
        what: what is measured.
        wanted: the least that it should be, or the most.
        at_least: whether more is better.
        measured: the number in a list of rows, None where they do not have it.
    """

    what: str
    wanted: float
    at_least: bool
    measured: Callable[[Sequence[dict[str, Any]]], float | None]

    @property
    def asked(self) -> str:
        """The bound in words."""
        return f">= {self.wanted:.2f}" if self.at_least else f"<= {self.wanted:.3f}"

    def met(self, value: float | None) -> str:
        """ "met", "not met" or "not measured"."""
        if value is None:
            return "not measured"
        return "met" if (value >= self.wanted if self.at_least else value <= self.wanted) else "not met"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; all but the first column are aligned to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def times(ms: dict[str, float]) -> str:
    """Median, quartiles and number of repetitions."""
    return f"{ms['median']:.4g} ({ms['q1']:.4g} to {ms['q3']:.4g}; {ms['n']:.0f})"
