"""Scoring a whole data set in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from jaguar.scoring.figures import Scores, row_losses
from jaguar.scoring.scorer import Scorer
from jaguar.tasks.questions import Example


def by_length(examples: Sequence[Example]) -> list[int]:
    """The order in which batches have rows of similar length."""
    return sorted(range(len(examples)), key=lambda i: examples[i].length)


def evaluate(
    scorer: Scorer,
    examples: Sequence[Example],
    batch_size: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> Scores:
    """Scores every option of every example, dropout off; `progress` is told the rows of each batch.

    The loss of a row does not depend on the rows of its batch: with the objective "answer" it is the mean over the
    row's own tokens.
    """
    order = by_length(examples)
    device = next(scorer.model.parameters()).device
    width = max(len(example.choices) for example in examples)
    parts = []
    was_training = scorer.model.training
    scorer.model.eval()
    try:
        with torch.no_grad():
            for first in range(0, len(order), batch_size):
                batch = scorer.collate([examples[i] for i in order[first : first + batch_size]])
                found = scorer.scores({key: value.to(device) for key, value in batch.items()}).cpu()
                # A classifier has as many scores as classes; the rows of other models as many as options.
                missing = max(0, width - found.shape[1])
                parts.append(torch.nn.functional.pad(found, (0, missing), value=-torch.inf))
                progress(len(found))
    finally:
        scorer.model.train(was_training)
    scores = torch.empty(len(examples), parts[0].shape[1], dtype=parts[0].dtype)
    scores[torch.tensor(order)] = torch.cat(parts)
    labels = torch.tensor([example.label for example in examples])
    return Scores(scores, labels, row_losses(scores, labels, scorer.objective))
