"""Fine-tuning of language models with forward passes only.

The public names are resolved on first use, so that reading a record or a journal needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaguar.optimizers import names as _names

__version__ = "0.6.0"

if TYPE_CHECKING:
    from jaguar import directions as directions
    from jaguar import estimators as estimators
    from jaguar import orthogonal as orthogonal
    from jaguar import rules as rules
    from jaguar.method import Method as Method
    from jaguar.optimizers.names import *  # noqa: F403
    from jaguar.params import Shard as Shard
    from jaguar.polar import newton_schulz as newton_schulz
    from jaguar.record import Record as Record
    from jaguar.scoring import Scorer as Scorer
    from jaguar.step_size import StepSize as StepSize
    from jaguar.trainer import ZOTrainer as ZOTrainer
    from jaguar.training_args import ZOTrainingArguments as ZOTrainingArguments

_HOME = _names.HOME | {
    "Method": "jaguar.method",
    "Record": "jaguar.record",
    "Scorer": "jaguar.scoring",
    "Shard": "jaguar.params",
    "StepSize": "jaguar.step_size",
    "ZOTrainer": "jaguar.trainer",
    "ZOTrainingArguments": "jaguar.training_args",
    "newton_schulz": "jaguar.polar",
}
# Modules whose classes are the parts of a `Method`.
_PARTS = ("directions", "estimators", "orthogonal", "rules")
__all__ = sorted([*_HOME, *_PARTS, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _PARTS:
        return importlib.import_module(f"jaguar.{name}")
    raise AttributeError(f"module 'jaguar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
