"""What a launch reads from memory: one row per tensor, one row per program, keys and scalars of the step.

Everything that a kernel needs besides its compile-time options lies in device memory and is built once, so that a
launch passes a handful of pointers whatever the number of tensors, and a captured CUDA graph can be replayed with
new numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of the tensor table (int64).
X = tl.constexpr(0)  # address of the parameter
M = tl.constexpr(1)  # address of the momentum, 0 without
COUNT = tl.constexpr(2)  # local elements
STREAM = tl.constexpr(3)  # stream of noise and dense directions
START = tl.constexpr(4)  # logical index of the first local element
DRAW = tl.constexpr(5)  # stream of the coordinate choice
ORIGIN = tl.constexpr(6)  # where local element 0 lies on the line that strata are cut from
SAVED = tl.constexpr(7)  # what turns a stratum (coordinates) or a local index (dense) into a place among saved values
SCALARS = tl.constexpr(8)  # where the scalars of its group begin
N_COLUMNS = tl.constexpr(9)  # columns of the matrix, 1 for a vector
N_STRATA = tl.constexpr(10)  # strata per row of strata (block), listed coordinates (listed)
IS_MATRIX = tl.constexpr(11)  # whether columns are drawn too (block)
WIDTH = tl.constexpr(12)

# Columns of the program table (int64).
TENSOR = tl.constexpr(0)
FIRST = tl.constexpr(1)  # first local element (tiles) or first stratum
STRATUM = tl.constexpr(2)  # first stratum of a tile
PROGRAM = tl.constexpr(3)

# Scalars of a group (fp64): tau, beta, decay, lr, then rho and entry of each direction.
TAU = tl.constexpr(0)
BETA = tl.constexpr(1)
DECAY = tl.constexpr(2)
LR = tl.constexpr(3)
RHO = tl.constexpr(4)
ENTRY = tl.constexpr(5)

# Geometry of the strata (int64).
SIZE = tl.constexpr(0)  # elements per stratum, rows and columns per stratum (block), whole part of d / k (count)
REST = tl.constexpr(1)  # d mod k (count)
NUMBER = tl.constexpr(2)  # k (count)
DIRECTIONS = tl.constexpr(3)
TOTAL = tl.constexpr(4)  # saved values of one direction
LANES = tl.constexpr(5)  # strata that a tile can meet

# Words of the key table per direction: two for each of eight purposes (int64, uint32 values).
KEYS = tl.constexpr(16)

FORMATS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e5m2: "e5m2",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a launch.

    Attributes:
        x: the parameter, contiguous.
        m: its momentum, contiguous, or None.
        stream: uint32 id of its random numbers.
        start: logical index of the first local element.
        shape: (rows, columns) of the whole logical tensor, (n, 1) for a vector.
        matrix: whether it has two dimensions or more.
        group: its parameter group.
        base: where the whole tensor begins in the concatenation of all tensors (a number of coordinates).
    """

    x: Tensor
    m: Tensor | None
    stream: int
    start: int
    shape: tuple[int, int]
    matrix: bool
    group: int
    base: int = 0


def programs(lengths: Sequence[int], firsts: Sequence[int], block: int, device: torch.device) -> Tensor:
    """The program table: tensor t gets ceil(length / block) programs at firsts[t], firsts[t] + block, ..."""
    rows = []
    for t, (length, first) in enumerate(zip(lengths, firsts, strict=True)):
        offset = torch.arange(first, first + length, block, dtype=torch.int64)
        rows.append(torch.stack((torch.full_like(offset, t), offset, torch.zeros_like(offset)), dim=1))
    table = torch.cat(rows) if rows else torch.empty((0, PROGRAM.value), dtype=torch.int64)
    return table.to(device)


def scalar_width(n_directions: int) -> int:
    """Scalars of one group."""
    return RHO.value + 2 * n_directions


@triton.jit
def derivatives_finite(scalars, n_directions):
    """Whether rho is finite along every direction; where it is not, a step restores and moves nothing."""
    finite = tl.abs(tl.load(scalars + RHO)) < float("inf")
    for k in range(1, n_directions):
        finite = finite & (tl.abs(tl.load(scalars + RHO + 2 * k)) < float("inf"))
    return finite
