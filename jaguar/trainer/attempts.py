"""Snapshot of a run's start, for `auto_find_batch_size`: put back before a smaller batch is tried."""

from __future__ import annotations

import copy
from typing import Any

import torch


class Attempt:
    """Weights, optimizer and counters of a trainer as they are when its first attempt begins.

    An attempt may run out of memory at its hundredth step, at a longer batch: the next one is a run of its own. The
    weights are kept in the CPU's memory.
    """

    def __init__(self, trainer: Any) -> None:
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        self._weights = [(p, p.detach().to("cpu", copy=True)) for p in parameters]
        optimizer = trainer.optimizer
        self._optimizer = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
        self._passes = trainer.forward_passes

    def restore(self, trainer: Any) -> None:
        """Puts everything back."""
        with torch.no_grad():
            for parameter, saved in self._weights:
                parameter.copy_(saved)
        if self._optimizer is None:
            trainer.optimizer = None  # made anew, as for the first attempt
        else:
            trainer.optimizer.load_state_dict(copy.deepcopy(self._optimizer))
        trainer.forward_passes = self._passes
