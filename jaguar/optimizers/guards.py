"""Guards against silent failures: losses that carry no signal, perturbations that rounding swallows."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jaguar.backends.launches import Lost, State
from jaguar.method.params import Slot
from jaguar.method.rule import Buffer
from jaguar.record import Record

_ROW = 10  # steps in a row before something that may be chance is reported
_ENOUGH = 100  # coordinates; with fewer, two equal losses are no surprise
_LOST_SHARE = 0.05  # share of a tensor's perturbed coordinates


class NonFiniteLoss(RuntimeError):
    """Too many losses in a row were NaN or infinite."""


class LossGuard:
    """Turns a closure's result into a number, and warns once of each thing that makes the number useless."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._equal = self._zero = self._empty = 0

    def as_float(self, loss: Any, double: bool) -> float:
        """The loss, or the mean of a vector of the rows' losses, rounded to fp32 unless `double`.

        Raises:
            TypeError: it is neither a tensor nor a number.
            ValueError: it is empty, or has several dimensions.
        """
        if isinstance(loss, (int, float)) and not isinstance(loss, bool):
            loss = torch.tensor(loss, dtype=torch.float64)
        if not isinstance(loss, Tensor):
            raise TypeError(f"the closure must return the loss as a scalar tensor, got {type(loss).__name__}")
        rows = loss.dim() == 1 and loss.numel() > 1
        if loss.numel() != 1 and not rows:
            raise ValueError(
                "the closure must return one number, or a vector with the loss of each row, got a tensor of shape "
                f"{tuple(loss.shape)}; take its mean"
            )
        if loss.dim() != 0 and not rows:
            self._tell(
                "shape", f"the closure's loss has shape {tuple(loss.shape)} instead of (); its only element is used"
            )
        if loss.grad_fn is not None:
            self._tell(
                "graph",
                "the closure's loss carries a graph: something inside enables gradients, which costs memory "
                "for nothing",
            )
        self.watch_dtype(loss.dtype)
        if rows:
            loss = loss.detach().double().mean()
        return float(loss.detach().to(torch.float64 if double else torch.float32))

    def watch_dtype(self, dtype: torch.dtype) -> None:
        """Warns of a loss that was computed in half precision."""
        if dtype in (torch.bfloat16, torch.float16):
            grain = "1.95 in bfloat16" if dtype == torch.bfloat16 else "0.24 in float16"
            self._tell(
                "half",
                f"the closure's loss is {dtype}; at tau 1e-3 the derivative then comes in steps of {grain}. "
                "Compute the loss in float32: cross_entropy(logits.float(), labels)",
            )

    def watch(self, losses: Sequence[float], n_perturbed: int) -> None:
        """Counts steps that perturbed nothing, or whose losses are all equal or exactly zero; warns at ten in a row."""
        equal = len(set(losses)) == 1
        self._equal = self._equal + 1 if equal and n_perturbed >= _ENOUGH else 0
        self._zero = self._zero + 1 if equal and losses[0] == 0.0 else 0
        self._empty = self._empty + 1 if n_perturbed == 0 else 0
        if self._empty == _ROW:
            self._tell(
                "empty",
                f"no coordinate was sampled in {_ROW} steps in a row, so nothing moves: the fraction is too small for "
                "so few parameters; raise `coordinates` (1.0 is all of them, an int is a number of them)",
            )
        if self._zero == _ROW:
            self._tell(
                "zero", f"the loss was exactly 0.0 in {_ROW} steps in a row: labels masked out, or NaNs filtered away?"
            )
        elif self._equal == _ROW:
            self._tell(
                "equal",
                f"all losses of a step were bit-equal in {_ROW} steps in a row: the perturbed parameters do not reach "
                "the loss (merged or switched-off adapter, frozen graph, stale copy of the weights?)",
            )

    def _tell(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warnings.warn(message, stacklevel=4)


def explained(error: RuntimeError) -> RuntimeError:
    """An error of a closure, in better words where torch's do not say what to do: a backward pass without a graph."""
    if "does not require grad" in str(error):
        return RuntimeError(
            "the closure asks for gradients, and there are none here: leave loss.backward() out of it. A closure "
            "computes the loss and returns it"
        )
    return error


def warn_of_skipped(record: Record, n_skipped: int) -> None:
    """Says that a step was skipped, at the first and at every power of two of them."""
    if n_skipped & (n_skipped - 1) == 0:
        bad = [loss for loss in record.losses if not math.isfinite(loss)]
        why = f"a loss was {bad[0]}" if bad else "the losses were too far apart for a finite derivative"
        warnings.warn(
            f"step {record.step} was skipped, because {why}: nothing moved. {n_skipped} of {record.step + 1} steps "
            "were skipped so far; lower lr or tau, or look at the data",
            stacklevel=4,
        )


def check_storage(slots: Sequence[Slot], buffers: Sequence[tuple[Buffer, ...]], state: State) -> None:
    """Raises RuntimeError where a parameter or its state is not where it should be; nothing was changed yet."""
    for slot, own, held in zip(slots, buffers, state, strict=True):
        x = slot.tensor
        named = [(f"the {b.name} of {slot.name}", m) for b, m in zip(own, held, strict=False)]
        for what, tensor in ((slot.name, x), *named):
            if tensor.numel() and tensor.untyped_storage().nbytes() == 0:
                raise RuntimeError(
                    f"the storage of {what} was freed (offloaded or resharded); bring it back before the step"
                )
        for what, m in named:
            if m.shape != x.shape or m.device != x.device:
                raise RuntimeError(
                    f"{what} is {tuple(m.shape)} on {m.device}, the parameter {tuple(x.shape)} on {x.device}; make "
                    "the optimizer after moving the model"
                )


def warn_of_lost(lost: Sequence[Lost], consequence: str) -> None:
    """Logs the share of perturbations that rounding swallows in each tensor, and warns where it is large."""
    logging.getLogger("jaguar").info("lost to rounding: %s", ", ".join(f"{p.name} {p.share:.1%}" for p in lost))
    bad = sorted((part for part in lost if part.share > _LOST_SHARE), key=lambda part: -part.share)
    if bad:
        worst = ", ".join(f"{part.name} {part.share:.0%}" for part in bad[:3])
        warnings.warn(
            f"tau is too small for the precision of {len(bad)} of {len(lost)} tensors: rounding swallows the "
            f"perturbation of some coordinates ({worst}), and those {consequence}. Raise tau or keep these tensors in "
            "float32",
            stacklevel=4,
        )
