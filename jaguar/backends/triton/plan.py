"""Tables of tensors and programs in device memory, made of slots for kernels to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from jaguar.backends.launches import State
from jaguar.backends.triton.device_scalars import DeviceScalars
from jaguar.backends.uploads import uploaded
from jaguar.method.directions import matrix_shape
from jaguar.method.params import Slot
from jaguar.triton_kernels import tables as T
from jaguar.triton_kernels.launch import BLOCK

# Constants that a kernel is compiled for, as far as it depends on a tensor and its state.
Options: TypeAlias = dict[str, Any]
# The tables of a launch differ in it: device and dtype of the parameter, and values of options.
Key: TypeAlias = tuple[Any, ...]
# Saved values lie in one buffer per device and parameter dtype.
Pool: TypeAlias = tuple[torch.device, torch.dtype]

# A saved tensor begins at a multiple of this many elements, so that its accesses are as wide as the parameter's.
_PAD = 16


@dataclass(frozen=True)
class Cut:
    """The strata of a slot (for a dense direction: its elements).

    Attributes:
        first: the first stratum that the local part meets.
        length: number of strata from there on.
        origin: where local element 0 lies on the line that is cut.
        stream: stream that chooses the places.
        strata: strata in a row of strata (block), listed elements (listed).
        at: the stratum of each local index, where tiles need it.
    """

    first: int
    length: int
    origin: int = 0
    stream: int = 0
    strata: int = 0
    at: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Table:
    """The tensors of one launch.

    Attributes:
        key: what they share.
        options: what their kernel is compiled for.
        members: their positions in the list of slots.
        tensors: the tensor table, int64 (members, columns).
        programs: the program table, int64 (programs, columns).
        ranges: first program and number of programs of each member.
        geometry: int64, what all tensors of the pool have in common.
    """

    key: Key
    options: Options
    members: list[int]
    tensors: Tensor
    programs: Tensor
    ranges: list[tuple[int, int]]
    geometry: Tensor

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        device: torch.device = self.key[0]
        return device

    @property
    def pool(self) -> Pool:
        """Key of their buffer of saved values."""
        return self.key[0], self.key[1]


@dataclass(frozen=True)
class Launch:
    """The kernel launches of one operation: a table per device, dtype and specialisation.

    Attributes:
        tables: the tables.
        parameters, state: the tensors that are written to, and whose version counters autograd looks at.
    """

    tables: list[Table]
    parameters: list[Tensor]
    state: list[Tensor]

    def written(self, again: bool = False) -> None:
        """Advances the version counters: autograd must notice what kernels wrote.

        Args:
            again: those of the parameters were advanced by this step before.
        """
        torch.autograd.graph.increment_version(self.state if again else [*self.parameters, *self.state])


class Plan:
    """Makes the tables of a list of slots, and the buffers of their saved values.

    Args:
        common: what all tensors have in common: size of strata, rest, number, lanes.
    """

    def __init__(
        self, slots: Sequence[Slot], cuts: Sequence[Cut], common: Sequence[int], numbers: DeviceScalars
    ) -> None:
        self.slots, self._cuts, self._common, self._numbers = slots, cuts, common, numbers
        # The tensors that the offsets below were made for; a tensor that became another one needs other launches.
        self._forms = [_form(slot.tensor) for slot in slots]
        self._offsets: list[int] = []
        self._totals: dict[Pool, int] = {}
        for slot, cut in zip(slots, cuts, strict=True):
            pool = slot.tensor.device, slot.tensor.dtype
            self._offsets.append(self._totals.get(pool, 0))
            self._totals[pool] = self._offsets[-1] + -(-cut.length // _PAD) * _PAD

    @property
    def pools(self) -> list[Pool]:
        """Keys of the buffers of saved values."""
        return list(self._totals)

    def check(self, state: State) -> None:
        """Raises RuntimeError for tensors that cannot be given to a kernel."""
        for slot, form in zip(self.slots, self._forms, strict=True):
            if _form(slot.tensor) != form:
                raise RuntimeError(
                    f"{slot.name} was {_described(form)} and is now {_described(_form(slot.tensor))}; make the "
                    "optimizer after changing the model"
                )
        check(self.slots, state)

    def launch(
        self, block: int, state: State, compiled_for: Callable[[Slot, tuple[Tensor, ...]], Options], tiles: bool = False
    ) -> Launch:
        """One table for every device, parameter dtype and value of `compiled_for`; of tensors that were checked.

        Args:
            block: size of a program: strata, or elements of `tiles`.
            state: one tuple per slot, of what is moved besides; empty ones for launches that move parameters only.
        """
        groups: dict[Key, list[int]] = {}
        options: dict[Key, Options] = {}
        for i, (slot, own) in enumerate(zip(self.slots, state, strict=True)):
            if slot.count:
                made = compiled_for(slot, own)
                key = slot.tensor.device, slot.tensor.dtype, *made.values()
                groups.setdefault(key, []).append(i)
                options[key] = made
        tables = [self._table(key, options[key], members, state, block, tiles) for key, members in groups.items()]
        parameters, held = [slot.tensor for slot in self.slots], [m for own in state for m in own]
        return Launch(tables, *([t for t in some if not t.is_inference()] for some in (parameters, held)))

    def saved(self, pool: Pool, n: int = 1) -> Tensor:
        """A buffer for the saved values of `n` directions, in the form that kernels load and store."""
        return torch.empty(n * self._totals[pool], dtype=T.STORAGE[pool[1]], device=pool[0])

    def listing(self, pool: Pool, indices: Sequence[Tensor]) -> Tensor:
        """Local indices of every slot where the kernels look for them; -1 where there is none."""
        table = torch.full((self._totals[pool],), -1, dtype=torch.int64, device=pool[0])
        for slot, offset, index in zip(self.slots, self._offsets, indices, strict=True):
            if (slot.tensor.device, slot.tensor.dtype) == pool:
                table[offset : offset + index.numel()] = index
        return table

    def _table(self, key: Key, options: Options, members: list[int], state: State, block: int, tiles: bool) -> Table:
        rows, programs, ranges = [], [], []
        n_programs = 0
        for t, i in enumerate(members):
            slot, cut = self.slots[i], self._cuts[i]
            row = [0] * T.WIDTH.value
            row[T.X.value] = slot.tensor.data_ptr()
            for column, own in zip((T.S0, T.S1, T.S2), state[i], strict=False):
                row[column.value] = own.data_ptr()
            row[T.COUNT.value] = slot.count
            row[T.STREAM.value] = slot.stream
            row[T.START.value] = slot.start
            row[T.DRAW.value] = cut.stream
            row[T.ORIGIN.value] = cut.origin
            row[T.SAVED.value] = self._offsets[i] - cut.first
            row[T.SCALARS.value] = self._numbers.row(slot.kind)
            row[T.N_COLUMNS.value] = matrix_shape(slot.shape)[1]
            row[T.N_STRATA.value] = cut.strata
            row[T.IS_MATRIX.value] = int(len(slot.shape) >= 2)
            row[T.SIGNED.value] = int(slot.signed)
            row[T.ACTIVE.value] = self._numbers.flag(slot)
            rows.append(row)
            begin, length = (0, slot.count) if tiles else (cut.first, cut.length)
            first = torch.arange(begin, begin + length, block, dtype=torch.int64)
            stratum = cut.at(first) if tiles and cut.at is not None else torch.zeros_like(first)
            programs.append(torch.stack((torch.full_like(first, t), first, stratum), dim=1))
            ranges.append((n_programs, first.numel()))
            n_programs += first.numel()
        common = [*self._common, self._numbers.n_directions, self._totals[key[0], key[1]]]
        tensors, program, geometry = (
            uploaded(table, key[0])
            for table in (torch.tensor(rows), torch.cat(programs), torch.tensor(common, dtype=torch.int64))
        )
        return Table(key, options, members, tensors, program, ranges, geometry)


_Form: TypeAlias = tuple[torch.dtype, torch.Size, torch.device]


def _form(tensor: Tensor) -> _Form:
    return tensor.dtype, tensor.shape, tensor.device


def _described(form: _Form) -> str:
    return f"{form[0]} of shape {tuple(form[1])} on {form[2]}"


def check(slots: Sequence[Slot], state: State) -> None:
    """Raises RuntimeError for what a kernel would read or write wrongly: it only sees addresses."""
    spans = []
    for slot, own in zip(slots, state, strict=True):
        for number, tensor in enumerate((slot.tensor, *own)):
            what = _named(slot, number, len(own))
            if tensor.device != slot.tensor.device:
                raise RuntimeError(f"{what} is on {tensor.device}, its parameter on {slot.tensor.device}")
            if tensor.dtype not in (T.FORMATS if number else T.STORAGE):
                raise RuntimeError(f"{what} has dtype {tensor.dtype}, which the Triton kernels cannot store")
            if tensor.shape != slot.tensor.shape or not tensor.is_contiguous():
                raise RuntimeError(
                    f"{what} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; the Triton kernels need a "
                    f"contiguous tensor of shape {tuple(slot.tensor.shape)}"
                )
            size = tensor.numel() * tensor.element_size()
            offset = tensor.storage_offset() * tensor.element_size()
            if tensor.untyped_storage().nbytes() < offset + size:
                raise RuntimeError(f"the storage of {what} was freed (offloaded or resharded)")
            if size:
                spans.append((str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + size, what))
    spans.sort()
    for (device, _, end, one), (other_device, begin, _, other) in pairwise(spans):
        if device == other_device and begin < end:
            raise RuntimeError(f"{one} and {other} overlap in memory")


def _named(slot: Slot, number: int, n: int) -> str:
    """Name of a tensor in messages: the parameter (number 0), its momentum, or one of its `n` state buffers."""
    if not number:
        return slot.name
    return f"the momentum of {slot.name}" if n == 1 else f"state buffer {number} of {slot.name}"


def alignment(slot: Slot, own: tuple[Tensor, ...] = ()) -> Options:
    """Tells whether accesses may be 16 bytes wide, and whether programs begin where the groups of random numbers do."""
    wide = all(tensor.data_ptr() % 16 == 0 for tensor in (slot.tensor, *own))
    return {"HINT": wide, "GROUPED": slot.start % BLOCK == 0}


def formats(own: tuple[Tensor, ...]) -> Options:
    """Storage format of each state buffer."""
    names = [T.FORMATS[tensor.dtype] for tensor in own] + ["none"] * (3 - len(own))
    return dict(zip(("S0", "S1", "S2"), names, strict=True))
