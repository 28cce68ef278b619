"""Launches of dense directions: perturb, flip and restore; SGD, momentum and sign step. One launch for all tensors.

z is made in registers and never stored. Checked against `jaguar.reference.dense`.
"""

import triton
import triton.language as tl

from jaguar.triton_kernels import rng, rules
from jaguar.triton_kernels import tables as T
from jaguar.triton_kernels.memory import as_stored, load, pointer, rows, scalar, store
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
def _moved(w, z, scale, FORMAT: tl.constexpr):
    """x + scale z as it is stored."""
    return nearest(rules.perturbed(w, z.to(w.dtype), scale), FORMAT)


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
        w = widened(v, FORMAT, FORMAT)
        if JOB == "lost":
            plus = widened(_moved(w, z, tau, FORMAT), FORMAT, FORMAT)
            other = w
            if TWO_SIDED:
                other = widened(_moved(w, z, -1.0 * tau, FORMAT), FORMAT, FORMAT)
            swallowed = (plus == other) & (j < rest)
            tl.atomic_add(lost, tl.sum(tl.sum(swallowed.to(tl.int64), 1), 0))
        else:
            if JOB == "save":
                store(saved, j, rest, v, FULL)
            store(x, j, rest, _moved(w, z, tau * factor, FORMAT), FULL)


@triton.jit(do_not_specialize=["first_program"])
def move(tensors, programs, keys, scalars, saved, lost, first_program, factor, JOB: tl.constexpr,
         FORMAT: tl.constexpr, DISTRIBUTION: tl.constexpr, TWO_SIDED: tl.constexpr, HINT: tl.constexpr,
         GROUPED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
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
    n = tl.load(row + T.COUNT)
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
        rest = (n - o).to(tl.int32)
        for u in range(0, rest, TILE):
            _move_tile(x + u, saved + u, lost, rest - u, k, first + u, stream, tau, factor,
                       JOB, FORMAT, DISTRIBUTION, TWO_SIDED, GROUPED, False, TILE)  # fmt: skip


@triton.jit
def _step_tile(x, m, saved, rest, keys, k, k_round, k_state, first, stream, scalars, n, factor, JOB: tl.constexpr,
               RULE: tl.constexpr, SEVERAL: tl.constexpr, X_FORMAT: tl.constexpr, M_FORMAT: tl.constexpr,
               DISTRIBUTION: tl.constexpr, STOCHASTIC: tl.constexpr, GROUPED: tl.constexpr, FULL: tl.constexpr,
               TILE: tl.constexpr):  # fmt: skip
    j = rows(TILE)
    if JOB == "saved":
        w = widened(load(saved, j, rest, FULL), X_FORMAT, X_FORMAT)
    else:
        w = widened(load(x, j, rest, FULL), X_FORMAT, X_FORMAT)
    if M_FORMAT != "none":
        old = widened(load(m, j, rest, FULL), M_FORMAT, X_FORMAT)
    z = _direction(k, first, j, stream, DISTRIBUTION, GROUPED).to(w.dtype)
    g = z * scalar(scalars + T.RHO, X_FORMAT)
    if SEVERAL:
        for d in range(1, n):
            z = _direction(rng.key(keys + d * T.KEYS, rng.DIRECTION), first, j, stream, DISTRIBUTION, GROUPED)
            z = z.to(w.dtype)
            g = g + z * scalar(scalars + T.RHO + 2 * d, X_FORMAT)
        if X_FORMAT == "fp64":  # whose division is rounded correctly anyway
            g = g / n.to(tl.float64)
        else:
            g = tl.div_rn(g, n.to(tl.float32))
    if JOB == "walked":  # z is the last direction's
        w = widened(_moved(w, z, scalar(scalars + T.TAU, X_FORMAT) * factor, X_FORMAT), X_FORMAT, X_FORMAT)
    if M_FORMAT != "none":
        g = rules.heavy_ball(old, g, scalar(scalars + T.BETA, X_FORMAT))
        stored = as_stored(g, j, k_state, first, stream, M_FORMAT, rng.ROUND_STATE, STOCHASTIC, GROUPED)
        store(m, j, rest, stored, FULL)
        g = widened(stored, M_FORMAT, X_FORMAT)
    decay, lr = scalar(scalars + T.DECAY, X_FORMAT), scalar(scalars + T.LR, X_FORMAT)
    if RULE == "sgd":
        y = rules.sgd_step(w, g, decay, lr)
    else:
        tl.static_assert(RULE == "sign")
        y = rules.sign_step(w, g, decay, lr)
    store(x, j, rest, as_stored(y, j, k_round, first, stream, X_FORMAT, rng.ROUND, STOCHASTIC, GROUPED), FULL)


@triton.jit
def step(tensors, programs, keys, scalars, geometry, saved, factor, JOB: tl.constexpr, RULE: tl.constexpr,
         SEVERAL: tl.constexpr, X_FORMAT: tl.constexpr, M_FORMAT: tl.constexpr, DISTRIBUTION: tl.constexpr,
         STOCHASTIC: tl.constexpr, HINT: tl.constexpr, GROUPED: tl.constexpr, BLOCK: tl.constexpr,
         TILE: tl.constexpr):  # fmt: skip
    """g = mean over directions of rho z; m <- momentum m + g where there is momentum; then RULE. JOB:

    plain     from x
    saved     from what was saved: restore and update in one
    walked    from x + factor tau z, z the last direction: the walk back and the update in one
    """
    program = programs + tl.program_id(0).to(tl.int64) * T.PROGRAM
    row = tensors + tl.load(program + T.TENSOR) * T.WIDTH
    o = tl.multiple_of(tl.load(program + T.FIRST), BLOCK)
    n = tl.load(row + T.COUNT)
    x = pointer(tl.load(row + T.X), X_FORMAT, HINT) + o
    m = x
    if M_FORMAT != "none":
        m = pointer(tl.load(row + T.M), M_FORMAT, HINT) + o
    saved += tl.multiple_of(tl.load(row + T.SAVED), 16) + o
    scalars += tl.load(row + T.SCALARS)
    stream = tl.load(row + T.STREAM).to(tl.uint32)
    first = tl.load(row + T.START) + o
    nd = tl.load(geometry + T.DIRECTIONS)
    last = keys + (nd - 1) * T.KEYS
    k, k_round, k_state = rng.key(keys, rng.DIRECTION), rng.key(keys, rng.ROUND), rng.key(keys, rng.ROUND_STATE)
    if not T.derivatives_finite(scalars, nd):
        if JOB != "plain":
            tau = scalar(scalars + T.TAU, X_FORMAT)
            rest = tl.minimum(n - o, BLOCK).to(tl.int32)
            BACK: tl.constexpr = "restore" if JOB == "saved" else "walk"
            for u in range(0, rest, TILE):
                _move_tile(x + u, saved + u, geometry, rest - u, rng.key(last, rng.DIRECTION), first + u, stream, tau,
                           factor, BACK, X_FORMAT, DISTRIBUTION, False, GROUPED, False, TILE)  # fmt: skip
    elif o + BLOCK <= n:
        for u in range(0, BLOCK, TILE):
            _step_tile(x + u, m + u, saved + u, TILE, keys, k, k_round, k_state, first + u, stream, scalars, nd,
                       factor, JOB, RULE, SEVERAL, X_FORMAT, M_FORMAT, DISTRIBUTION, STOCHASTIC, GROUPED, True,
                       TILE)  # fmt: skip
    else:
        rest = (n - o).to(tl.int32)
        for u in range(0, rest, TILE):
            _step_tile(x + u, m + u, saved + u, rest - u, keys, k, k_round, k_state, first + u, stream, scalars, nd,
                       factor, JOB, RULE, SEVERAL, X_FORMAT, M_FORMAT, DISTRIBUTION, STOCHASTIC, GROUPED, False,
                       TILE)  # fmt: skip
