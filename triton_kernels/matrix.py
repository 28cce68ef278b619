"""The step along matrices that are given: x <- (1 - lr wd) x - lr O, one launch for all of them.

Checked against `jaguar.backends.reference.matrix`.
"""

import triton
import triton.language as tl

from jaguar.triton_kernels import rng, rules
from jaguar.triton_kernels import tables as T
from jaguar.triton_kernels.memory import as_stored, load, pointer, rows, scalar, store
from jaguar.triton_kernels.rounding import widened


@triton.jit
def _along_tile(x, o, rest, k, first, stream, decay, lr, X_FORMAT: tl.constexpr, O_FORMAT: tl.constexpr,
                FULL: tl.constexpr, STOCHASTIC: tl.constexpr, GROUPED: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    j = rows(TILE)
    g = widened(load(o, j, rest, FULL), O_FORMAT, X_FORMAT)
    y = rules.sgd_step(widened(load(x, j, rest, FULL), X_FORMAT, X_FORMAT), g, decay, lr)
    store(x, j, rest, as_stored(y, j, k, first, stream, X_FORMAT, rng.ROUND, STOCHASTIC, GROUPED), FULL)


@triton.jit
def along(tensors, programs, keys, scalars, geometry, X_FORMAT: tl.constexpr, O_FORMAT: tl.constexpr,
          STOCHASTIC: tl.constexpr, HINT: tl.constexpr, GROUPED: tl.constexpr, BLOCK: tl.constexpr,
          TILE: tl.constexpr):  # fmt: skip
    """x <- (1 - lr wd) x - lr O, O at the table's address S0. HINT, GROUPED: as `coordinate.tiles`."""
    program = programs + tl.program_id(0).to(tl.int64) * T.PROGRAM
    row = tensors + tl.load(program + T.TENSOR) * T.WIDTH
    begin = tl.multiple_of(tl.load(program + T.FIRST), BLOCK)
    n = tl.load(row + T.COUNT)
    x = pointer(tl.load(row + T.X), X_FORMAT, HINT) + begin
    o = pointer(tl.load(row + T.S0), O_FORMAT, HINT) + begin
    scalars += tl.load(row + T.SCALARS)
    decay, lr = scalar(scalars + T.DECAY, X_FORMAT), scalar(scalars + T.LR, X_FORMAT)
    k = rng.key(keys, rng.ROUND)
    stream = tl.load(row + T.STREAM).to(tl.uint32)
    start = tl.load(row + T.START)
    if GROUPED:
        start = tl.multiple_of(start, BLOCK)
    start += begin
    if begin + BLOCK <= n:
        for u in range(0, BLOCK, TILE):
            _along_tile(x + u, o + u, TILE, k, start + u, stream, decay, lr,
                        X_FORMAT, O_FORMAT, True, STOCHASTIC, GROUPED, TILE)  # fmt: skip
    else:
        rest = (n - begin).to(tl.int32)
        for u in range(0, rest, TILE):
            _along_tile(x + u, o + u, rest - u, k, start + u, stream, decay, lr,
                        X_FORMAT, O_FORMAT, False, STOCHASTIC, GROUPED, TILE)  # fmt: skip
