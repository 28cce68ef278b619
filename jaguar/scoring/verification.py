"""Comparison of scores in batches with those of rows one by one; finds a way to read batches that is right."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from jaguar.models.errors import said
from jaguar.models.tolerance import rounding
from jaguar.tasks.questions import Choice, Example

# Rows that share a forward pass: all of a batch, those of one length, or none.
TOGETHER = ("padded", "equal", "one")


@dataclass(frozen=True)
class Reading:
    """A way to put batches to a model.

    Attributes:
        own_masks: by masks and positions of one's own, so that options share rows, and rows are packed.
        pad_id: the token that fills short rows.
        together: which rows share a forward pass, one of `TOGETHER`.
    """

    own_masks: bool
    pad_id: int
    together: str = "padded"


class Verifiable(Protocol):
    """The part of a scorer that is used here; `jaguar.scoring.Scorer` documents it."""

    model: Any
    kind: str
    layout: str
    head: nn.Module | None
    readings: list[Reading]
    verified_length: float

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Examples as one batch."""

    def scores(self, batch: Mapping[str, Any]) -> Tensor:
        """Scores of the options of a batch, a row per example."""


def readings(model: Any, kind: str, pad_id: int, own_masks: bool) -> list[Reading]:
    """The ways to read batches, cheapest first; the last asks nothing of the model but its rows one by one."""
    plain, own_pad = Reading(False, pad_id), getattr(model.config, "pad_token_id", None)
    found = [replace(plain, own_masks=True)] if own_masks and kind != "classifier" else []
    found.append(plain)
    if kind == "classifier" and isinstance(own_pad, int) and 0 <= own_pad != pad_id:
        found.append(replace(plain, pad_id=own_pad))  # it looks for this id, whatever the mask says
    return found + [replace(plain, together=rows) for rows in TOGETHER[1:]]


def picked(examples: Sequence[Example]) -> list[Example]:
    """The two shortest and the two longest."""
    order = sorted(examples, key=lambda example: example.length)
    return order if len(order) < 4 else [*order[:2], *order[-2:]]


@torch.no_grad()
def first_right(scorer: Verifiable, examples: Sequence[Example]) -> int:
    """The number of the first of `scorer.readings` by which batches score as the rows one by one, without padding.

    Raises:
        ValueError: there is none; the message has the model's name and the reason.
    """
    name = type(scorer.model).__name__
    alone, scale = _one_by_one(scorer, examples)
    again, _ = _one_by_one(scorer, examples[::-1])
    tolerance = scale * rounding(scorer.model)
    if (moved := max(map(_distance, again[::-1], alone))) > tolerance:
        raise ValueError(
            f"a {name} scores the same rows otherwise the second time, by {moved:.2g} (dropout or random routing that "
            "evaluation mode leaves on, or a memory of earlier rows); this model cannot be scored by jaguar"
        )
    reason = ""
    for number, reading in enumerate(scorer.readings):
        try:
            far = max(_distance(found, alone[i]) for i, found in _in_batches(scorer, examples, reading))
        except (RuntimeError, TypeError, ValueError, LookupError, AssertionError, AttributeError) as error:
            if _is_of_memory(error):
                raise
            reason = f"scoring a {name} fails: {said(error)}"
            continue
        if far <= tolerance:
            return number
        reason = f"scoring only the options' positions of a {name} differs from its whole forward by {far:.2g}"
    raise ValueError(f"{reason}; this model cannot be scored by jaguar")


def _in_batches(scorer: Verifiable, examples: Sequence[Example], reading: Reading) -> Iterator[tuple[int, Tensor]]:
    """Number of an example and its scores: from the shortest two in a batch, then from all, in every layout.

    Where rows of equal length are read together, each gets a companion: there may be only one of its length.
    """
    trial = copy.copy(scorer)
    trial.readings, trial.verified_length = [reading], math.inf
    device = next(scorer.model.parameters()).device
    for count in {min(2, len(examples)), len(examples)}:
        rows = list(examples[:count])
        if reading.together == "equal":
            rows = [backwards(example) for example in rows] + rows
        for trial.layout in ("padded", "packed") if reading.own_masks else ("padded",):
            batch = {key: value.to(device) for key, value in trial.collate(rows).items()}
            for i, row in enumerate(trial.scores(batch)[-count:]):
                yield i, row if scorer.head is None else row[: len(examples[i].choices)]


def backwards(example: Example) -> Example:
    """Another example of the same form."""
    return replace(example, choices=tuple(replace(choice, ids=choice.ids[::-1]) for choice in example.choices))


def _one_by_one(scorer: Verifiable, examples: Sequence[Example]) -> tuple[list[Tensor], float]:
    """The scores of every example by the model's own forward, and the largest of the logits that they are made of."""
    device, found, scale = next(scorer.model.parameters()).device, [], 0.0
    options = {"use_cache": False} if scorer.kind == "causal" else {}
    for example in examples:
        scores = []
        for choice in example.choices:
            try:
                logits = scorer.model(torch.tensor([choice.ids], device=device), **options).logits
            except (RuntimeError, ValueError, LookupError) as error:
                if _is_of_memory(error):
                    raise
                raise ValueError(
                    f"{example.where or 'a row'}: a {type(scorer.model).__name__} cannot read its {len(choice.ids)} "
                    f"tokens: {said(error)}"
                ) from error
            score, logits = _read(logits, choice, device)
            scores.append(score)
            spread = (logits - logits.mean(-1, keepdim=True)).abs()
            scale = max(scale, spread[spread.isfinite()].max().item() if spread.isfinite().any() else 0.0)
        found.append(torch.cat(scores))
    return found, scale


def _read(logits: Tensor, choice: Choice, device: torch.device) -> tuple[Tensor, Tensor]:
    """A choice's score (1,), or a classifier's (classes,); and the logits that it is made of."""
    logits = full(logits[0])
    if logits.dim() == 1:
        return logits, logits
    # Virtual tokens of an adapter stand before the prompt; some models answer for them too.
    logits = logits[-len(choice.ids) :][torch.tensor(choice.positions, device=device)]
    targets = torch.tensor(choice.targets, device=device)[:, None]
    return logits.log_softmax(1).gather(1, targets).mean()[None], logits


def _distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, where the model alone has a finite score: a broken model says so itself in every loss."""
    far = (found - expected)[expected.isfinite()].abs()
    return far.nan_to_num(nan=math.inf).max().item() if len(far) else 0.0


def _is_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def full(logits: Tensor) -> Tensor:
    """In fp32, unless it is fp64."""
    return logits if logits.dtype == torch.float64 else logits.float()
