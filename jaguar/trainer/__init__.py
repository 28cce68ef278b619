"""transformers' Trainer with forward passes only: its arguments, checkpoints, micro-batches and scoring."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaguar.trainer.arguments import ZOTrainingArguments as ZOTrainingArguments
    from jaguar.trainer.trainer import ScoringTrainer as ScoringTrainer
    from jaguar.trainer.trainer import ZOTrainer as ZOTrainer

# Resolved on first use: the command line reads `jaguar.trainer.options` without transformers.
_HOME = {
    "ScoringTrainer": "jaguar.trainer.trainer",
    "ZOTrainer": "jaguar.trainer.trainer",
    "ZOTrainingArguments": "jaguar.trainer.arguments",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'jaguar.trainer' has no attribute {name!r}")
