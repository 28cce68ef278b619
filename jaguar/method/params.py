"""Trained tensors: names, streams, groups, shards, tied tensors once, and every refusal with its reason."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jaguar.method import distributed

PARAMETER_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Wrappers (DDP, torch.compile, FSDP) insert a path component; the parameter is the same with and without.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module)\.")


def canonical_name(name: str) -> str:
    """`name` without the path components that wrappers insert: `module.`, `_orig_mod.`, `_fsdp_wrapped_module.`."""
    return _WRAPPERS.sub("", name)


def stream_of(name: str) -> int:
    """The stream id of a named tensor: 32-bit BLAKE2b of its canonical name, little-endian."""
    return int.from_bytes(hashlib.blake2b(canonical_name(name).encode(), digest_size=4).digest(), "little")


class Kind(NamedTuple):
    """The key of a step's scalars; `double`: arithmetic is in fp64; `rate` and `gain` as in `Slot`."""

    group: int
    double: bool
    rate: float
    gain: float


@dataclass(frozen=True)
class Shard:
    """A part of a logical tensor, held here: rows of `width` elements that begin `pitch` apart.

    Local element j (row-major) is logical element start + (j // width) pitch + j % width. Of a (rows, columns) tensor
    rows a to b are `Shard((rows, columns), a * columns)`, columns a to b are `Shard((rows, columns), a, b - a,
    columns)`.

    Attributes:
        shape: shape of the logical tensor.
        start: logical index of the first local element.
        width, pitch: numbers of the rows; None: one row, whatever is held.
    """

    shape: tuple[int, ...]
    start: int = 0
    width: int | None = None
    pitch: int | None = None

    def __post_init__(self) -> None:
        if (self.width is None) != (self.pitch is None):
            raise ValueError(f"{self}: give width and pitch, or neither where the part is one run of elements")
        if self.start < 0 or (self.width is not None and self.pitch is not None and not 0 < self.width <= self.pitch):
            raise ValueError(f"{self}: start must be at least 0, and 0 < width <= pitch")


@dataclass(frozen=True, eq=False)
class Slot:
    """One trained tensor, or the part of it that is held here.

    Attributes:
        name: canonical name, or `#position` where names are not known.
        tensor: the local values, any strides; which logical elements they are: `Shard`.
        stream: uint32 id that separates this tensor's random numbers from every other tensor's.
        group: index of its parameter group.
        shape: shape of the whole logical tensor.
        start: logical index of the first local element; 0 unless the tensor is a shard.
        width, pitch: numbers of a shard's rows; None: local element j is logical element `start + j`.
        rate: its learning rate as a multiple of its group's.
        gain: length of its step as a multiple of its learning rate; weight decay has no part in it.
        signed: the rule moves it; else its launches update its state only, and something else moves it.
        matrices: rows and columns of its matrices, where directions know of them.
        kept: a row that stays as it is, of the logical tensor.
        spread: the DTensor whose part `tensor` is.
    """

    name: str
    tensor: Tensor
    stream: int
    group: int
    shape: torch.Size
    start: int = 0
    width: int | None = None
    pitch: int | None = None
    rate: float = 1.0
    gain: float = 1.0
    signed: bool = True
    matrices: tuple[int, int] | None = None
    kept: int | None = None
    spread: Tensor | None = None

    @property
    def parameter(self) -> Tensor:
        """What the optimizer's group has, and its state belongs to: `tensor` itself, or the DTensor that it is of."""
        return self.tensor if self.spread is None else self.spread

    @property
    def kept_here(self) -> int | None:
        """The row of `tensor` that stays as it is."""
        if self.kept is None or self.spread is None:
            return self.kept
        row = self.kept - self.start // math.prod(self.shape[1:])
        return row if 0 <= row < len(self.tensor) else None

    @property
    def count(self) -> int:
        """Number of local elements."""
        return self.tensor.numel()

    @property
    def total(self) -> int:
        """Number of elements of the whole logical tensor."""
        return math.prod(self.shape)

    @property
    def kind(self) -> Kind:
        """Key of the scalars that it reads."""
        return Kind(self.group, self.tensor.dtype == torch.float64, self.rate, self.gain)

    @property
    def end(self) -> int:
        """One past the logical index of the last local element."""
        if self.width is None or self.pitch is None or not self.count:
            return self.start + self.count
        last = self.count - 1
        return self.start + last // self.width * self.pitch + last % self.width + 1

    def spans(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """Stream, first logical element and length of the runs that local elements from `first` on are."""
        if self.width is None or self.pitch is None:
            return [(self.stream, self.start + first, count)]
        found = []
        while count > 0:
            row, column = divmod(first, self.width)
            length = min(count, self.width - column)
            found.append((self.stream, self.start + row * self.pitch + column, length))
            first, count = first + length, count - length
        return found


def is_int(value: Any) -> bool:
    """Tells whether `value` is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def named_entries(params: Any) -> Iterator[tuple[str | None, Tensor]]:
    """(name or None, tensor) of a tensor, an iterable of tensors, or an iterable of (name, tensor)."""
    if isinstance(params, Tensor):
        params = [params]
    if not isinstance(params, Iterable):
        raise TypeError(f"params must be tensors, dicts or model.named_parameters(), got {type(params).__name__}")
    for entry in params:
        name, tensor = entry if isinstance(entry, tuple) else (None, entry)
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"a parameter must be a torch.Tensor, got {type(tensor).__name__}; "
                "pass model.parameters() or model.named_parameters()"
            )
        yield name, tensor


def check_tensor(label: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor that cannot be perturbed in place element by element."""
    if tensor.is_meta:
        raise ValueError(
            f"{label} is on the meta device and has no values; materialise the model first. What accelerate has "
            "offloaded (a device_map with more than the GPUs hold) cannot be trained, only frozen: train an adapter"
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{label} is sparse ({tensor.layout}); only dense tensors can be trained")
    if distributed.is_spread(tensor):
        try:
            distributed.cut_of(tensor)
        except ValueError as error:
            raise ValueError(f"{label} is a DTensor, and {error}") from None
        tensor = distributed.local(tensor)
    if tensor.is_quantized or tensor.dtype not in PARAMETER_DTYPES:
        raise ValueError(
            f"{label} has dtype {tensor.dtype}; trainable dtypes are "
            + ", ".join(str(d) for d in PARAMETER_DTYPES)
            + " (set requires_grad=False on integer or quantised weights and train an adapter)"
        )
    if _overlaps_itself(tensor):
        raise ValueError(
            f"{label} overlaps itself (shape {tuple(tensor.shape)}, strides {tensor.stride()}); "
            "pass tensor.contiguous() or the tensor that was expanded"
        )


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors exactly when they are tied: same storage, offset, shape and strides.

    Empty tensors (those of which this process has nothing, too) share an address without being tied.
    """
    tensor, given = distributed.local(tensor), tensor
    if not tensor.numel():
        return (id(given),)
    return (
        tensor.device,
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
    )


def build_slots(groups: list[dict[str, Any]], shards: Mapping[str, Shard] | None = None) -> list[Slot]:
    """The slots of torch parameter groups, in canonical order; tied tensors must already be there once.

    Args:
        shards: by name (`#position` where names are not known), the tensors that are parts of bigger ones; names of
            groups to come may be among them.

    Raises ValueError where two names share a canonical name or a stream, two tensors overlap in memory, or a shard is
    larger than its tensor.
    """
    parts = {canonical_name(name): shard for name, shard in (shards or {}).items()}
    slots: list[Slot] = []
    for index, group in enumerate(groups):
        names = group.get("param_names") or [None] * len(group["params"])
        for name, tensor in zip(names, group["params"], strict=True):
            position = len(slots)
            label = canonical_name(name) if name is not None else f"#{position}"
            stream = stream_of(name) if name is not None else position
            if label in parts and distributed.is_spread(tensor):
                raise ValueError(
                    f"{label} is a DTensor, which says itself what part of it is here: leave it out of shards"
                )
            slots.append(_part(_slot(label, tensor, stream, index), parts.get(label)))
    seen: dict[int, str] = {}
    for slot in slots:
        if slot.stream in seen:
            other = seen[slot.stream]
            what = "the same canonical name" if other == slot.name else "the same 32-bit stream id"
            raise ValueError(f"parameters {other!r} and {slot.name!r} have {what}; rename one of them")
        seen[slot.stream] = slot.name
    _refuse_overlaps(slots)
    if slots and not slots[0].name.startswith("#"):
        slots.sort(key=lambda slot: slot.name)
    return slots


def check_shards(shards: Mapping[str, Shard], slots: Iterable[Slot]) -> None:
    """Raises ValueError for names that none of all slots has."""
    unknown = {canonical_name(name) for name in shards} - {slot.name for slot in slots}
    if unknown:
        raise ValueError(f"shards names {', '.join(map(repr, sorted(unknown)))}, and no parameter has this name")


def _slot(name: str, tensor: Tensor, stream: int, group: int) -> Slot:
    if not distributed.is_spread(tensor):
        return Slot(name, tensor, stream, group, tensor.shape)
    slot = Slot(name, distributed.local(tensor), stream, group, tensor.shape, spread=tensor)
    cut = distributed.cut_of(tensor)
    if cut is None or not slot.count:
        return slot
    row = math.prod(tensor.shape[cut.dim + 1 :])  # elements per place along the dimension
    rows = ((cut.end - cut.begin) * row, tensor.shape[cut.dim] * row) if cut.dim else (None, None)
    return _part(slot, Shard(tuple(tensor.shape), cut.begin * row, *rows))


def _part(slot: Slot, shard: Shard | None) -> Slot:
    if shard is None:
        return slot
    made = replace(slot, shape=torch.Size(shard.shape), start=shard.start, width=shard.width, pitch=shard.pitch)
    if made.end > made.total:
        raise ValueError(f"{slot.name} holds {slot.count} elements, and {shard} has no room for them")
    return made


def _extent(tensor: Tensor) -> int:
    """Storage elements from the first to one past the last element of `tensor`."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _overlaps_itself(tensor: Tensor) -> bool:
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and tensor.numel() > 0:
            if stride < reach:
                return True
            reach += (size - 1) * stride
    return False


def _refuse_overlaps(slots: list[Slot]) -> None:
    """Interleaved views (columns of one matrix) are fine as long as no element is shared."""
    spans = []
    for slot in slots:
        if slot.count:
            begin = slot.tensor.data_ptr()
            spans.append(
                (str(slot.tensor.device), begin, begin + _extent(slot.tensor) * slot.tensor.element_size(), slot)
            )
    spans.sort(key=lambda span: span[:3])
    open_spans: list[tuple[str, int, int, Slot]] = []
    for device, begin, end, slot in spans:
        open_spans = [span for span in open_spans if span[0] == device and span[2] > begin]
        for _, other_begin, other_end, other in open_spans:
            if _share_bytes(other, other_begin, slot, begin, max(end, other_end)):
                raise ValueError(
                    f"parameters {other.name!r} and {slot.name!r} overlap in memory without being the same "
                    "tensor; pass the tensor they are views of"
                )
        open_spans.append((device, begin, end, slot))


def _share_bytes(a: Slot, a_begin: int, b: Slot, b_begin: int, end: int) -> bool:
    touched = torch.zeros(end - a_begin, dtype=torch.bool)
    for slot, begin in ((a, a_begin), (b, b_begin)):
        width = slot.tensor.element_size()
        shape = (*slot.tensor.shape, width)
        stride = (*(s * width for s in slot.tensor.stride()), 1)
        view = touched.as_strided(shape, stride, begin - a_begin)
        if slot is b and bool(view.any()):
            return True
        view.fill_(True)
    return False


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on `device`, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not a POSIX system: prefer the path that needs no copy
        return 0
