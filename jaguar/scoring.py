"""Scoring: the logits of the options and nothing else, and the figures that are made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jaguar.tasks.text_classification import Example


class OptionScorer:
    """Logits of single-token options after a prompt, or of the classes of a sequence classifier.

    A causal LM runs without a KV cache, and only the hidden state of the last prompt token reaches the output head.

    Args:
        model: a causal LM with a base model and output embeddings, or a sequence classifier.
        pad_id: token that fills short rows (on the right, where a causal model's last prompt token cannot see it).
        option_ids: token ids of the options; None for a sequence classifier, whose classes are the options.
    """

    def __init__(self, model: Any, pad_id: int, option_ids: Sequence[int] | None) -> None:
        self.model, self.pad_id = model, pad_id
        self.device = next(model.parameters()).device
        self.option_ids = None if option_ids is None else torch.tensor(option_ids, device=self.device)
        self.forward_passes = 0
        self._logits = self._class_logits if option_ids is None else self._option_logits

    def __call__(self, batch: Sequence[Example]) -> Tensor:
        """Option logits of a batch: fp32 (rows, options)."""
        self.forward_passes += 1
        longest = max(len(example.ids) for example in batch)
        ids = torch.tensor(
            [[*example.ids, *[self.pad_id] * (longest - len(example.ids))] for example in batch], device=self.device
        )
        lengths = torch.tensor([len(example.ids) for example in batch], device=self.device)
        mask = (torch.arange(longest, device=self.device) < lengths.unsqueeze(1)).long()
        return self._logits(ids, mask, lengths - 1).float()

    def check_head(self, example: Example) -> None:
        """Compares the short way with the model's own forward on one prompt, and takes the latter where they differ.

        Some models scale or cap their logits after the output head; a wrong option logit would be silent.
        """
        if self.option_ids is None:
            return
        with torch.no_grad():
            short = self([example])
            self._logits = self._full_logits
            full = self([example])
        if torch.allclose(short, full, rtol=1e-3, atol=1e-3):
            self._logits = self._option_logits
        self.forward_passes -= 2

    def _option_logits(self, ids: Tensor, mask: Tensor, last: Tensor) -> Tensor:
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        rows = torch.arange(len(ids), device=self.device)
        # The head is called as a module (the whole vocabulary for one position is 1 % of the pass), so that
        # adapters, biases and hooks on it act.
        logits: Tensor = self.model.get_output_embeddings()(hidden[rows, last])
        return logits[:, self.option_ids]

    def _full_logits(self, ids: Tensor, mask: Tensor, last: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits[torch.arange(len(ids), device=self.device), last][:, self.option_ids]

    def _class_logits(self, ids: Tensor, mask: Tensor, last: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return logits


@dataclass(frozen=True)
class Scores:
    """Option logits and labels of a data set, in its order."""

    logits: Tensor
    labels: Tensor

    @property
    def correct(self) -> Tensor:
        """1.0 where the largest logit is the label's, fp64 (rows,)."""
        return (self.logits.argmax(1) == self.labels).double()

    def figures(self) -> dict[str, float]:
        """Accuracy with its standard error, mean loss, and for two options the area under the ROC curve."""
        accuracy, n = self.correct.mean().item(), len(self.labels)
        figures = {
            "accuracy": accuracy,
            "accuracy_se": math.sqrt(accuracy * (1.0 - accuracy) / n),
            "loss": F.cross_entropy(self.logits.double(), self.labels).item(),
        }
        if self.logits.shape[1] == 2:
            figures["auc"] = roc_auc((self.logits[:, 1] - self.logits[:, 0]), self.labels)
        return {key: value for key, value in figures.items() if key != "auc" or value == value}


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


def evaluate(
    scorer: OptionScorer,
    examples: Sequence[Example],
    batch_size: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> Scores:
    """Scores every example, in batches of similar length; `progress` is told the rows of each batch."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    parts = []
    with torch.no_grad(), _evaluating(scorer.model):
        for first in range(0, len(order), batch_size):
            batch = [examples[i] for i in order[first : first + batch_size]]
            parts.append(scorer(batch).cpu())
            progress(len(batch))
    logits = torch.empty(len(examples), parts[0].shape[1])
    logits[torch.tensor(order)] = torch.cat(parts)
    return Scores(logits, torch.tensor([example.label for example in examples]))


class _evaluating:
    """Evaluation mode for a while (dropout off), whatever mode the model was in."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._was_training = self._model.training
        self._model.eval()

    def __exit__(self, *error: object) -> None:
        self._model.train(self._was_training)


def batches(examples: Sequence[Example], batch_size: int, seed: int, first: int = 0) -> Iterator[list[Example]]:
    """Endless training batches from batch number `first` on; each epoch shuffles anew.

    Rows of a batch have similar lengths: an epoch is sorted by length within pools of 50 batches, and the order of the
    batches is random. The order depends on (seed, epoch) only, so a resumed run meets the same batches.
    """
    per_epoch = max(1, len(examples) // batch_size)
    number = first
    while True:
        epoch, start = divmod(number, per_epoch)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(examples), generator=generator).tolist()
        pool = 50 * batch_size
        order = [
            i
            for p in range(0, len(order), pool)
            for i in sorted(order[p : p + pool], key=lambda i: len(examples[i].ids))
        ]
        turns = torch.randperm(per_epoch, generator=generator).tolist()
        for turn in turns[start:]:
            yield [examples[i] for i in order[turn * batch_size : (turn + 1) * batch_size]]
            number += 1
