"""Directions along a random part of the layers."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from jaguar.method import rng
from jaguar.method.directions.base import Dense
from jaguar.method.directions.distributions import Gaussian
from jaguar.method.params import Slot, canonical_name, stream_of
from jaguar.method.rng import Draw, Elements, Purpose

# The layer of a parameter, where its name says it: "model.layers.3" of "model.layers.3.attention.weight".
_LAYER = re.compile(r"(?:[^.]+\.)*?\d+(?=\.)")


def _are_prefixes(layers: object) -> bool:
    if isinstance(layers, str) or not isinstance(layers, Collection) or not layers:
        return False
    return all(isinstance(layer, str) and layer.strip(".") for layer in layers)


@dataclass(frozen=True)
class Layers(Dense):
    """e along the tensors of some layers of the step, drawn without replacement, and of none besides.

    `round(keep L)` of L layers (halves to even) take part in a step, at least one; tensors outside the layers take part
    always. Those of the other layers are neither read nor written: not perturbed, not moved, not decayed.

    Attributes:
        inner: what is drawn there, another dense direction.
        keep: share of the layers, in (0, 1].
        layers: prefixes of parameter names, one per layer, of which the longest counts; None: what comes before the
            first number in a name, and the number.

    Source: arXiv 2410.09823 (LeZO), Algorithm 1.
    """

    inner: Dense = field(default_factory=Gaussian)
    keep: float = 0.25
    layers: Collection[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Dense) or isinstance(self.inner, Layers):
            raise ValueError(f"inner={self.inner!r}: give Gaussian() or Rademacher()")
        if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)) or not 0.0 < self.keep <= 1.0:
            raise ValueError(f"keep={self.keep!r}: give the share of the layers that take part in a step, in (0, 1]")
        if self.layers is not None and not _are_prefixes(self.layers):
            raise ValueError(f"layers={self.layers!r}: give prefixes of parameter names, ('model.layers.0', ...) say")
        object.__setattr__(self, "keep", float(self.keep))
        object.__setattr__(
            self, "layers", None if self.layers is None else tuple(sorted(set(map(canonical_name, self.layers))))
        )

    @property
    def name(self) -> str:  # type: ignore[override]
        """The distribution."""
        return self.inner.name

    @property
    def drawn(self) -> Dense:
        """`inner`."""
        return self.inner

    def values_of(self, draw: Draw, elements: Elements) -> Tensor:
        """e of these elements: fp32."""
        return self.inner.values_of(draw, elements)

    def units(self, slots: Sequence[Slot]) -> list[str | None]:
        """The layer of each slot, None outside the layers."""
        return [self._layer(slot.name) for slot in slots]

    def check(self, slots: Sequence[Slot]) -> None:
        """Raises ValueError if there are no layers."""
        if slots and not any(self.units(slots)):
            names = ", ".join(repr(slot.name) for slot in slots[:3])
            raise ValueError(
                f"no layers among {names}{', ...' if len(slots) > 3 else ''}: pass model.named_parameters(), or say "
                "with layers= what the names of each layer's parameters begin with"
            )

    def active(self, draw: Draw, slots: Sequence[Slot]) -> list[bool] | None:
        """The slots of the layers that are drawn, and those outside the layers; the same for all directions."""
        if self.keep == 1.0:
            return None
        units = self.units(slots)
        layers = self._among(units)
        key = Draw(draw.seed, draw.step, 0).key(Purpose.LAYERS)
        # Each layer draws a number by its own name: which ones there are besides changes nothing about it.
        streams = torch.tensor([stream_of(layer) for layer in layers], dtype=torch.int64)
        w0, w1, _, _ = rng.words(key, torch.zeros_like(streams), streams, Purpose.LAYERS)
        order = torch.argsort((w1 << 31) | (w0 >> 1)).tolist()
        drawn = {layers[i] for i in order[: self._count(layers)]}
        return [layer is None or layer in drawn for layer in units]

    def options(self) -> dict[str, Any]:
        """The fields."""
        layers = None if self.layers is None else list(self.layers)
        return self.inner.options() | {"keep": self.keep, "layers": layers}

    def shown(self, slots: Sequence[Slot]) -> str:
        """A line about it, with the layers where they were given."""
        layers = self._among(self.units(slots))
        which = "" if self.layers is None else f" ({', '.join(layers)})"
        return f"{self.inner.shown(slots)}, on {self._count(layers)} of {len(layers)} layers{which} in each step"

    def _among(self, units: Sequence[str | None]) -> list[str]:
        return sorted({layer for layer in units if layer is not None})

    def _count(self, layers: Sequence[str]) -> int:
        return max(1, round(self.keep * len(layers))) if layers else 0

    def _layer(self, name: str) -> str | None:
        if self.layers is None:
            found = _LAYER.match(name)
            return found.group() if found else None
        mine = [layer for layer in self.layers if name == layer or name.startswith(layer.rstrip(".") + ".")]
        return max(mine, key=len, default=None)
