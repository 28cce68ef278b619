"""The search of DiZO: how far along the way from where they began some tensors should be."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from jaguar.backends.reference.indexing import flat_, ranges
from jaguar.method import rng
from jaguar.method.params import Slot, is_int
from jaguar.method.rng import Draw, Elements, Purpose
from jaguar.method.rounding import compute_dtype, needs_noise, store
from jaguar.method.rule import plain, rounded
from jaguar.method.rules import SGD
from jaguar.optimizers.trials import kept


def stretched(x: Tensor, start: Tensor, scale: float) -> Tensor:
    """start + scale (x - start): the way from the start, longer or shorter.

    Source: arXiv 2502.03304 (DiZO), equation 5, with the scale in multiples of the way's length.
    Equivalent to: `start + scale * (x - start)`.
    """
    return start + (x - start) * scale


@dataclass(frozen=True)
class Projected(SGD):
    """`SGD`, and every `every` steps a search for the length of the way that some tensors have gone: see `jaguar.DiZO`.

    Attributes:
        every: steps from one search to the next.
        search_steps: two evaluations each.
        search_scale, search_lr: perturbation and learning rate of the search, in multiples of the way.
        bounds: limits of the multiple of the way that a search may leave.
        project: path components, or whole names, of the tensors.
    """

    every: int = 50
    search_steps: int = 10
    search_scale: float = 0.2
    search_lr: float = 10.0
    bounds: tuple[float, float] = (0.8, 1.2)
    project: tuple[str, ...] = ()

    called: ClassVar[str] = "DiZO"

    def __post_init__(self) -> None:
        for name in ("every", "search_steps"):
            if not is_int(value := getattr(self, name)) or value < 1:
                raise ValueError(f"{name}={value!r}: give an int of at least 1")
        for name in ("search_scale", "search_lr"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
                raise ValueError(f"{name}={value!r}: give a number above 0")
            object.__setattr__(self, name, float(value))
        bounds = self.bounds
        numbers = isinstance(bounds, (tuple, list)) and [type(b) in (int, float) for b in bounds] == [True, True]
        if not numbers or not 0.0 < bounds[0] <= 1.0 <= bounds[1] < math.inf:
            raise ValueError(f"bounds={bounds!r}: give two multiples of the way around 1, (0.8, 1.2) say")
        object.__setattr__(self, "bounds", tuple(map(float, bounds)))
        names = (self.project,) if isinstance(self.project, str) else self.project
        if not isinstance(names, Collection) or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"project={self.project!r}: give names of tensors, or components of them: ('q_proj', ...)")
        object.__setattr__(self, "project", tuple(sorted(set(names))))

    def options(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.name != "momentum"}

    def searches(self, step: int) -> bool:
        """Tells whether a search comes first in a step."""
        return step > 0 and step % self.every == 0

    def projects(self, slot: Slot) -> bool:
        """Tells whether the searches are about a tensor."""
        return slot.name in self.project or not {*slot.name.split(".")}.isdisjoint(self.project)

    def copies(self, slot: Slot, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Name of the copy that keeps where a tensor of the searches began."""
        return ("start",) if self.projects(slot) else ()

    def shown(self, groups: Sequence[Mapping[str, Any]], fraction: float, momentum: str) -> list[str]:
        """Lines about the searches: when, and by what numbers."""
        low, high = self.bounds
        search = (
            f"{self.search_steps} steps of two evaluations before every {self.every}th step, to {low:g} .. {high:g} of"
        )
        of = f"search: {search} the way, scale {self.search_scale:g}, lr {self.search_lr:g}"
        return [*super().shown(groups, fraction, momentum), of, f"  along {', '.join(self.project)}"]


@dataclass(frozen=True)
class Search:
    """One search: s of every tensor from 1 on, by `search_steps` two-sided estimates along random directions.

    Attributes:
        rule: its numbers.
        draw: the step's draw.
        slots, starts: the tensors, and where they began.
        stochastic: how what is found is rounded.
        maximize: make the loss larger.
    """

    rule: Projected
    draw: Draw
    slots: Sequence[Slot]
    starts: Sequence[Tensor]
    stochastic: bool
    maximize: bool

    def measured(self, evaluate: Callable[[], float]) -> tuple[float, ...]:
        """The losses of the search; the tensors come back, bit for bit."""
        losses: list[float] = []
        with kept([slot.tensor for slot in self.slots]) as ways:
            for j in range(self.rule.search_steps):
                s = self.scales(losses)
                for side in (1.0, -1.0):
                    for k, (slot, n) in enumerate(zip(self.slots, self._normals(j), strict=True)):
                        self._place_(slot, ways[k], self.starts[k], s[k] + side * self.rule.search_scale * n, None)
                    losses.append(evaluate())
        return tuple(losses)

    def scales(self, losses: Sequence[float]) -> list[float]:
        """s of every tensor after these losses."""
        rule, s = self.rule, [1.0] * len(self.slots)
        low, high = rule.bounds
        for j, (plus, minus) in enumerate(zip(losses[0::2], losses[1::2], strict=True)):
            r = (minus - plus if self.maximize else plus - minus) / (2.0 * rule.search_scale)
            if math.isfinite(r):  # else the step is skipped
                s = [min(max(a - rule.search_lr * r * n, low), high) for a, n in zip(s, self._normals(j), strict=True)]
        return s

    @contextmanager
    def found(self, losses: Sequence[float]) -> Iterator[None]:
        """Inside, the tensors are where the search ends; afterwards where they were, bit for bit."""
        with kept([slot.tensor for slot in self.slots]):
            self.project_(losses)
            yield

    def project_(self, losses: Sequence[float]) -> None:
        """x <- x0 + s (x - x0), rounded as the method rounds."""
        for slot, start, s in zip(self.slots, self.starts, self.scales(losses), strict=True):
            self._place_(slot, slot.tensor.detach().clone(), start, s, self.draw if self.stochastic else None)

    def _normals(self, j: int) -> list[float]:
        """The j-th standard normal of every tensor."""
        if not self.slots:
            return []
        elements = Elements([(slot.stream, j, 1) for slot in self.slots], torch.device("cpu"))
        found: list[float] = rng.normals_of(self.draw.key(Purpose.SEARCH), elements).tolist()
        return found

    @staticmethod
    def _place_(slot: Slot, x: Tensor, start: Tensor, scale: float, noise: Draw | None) -> None:
        """The tensor becomes start + scale (x - start), rounded to nearest, or with the noise of a draw."""
        dtype = slot.tensor.dtype
        wide = compute_dtype(dtype)
        scale = rounded(scale, dtype == torch.float64)
        with flat_(slot.tensor) as target, flat_(x) as values, flat_(start) as begun:
            for part in ranges(slot.count):
                here, first = values[part].to(wide), begun[part].to(wide)
                moved = torch.where(here == first, here, stretched(here, first, scale))  # -0 stays -0
                if noise is None or not needs_noise(dtype):
                    target[part] = store(moved, dtype)
                else:
                    spans = list(slot.spans(part.start, part.stop - part.start))
                    elements = Elements(spans, slot.tensor.device)
                    drawn = rng.noise16_of(noise.key(Purpose.PROJECT), elements, Purpose.PROJECT)
                    target[part] = store(moved, dtype, drawn)
