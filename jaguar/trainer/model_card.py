"""The optimizer that ran, in a model card."""

from __future__ import annotations

import copy
from typing import Any

import torch

from jaguar.method.step_size import AUTO
from jaguar.optimizers.base import ZerothOrder
from jaguar.trainer.arguments import ZOTrainingArguments


def card_arguments(args: ZOTrainingArguments, optimizer: torch.optim.Optimizer) -> Any:
    """The arguments as transformers' model card reads them, with that optimizer's name, options and learning rate."""
    shown: Any = copy.copy(args)
    group = optimizer.param_groups[0]
    own = optimizer.method.step_size if isinstance(optimizer, ZerothOrder) else None
    automatic = own is not None and own.lr  # the group has a factor then
    shown.learning_rate = AUTO if automatic else float(group.get("initial_lr", group["lr"]))
    shown.optim = type(optimizer).__name__
    hidden = {"lr", "optimizer", "rng", "differentiable"}
    options = optimizer.defaults | optimizer.state_dict().get("jaguar", {}).get("options", {})
    if type(optimizer) is ZerothOrder:
        shown.optim += f"({optimizer.method.rule.name})"
    betas = options.get("betas", (args.adam_beta1, args.adam_beta2))
    shown.adam_beta1, shown.adam_beta2 = options.get("beta1", betas[0]), options.get("beta2", betas[1])
    shown.adam_epsilon = options.get("eps", args.adam_epsilon)
    shown.optim_args = ", ".join(
        f"{key}={value}" for key, value in options.items() if key not in hidden and value is not None
    )
    return shown
