"""Which tensors take part in a step: `requires_grad` is a fact of the step, not of the optimizer's construction."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence

from jaguar.params import Slot


class Frozen:
    """The optimizer's tensors that have requires_grad=False now.

    Attributes:
        mark: 32 bits that tell one set of frozen tensors from another, from their names; 0: none is frozen.
    """

    def __init__(self) -> None:
        self.mark = 0
        self._told = False

    def read(self, slots: Sequence[Slot]) -> bool:
        """Looks at every tensor; returns whether the frozen ones are others than at the last call.

        Raises:
            ValueError: all are frozen.
        """
        names = [slot.name for slot in slots if not slot.tensor.requires_grad]
        before, self.mark = self.mark, mark(names)
        if names and len(names) == len(slots):
            raise ValueError(
                f"no parameter to train: all {len(slots)} tensors of the optimizer have requires_grad=False by now; "
                "call requires_grad_() on those that should train"
            )
        if names and not self._told:
            self._told = True
            some = ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")
            warnings.warn(
                f"{len(names)} of {len(slots)} tensors have requires_grad=False since the optimizer was made ({some}): "
                "they stay as they are, with their state, until they require gradients again (said once)",
                stacklevel=5,
            )
        return self.mark != before


def mark(names: Sequence[str]) -> int:
    """CRC-32 of names, never 0 but for none."""
    return zlib.crc32("\0".join(names).encode()) or 1 if names else 0
