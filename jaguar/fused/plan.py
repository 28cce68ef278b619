"""From slots to what kernels read: tables of tensors and programs, keys and scalars in device memory."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from jaguar.directions import matrix_shape
from jaguar.params import Slot
from jaguar.rng import Draw, Purpose
from jaguar.rules import Scalars
from jaguar.triton_kernels import tables as T
from jaguar.triton_kernels.launch import BLOCK

# What the tensors of one launch share: device and dtype of the parameter, and what else a kernel is compiled for.
Key: TypeAlias = tuple[Any, ...]
# Saved values lie in one buffer per device and parameter dtype.
Pool: TypeAlias = tuple[torch.device, torch.dtype]

# A saved tensor begins at a multiple of this many elements, so that its accesses are as wide as the parameter's.
_PAD = 16


@dataclass(frozen=True)
class Cut:
    """How a slot is cut into strata (a dense direction: into its elements).

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
        members: their positions in the list of slots.
        tensors: the tensor table, int64 (members, columns).
        programs: the program table, int64 (programs, columns).
        ranges: first program and number of programs of each member.
        geometry: int64, what all tensors of the pool have in common.
    """

    key: Key
    members: list[int]
    tensors: Tensor
    programs: Tensor
    ranges: list[tuple[int, int]]
    geometry: Tensor

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        device: torch.device = self.key[0]
        return device

    @property
    def pool(self) -> Pool:
        """Which buffer of saved values is theirs."""
        return self.key[0], self.key[1]


@dataclass(frozen=True)
class Launch:
    """What is launched for one job: a table for every set of tensors that share a kernel.

    Attributes:
        tables: the tables.
        addresses: where the tensors were when the tables were made.
        dtypes: of the parameters, then.
        versioned: the tensors that are written to, and whose version counters autograd looks at.
    """

    tables: list[Table]
    addresses: list[int]
    dtypes: list[torch.dtype]
    versioned: list[Tensor]

    def done(self) -> None:
        """Advances the version counters: autograd must notice what kernels wrote."""
        torch.autograd.graph.increment_version(self.versioned)


class Plan:
    """The tables of a list of slots: built once, and again when an address has changed."""

    def __init__(self, slots: Sequence[Slot], cuts: Sequence[Cut], n_directions: int, common: Sequence[int]) -> None:
        self.slots, self._cuts, self._n_directions, self._common = slots, cuts, n_directions, common
        self._tensors = [slot.tensor for slot in slots]
        self._scalar_rows = scalar_rows(slots)
        # What the offsets below were made for; a tensor that became another one needs other launches.
        self._forms = [_form(tensor) for tensor in self._tensors]
        self._offsets: list[int] = []
        self._totals: dict[Pool, int] = {}
        for slot, cut in zip(slots, cuts, strict=True):
            pool = slot.tensor.device, slot.tensor.dtype
            self._offsets.append(self._totals.get(pool, 0))
            self._totals[pool] = self._offsets[-1] + -(-cut.length // _PAD) * _PAD
        self._built: dict[Any, Launch] = {}

    def forget(self) -> None:
        """Tables are made anew, from tensors as they are now."""
        self._built.clear()

    def launch(
        self,
        block: int,
        momenta: Sequence[Tensor | None] | None = None,
        compiled_for: Callable[[Slot, Tensor | None], Key] = lambda slot, m: (),
        tiles: bool = False,
    ) -> Launch:
        """One table for every device, parameter dtype and value of `compiled_for`.

        Args:
            block: size of a program: strata, or elements of `tiles`.
            momenta: one per slot, for launches that move them.

        Raises:
            RuntimeError: a tensor cannot be given to a kernel; nothing was launched.
        """
        addresses = list(map(Tensor.data_ptr, self._tensors))
        if momenta is not None:
            addresses += [0 if m is None else m.data_ptr() for m in momenta]
        which = block, tiles, momenta is None
        dtypes = [tensor.dtype for tensor in self._tensors]  # an address can come back with another tensor
        if which not in self._built or (self._built[which].addresses, self._built[which].dtypes) != (addresses, dtypes):
            self._built[which] = self._made(addresses, dtypes, momenta, block, compiled_for, tiles)
        return self._built[which]

    def _made(
        self,
        addresses: list[int],
        dtypes: list[torch.dtype],
        momenta: Sequence[Tensor | None] | None,
        block: int,
        compiled_for: Callable[[Slot, Tensor | None], Key],
        tiles: bool,
    ) -> Launch:
        of = [None] * len(self.slots) if momenta is None else momenta
        for slot, form in zip(self.slots, self._forms, strict=True):
            if _form(slot.tensor) != form:
                raise RuntimeError(
                    f"{slot.name} was {_described(form)} and is now {_described(_form(slot.tensor))}; make the "
                    "optimizer after changing the model"
                )
        check(self.slots, of)
        groups: dict[Key, list[int]] = {}
        for i, (slot, m) in enumerate(zip(self.slots, of, strict=True)):
            if slot.count:
                key = slot.tensor.device, slot.tensor.dtype, *compiled_for(slot, m)
                groups.setdefault(key, []).append(i)
        written = [t for t in (*self._tensors, *of) if t is not None and not t.is_inference()]
        tables = [self._table(key, members, of, block, tiles) for key, members in groups.items()]
        return Launch(tables, addresses, dtypes, written)

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

    def _table(self, key: Key, members: list[int], momenta: Sequence[Tensor | None], block: int, tiles: bool) -> Table:
        rows, programs, ranges = [], [], []
        n_programs = 0
        for t, i in enumerate(members):
            slot, m, cut = self.slots[i], momenta[i], self._cuts[i]
            row = [0] * T.WIDTH.value
            row[T.X.value] = slot.tensor.data_ptr()
            row[T.M.value] = 0 if m is None else m.data_ptr()
            row[T.COUNT.value] = slot.count
            row[T.STREAM.value] = slot.stream
            row[T.START.value] = slot.start
            row[T.DRAW.value] = cut.stream
            row[T.ORIGIN.value] = cut.origin
            row[T.SAVED.value] = self._offsets[i] - cut.first
            row[T.SCALARS.value] = self._scalar_rows[i] * scalar_width(self._n_directions)
            row[T.N_COLUMNS.value] = matrix_shape(slot.shape)[1]
            row[T.N_STRATA.value] = cut.strata
            row[T.IS_MATRIX.value] = int(len(slot.shape) >= 2)
            row[T.SIGNED.value] = int(slot.signed)
            rows.append(row)
            begin, length = (0, slot.count) if tiles else (cut.first, cut.length)
            first = torch.arange(begin, begin + length, block, dtype=torch.int64)
            stratum = cut.at(first) if tiles and cut.at is not None else torch.zeros_like(first)
            programs.append(torch.stack((torch.full_like(first, t), first, stratum), dim=1))
            ranges.append((n_programs, first.numel()))
            n_programs += first.numel()
        common = [*self._common, self._n_directions, self._totals[key[0], key[1]]]
        tensors, program, geometry = (
            table.to(key[0])
            for table in (torch.tensor(rows), torch.cat(programs), torch.tensor(common, dtype=torch.int64))
        )
        return Table(key, members, tensors, program, ranges, geometry)


class Numbers:
    """Keys and scalars of a step in the memory of every device that launches read them on.

    The buffers stay where they are: a CUDA graph that captured launches (not `write`, which copies from the host) reads
    the numbers that were written last. `purposes` are those that the launches draw for.
    """

    def __init__(self, slots: Sequence[Slot], n_directions: int, purposes: Sequence[Purpose]) -> None:
        self._n_directions, self._purposes = n_directions, purposes
        self._rows = scalar_rows(slots)
        self._first_of = {row: i for i, row in reversed(list(enumerate(self._rows)))}
        self._n_keys = n_directions * T.KEYS.value
        self._size = self._n_keys + (max(self._rows) + 1) * scalar_width(n_directions)
        self._words: dict[Draw, list[int]] = {}
        devices = dict.fromkeys(slot.tensor.device for slot in slots)
        with torch.inference_mode(False):  # made in inference mode they could not be written to outside it
            self._buffers = {device: torch.zeros(self._size, dtype=torch.int64, device=device) for device in devices}

    def keys(self, device: torch.device) -> Tensor:
        """Two words for each purpose of each direction: int64."""
        return self._buffers[device][: self._n_keys]

    def scalars(self, device: torch.device) -> Tensor:
        """tau, beta, decay, lr, then rho and entry of each direction, per row of scalars: fp64."""
        return self._buffers[device][self._n_keys :].view(torch.float64)

    def arguments(self, table: Table) -> tuple[Tensor, ...]:
        """What every launch takes first."""
        keys, scalars = self.keys(table.device), self.scalars(table.device)
        return table.tensors, table.programs, keys, scalars, table.geometry

    def write(
        self, draws: Sequence[Draw], scalars: Sequence[Scalars] | None = None, taus: Sequence[float] = ()
    ) -> None:
        """Puts a step's numbers where the next launches read them: `scalars` per slot, or only `taus`.

        Single launches read the first of `draws`.
        """
        words = [0] * self._n_keys
        for k, draw in enumerate(draws):
            if draw not in self._words:
                self._words = {d: w for d, w in self._words.items() if d.step == draw.step}
                own = self._words[draw] = [0] * T.KEYS.value
                for purpose in self._purposes:
                    own[2 * purpose : 2 * purpose + 2] = draw.key(purpose)
            words[k * T.KEYS.value : (k + 1) * T.KEYS.value] = self._words[draw]
        width = scalar_width(self._n_directions)
        numbers = [0.0] * (self._size - self._n_keys)
        for row, i in self._first_of.items():  # the slots of a row have the same
            values = [taus[i]] if scalars is None else _in_order(scalars[i])
            numbers[row * width : row * width + len(values)] = values
        packed = bytearray(struct.pack(f"={self._n_keys}q{len(numbers)}d", *words, *numbers))
        together = torch.frombuffer(packed, dtype=torch.int64)
        for device, buffer in self._buffers.items():
            # From pinned memory the copy does not wait for the work that the device still has to do.
            buffer.copy_(together.pin_memory() if device.type == "cuda" else together, non_blocking=True)


_Form: TypeAlias = tuple[torch.dtype, torch.Size, torch.device]


def _form(tensor: Tensor) -> _Form:
    return tensor.dtype, tensor.shape, tensor.device


def _described(form: _Form) -> str:
    return f"{form[0]} of shape {tuple(form[1])} on {form[2]}"


def scalar_rows(slots: Sequence[Slot]) -> list[int]:
    """Which row of scalars each slot reads; slots of one group, precision, rate and gain share one."""
    kinds = [(slot.group, slot.tensor.dtype == torch.float64, slot.rate, slot.gain) for slot in slots]
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    return [numbers[kind] for kind in kinds]


def _in_order(s: Scalars) -> list[float]:
    """The scalars of a group in the order of the table."""
    return [s.tau, s.beta, s.decay, s.lr, *(value for pair in zip(s.rho, s.entry, strict=True) for value in pair)]


def scalar_width(n_directions: int) -> int:
    """Scalars of one group and compute dtype."""
    return int(T.RHO.value) + 2 * n_directions


def check(slots: Sequence[Slot], momenta: Sequence[Tensor | None]) -> None:
    """Raises RuntimeError for what a kernel would read or write wrongly: it only sees addresses."""
    spans = []
    for slot, m in zip(slots, momenta, strict=True):
        for what, tensor in ((slot.name, slot.tensor), (f"the momentum of {slot.name}", m)):
            if tensor is None:
                continue
            if tensor.device != slot.tensor.device:
                raise RuntimeError(f"{what} is on {tensor.device}, its parameter on {slot.tensor.device}")
            if tensor.dtype not in (T.FORMATS if tensor is m else T.STORAGE):
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


def alignment(slot: Slot, m: Tensor | None) -> tuple[bool, bool]:
    """Whether accesses may be 16 bytes wide, and whether programs begin where the groups of random numbers do."""
    pointers = [slot.tensor.data_ptr()] if m is None else [slot.tensor.data_ptr(), m.data_ptr()]
    return all(pointer % 16 == 0 for pointer in pointers), slot.start % BLOCK == 0
