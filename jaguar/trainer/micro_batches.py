"""The loss of a step over its micro-batches and processes, equal to that of one large batch."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from jaguar.optimizers.tangents import summed

Loss = Callable[[dict[str, Any], Any], Tensor]  # of a batch and num_items_in_batch

# How the loss of a micro-batch belongs to that of the large one.
_SHARE = "share"  # it was divided by the items of all micro-batches, or by nothing: they are added
_MIXED = "mixed"  # so was a part of it
_LABELS, _SHIFTED, _ROWS = "labels", "shifted labels", "rows"  # it is a mean over its ... that count

_HALF = (torch.bfloat16, torch.float16)


class MicroBatches:
    """Adds up the losses of micro-batches so that they make the loss of one large batch.

    A few more forward passes of one micro-batch, in the first step that has several, find out the model's ways: it
    divides its loss by `num_items_in_batch`, or takes the number and drops it; it shifts its labels or not; its mean
    is over labels or rows.

    Args:
        name: the model's class, for warnings.
        share: the user's word on that division; None: to be found out.
        tolerance: relative difference up to which two losses are the same; None: no rows are set apart, so that
            batches keep their shapes.
    """

    def __init__(
        self,
        name: str,
        *,
        share: bool | None = None,
        tolerance: float | None = 1e-4,
    ) -> None:
        self._name, self._tolerance = name, tolerance
        self._kind = None if share is None else _SHARE if share else _LABELS
        self._may_shift = share is not True  # it is open whether the first label of a row counts
        self._looked, self._sure, self._told = False, share is True, False
        self._settled = False  # before the step

    @classmethod
    def of(cls, model: nn.Module, share: bool | None, autocast: bool, compiled: bool) -> MicroBatches:
        """Makes one for a model as it runs; a model compiled for its shapes is never given rows set apart."""
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        tolerance = 2e-2 if autocast or dtypes & set(_HALF) else 1e-4
        return cls(type(model).__name__, share=share, tolerance=None if compiled else tolerance)

    def parts(
        self, window: Sequence[dict[str, Any]], n_items: Any, loss_of: Loss, processes: int = 1, spanned: int = 1
    ) -> list[tuple[Tensor, Tensor]]:
        """Numbers in fp64 that each micro-batch adds to the sum of losses and to its divisor.

        Args:
            window: micro-batches.
            n_items: labels that count in all of them, if the loss may be divided by it.
            loss_of: called under no_grad.
            processes: number of those that have micro-batches of the step.
            spanned: number of those whose labels `n_items` counts.
        """
        several = len(window) * processes > 1
        if several and not self._settled:
            self._find_out(window, n_items, loss_of)
        kind = self._kind or (_LABELS if n_items is None else _SHARE)
        if kind == _MIXED:
            n_items = n_items / (len(window) * spanned)
        parts = []
        for batch in window:
            shares = len(window) * (spanned if kind == _SHARE else 1)
            part = torch.tensor(1.0 / shares if kind in (_SHARE, _MIXED) else _count(batch, kind))
            if several and not part:
                continue  # a mean over nothing is no number
            loss = loss_of(batch, n_items)
            loss = loss if kind == _SHARE else loss.double() * part
            parts.append((loss.double(), part.double()))
        return parts

    def settle(self, window: Sequence[dict[str, Any]], n_items: Any, loss_of: Loss) -> None:
        """Finds out the model's ways before a step whose evaluations processes share, in which they cannot agree."""
        self._settled = True
        if len(window) > 1:
            with torch.no_grad():
                self._find_out(window, n_items, loss_of)

    def _find_out(self, window: Sequence[dict[str, Any]], n_items: Any, loss_of: Loss) -> None:
        """Settles the open questions about the loss, as far as these micro-batches can tell."""
        first = next((batch for batch in window if _count(batch, _LABELS)), window[0])
        if self._kind is None:
            self._kind = _agreed(_kind_of(first, n_items, loss_of))
            if self._kind == _MIXED:
                self._tell("a part of it does not heed num_items_in_batch, as a router's auxiliary loss")
        if self._kind == _LABELS and self._may_shift:
            shifts = _agreed(_shifts(first, n_items, loss_of))
            self._may_shift = shifts is None
            self._kind = shifts or _LABELS
        if self._kind not in (None, _MIXED) and self._tolerance is not None and not self._sure:
            self._check(window, n_items, loss_of, self._tolerance)

    def _check(self, window: Sequence[dict[str, Any]], n_items: Any, loss_of: Loss, tolerance: float) -> None:
        """Compares a batch with two parts of it, which show whether its loss is a mean over labels or rows.

        Parts with the same number of labels cannot tell rows from labels: they are looked at once. Parts with the very
        same labels tell nothing, as classes may have weights.
        """
        found = [
            splitting
            for splitting in _splittings(window)
            if all(_count(part, _LABELS) for part in splitting[1:]) and not _alike(*splitting[1:])
        ]
        telling = [parts for parts in found if _count(parts[1], _LABELS) != _count(parts[2], _LABELS)]
        best = next(iter(telling or ([] if self._looked else found)), None)
        kinds = [_SHARE]
        if self._kind != _SHARE:
            kinds = [str(self._kind), *([_SHIFTED] if self._may_shift else []), _ROWS, _SHARE]
        answer = _agreed(None if best is None else _fitting(kinds, best, n_items, loss_of, tolerance))
        self._looked = self._looked or answer is not None
        self._sure = _agreed("yes" if telling or self._kind == _SHARE else "no") == "yes" and self._looked
        if answer == "none":
            self._tell("it is neither a sum nor a mean over rows or labels, as contrastive and auxiliary losses")
        elif answer is not None:
            self._kind = answer

    def _tell(self, reason: str) -> None:
        if self._told:
            return
        self._told = True
        warnings.warn(
            f"the loss of a {self._name} depends on how its rows are batched ({reason}), so the step of several "
            "micro-batches is not exactly that of one large batch",
            stacklevel=2,
        )


def mean(parts: Sequence[tuple[Tensor, Tensor]], accelerator: Accelerator, processes: int) -> Tensor:
    """The loss, from the numbers that the micro-batches of each process add to a sum and to its divisor.

    Args:
        processes: number of those over which the rows are spread.
    """
    nothing, device = torch.zeros((), dtype=torch.float64), accelerator.device
    total, weight = (functools.reduce(_added, [part[i] for part in parts] or [nothing]) for i in (0, 1))
    total = total.to(device)
    # What was counted on the host goes there by a launch, which waits for nothing.
    on_host = weight.device.type == "cpu" != device.type
    weight = torch.full((), float(weight), dtype=weight.dtype, device=device) if on_host else weight.to(device)
    if processes > 1:
        total, weight = summed(torch.stack([total.reshape(()), weight]))
    return total / weight


def each(parts: Sequence[tuple[Tensor, Tensor]], accelerator: Accelerator) -> Tensor:
    """Losses whose mean is `mean`'s: one for every row, or for every micro-batch where rows are not told apart.

    Raises:
        ValueError: there is one loss only.
    """
    both = torch.stack([torch.cat([part[i].reshape(-1).to(accelerator.device) for part in parts]) for i in (0, 1)])
    if accelerator.num_processes > 1:
        both = accelerator.gather(accelerator.pad_across_processes(both.T.contiguous())).T  # padded by 0
        both = both[:, both[1] > 0]
    if both.shape[1] < 2:
        raise ValueError(
            "an automatic step compares rows, and this model says the loss of its batch only: give a scorer, or "
            "gradient_accumulation_steps of 2 or more, whose micro-batches are compared, or learning_rate and tau "
            "as numbers"
        )
    return both[0] * (both.shape[1] / both[1].sum())


def _added(total: Tensor, part: Tensor) -> Tensor:
    return total.to(part.device) + part


class Grain:
    """Notices losses that were computed in half precision, also where they were widened since (autocast, `.float()`).

    A widened loss ends in zeros: a few different ones that all do are no chance.
    """

    def __init__(self) -> None:
        self._suspects, self._seen = list(_HALF), list[float]()

    def dtype(self, loss: Tensor) -> torch.dtype:
        """The dtype that the loss was computed in, as far as it is known."""
        if loss.dtype in _HALF or not self._suspects or loss.numel() != 1:
            return loss.dtype
        value = float(loss)
        if value == 0.0 or not math.isfinite(value):
            return loss.dtype
        self._suspects = [half for half in self._suspects if float(loss.to(half)) == value]
        self._seen.append(value)
        if len(self._seen) < 8 or len(set(self._seen)) < 3 or not self._suspects:
            return loss.dtype
        found, self._suspects = self._suspects[0], []
        return found


def _agreed(answer: str | None) -> str | None:
    """The first process's answer."""
    if not (dist.is_available() and dist.is_initialized()):
        return answer
    box = [answer]
    dist.broadcast_object_list(box, 0)
    return box[0]


def _count(batch: dict[str, Any], kind: str) -> float:
    """The divisor of a mean loss, or a multiple of it."""
    labels = batch.get("labels")
    if kind == _ROWS or not isinstance(labels, Tensor):
        return float(next((len(value) for value in batch.values() if isinstance(value, Tensor)), 1))
    if labels.is_floating_point():
        return float(labels.numel())
    if "shift_labels" in batch:
        labels = batch["shift_labels"]
    elif kind == _SHIFTED:
        labels = labels[..., 1:]
    return float(labels.ne(-100).sum())


def _tried(loss_of: Loss, batch: dict[str, Any], n_items: Any) -> float:
    """The loss; random numbers are drawn as if it had not been asked for."""
    device = next((value.device for value in batch.values() if isinstance(value, Tensor)), torch.device("cpu"))
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        return float(loss_of(batch, n_items))


def _kind_of(batch: dict[str, Any], n_items: Any, loss_of: Loss) -> str | None:
    """`_SHARE` if the loss heeds the number of items, `_LABELS` if not; None where the batch cannot tell."""
    if n_items is None:
        return _LABELS
    one, half = _tried(loss_of, batch, n_items), _tried(loss_of, batch, 2 * n_items)
    if not math.isfinite(one) or one == 0.0:
        return None
    for ratio, kind in ((0.5, _SHARE), (1.0, _LABELS)):
        if math.isclose(half / one, ratio, rel_tol=1e-5):
            return kind
    return _MIXED


def _shifts(batch: dict[str, Any], n_items: Any, loss_of: Loss) -> str | None:
    """`_SHIFTED` if other first labels leave the loss as it is, else `_LABELS`; None where the batch cannot tell."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() < 2 or labels.is_floating_point() or "shift_labels" in batch:
        return _LABELS
    values, first = labels[labels != -100].unique(), labels[..., 0]
    if len(values) < 2 or not (first != -100).any():
        return None
    other = labels.clone()
    other[..., 0] = torch.where(first == -100, -100, torch.where(first == values[0], values[-1], values[0]))
    one, two = _tried(loss_of, batch, n_items), _tried(loss_of, {**batch, "labels": other}, n_items)
    return _SHIFTED if math.isclose(one, two, rel_tol=1e-6) else _LABELS


def _fitting(
    kinds: Sequence[str], splitting: Sequence[dict[str, Any]], n_items: Any, loss_of: Loss, tolerance: float
) -> str | None:
    """The first kind by which two parts make their whole; "none", or None where they cannot tell."""
    try:
        whole, *losses = (_tried(loss_of, batch, n_items) for batch in splitting)
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError):
        return None  # a model of rows that belong together
    if not all(map(math.isfinite, (whole, *losses))):
        return None
    for kind in kinds:
        counts = [1.0 if kind == _SHARE else _count(part, kind) for part in splitting[1:]]
        total = math.fsum(count * loss for count, loss in zip(counts, losses, strict=True))
        mean = total if kind == _SHARE else total / (math.fsum(counts) or math.nan)
        if math.isclose(mean, whole, rel_tol=tolerance, abs_tol=1e-9):
            return kind
    return "none"


def _splittings(window: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], ...]]:
    """Batches, each with two others that have its rows: its halves, or two that make it."""
    for batch, following in zip(window, [*window[1:], None], strict=True):
        rows = {len(value) if isinstance(value, Tensor) and value.dim() else 0 for value in batch.values()}
        if len(rows) != 1 or not (count := rows.pop()):
            continue
        if count > 1:
            halves = slice(count // 2), slice(count // 2, None)
            yield batch, *({key: value[half] for key, value in batch.items()} for half in halves)
        elif following is not None and _shapes(batch) == _shapes(following):
            yield {key: torch.cat([value, following[key]]) for key, value in batch.items()}, batch, following


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """True if both have the same labels, in any order."""
    labels = [batch.get("labels") for batch in (one, other)]
    sets = [value.flatten().sort().values for value in labels if isinstance(value, Tensor)]
    return len(sets) == 2 and torch.equal(*sets)


def _shapes(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: getattr(value, "shape", None) for key, value in batch.items()}
