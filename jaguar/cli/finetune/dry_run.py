"""Checks before the model is loaded: optimizer, schedule, reports and data loader take their options."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from jaguar.trainer.arguments import ZOTrainingArguments


def check(args: ZOTrainingArguments) -> None:
    """Makes the optimizer, the schedule, the reports and the data loader of these arguments, for one small matrix.

    Raises:
        ValueError: one of them does not take its options.
    """
    steps = max(int(args.max_steps), 2)
    with _said_of("zo_options") if args.zo_options else nullcontext():
        optimizer = _optimizer(args)
    name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    options: Any = args.lr_scheduler_kwargs or {}
    with _said_of(f"lr_scheduler_type {name}"):
        get_scheduler(name, optimizer, args.get_warmup_steps(steps), steps, dict(options))
    accelerator: Any = args.accelerator_config
    for f in fields(accelerator):
        if isinstance(f.default, bool) and not isinstance(value := getattr(accelerator, f.name), bool):
            raise ValueError(f"--accelerator_config: {f.name} is true or false, not {value!r}")
    with _said_of("report_to"):
        get_reporting_integration_callbacks(args.report_to)
    with _said_of("dataloader_num_workers and the like"):
        DataLoader(
            range(0),  # type: ignore[arg-type]
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )


@contextmanager
def _said_of(flag: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, AssertionError, AttributeError) as error:  # as libraries have it
        raise ValueError(f"--{flag}: {error}") from error


def _optimizer(args: ZOTrainingArguments) -> torch.optim.Optimizer:
    options = args.optimizer_options()
    coordinates = options.get("coordinates")
    if isinstance(coordinates, int) and coordinates > 1:
        options["coordinates"] = 1  # whether there are as many is the model's affair
    layers = options.get("layers")
    layer = layers[0] if isinstance(layers, tuple) and layers else "layers.0"  # which ones there are is the model's too
    project = options.get("project")  # so are the tensors that are projected
    part = (project if isinstance(project, str) else next(iter(project))) if project else "q_proj"
    weight = torch.nn.Parameter(torch.zeros(256, 256, device=args.device))
    group: dict[str, Any] = {"params": [(f"{layer}.{part}.weight", weight)], "weight_decay": args.weight_decay}
    if getattr(args.optimizer_class, "by_role", False):
        group["ns"] = True
    return args.optimizer_class([group], **options)
