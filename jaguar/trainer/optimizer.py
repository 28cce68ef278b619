"""The optimizer of a Trainer: its parameter groups, and the way to it through accelerate."""

from __future__ import annotations

from typing import Any

from torch import nn


def decay_groups(model: nn.Module, decay: float, decaying: set[str]) -> list[dict[str, Any]]:
    """Trainer's two groups, with and without weight decay, by name; one group where there is no decay.

    Args:
        model: the model; its parameters with `requires_grad` are trained.
        decay: weight decay.
        decaying: names of the parameters that have it.

    Raises:
        ValueError: nothing is trained.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("no parameter of the model has requires_grad=True: there is nothing to train")
    if not decay:
        return [{"params": named, "weight_decay": 0.0}]
    parts = [(n, p) for n, p in named if n in decaying], [(n, p) for n, p in named if n not in decaying]
    return [{"params": part, "weight_decay": wd} for part, wd in zip(parts, (decay, 0.0), strict=True) if part]


def unwrap(optimizer: Any) -> Any:
    """The optimizer out of accelerate's wrapper, which hides its methods."""
    while type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    return optimizer
