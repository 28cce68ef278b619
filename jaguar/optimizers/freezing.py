"""Frozen tensors: `requires_grad` is a fact of the step, not of the optimizer's construction."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence

from jaguar.method.params import Slot


class Frozen:
    """The optimizer's tensors that have requires_grad=False now.

    Attributes:
        mark: 32 bits that tell one set of frozen tensors from another, from their names; 0: none is frozen.
    """

    def __init__(self) -> None:
        self.mark = 0
        self._told: set[str] = set()

    def read(self, slots: Sequence[Slot]) -> bool:
        """Looks at every tensor; returns whether the frozen ones are others than at the last call."""
        names = [slot.name for slot in slots if not slot.parameter.requires_grad]
        before, self.mark = self.mark, mark(names)
        if names and len(names) == len(slots):
            self._tell(
                "all",
                f"all {len(slots)} tensors of the optimizer have requires_grad=False by now, so its steps move "
                "nothing: call requires_grad_() on those that should train, or make an optimizer for the adapter that "
                "does",
            )
        elif names:
            some = ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")
            self._tell(
                "some",
                f"{len(names)} of {len(slots)} tensors have requires_grad=False since the optimizer was made ({some}): "
                "they stay as they are, with their state, until they require gradients again (said once)",
            )
        return self.mark != before

    def _tell(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warnings.warn(message, stacklevel=6)


def mark(names: Sequence[str]) -> int:
    """CRC-32 of names, never 0 but for none."""
    return zlib.crc32("\0".join(names).encode()) or 1 if names else 0
