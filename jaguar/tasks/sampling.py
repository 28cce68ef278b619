"""Splits into training, dev and test rows, by the protocols of the benchmark and of MeZO's k-shot runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def drawn(rows: Sequence[T], count: int | None, seed: int) -> list[T]:
    """The first `count` rows of one permutation under numpy's `seed`; None: all of them, as they stand."""
    if count is None:
        return list(rows)
    return [rows[i] for i in np.random.RandomState(seed).permutation(len(rows))[:count]]


def train_and_dev(rows: Sequence[T], num_train: int | None, num_dev: int, seed: int) -> tuple[list[T], list[T]]:
    """One permutation; of its first num_train + num_dev rows the last num_dev are the dev rows.

    As the benchmark has it, a pool that is too small shortens the training rows, not the dev rows (COPA: 300 and 100 of
    400). `num_train=None` takes every row that is left.

    Raises:
        ValueError: no row would be left to train on.
    """
    if num_dev == 0:
        return drawn(rows, num_train, seed), []
    if num_dev >= len(rows):
        raise ValueError(f"--num_dev {num_dev} leaves nothing to train on: there are {len(rows)} training rows")
    taken = drawn(rows, len(rows) if num_train is None else num_train + num_dev, seed)
    return taken[:-num_dev], taken[-num_dev:]


def k_shot(rows: Sequence[T], label: Callable[[T], str], k: int, seed: int) -> tuple[list[T], list[T]]:
    """`k` rows of each label to train on and `k` others of each label as dev rows (MeZO, Gao et al. 2021).

    Raises:
        ValueError: a label has fewer than 2 k rows.
    """
    by_label: dict[str, list[T]] = {}
    for row in drawn(rows, len(rows), seed):
        by_label.setdefault(label(row), []).append(row)
    for name, found in sorted(by_label.items()):
        if len(found) < 2 * k:
            raise ValueError(
                f"--num_k_shot {k} needs {2 * k} training rows of every label (k to train on, k as dev rows); label "
                f"{name} has {len(found)}"
            )
    train, dev = ([row for name in sorted(by_label) for row in by_label[name][a : a + k]] for a in (0, k))
    return train, dev
