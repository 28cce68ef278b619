"""Facts of a model that transformers does not say by a name."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def first_position(model: Any) -> int:
    """The number that the model gives to a sequence's first position: RoBERTa's family begins after the padding id."""
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table.padding_idx + 1
    return 0


def running_statistics(model: Any) -> list[str]:
    """Modules whose statistics a forward pass in training mode moves: BatchNorm and its kin."""
    return [
        f"{name} of type {type(module).__name__}"
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None
    ]
