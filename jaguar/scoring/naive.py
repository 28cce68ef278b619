"""The reference of scoring: every option in a row of its own, all of the vocabulary at every position.

The public codes pad on the left to a multiple of eight and take a log-softmax over all logits in the model's dtype
(formulas from arXiv 2305.17333, appendix E). Tests compare the scorer with this, and benchmarks measure against it; no
run of the package uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jaguar.tasks.questions import Example


def rows(
    examples: Sequence[Example], kind: str, pad_id: int, side: str = "left", multiple: int = 8
) -> tuple[Tensor, Tensor, list[list[int]], list[list[int]]]:
    """input_ids, attention_mask (rows, tokens), and for each row the positions and tokens of its option."""
    choices = [choice for example in examples for choice in example.choices]
    # The benchmark's rows hold the option's last token too.
    full = [[*c.ids, *([c.targets[-1]] if kind == "causal" else [])] for c in choices]
    longest = -(-max(map(len, full)) // multiple) * multiple
    ids, mask, where = [], [], []
    for row, choice in zip(full, choices, strict=True):
        fill = longest - len(row)
        before, after = (fill, 0) if side == "left" else (0, fill)
        ids.append([pad_id] * before + row + [pad_id] * after)
        mask.append([0] * before + [1] * len(row) + [0] * after)
        where.append([p + before for p in choice.positions])
    return torch.tensor(ids), torch.tensor(mask), where, [list(c.targets) for c in choices]


def _logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    # GPT-2 and BERT count positions from the row's start; padding on the left must not move them.
    counts = model.config.model_type in ("gpt2", "bert")
    more = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if counts else {}
    logits: Tensor = model(input_ids=ids, attention_mask=mask, **more).logits
    return logits


def scores(
    model: Any, examples: Sequence[Example], kind: str, pad_id: int, side: str = "left", multiple: int = 8
) -> list[Tensor]:
    """The mean log-probability of each option, a tensor per example.

    Args:
        model: a language model of transformers.
        examples: what is scored, as one batch.
        kind: "causal" or "masked".
        pad_id: the token that fills short rows.
        side: where it stands, "left" or "right".
        multiple: of the number of tokens in a row.
    """
    ids, mask, where, targets = rows(examples, kind, pad_id, side, multiple)
    logits = _logits(model, ids, mask)
    logprobs = F.log_softmax(logits, -1)
    means = [
        logprobs[i, w].gather(1, torch.tensor(t)[:, None]).mean()
        for i, (w, t) in enumerate(zip(where, targets, strict=True))
    ]
    return list(torch.stack(means).split([len(e.choices) for e in examples]))


def loss(model: Any, examples: Sequence[Example], kind: str, pad_id: int, objective: str, side: str = "left") -> Tensor:
    """The training loss of the batch: cross-entropy of option scores ("classification"), or of the answer's tokens."""
    if objective == "classification":
        found = scores(model, examples, kind, pad_id, side)
        each = [F.cross_entropy(s[None], torch.tensor([e.label])) for s, e in zip(found, examples, strict=True)]
        return torch.stack(each).mean()
    right = [Example((e.choices[e.label],), 0) for e in examples]
    ids, mask, where, targets = rows(right, kind, pad_id, side)
    logits = _logits(model, ids, mask)
    picked = torch.cat([logits[i, w] for i, w in enumerate(where)])
    return F.cross_entropy(picked, torch.tensor([t for target in targets for t in target]))


def alone(model: Any, examples: Sequence[Example], kind: str) -> Tensor:
    """The same as `scores`, by the plainest forward: one sequence at a time, no padding, no mask, all of its logits."""
    found = []
    for example in examples:
        logits = [model(input_ids=torch.tensor([choice.ids])).logits[0] for choice in example.choices]
        if kind == "classifier":
            found.append(logits[0])
            continue
        means = [
            F.log_softmax(one[list(c.positions)], -1).gather(1, torch.tensor(c.targets)[:, None]).mean()
            for one, c in zip(logits, example.choices, strict=True)
        ]
        found.append(torch.stack(means))
    return torch.stack(found)
