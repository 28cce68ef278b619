"""Scoring a whole data set in batches of similar length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import EvalPrediction

from jaguar.scoring.metrics import Scores, row_losses
from jaguar.scoring.scorer import Scorer
from jaguar.tasks.questions import Example


def by_length(examples: Sequence[Example]) -> list[int]:
    """The order in which batches have rows of similar length."""
    return sorted(range(len(examples)), key=lambda i: examples[i].length)


def rearranged(value: Any, places: np.ndarray) -> Any:
    """The rows of an array, or of all in a tuple, list or dictionary, by their places; others stay as they are."""
    if isinstance(value, dict):
        return {key: rearranged(part, places) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(rearranged(part, places) for part in value)
    return value[places] if np.ndim(value) and len(value) == len(places) else value


def widest(examples: Sequence[Example]) -> int:
    """The largest number of options."""
    return max(len(examples[i].choices) for i in range(len(examples)))


def filled(scores: Tensor, width: int) -> Tensor:
    """The scores with -inf for the options up to `width` that are not there; a classifier has one score a class."""
    return F.pad(scores, (0, max(0, width - scores.shape[1])), value=-math.inf)


def accuracy(found: EvalPrediction) -> dict[str, float]:
    """Share of rows whose label has the largest score; a row with a NaN is wrong."""
    whole = (np.concatenate(x) if isinstance(x, list) else x for x in (found.predictions, found.label_ids))
    scores, labels = map(torch.as_tensor, whole)
    return {"accuracy": Scores(scores, labels, torch.empty(0)).correct.mean().item()}


def evaluate(
    scorer: Scorer,
    examples: Sequence[Example],
    batch_size: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> Scores:
    """Scores every option of every example, dropout off; `progress` is told the rows of each batch.

    The loss of a row does not depend on the rows of its batch: with the objective "answer" it is the mean over the
    row's own tokens.

    Raises:
        ValueError: the model cannot be scored; see `Scorer.verify`.
    """
    scorer.trust(examples)  # once, not at every batch of longer rows
    order = by_length(examples)
    device = next(scorer.model.parameters()).device
    width = widest(examples)
    parts = []
    was_training = scorer.model.training
    scorer.model.eval()
    try:
        with torch.no_grad():
            for first in range(0, len(order), batch_size):
                batch = scorer.collate([examples[i] for i in order[first : first + batch_size]])
                found = scorer.scores({key: value.to(device) for key, value in batch.items()}).cpu()
                parts.append(filled(found, width))
                progress(len(found))
    finally:
        scorer.model.train(was_training)
    scores = torch.empty(len(examples), parts[0].shape[1], dtype=parts[0].dtype)
    scores[torch.tensor(order)] = torch.cat(parts)
    labels = torch.tensor([example.label for example in examples])
    return Scores(scores, labels, row_losses(scores, labels, scorer.objective))
