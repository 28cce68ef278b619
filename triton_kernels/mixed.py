"""Launches of directions that are mixed with momentum: perturb, flip and restore; the step, which leaves the direction.

The direction is made in registers from m and two draws, and never stored but as the m of the next step. Checked against
`jaguar.backends.reference.mixed`. MASKED: as in `jaguar.triton_kernels.dense`.
"""

import triton
import triton.language as tl

from jaguar.triton_kernels import rng, rules
from jaguar.triton_kernels import tables as T
from jaguar.triton_kernels.dense import buffer, count, moved, place, remaining
from jaguar.triton_kernels.memory import as_stored, load, pointer, rows, scalar, store
from jaguar.triton_kernels.rounding import widened

# The direction's own numbers, which follow the one weight.
_FRESH = tl.constexpr(0)  # sqrt(alpha)
_SPREAD = tl.constexpr(1)  # sqrt(1 - alpha)
_BETA1 = tl.constexpr(2)
_REST1 = tl.constexpr(3)  # 1 - beta1
_BETA2 = tl.constexpr(4)
_REST2 = tl.constexpr(5)
_WEIGHT = tl.constexpr(T.OWN.value)
_OWN = tl.constexpr(T.OWN.value + 1)


@triton.jit
def _normals(k, first, j, stream, FORMAT: tl.constexpr, GROUPED: tl.constexpr):
    """Standard normal numbers of the logical elements first + j, in the compute dtype."""
    if GROUPED:
        z = rng.normals_rows(k, first >> 2, stream, j.shape[0])
    else:
        z = rng.normals_at(k, first + j, stream)
    if FORMAT == "fp64":
        z = z.to(tl.float64)
    return z


@triton.jit
def _noises(m, j, rest, keys, first, stream, own, X_FORMAT: tl.constexpr, S0: tl.constexpr, GROUPED: tl.constexpr,
            FULL: tl.constexpr):  # fmt: skip
    """z and y; S0 = "none": m is 0."""
    z = _normals(rng.key(keys, rng.DIRECTION), first, j, stream, X_FORMAT, GROUPED)
    y = _normals(rng.key(keys, rng.DIRECTION_1), first, j, stream, X_FORMAT, GROUPED) * scalar(own + _SPREAD, X_FORMAT)
    if S0 != "none":
        y = widened(load(m, j, rest, FULL), S0, X_FORMAT) + y
    return z * scalar(own + _FRESH, X_FORMAT), y


@triton.jit
def _entered(z, y, j, keys, first, stream, own, X_FORMAT: tl.constexpr, M_FORMAT: tl.constexpr,
             STOCHASTIC: tl.constexpr, GROUPED: tl.constexpr):  # fmt: skip
    """m' as it is stored."""
    mixed = rules.blend(z, y, scalar(own + _BETA1, X_FORMAT), scalar(own + _REST1, X_FORMAT))
    k = rng.key(keys, rng.ROUND_STATE)
    return as_stored(mixed, j, k, first, stream, M_FORMAT, rng.ROUND_STATE, STOCHASTIC, GROUPED)


@triton.jit
def _move_tile(x, m, saved, lost, rest, keys, first, stream, scalars, factor, JOB: tl.constexpr,
               X_FORMAT: tl.constexpr, S0: tl.constexpr, M_FORMAT: tl.constexpr, TWO_SIDED: tl.constexpr,
               STOCHASTIC: tl.constexpr, GROUPED: tl.constexpr, FULL: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    j = rows(TILE)
    if JOB == "restore":
        store(x, j, rest, load(saved, j, rest, FULL), FULL)
    else:
        v = load(saved if JOB == "flip" else x, j, rest, FULL)
        z, y = _noises(m, j, rest, keys, first, stream, scalars + _OWN, X_FORMAT, S0, GROUPED, FULL)
        e = _entered(z, y, j, keys, first, stream, scalars + _OWN, X_FORMAT, M_FORMAT, STOCHASTIC, GROUPED)
        e = widened(e, M_FORMAT, X_FORMAT)
        tau = scalar(scalars + T.TAU, X_FORMAT)
        place(x, saved, lost, j, rest, v, e, tau, factor, JOB, X_FORMAT, TWO_SIDED, FULL)


@triton.jit(do_not_specialize=["first_program"])
def move(tensors, programs, keys, scalars, active, saved, lost, first_program, factor, JOB: tl.constexpr,
         MASKED: tl.constexpr, X_FORMAT: tl.constexpr, S0: tl.constexpr, M_FORMAT: tl.constexpr,
         TWO_SIDED: tl.constexpr, STOCHASTIC: tl.constexpr, HINT: tl.constexpr, GROUPED: tl.constexpr,
         BLOCK: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """x <- x + factor tau m', rounded to nearest; m stays. JOB: as `dense.move`."""
    program = programs + (first_program + tl.program_id(0)).to(tl.int64) * T.PROGRAM
    row = tensors + tl.load(program + T.TENSOR) * T.WIDTH
    o = tl.multiple_of(tl.load(program + T.FIRST), BLOCK)
    n = count(row, active, MASKED)
    x = pointer(tl.load(row + T.X), X_FORMAT, HINT) + o
    m = buffer(row, x, o, T.S0, S0, HINT)
    saved += tl.multiple_of(tl.load(row + T.SAVED), 16) + o
    lost += tl.load(program + T.TENSOR)
    scalars += tl.load(row + T.SCALARS)
    stream = tl.load(row + T.STREAM).to(tl.uint32)
    first = tl.load(row + T.START) + o
    if o + BLOCK <= n:
        for u in range(0, BLOCK, TILE):
            _move_tile(x + u, m + u, saved + u, lost, TILE, keys, first + u, stream, scalars, factor, JOB, X_FORMAT,
                       S0, M_FORMAT, TWO_SIDED, STOCHASTIC, GROUPED, True, TILE)  # fmt: skip
    else:
        rest = remaining(n, o, MASKED)
        for u in range(0, rest, TILE):
            _move_tile(x + u, m + u, saved + u, lost, rest - u, keys, first + u, stream, scalars, factor, JOB,
                       X_FORMAT, S0, M_FORMAT, TWO_SIDED, STOCHASTIC, GROUPED, False, TILE)  # fmt: skip


@triton.jit
def _step_tile(x, m, saved, rest, keys, first, stream, scalars, factor, JOB: tl.constexpr, X_FORMAT: tl.constexpr,
               S0: tl.constexpr, STOCHASTIC: tl.constexpr, GROUPED: tl.constexpr, FULL: tl.constexpr,
               TILE: tl.constexpr):  # fmt: skip
    j = rows(TILE)
    own = scalars + _OWN
    w = widened(load(saved if JOB == "saved" else x, j, rest, FULL), X_FORMAT, X_FORMAT)
    z, y = _noises(m, j, rest, keys, first, stream, own, X_FORMAT, S0, GROUPED, FULL)
    stored = _entered(z, y, j, keys, first, stream, own, X_FORMAT, S0, STOCHASTIC, GROUPED)
    e = widened(stored, S0, X_FORMAT)
    if JOB == "walked":
        w = widened(moved(w, e, scalar(scalars + T.TAU, X_FORMAT) * factor, X_FORMAT), X_FORMAT, X_FORMAT)
    v = rules.blend(z * z, y * y, scalar(own + _BETA2, X_FORMAT), scalar(own + _REST2, X_FORMAT))
    rate = tl.load(scalars + T.LR) * tl.load(scalars + _WEIGHT)
    if X_FORMAT != "fp64":
        rate = rate.to(tl.float32)
    stepped = rules.momentum_step(w, e, scalar(scalars + T.DECAY, X_FORMAT), rate, v)
    store(m, j, rest, stored, FULL)
    k = rng.key(keys, rng.ROUND)
    store(x, j, rest, as_stored(stepped, j, k, first, stream, X_FORMAT, rng.ROUND, STOCHASTIC, GROUPED), FULL)


@triton.jit
def step(tensors, programs, keys, scalars, active, geometry, saved, factor, JOB: tl.constexpr, MASKED: tl.constexpr,
         X_FORMAT: tl.constexpr, S0: tl.constexpr, M_FORMAT: tl.constexpr, TWO_SIDED: tl.constexpr,
         STOCHASTIC: tl.constexpr, HINT: tl.constexpr, GROUPED: tl.constexpr, BLOCK: tl.constexpr,
         TILE: tl.constexpr):  # fmt: skip
    """m <- m'; x <- (1 - lr wd) x - (lr rho) m' / sqrt(v + 1e-8). JOB: as `dense.step`."""
    program = programs + tl.program_id(0).to(tl.int64) * T.PROGRAM
    row = tensors + tl.load(program + T.TENSOR) * T.WIDTH
    o = tl.multiple_of(tl.load(program + T.FIRST), BLOCK)
    n = count(row, active, MASKED)
    x = pointer(tl.load(row + T.X), X_FORMAT, HINT) + o
    m = buffer(row, x, o, T.S0, S0, HINT)
    saved += tl.multiple_of(tl.load(row + T.SAVED), 16) + o
    scalars += tl.load(row + T.SCALARS)
    stream = tl.load(row + T.STREAM).to(tl.uint32)
    first = tl.load(row + T.START) + o
    if not T.derivatives_finite(scalars + _WEIGHT, 1):
        if JOB != "plain":
            rest = remaining(tl.minimum(n, o + BLOCK), o, MASKED)
            BACK: tl.constexpr = "restore" if JOB == "saved" else "walk"
            for u in range(0, rest, TILE):
                _move_tile(x + u, m + u, saved + u, geometry, rest - u, keys, first + u, stream, scalars, factor, BACK,
                           X_FORMAT, S0, M_FORMAT, TWO_SIDED, STOCHASTIC, GROUPED, False, TILE)  # fmt: skip
    elif o + BLOCK <= n:
        for u in range(0, BLOCK, TILE):
            _step_tile(x + u, m + u, saved + u, TILE, keys, first + u, stream, scalars, factor, JOB, X_FORMAT, S0,
                       STOCHASTIC, GROUPED, True, TILE)  # fmt: skip
    else:
        rest = remaining(n, o, MASKED)
        for u in range(0, rest, TILE):
            _step_tile(x + u, m + u, saved + u, rest - u, keys, first + u, stream, scalars, factor, JOB, X_FORMAT, S0,
                       STOCHASTIC, GROUPED, False, TILE)  # fmt: skip
