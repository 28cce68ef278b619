"""Models as a run trains them: which parameters train, with which adapter, and the names of their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import set_seed

from jaguar.models.adapters import Adapter
from jaguar.models.load import Loaded, adapted, select_trainable
from jaguar.tasks import Task


def made_trainable(loaded: Loaded, adapter: Adapter, train: str, seed: int, prompt: Sequence[int]) -> Loaded:
    """The model with its adapter, and what does not train frozen; the same values for the same arguments.

    Args:
        adapter: settings of an adapter to add; kind "none": none.
        train: which of the model's own parameters train, where it has no adapter.
        seed: draws LoRA's factors.
        prompt: tokens that a prefix or prompt begins with.

    Raises:
        ValueError: the adapter does not fit the model, or there is nothing to train.
    """
    if adapter.kind != "none":
        set_seed(seed)
        return adapted(loaded, adapter.applied(loaded.model, loaded.kind, prompt))
    if not hasattr(loaded.model, "peft_config"):
        select_trainable(loaded.model, train)
    return loaded


def name_labels(model: Any, task: Task) -> None:
    """Writes the names of a classifier's labels into its configuration."""
    model.config.id2label = dict(enumerate(task.classes))
    model.config.label2id = {label: i for i, label in enumerate(task.classes)}
