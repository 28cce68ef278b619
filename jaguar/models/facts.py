"""Facts of a model that transformers does not say by a name."""

from __future__ import annotations

from typing import Any

from torch import nn


def first_position(model: Any) -> int:
    """The number that the model gives to a sequence's first position: RoBERTa's family begins after the padding id."""
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table.padding_idx + 1
    return 0
