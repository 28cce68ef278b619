"""Metrics of option scores: accuracy, loss, AUC, standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Option scores and labels of a data set, in its order; missing options have the score -inf."""

    logits: Tensor
    labels: Tensor
    losses: Tensor

    @property
    def correct(self) -> Tensor:
        """1.0 where the largest score is the label's, fp64 (rows,); a row with a NaN is wrong."""
        right = (self.logits.argmax(1) == self.labels) & ~self.logits.isnan().any(1)
        return right.double()

    def figures(self) -> dict[str, float]:
        """Accuracy with its standard error, mean loss, and for two options the area under the ROC curve."""
        accuracy, n = self.correct.mean().item(), len(self.labels)
        figures = {
            "accuracy": accuracy,
            "accuracy_se": math.sqrt(accuracy * (1.0 - accuracy) / n),
            "loss": self.losses.double().mean().item(),
        }
        if self.logits.shape[1] == 2:
            figures["auc"] = roc_auc((self.logits[:, 1] - self.logits[:, 0]), self.labels)
        return {key: value for key, value in figures.items() if key != "auc" or value == value}


def row_losses(scores: Tensor, labels: Tensor, objective: str) -> Tensor:
    """Loss of every row, (rows,): cross-entropy over the options, or minus the right option's mean log-probability."""
    if objective == "classification":
        return F.cross_entropy(scores, labels, reduction="none")
    return -scores.gather(1, labels[:, None])[:, 0]


def paired_se(before: Scores, after: Scores) -> float:
    """Standard error of the change in accuracy between two models on the same rows; NaN for a single row."""
    change = after.correct - before.correct
    if len(change) < 2:
        return math.nan
    return (change.std(correction=1) / math.sqrt(len(change))).item()


def roc_auc(score: Tensor, label: Tensor) -> float:
    """Probability that a random positive scores above a random negative, ties counting half; NaN without both.

    Equivalent to: `(s1[:, None] > s0).double().mean() + (s1[:, None] == s0).double().mean() / 2`.
    """
    values, place = score.double().unique(return_inverse=True)
    positives = torch.bincount(place[label == 1], minlength=len(values)).double()
    negatives = torch.bincount(place[label == 0], minlength=len(values)).double()
    below = negatives.cumsum(0) - negatives
    pairs = positives.sum() * negatives.sum()
    return ((positives * (below + negatives / 2)).sum() / pairs).item() if pairs else math.nan
