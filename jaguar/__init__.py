"""Fine-tuning of language models with forward passes only.

The public names are resolved on first use, so that reading a record or a journal needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaguar.optimizers import names as _names

__version__ = "0.8.0"

if TYPE_CHECKING:
    from jaguar.backends.polar.newton_schulz import newton_schulz as newton_schulz
    from jaguar.method import directions as directions
    from jaguar.method import estimators as estimators
    from jaguar.method import orthogonal as orthogonal
    from jaguar.method import rules as rules
    from jaguar.method.method import Method as Method
    from jaguar.method.params import Shard as Shard
    from jaguar.method.step_size import StepSize as StepSize
    from jaguar.optimizers.names import *  # noqa: F403
    from jaguar.optimizers.replay import replay as replay
    from jaguar.record import Journal as Journal
    from jaguar.record import Record as Record
    from jaguar.scoring import Scorer as Scorer
    from jaguar.trainer.arguments import ZOTrainingArguments as ZOTrainingArguments
    from jaguar.trainer.trainer import ScoringTrainer as ScoringTrainer
    from jaguar.trainer.trainer import ZOTrainer as ZOTrainer

_HOME = _names.HOME | {
    "Method": "jaguar.method.method",
    "Journal": "jaguar.record",
    "Record": "jaguar.record",
    "Scorer": "jaguar.scoring",
    "ScoringTrainer": "jaguar.trainer.trainer",
    "Shard": "jaguar.method.params",
    "StepSize": "jaguar.method.step_size",
    "ZOTrainer": "jaguar.trainer.trainer",
    "ZOTrainingArguments": "jaguar.trainer.arguments",
    "replay": "jaguar.optimizers.replay",
    "newton_schulz": "jaguar.backends.polar.newton_schulz",
}
# Modules whose classes are the parts of a `Method`.
_PARTS = {name: f"jaguar.method.{name}" for name in ("directions", "estimators", "orthogonal", "rules")}
__all__ = sorted([*_HOME, *_PARTS, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _PARTS:
        return importlib.import_module(_PARTS[name])
    raise AttributeError(f"module 'jaguar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
