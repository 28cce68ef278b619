"""Rows of a test table in which every two levels of two factors meet."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


def pairwise(factors: dict[str, Sequence[Any]], never: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Rows in which every two levels of two factors meet, except those of `never`.

    Greedy, and the same every time; where it makes no difference a row gets the first level of a factor.
    """

    def pairs(row: dict[str, Any]) -> list[Any]:
        return list(itertools.combinations([(name, row[name]) for name in factors if name in row], 2))

    left = {
        ((a, level), (b, other))
        for a, b in itertools.combinations(factors, 2)
        for level, other in itertools.product(factors[a], factors[b])
    }
    left -= {p for bad in never if len(bad) == 2 for p in pairs(bad)}
    order = sorted(left, key=repr)
    rows: list[dict[str, Any]] = []
    while left:
        row = dict(next(p for p in order if p in left))
        for name in [n for n in factors if n not in row]:
            choices = [row | {name: level} for level in factors[name]]
            choices = [c for c in choices if not any(bad.items() <= c.items() for bad in never)]
            row = max(choices, key=lambda c: len(left.intersection(pairs(c))))
        rows.append({name: row[name] for name in factors})
        left.difference_update(pairs(row))
    return rows
