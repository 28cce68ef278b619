"""Tensors that a launch treats as one vector: a large one alone, many small ones together."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from jaguar.backends.reference.indexing import CHUNK, flat_
from jaguar.method.params import Slot
from jaguar.method.rng import Elements

# The overhead of a call of torch is more than the arithmetic of a tensor of up to this size.
_SMALL = CHUNK // 4


class Piece:
    """One slot, or several small ones that share device, dtype and the scalars of a step.

    Args:
        where: their positions in the list of slots.
        slots: the slots themselves.

    Attributes:
        count: number of elements; of several slots at most `CHUNK`.
        kind: kind of each of the slots.
    """

    def __init__(self, where: Sequence[int], slots: Sequence[Slot]) -> None:
        self.where, self.slots = where, slots
        self.counts = [slot.count for slot in slots]
        self.count = sum(self.counts)
        self.dtype, self.device = slots[0].tensor.dtype, slots[0].tensor.device
        self.kind = slots[0].kind
        self._whole = Elements([run for slot in slots for run in slot.spans(0, slot.count)], self.device)

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters."""
        return [slot.tensor for slot in self.slots]

    def elements(self, part: slice) -> Elements:
        """The logical elements of a part, which of several slots is the whole."""
        if len(self.slots) > 1:
            return self._whole
        return Elements(self.slots[0].spans(part.start, part.stop - part.start), self.device)

    def at(self, place: Tensor) -> tuple[int | Tensor, Tensor]:
        """Stream and logical index of the elements at `place`."""
        return self._whole.at(place)

    def read(self, tensors: Sequence[Tensor]) -> Tensor:
        """A copy of one tensor per slot (the parameters, or their momenta), as a vector."""
        if len(tensors) == 1:
            return tensors[0].detach().clone(memory_format=torch.contiguous_format).view(-1)
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])

    def write_(self, tensors: Sequence[Tensor], vector: Tensor) -> None:
        """Writes what `read` gave."""
        if len(tensors) == 1:
            tensors[0].copy_(vector.view(tensors[0].shape))
            return
        shaped = [x.view(tensor.shape) for x, tensor in zip(vector.split(self.counts), tensors, strict=True)]
        if vector.element_size() == 1:  # float8 has no such copy
            for tensor, x in zip(tensors, shaped, strict=True):
                tensor.copy_(x)
        else:
            torch._foreach_copy_(list(tensors), shaped)

    @contextmanager
    def flat_(self, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        """All elements as a vector that may be written to; what is no view is written back, unless something failed."""
        if len(tensors) == 1:
            with flat_(tensors[0]) as x:
                yield x
        else:
            x = self.read(tensors)
            yield x
            self.write_(tensors, x)

    @contextmanager
    def indexable_(self, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        """As `flat_`, but one tensor is itself: for `gather` and `scatter_`, which take any strides."""
        if len(tensors) == 1:
            yield tensors[0]
        else:
            with self.flat_(tensors) as x:
                yield x


def pieces(slots: Sequence[Slot], units: Sequence[Hashable]) -> list[Piece]:
    """All slots, small ones that are alike and of one unit in pieces of at most `CHUNK` elements."""
    found: list[list[int]] = []
    open_ones: dict[object, tuple[list[int], int]] = {}
    for i, slot in enumerate(slots):
        if slot.count > _SMALL:
            found.append([i])
            continue
        x = slot.tensor
        kind = x.device, x.dtype, slot.kind, slot.signed, units[i]
        members, count = open_ones.get(kind, ([], CHUNK + 1))
        if count + slot.count > CHUNK:
            members, count = [], 0
            found.append(members)
        members.append(i)
        open_ones[kind] = members, count + slot.count
    return [Piece(where, [slots[i] for i in where]) for where in found]
