"""No speed without parity: an optimizer must compute the reference's bits on the very tensors that are timed.

The reference is far too slow for whole models, so it computes windows of some tensors, as shards of them: a step's
numbers depend on logical indices only. Compared are both evaluations' parameters, restored parameters, the parameters
after the step, and momentum; once for step(closure) and once for measure + apply_, which launch different kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jaguar.method.params import Shard
from step.shapes import Named

# Elements per window: a few programs of 8192, and a tail.
_LENGTH = 20_000


class Mismatch(Exception):
    """Something that should be equal is not."""


class Losses:
    """A closure that costs nothing: two losses that lie ready, in turn."""

    values = (0.71, 0.64)

    def __init__(self, device: torch.device) -> None:
        self._calls = 0
        self.place(device)

    def place(self, device: torch.device) -> None:
        """Where the losses lie: on a GPU reading one waits for it, as after a real forward pass; on the CPU not."""
        self._ready = [torch.tensor(value, device=device) for value in self.values]

    def __call__(self) -> Tensor:
        """The next of the two."""
        self._calls += 1
        return self._ready[(self._calls - 1) % 2]


@dataclass(frozen=True)
class Window:
    """Elements begin .. end of a tensor in row-major order."""

    name: str
    shape: torch.Size
    begin: int
    end: int

    def of(self, tensor: Tensor) -> Tensor:
        """The window as a view."""
        return tensor.detach().view(-1)[self.begin : self.end]


def windows(named: Named) -> list[Window]:
    """The beginning of the first and the end of the last tensor of every shape."""
    first = {p.shape: (name, p) for name, p in reversed(named)}
    last = {p.shape: (name, p) for name, p in named}
    found = [Window(name, p.shape, 0, min(p.numel(), _LENGTH)) for name, p in first.values()]
    for name, p in last.values():
        if name != first[p.shape][0]:
            found.append(Window(name, p.shape, max(0, p.numel() - _LENGTH), p.numel()))
    return found


def expect_bits(got: Tensor, wanted: Tensor, what: str) -> None:
    """Raises Mismatch unless two tensors have the same bytes."""
    a, b = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (got, wanted))
    if not torch.equal(a, b):
        wrong = (got.reshape(-1).float() != wanted.reshape(-1).float()).nonzero().view(-1)
        where = (
            f"first at {int(wrong[0])}: {float(got.reshape(-1)[wrong[0]])!r}, reference "
            f"{float(wanted.reshape(-1)[wrong[0]])!r}"
            if wrong.numel()
            else "in the sign of a zero"
        )
        raise Mismatch(f"{what} differs in {max(1, wrong.numel())} of {got.numel()} elements, {where}")


def expect_close(got: Tensor, wanted: Tensor, what: str, tolerance: float = 2.0**-7) -> None:
    """Raises Mismatch unless |got - wanted| <= tolerance (|wanted| + 1) everywhere."""
    error = (got.float() - wanted.float()).abs() / (wanted.float().abs() + 1.0)
    if not bool((error <= tolerance).all()):  # NaN is not
        raise Mismatch(f"{what} is off by up to {float(error.max()):.3g}, allowed is {tolerance:.3g}")


def check(named: Named, make: Callable[..., Any]) -> Any:
    """An optimizer of the Triton backend over `named`, two steps after its beginning, both equal to the reference.

    Args:
        make: (named tensors, backend=..., shards=...) -> optimizer.

    Raises:
        Mismatch: a bit differs; the message says where.
    """
    chosen = {window.name: window for window in windows(named)}
    whole = {name: p for name, p in named if name in chosen}
    parts = {name: nn.Parameter(chosen[name].of(p).clone()) for name, p in whole.items()}
    shards = {window.name: Shard(window.shape, window.begin) for window in chosen.values()}
    ours, reference = make(named, backend="triton"), make(list(parts.items()), backend="reference", shards=shards)

    def states(optimizer: Any, tensors: dict[str, nn.Parameter], cut: Callable[[str, Tensor], Tensor]) -> list[Tensor]:
        seen: list[Tensor] = []
        losses = Losses(next(iter(tensors.values())).device)

        def look(parameters_only: bool = True) -> None:
            for name, p in tensors.items():
                seen.append(cut(name, p).clone())
                momentum = optimizer.state[p].get("momentum")
                if momentum is not None and not parameters_only:
                    seen.append(cut(name, momentum).clone())

        def closure() -> Tensor:
            look()
            return losses()

        optimizer.step(closure)
        look(parameters_only=False)
        record = optimizer.measure(closure)
        look()
        optimizer.apply_(record)
        look(parameters_only=False)
        return seen

    got = states(ours, whole, lambda name, t: chosen[name].of(t))
    wanted = states(reference, parts, lambda name, t: t.detach())
    if len(got) != len(wanted):
        raise Mismatch(f"the backends keep different state: {len(got)} and {len(wanted)} tensors")
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        expect_bits(a, b, f"window {i} of {len(got)}")
    return ours
