"""Fine-tuning of language models with forward passes only.

The public names are resolved on first use, so that reading a record or a journal needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from jaguar.optimizers import ZOSGD as ZOSGD
    from jaguar.optimizers import JaguarMuon as JaguarMuon
    from jaguar.optimizers import JaguarSignSGD as JaguarSignSGD
    from jaguar.optimizers import ZOSignSGD as ZOSignSGD
    from jaguar.optimizers import param_groups as param_groups
    from jaguar.polar import newton_schulz as newton_schulz
    from jaguar.record import Record as Record
    from jaguar.scoring import Scorer as Scorer
    from jaguar.trainer import ZOTrainer as ZOTrainer
    from jaguar.training_args import ZOTrainingArguments as ZOTrainingArguments

_HOME = {
    "JaguarMuon": "jaguar.optimizers",
    "JaguarSignSGD": "jaguar.optimizers",
    "ZOSGD": "jaguar.optimizers",
    "ZOSignSGD": "jaguar.optimizers",
    "Record": "jaguar.record",
    "Scorer": "jaguar.scoring",
    "ZOTrainer": "jaguar.trainer",
    "ZOTrainingArguments": "jaguar.training_args",
    "newton_schulz": "jaguar.polar",
    "param_groups": "jaguar.optimizers",
}
__all__ = [
    "ZOSGD",
    "JaguarMuon",
    "JaguarSignSGD",
    "Record",
    "Scorer",
    "ZOSignSGD",
    "ZOTrainer",
    "ZOTrainingArguments",
    "__version__",
    "newton_schulz",
    "param_groups",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'jaguar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
