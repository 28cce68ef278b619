"""Tensors that several processes hold together (DTensors of FSDP2 and tensor parallelism): the part here, the whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cut:
    """The part of a tensor that a process holds: the places from `begin` to `end` along one dimension."""

    dim: int
    begin: int
    end: int


def is_spread(tensor: Tensor) -> bool:
    """Tells whether a tensor is a DTensor."""
    return type(tensor).__name__ == "DTensor"  # its module takes a third of a second to import


def local(tensor: Tensor) -> Tensor:
    """The values that are held here, in the storage of the tensor itself; all of them, if it is no DTensor."""
    held: Tensor = tensor._local_tensor if is_spread(tensor) else tensor  # type: ignore[attr-defined]
    return held


def cut_of(tensor: Any) -> Cut | None:
    """The part of a DTensor that is held here; None: all of it.

    Along its dimension a tensor is cut as by torch.chunk: the first parts have ceil(n / processes) places, the last
    ones fewer or none.

    Raises:
        ValueError: it is cut in another way.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh, where = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    if where is None:
        raise ValueError("it lies on a mesh that this process is no part of")
    cuts = [i for i, placed in enumerate(tensor.placements) if type(placed) is not Replicate and mesh.size(i) > 1]
    if not cuts:
        return None
    if len(cuts) > 1 or type(tensor.placements[cuts[0]]) is not Shard:
        placements = ", ".join(map(str, tensor.placements))
        raise ValueError(
            f"it is placed as ({placements}), where Replicate() and, for one dimension of the mesh, Shard(dim) can be"
        )
    dim = tensor.placements[cuts[0]].dim % tensor.dim()
    n = tensor.shape[dim]
    size = -(-n // mesh.size(cuts[0]))
    begin = min(where[cuts[0]] * size, n)
    cut = Cut(dim, begin, min(begin + size, n))
    held, wanted = local(tensor), list(tensor.shape)
    wanted[dim] = cut.end - cut.begin
    if list(held.shape) != wanted and (held.numel() or cut.end > cut.begin):
        raise ValueError(f"its part here has the shape {tuple(held.shape)}, and torch.chunk's is {tuple(wanted)}")
    if type(held) not in (Tensor, nn.Parameter):
        raise ValueError(f"its part here is a {type(held).__name__}, and not a plain tensor")
    return cut


def part_of(tensor: Any) -> str:
    """Which part of a DTensor is here, in words: state of another part does not fit it."""
    mesh = tensor.device_mesh
    placements = ", ".join(map(str, tensor.placements))
    return f"({placements}) at {tuple(mesh.get_coordinate())} of {tuple(mesh.shape)} processes"


def processes_of(tensor: Any) -> list[Any]:
    """The process groups over which the parts of a DTensor are spread; none where each process has all of it."""
    spread = [i for i, placement in enumerate(tensor.placements) if placement.is_shard()]
    return [tensor.device_mesh.get_group(i) for i in spread]


def whole(tensor: Any, part: Tensor) -> Tensor:
    """All values of which every process holds the part that it holds of `tensor`, a DTensor; all processes call it."""
    from torch.distributed.tensor import DTensor

    # Bytes, because not every backend gathers eight-bit floats.
    sent = part.view(torch.uint8) if part.dtype.itemsize == 1 else part
    meta: dict[str, Any] = {"shape": tensor.shape, "stride": _contiguous(tensor.shape)}
    found: Tensor = DTensor.from_local(
        sent, tensor.device_mesh, tensor.placements, run_check=False, **meta
    ).full_tensor()
    return found.view(part.dtype)


def own(tensor: Any, values: Tensor) -> Tensor:
    """The part of all values that belongs to this process, contiguous: the way back from `whole`."""
    cut = cut_of(tensor)
    return values if cut is None else values.narrow(cut.dim, cut.begin, cut.end - cut.begin).contiguous()


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
