"""Launches of dense directions: perturb, flip and restore; entry into state and step. One launch for all tensors.

z is made in registers and never stored. Checked against `backends.reference.dense`. MASKED: only tensors whose flag in
`active` is 1 are read or written.
"""

import triton
import triton.language as tl

from jaguar.triton_kernels import rng, rules
from jaguar.triton_kernels import tables as T
from jaguar.triton_kernels.memory import as_stored, load, pointer, rows, scalar, scalars_at, store
from jaguar.triton_kernels.rounding import nearest, widened


@triton.jit
def _direction(k, first, j, stream, DISTRIBUTION: tl.constexpr, GROUPED: tl.constexpr):
    """z of the logical elements first + j: fp32 [R, 8]."""
    if DISTRIBUTION == "rademacher":
        if GROUPED:
            return rng.signs_rows(k, first >> 7, stream, j.shape[0])
        else:
            return rng.signs_at(k, first + j, stream)
    else:
        tl.static_assert(DISTRIBUTION == "gaussian")
        if GROUPED:
            return rng.normals_rows(k, first >> 2, stream, j.shape[0])
        else:
            return rng.normals_at(k, first + j, stream)


@triton.jit
def count(row, active, MASKED: tl.constexpr):
    """Local elements that take part: all or none."""
    n = tl.load(row + T.COUNT)
    if MASKED:
        n *= tl.load(active + tl.load(row + T.ACTIVE))
    return n


@triton.jit
def remaining(n, o, MASKED: tl.constexpr):
    """Number of the n elements from `o` on; in MASKED launches n may be 0."""
    if MASKED:
        n = tl.maximum(n, o)
    return (n - o).to(tl.int32)


@triton.jit
def moved(w, z, scale, FORMAT: tl.constexpr):
    """x + scale z as it is stored."""
    return nearest(rules.perturbed(w, z.to(w.dtype), scale), FORMAT)


@triton.jit
def place(x, saved, lost, j, rest, v, z, tau, factor, JOB: tl.constexpr, FORMAT: tl.constexpr,
          TWO_SIDED: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """Stores v + factor tau z, and v itself to be saved; or counts what rounding swallows."""
    w = widened(v, FORMAT, FORMAT)
    if JOB == "lost":
        plus = widened(moved(w, z, tau, FORMAT), FORMAT, FORMAT)
        other = w
        if TWO_SIDED:
            other = widened(moved(w, z, -1.0 * tau, FORMAT), FORMAT, FORMAT)
        swallowed = (plus == other) & (z != 0.0) & (j < rest)
        tl.atomic_add(lost, tl.sum(tl.sum(swallowed.to(tl.int64), 1), 0))
    else:
        if JOB == "save":
            store(saved, j, rest, v, FULL)
        store(x, j, rest, moved(w, z, tau * factor, FORMAT), FULL)


@triton.jit
def _move_tile(x, saved, lost, rest, k, first, stream, tau, factor, JOB: tl.constexpr, FORMAT: tl.constexpr,
               DISTRIBUTION: tl.constexpr, TWO_SIDED: tl.constexpr, GROUPED: tl.constexpr, FULL: tl.constexpr,
               TILE: tl.constexpr):  # fmt: skip
    j = rows(TILE)
    if JOB == "restore":
        store(x, j, rest, load(saved, j, rest, FULL), FULL)
    else:
        if JOB == "flip":
            v = load(saved, j, rest, FULL)
        else:
            v = load(x, j, rest, FULL)
        z = _direction(k, first, j, stream, DISTRIBUTION, GROUPED)  # after the loads, which take longer
        place(x, saved, lost, j, rest, v, z, tau, factor, JOB, FORMAT, TWO_SIDED, FULL)


@triton.jit(do_not_specialize=["first_program"])
def move(tensors, programs, keys, scalars, active, saved, lost, first_program, factor, JOB: tl.constexpr,
         MASKED: tl.constexpr, FORMAT: tl.constexpr, DISTRIBUTION: tl.constexpr, TWO_SIDED: tl.constexpr,
         HINT: tl.constexpr, GROUPED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """x <- x + factor tau z, rounded to nearest. JOB:

    walk      from x, saving nothing
    save      from x, which is saved
    flip      from what was saved
    restore   write what was saved
    lost      lost[tensor] += perturbations that rounding swallows
    """
    program = programs + (first_program + tl.program_id(0)).to(tl.int64) * T.PROGRAM
    row = tensors + tl.load(program + T.TENSOR) * T.WIDTH
    o = tl.multiple_of(tl.load(program + T.FIRST), BLOCK)
    n = count(row, active, MASKED)
    x = pointer(tl.load(row + T.X), FORMAT, HINT) + o
    saved += tl.multiple_of(tl.load(row + T.SAVED), 16) + o
    lost += tl.load(program + T.TENSOR)
    tau = scalar(scalars + tl.load(row + T.SCALARS) + T.TAU, FORMAT)
    k = rng.key(keys, rng.DIRECTION)
    stream = tl.load(row + T.STREAM).to(tl.uint32)
    first = tl.load(row + T.START) + o
    if o + BLOCK <= n:
        for u in range(0, BLOCK, TILE):
            _move_tile(x + u, saved + u, lost, TILE, k, first + u, stream, tau, factor,
                       JOB, FORMAT, DISTRIBUTION, TWO_SIDED, GROUPED, True, TILE)  # fmt: skip
    else:
        rest = remaining(n, o, MASKED)
        for u in range(0, rest, TILE):
            _move_tile(x + u, saved + u, lost, rest - u, k, first + u, stream, tau, factor,
                       JOB, FORMAT, DISTRIBUTION, TWO_SIDED, GROUPED, False, TILE)  # fmt: skip


@triton.jit
def buffer(row, x, o, COLUMN: tl.constexpr, FORMAT: tl.constexpr, HINT: tl.constexpr):
    """Element `o` of a state buffer; `x` where there is none."""
    if FORMAT == "none":
        return x
    else:
        return pointer(tl.load(row + COLUMN), FORMAT, HINT) + o


@triton.jit
def _state(s0, s1, s2, j, rest, X_FORMAT: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
           FULL: tl.constexpr):  # fmt: skip
    """The state in the compute dtype: a tuple of as many tiles as there are buffers."""
    state = ()
    if S0 != "none":
        state += (widened(load(s0, j, rest, FULL), S0, X_FORMAT),)
    if S1 != "none":
        state += (widened(load(s1, j, rest, FULL), S1, X_FORMAT),)
    if S2 != "none":
        state += (widened(load(s2, j, rest, FULL), S2, X_FORMAT),)
    return state


@triton.jit
def _entered(v, s, j, rest, k, first, stream, X_FORMAT: tl.constexpr, FORMAT: tl.constexpr, PURPOSE: tl.constexpr,
             STOCHASTIC: tl.constexpr, GROUPED: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """Stores a tile of a state buffer; what was stored, widened."""
    stored = as_stored(v, j, k, first, stream, FORMAT, PURPOSE, STOCHASTIC, GROUPED)
    store(s, j, rest, stored, FULL)
    return widened(stored, FORMAT, X_FORMAT)


@triton.jit
def _step_tile(x, s0, s1, s2, saved, rest, keys, k, k_round, k0, k1, k2, first, stream, scalars, n, factor, signed,
               JOB: tl.constexpr, ENTRY: tl.constexpr, STEP: tl.constexpr, N_ENTRY: tl.constexpr,
               N_STEP: tl.constexpr, SEVERAL: tl.constexpr, X_FORMAT: tl.constexpr, S0: tl.constexpr,
               S1: tl.constexpr, S2: tl.constexpr, DISTRIBUTION: tl.constexpr, STOCHASTIC: tl.constexpr,
               GROUPED: tl.constexpr, FULL: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    j = rows(TILE)
    if JOB == "saved":
        w = widened(load(saved, j, rest, FULL), X_FORMAT, X_FORMAT)
    else:
        w = widened(load(x, j, rest, FULL), X_FORMAT, X_FORMAT)
    state = _state(s0, s1, s2, j, rest, X_FORMAT, S0, S1, S2, FULL)
    weights = scalars + T.OWN + N_ENTRY + N_STEP
    z = _direction(k, first, j, stream, DISTRIBUTION, GROUPED).to(w.dtype)
    g = z * scalar(weights, X_FORMAT)
    if SEVERAL:
        for d in range(1, n):
            z = _direction(rng.key(keys + d * T.KEYS, rng.DIRECTION), first, j, stream, DISTRIBUTION, GROUPED)
            z = z.to(w.dtype)
            g = g + z * scalar(weights + d, X_FORMAT)
        if X_FORMAT == "fp64":  # whose division is rounded correctly anyway
            g = g / n.to(tl.float64)
        else:
            g = tl.div_rn(g, n.to(tl.float32))
    if JOB == "walked":  # z is the last direction's
        w = widened(moved(w, z, scalar(scalars + T.TAU, X_FORMAT) * factor, X_FORMAT), X_FORMAT, X_FORMAT)
    if S0 == "none":
        state = (g,)
    else:
        new = ENTRY(*state, g, *scalars_at(scalars + T.OWN, N_ENTRY, X_FORMAT))
        if S1 == "none":
            new = (new,)
        state = (_entered(new[0], s0, j, rest, k0, first, stream, X_FORMAT, S0, rng.ROUND_STATE, STOCHASTIC, GROUPED,
                          FULL),)  # fmt: skip
        if S1 != "none":
            state += (_entered(new[1], s1, j, rest, k1, first, stream, X_FORMAT, S1, rng.ROUND_STATE_1, STOCHASTIC,
                               GROUPED, FULL),)  # fmt: skip
        if S2 != "none":
            state += (_entered(new[2], s2, j, rest, k2, first, stream, X_FORMAT, S2, rng.ROUND_STATE_2, STOCHASTIC,
                               GROUPED, FULL),)  # fmt: skip
    decay, lr = scalar(scalars + T.DECAY, X_FORMAT), scalar(scalars + T.LR, X_FORMAT)
    y = STEP(w, *state, decay, lr, *scalars_at(scalars + T.OWN + N_ENTRY, N_STEP, X_FORMAT))
    # What something else moves is written as it was: rounding leaves it alone.
    y = tl.where(signed, y, w)
    store(x, j, rest, as_stored(y, j, k_round, first, stream, X_FORMAT, rng.ROUND, STOCHASTIC, GROUPED), FULL)


@triton.jit
def step(tensors, programs, keys, scalars, active, geometry, saved, factor, JOB: tl.constexpr, MASKED: tl.constexpr,
         ENTRY: tl.constexpr, STEP: tl.constexpr, N_ENTRY: tl.constexpr, N_STEP: tl.constexpr,
         SEVERAL: tl.constexpr, X_FORMAT: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
         DISTRIBUTION: tl.constexpr, STOCHASTIC: tl.constexpr, HINT: tl.constexpr, GROUPED: tl.constexpr,
         BLOCK: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """g = mean over directions of weight z; state <- ENTRY(state, g) where there is state; x <- STEP(x, state or g).

    JOB:

    plain     from x
    saved     from what was saved: restore and update in one
    walked    from x + factor tau z, z the last direction: the walk back and the update in one
    """
    program = programs + tl.program_id(0).to(tl.int64) * T.PROGRAM
    row = tensors + tl.load(program + T.TENSOR) * T.WIDTH
    o = tl.multiple_of(tl.load(program + T.FIRST), BLOCK)
    n = count(row, active, MASKED)
    x = pointer(tl.load(row + T.X), X_FORMAT, HINT) + o
    s0 = buffer(row, x, o, T.S0, S0, HINT)
    s1 = buffer(row, x, o, T.S1, S1, HINT)
    s2 = buffer(row, x, o, T.S2, S2, HINT)
    saved += tl.multiple_of(tl.load(row + T.SAVED), 16) + o
    scalars += tl.load(row + T.SCALARS)
    stream = tl.load(row + T.STREAM).to(tl.uint32)
    first = tl.load(row + T.START) + o
    nd = tl.load(geometry + T.DIRECTIONS)
    signed = tl.load(row + T.SIGNED) != 0
    last = keys + (nd - 1) * T.KEYS
    k, k_round = rng.key(keys, rng.DIRECTION), rng.key(keys, rng.ROUND)
    k0 = rng.key(keys, rng.ROUND_STATE)
    k1 = rng.key(keys, rng.ROUND_STATE_1)
    k2 = rng.key(keys, rng.ROUND_STATE_2)
    if not T.derivatives_finite(scalars + T.OWN + N_ENTRY + N_STEP, nd):
        if JOB != "plain":
            tau = scalar(scalars + T.TAU, X_FORMAT)
            rest = remaining(tl.minimum(n, o + BLOCK), o, MASKED)
            BACK: tl.constexpr = "restore" if JOB == "saved" else "walk"
            for u in range(0, rest, TILE):
                _move_tile(x + u, saved + u, geometry, rest - u, rng.key(last, rng.DIRECTION), first + u, stream, tau,
                           factor, BACK, X_FORMAT, DISTRIBUTION, False, GROUPED, False, TILE)  # fmt: skip
    elif o + BLOCK <= n:
        for u in range(0, BLOCK, TILE):
            _step_tile(x + u, s0 + u, s1 + u, s2 + u, saved + u, TILE, keys, k, k_round, k0, k1, k2, first + u, stream,
                       scalars, nd, factor, signed, JOB, ENTRY, STEP, N_ENTRY, N_STEP, SEVERAL, X_FORMAT, S0, S1, S2,
                       DISTRIBUTION, STOCHASTIC, GROUPED, True, TILE)  # fmt: skip
    else:
        rest = remaining(n, o, MASKED)
        for u in range(0, rest, TILE):
            _step_tile(x + u, s0 + u, s1 + u, s2 + u, saved + u, rest - u, keys, k, k_round, k0, k1, k2, first + u,
                       stream, scalars, nd, factor, signed, JOB, ENTRY, STEP, N_ENTRY, N_STEP, SEVERAL, X_FORMAT, S0,
                       S1, S2, DISTRIBUTION, STOCHASTIC, GROUPED, False, TILE)  # fmt: skip
