"""Launches of coordinate directions: perturb, flip, restore, entry into state and step, one for all tensors.

`sparse` has one lane per stratum and touches sampled elements only. `tiles` moves every element (update="all"): the
strata that meet a tile first, a barrier, then the whole tile. Both are checked against `backends.reference.coordinate`.
A rule has one state buffer here, m, and ENTRY(m, g) is made along one direction after the other, g = weight * sign.
"""

import triton
import triton.language as tl

from jaguar.triton_kernels import rng, rules
from jaguar.triton_kernels import tables as T
from jaguar.triton_kernels.memory import as_stored, load, pointer, prefetch, rows, scalar, scalars_at, store
from jaguar.triton_kernels.rounding import nearest, noisy, stochastic, widened


@triton.jit
def _choice(keys, stratum, stream, size, PURPOSE: tl.constexpr):
    """Place in [0, size) and sign of each stratum."""
    w0, w1, w2, _ = rng.words(rng.key(keys, PURPOSE), stratum, stream, PURPOSE)
    return rng.mulhi64(w1, w0, size), rng.signed(w2 >> 31)


@triton.jit
def _drawn(row, keys, geometry, listed, s, LAYOUT: tl.constexpr, ONES: tl.constexpr):
    """Local index (int64), sign (fp32) and whether it is held here, of each stratum `s` (int64)."""
    n = tl.load(row + T.COUNT)
    size = tl.load(geometry + T.SIZE)
    stream = tl.load(row + T.DRAW).to(tl.uint32)
    origin = tl.load(row + T.ORIGIN)
    if LAYOUT == "listed":
        inside = s < tl.load(row + T.N_STRATA)
        i = tl.load(listed + tl.load(row + T.SAVED) + s, mask=inside, other=-1)
        sign = tl.full(s.shape, 1.0, tl.float32)
    elif LAYOUT == "block":
        columns = tl.load(row + T.N_COLUMNS)
        strata = tl.load(row + T.N_STRATA)
        a = s // strata
        b = s - a * strata
        r, sign = _choice(keys, a, stream, size, rng.ROWS)
        i = (r + a * size) * columns - origin
        inside = s >= 0
        if tl.load(row + T.IS_MATRIX) != 0:
            c, column_sign = _choice(keys, b, stream, size, rng.COLUMNS)
            c += b * size
            i += c
            inside = c < columns
            sign *= column_sign
    else:
        if LAYOUT == "count":
            rest = tl.load(geometry + T.REST)
            number = tl.load(geometry + T.NUMBER)
            first = s * size + s * rest // number
            inside = s < number
            size = (s + 1) * size + (s + 1) * rest // number - first
        else:
            tl.static_assert(LAYOUT == "fraction")
            first = s * size
            inside = s >= 0
        place, sign = _choice(keys, s, stream, size, rng.COORDINATES)
        i = first + place - origin
    if ONES:
        sign = tl.full(s.shape, 1.0, tl.float32)
    return i, sign, inside & (i >= 0) & (i < n)


@triton.jit
def _endpoints(v, sign, tau, FORMAT: tl.constexpr, TWO_SIDED: tl.constexpr):
    """The stored points whose losses are compared, widened: x + tau s, and x - tau s or x itself."""
    x = widened(v, FORMAT, FORMAT)
    e = sign.to(x.dtype)
    plus = widened(nearest(rules.perturbed(x, e, tau), FORMAT), FORMAT, FORMAT)
    other = x
    if TWO_SIDED:
        other = widened(nearest(rules.perturbed(x, e, -1.0 * tau), FORMAT), FORMAT, FORMAT)
    return plus, other


@triton.jit
def _stored_at(v, i, row, keys, FORMAT: tl.constexpr, PURPOSE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Values as stored, rounded with the noise of the local elements `i`."""
    if noisy(FORMAT, STOCHASTIC):
        stream = tl.load(row + T.STREAM).to(tl.uint32)
        index = i + tl.load(row + T.START)
        return stochastic(v, rng.noise16_at(rng.key(keys, PURPOSE), index, stream, PURPOSE), FORMAT)
    else:
        return nearest(v, FORMAT)


@triton.jit
def _enter(m, i, live, sign, weight, own, row, keys, ENTRY: tl.constexpr, X_FORMAT: tl.constexpr, S0: tl.constexpr,
           STOCHASTIC: tl.constexpr):  # fmt: skip
    """m_i <- ENTRY(m_i, weight s_i) at the live elements; returns what was stored, widened."""
    old = widened(tl.load(m + i, mask=live, other=0.0), S0, X_FORMAT)
    new = ENTRY(old, sign.to(old.dtype) * weight, *own)
    stored = _stored_at(new, i, row, keys, S0, rng.ROUND_STATE, STOCHASTIC)
    tl.store(m + i, stored, mask=live)
    return widened(stored, S0, X_FORMAT)


@triton.jit
def _stepped(v, m, i, row, keys, scalars, STEP: tl.constexpr, N_ENTRY: tl.constexpr, N_STEP: tl.constexpr,
             FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr):  # fmt: skip
    """The stored STEP(x, m) of sampled elements, from their stored values before the step."""
    decay, lr = scalar(scalars + T.DECAY, FORMAT), scalar(scalars + T.LR, FORMAT)
    own = scalars_at(scalars + T.OWN + N_ENTRY, N_STEP, FORMAT)
    x = STEP(widened(v, FORMAT, FORMAT), m, decay, lr, *own)
    return _stored_at(x, i, row, keys, FORMAT, rng.ROUND, STOCHASTIC)


@triton.jit
def sparse(tensors, programs, keys, scalars, geometry, listed, saved, lost, factor, JOB: tl.constexpr,
           ENTRY: tl.constexpr, STEP: tl.constexpr, N_ENTRY: tl.constexpr, N_STEP: tl.constexpr,
           X_FORMAT: tl.constexpr, S0: tl.constexpr, LAYOUT: tl.constexpr, ONES: tl.constexpr,
           TWO_SIDED: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One lane per stratum. JOB:

    perturb   save x, write x + factor tau s
    flip      write saved + factor tau s
    restore   write saved
    lost      lost[tensor] += (perturbations that rounding swallows, all perturbations)
    update    entries of one direction, then the step of its elements where the tensor is SIGNED
    fused     the same from saved values, and restore what does not move
    several   entries of all directions in order, then one step; `saved` is scratch. Two directions meet in a stratum,
              hence in a lane, if at all; only listed elements have no such home
    """
    program = programs + tl.program_id(0).to(tl.int64) * T.PROGRAM
    row = tensors + tl.load(program + T.TENSOR) * T.WIDTH
    s = tl.load(program + T.FIRST) + tl.arange(0, BLOCK)
    scalars += tl.load(row + T.SCALARS)
    saved += tl.load(row + T.SAVED) + s
    x = pointer(tl.load(row + T.X), X_FORMAT, False)
    m = pointer(tl.load(row + T.S0), S0, False)
    tau, own = scalar(scalars + T.TAU, X_FORMAT), scalars_at(scalars + T.OWN, N_ENTRY, X_FORMAT)
    weights = scalars + T.OWN + N_ENTRY + N_STEP
    signed = tl.load(row + T.SIGNED) != 0
    if JOB == "several":
        n = tl.load(geometry + T.DIRECTIONS)
        total = tl.load(geometry + T.TOTAL)
        if T.derivatives_finite(weights, n):
            for k in range(0, n):
                i, sign, live = _drawn(row, keys + k * T.KEYS, geometry, listed, s, LAYOUT, ONES)
                tl.store(saved + k * total, tl.load(x + i, mask=live), mask=live)
            for k in range(0, n):
                tl.debug_barrier()  # other threads may have written what is read here
                i, sign, live = _drawn(row, keys + k * T.KEYS, geometry, listed, s, LAYOUT, ONES)
                plus, other = _endpoints(tl.load(saved + k * total, mask=live, other=0), sign, tau, X_FORMAT, TWO_SIDED)
                _enter(m, i, live & (plus != other), sign, scalar(weights + k, X_FORMAT), own, row, keys + k * T.KEYS,
                       ENTRY, X_FORMAT, S0, STOCHASTIC)  # fmt: skip
            tl.debug_barrier()
            for k in range(0, n):  # an element that two directions drew is written twice, with the same value
                i, sign, live = _drawn(row, keys + k * T.KEYS, geometry, listed, s, LAYOUT, ONES)
                v = tl.load(saved + k * total, mask=live, other=0)
                plus, other = _endpoints(v, sign, tau, X_FORMAT, TWO_SIDED)
                mv = widened(tl.load(m + i, mask=live, other=0), S0, X_FORMAT)
                y = _stepped(v, mv, i, row, keys, scalars, STEP, N_ENTRY, N_STEP, X_FORMAT, STOCHASTIC)
                tl.store(x + i, y, mask=live & (plus != other) & signed)
    else:
        i, sign, live = _drawn(row, keys, geometry, listed, s, LAYOUT, ONES)
        if JOB == "perturb" or JOB == "update" or JOB == "lost":
            v = tl.load(x + i, mask=live, other=0)
        else:
            v = tl.load(saved, mask=live, other=0)
        if JOB == "perturb" or JOB == "flip":
            if JOB == "perturb":
                tl.store(saved, v, mask=live)
            w = widened(v, X_FORMAT, X_FORMAT)
            tl.store(x + i, nearest(rules.perturbed(w, sign.to(w.dtype), tau * factor), X_FORMAT), mask=live)
        elif JOB == "restore":
            tl.store(x + i, v, mask=live)
        elif JOB == "lost":
            plus, other = _endpoints(v, sign, tau, X_FORMAT, TWO_SIDED)
            lost += 2 * tl.load(program + T.TENSOR)
            tl.atomic_add(lost, tl.sum((live & (plus == other)).to(tl.int64), 0))
            tl.atomic_add(lost + 1, tl.sum(live.to(tl.int64), 0))
        else:
            tl.static_assert(JOB == "update" or JOB == "fused")
            plus, other = _endpoints(v, sign, tau, X_FORMAT, TWO_SIDED)
            movable = tl.where(T.derivatives_finite(weights, 1), tl.load(row + T.COUNT), 0)
            moving = live & (plus != other) & (i < movable)
            mv = _enter(m, i, moving, sign, scalar(weights, X_FORMAT), own, row, keys, ENTRY, X_FORMAT, S0, STOCHASTIC)
            y = _stepped(v, mv, i, row, keys, scalars, STEP, N_ENTRY, N_STEP, X_FORMAT, STOCHASTIC)
            if JOB == "fused":
                tl.store(x + i, tl.where(moving & signed, y, v), mask=live)
            else:
                tl.store(x + i, y, mask=moving & signed)


@triton.jit
def _tile_strata(row, geometry, program, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    """The strata that meet a tile: the first, how many in a row and how far to the next row (block), how many lanes.

    A block layout's form a rectangle, of all columns unless the tile lies in one row.
    """
    if LAYOUT == "block":
        size = tl.load(geometry + T.SIZE)
        columns = tl.load(row + T.N_COLUMNS)
        strata = tl.load(row + T.N_STRATA)
        o = tl.load(program + T.FIRST)
        first = o + tl.load(row + T.START)
        last = tl.minimum(o + BLOCK, tl.load(row + T.COUNT)) - 1 + tl.load(row + T.START)
        top, bottom = first // columns, last // columns
        left = first * 0
        width = strata
        if top == bottom:
            left = (first - top * columns) // size
            width = (last - top * columns) // size - left + 1
        height = bottom // size - top // size + 1
        return top // size * strata + left, width, strata - width, height * width
    else:
        return tl.load(program + T.STRATUM), 1, 0, tl.load(geometry + T.LANES)


@triton.jit
def _step_tile(x, m, o, rest, k, stream, start, decay, lr, own, STEP: tl.constexpr, X_FORMAT: tl.constexpr,
               S0: tl.constexpr, FULL: tl.constexpr, STOCHASTIC: tl.constexpr, GROUPED: tl.constexpr,
               TILE: tl.constexpr):  # fmt: skip
    """x <- STEP(x, m) on elements o .. o + TILE; `rest` of them are left where it is not FULL."""
    j = rows(TILE)
    x += o
    mv = widened(load(m + o, j, rest, FULL), S0, X_FORMAT)
    y = STEP(widened(load(x, j, rest, FULL), X_FORMAT, X_FORMAT), mv, decay, lr, *own)
    store(x, j, rest, as_stored(y, j, k, start + o, stream, X_FORMAT, rng.ROUND, STOCHASTIC, GROUPED), FULL)


@triton.jit
def tiles(tensors, programs, keys, scalars, geometry, listed, saved, RESTORE: tl.constexpr, SEVERAL: tl.constexpr,
          ENTRY: tl.constexpr, STEP: tl.constexpr, N_ENTRY: tl.constexpr, N_STEP: tl.constexpr,
          X_FORMAT: tl.constexpr, S0: tl.constexpr, LAYOUT: tl.constexpr, ONES: tl.constexpr,
          TWO_SIDED: tl.constexpr, STOCHASTIC: tl.constexpr, HINT: tl.constexpr, GROUPED: tl.constexpr,
          PREFETCH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Entries of a tile's sampled elements (restored first), a barrier, the tile's step if SIGNED.

    HINT: addresses are multiples of 16. GROUPED: shards begin at a multiple of BLOCK. A stratum that straddles two
    tiles is seen by both, and the tile that holds the drawn element acts.
    """
    program = programs + tl.program_id(0).to(tl.int64) * T.PROGRAM
    row = tensors + tl.load(program + T.TENSOR) * T.WIDTH
    o = tl.multiple_of(tl.load(program + T.FIRST), BLOCK)
    n = tl.load(row + T.COUNT)
    x = pointer(tl.load(row + T.X), X_FORMAT, HINT)
    m = pointer(tl.load(row + T.S0), S0, HINT)
    if PREFETCH:
        prefetch(x + o, n - o, BLOCK)
        prefetch(m + o, n - o, BLOCK)
    scalars += tl.load(row + T.SCALARS)
    saved += tl.load(row + T.SAVED)
    tau, own = scalar(scalars + T.TAU, X_FORMAT), scalars_at(scalars + T.OWN, N_ENTRY, X_FORMAT)
    weights = scalars + T.OWN + N_ENTRY + N_STEP
    n_directions = tl.load(geometry + T.DIRECTIONS) if SEVERAL else 1
    finite = T.derivatives_finite(weights, n_directions)
    movable = tl.where(finite, n, 0)
    lane = tl.arange(0, LANES)
    first, width, step, lanes = _tile_strata(row, geometry, program, LAYOUT, BLOCK)
    for k in range(0, n_directions):
        for u in range(0, lanes, LANES):
            s = first + u + lane
            if LAYOUT == "block":
                s += (u + lane) // width * step
            i, sign, live = _drawn(row, keys + k * T.KEYS, geometry, listed, s, LAYOUT, ONES)
            live = live & (u + lane < lanes) & (i >= o) & (i < o + BLOCK)
            if RESTORE:
                v = tl.load(saved + s, mask=live, other=0)
                tl.store(x + i, v, mask=live)
            else:
                v = tl.load(x + i, mask=live, other=0)
            plus, other = _endpoints(v, sign, tau, X_FORMAT, TWO_SIDED)
            _enter(m, i, live & (plus != other) & (i < movable), sign, scalar(weights + k, X_FORMAT), own, row,
                   keys + k * T.KEYS, ENTRY, X_FORMAT, S0, STOCHASTIC)  # fmt: skip
        # What was written here is read by other threads: in the tile below, and for the next direction.
        tl.debug_barrier()
    if finite & (tl.load(row + T.SIGNED) != 0):
        decay, lr = scalar(scalars + T.DECAY, X_FORMAT), scalar(scalars + T.LR, X_FORMAT)
        numbers = scalars_at(scalars + T.OWN + N_ENTRY, N_STEP, X_FORMAT)
        noise_key = rng.key(keys, rng.ROUND)
        stream = tl.load(row + T.STREAM).to(tl.uint32)
        start = tl.load(row + T.START)
        if GROUPED:
            start = tl.multiple_of(start, BLOCK)
        if o + BLOCK <= n:
            for u in range(0, BLOCK, TILE):
                _step_tile(x, m, o + u, TILE, noise_key, stream, start, decay, lr, numbers,
                           STEP, X_FORMAT, S0, True, STOCHASTIC, GROUPED, TILE)  # fmt: skip
        else:
            rest = (n - o).to(tl.int32)
            for u in range(0, rest, TILE):
                _step_tile(x, m, o + u, rest - u, noise_key, stream, start, decay, lr, numbers,
                           STEP, X_FORMAT, S0, False, STOCHASTIC, GROUPED, TILE)  # fmt: skip
