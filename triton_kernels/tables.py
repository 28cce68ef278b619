"""Tables that launches read from memory: one row per tensor, one row per program, keys and scalars of the step.

The columns are named here, once for the kernels and for the host code that fills them (`backends.triton`). Everything
that a kernel needs besides its compile-time options lies in device memory and is built once, so that a launch passes a
handful of pointers whatever the number of tensors, and captured launches read the numbers that are there at replay.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Columns of the tensor table (int64).
X = tl.constexpr(0)  # address of the parameter
S0 = tl.constexpr(1)  # addresses of its state buffers, 0 without
S1 = tl.constexpr(2)
S2 = tl.constexpr(3)
COUNT = tl.constexpr(4)  # local elements
STREAM = tl.constexpr(5)  # stream of noise and dense directions
START = tl.constexpr(6)  # logical index of the first local element
DRAW = tl.constexpr(7)  # stream of the coordinate choice
ORIGIN = tl.constexpr(8)  # where local element 0 lies on the line that strata are cut from
SAVED = tl.constexpr(9)  # what turns a stratum (coordinates) or a local index (dense) into a place among saved values
SCALARS = tl.constexpr(10)  # where the scalars of its kind begin
N_COLUMNS = tl.constexpr(11)  # columns of the matrix, 1 for a vector
N_STRATA = tl.constexpr(12)  # strata per row of strata (block), listed coordinates (listed)
IS_MATRIX = tl.constexpr(13)  # whether columns are drawn too (block)
SIGNED = tl.constexpr(14)  # whether the rule moves it, or only its state is entered
ACTIVE = tl.constexpr(15)  # which of the flags says whether it takes part in the step
WIDTH = tl.constexpr(16)

# Columns of the program table (int64).
TENSOR = tl.constexpr(0)
FIRST = tl.constexpr(1)  # first local element (tiles) or first stratum
STRATUM = tl.constexpr(2)  # first stratum of a tile
PROGRAM = tl.constexpr(3)

# Scalars of a kind (fp64): these, the rule's own numbers for its entry and its step, a weight per direction, then the
# direction's own numbers.
TAU = tl.constexpr(0)
DECAY = tl.constexpr(1)
LR = tl.constexpr(2)
OWN = tl.constexpr(3)

# What the tensors of a launch have in common (int64).
SIZE = tl.constexpr(0)  # elements per stratum, rows and columns per stratum (block), whole part of d / k (count)
REST = tl.constexpr(1)  # d mod k (count)
NUMBER = tl.constexpr(2)  # k (count)
LANES = tl.constexpr(3)  # strata that a tile can meet
DIRECTIONS = tl.constexpr(4)
TOTAL = tl.constexpr(5)  # saved values of one direction

# Words of the key table per direction: two for each of up to sixteen purposes (int64, uint32 values).
KEYS = tl.constexpr(32)

FORMATS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e5m2: "e5m2",
}
# Buffers of saved values hold what the kernels load and store: bf16 as integers.
STORAGE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float16,
    torch.bfloat16: torch.uint16,
}


@triton.jit
def derivatives_finite(weights, n_directions):
    """Checks that every direction's weight is finite; where one is not, a step restores and moves nothing."""
    finite = tl.abs(tl.load(weights)) < float("inf")
    for k in range(1, n_directions):
        finite = finite & (tl.abs(tl.load(weights + k)) < float("inf"))
    return finite
