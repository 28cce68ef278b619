"""Launches of the Newton-Schulz iteration: scaled fp16 copies, products of batches, small matrices whole on chip.

    X = s G / ||G||_F;   p(X) = a X + (b R + c R R) X,   R = X X^T

Products take fp16, add in fp32 and round once. Sizes are run-time arguments without specialisation, since one model has
many; what lets accesses be 16 bytes wide is promised by HINT: addresses are multiples of 16, sizes and strides of 8.
"""

import triton
import triton.language as tl

from jaguar.triton_kernels.memory import load, pointer, rows
from jaguar.triton_kernels.rounding import nearest, widened

# Parts that `measure` cuts a matrix into: its partial results are fp32 (batch, 2, PARTS), magnitudes and sums.
PARTS = tl.constexpr(64)
# Rows of tiles that share their columns of B while these are in the L2 cache.
GROUP = tl.constexpr(8)

# Columns of the table of `small` (int64). Element (i, j) of a matrix, i < n <= m, is at i * STRIDE_N + j * STRIDE_M.
IN = tl.constexpr(0)
OUT = tl.constexpr(1)
N_SHORT = tl.constexpr(2)
N_LONG = tl.constexpr(3)
STRIDE_N = tl.constexpr(4)
STRIDE_M = tl.constexpr(5)
ITEM = tl.constexpr(6)


@triton.jit
def _hinted(x, HINT: tl.constexpr):
    """An integer that HINT promises to be a multiple of 8, in a form that the compiler sees it from."""
    if HINT:
        return x // 8 * 8
    else:
        return x


@triton.jit
def _magnitude(v):
    """|v|, or infinity for a NaN, which maxima would pass over."""
    size = tl.abs(v)
    return tl.where(size < float("inf"), size, float("inf"))


@triton.jit
def _lift(peak, POWER: tl.constexpr):
    """The power of two that takes `peak` into [2^POWER, 2^(POWER + 1)), as far as fp32 has it; exact to multiply by."""
    exponent = (peak.to(tl.uint32, bitcast=True) >> 23).to(tl.int32)
    lifted = tl.minimum(tl.maximum(254 + POWER - exponent, 1), 254)
    return (lifted << 23).to(tl.float32, bitcast=True)


@triton.jit
def _over_norm(scale, total, peak):
    """scale / sqrt(total); finite for a matrix of zeros, NaN for one whose largest magnitude is infinite."""
    root = tl.sqrt_rn(tl.where(total > 0, total, 1.0))
    ratio = tl.div_rn(scale + tl.zeros_like(root), root)
    return tl.where(peak < float("inf"), ratio, float("nan"))


@triton.jit(do_not_specialize=["count", "chunk"])
def measure(matrices, statistics, count, chunk, FORMAT: tl.constexpr, HINT: tl.constexpr, TILE: tl.constexpr):
    """Partial statistics of part p of matrix k: peak = max |g| and sum (lift(peak) g)^2, over `chunk` elements.

    `matrices` holds addresses of contiguous matrices of `count` elements; the grid is (parts, matrices). The second
    look at the elements comes from the L2 cache.
    """
    p, k = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = p.to(tl.int64) * (chunk // TILE * TILE)
    g = pointer(tl.load(matrices + k), FORMAT, HINT) + first
    rest = tl.minimum(count - first, chunk).to(tl.int32)
    full = rest // TILE * TILE
    j = rows(TILE)
    peaks = tl.zeros((TILE // 8, 8), tl.float32)
    for o in range(0, full, TILE):
        peaks = tl.maximum(peaks, _magnitude(widened(load(g + o, j, TILE, True), FORMAT, FORMAT).to(tl.float32)))
    tail = widened(load(g + full, j, rest - full, False), FORMAT, FORMAT).to(tl.float32)
    peak = tl.max(tl.max(tl.maximum(peaks, _magnitude(tail)), 1), 0)
    lift = _lift(peak, 0)
    tail *= lift
    sums = tail * tail
    for o in range(0, full, TILE):
        v = widened(load(g + o, j, TILE, True), FORMAT, FORMAT).to(tl.float32) * lift
        sums += v * v
    statistics += k * (2 * PARTS) + p
    tl.store(statistics, peak)
    tl.store(statistics + PARTS, tl.sum(tl.sum(sums, 1), 0))


@triton.jit(do_not_specialize=["parts", "n_rows", "n_columns", "x_batch", "x_row"])
def prepare(matrices, statistics, x, parts, n_rows, n_columns, x_batch, x_row, scale, FORMAT: tl.constexpr,
            TALL: tl.constexpr, HINT: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """X_k = fp16(scale G_k / ||G_k||_F), of G_k^T where TALL; G_k is (n_rows, n_columns), X_k's rows are x_row apart.

    The norm is sqrt(sum_p sum_p (lift / lift_p)^2) / lift from what `measure` left; the grid is (tiles, matrices).
    """
    k = tl.program_id(1).to(tl.int64)
    part = tl.arange(0, PARTS)
    statistics += k * (2 * PARTS) + part
    peaks = tl.load(statistics, mask=part < parts, other=0.0)
    sums = tl.load(statistics + PARTS, mask=part < parts, other=0.0)
    peak = tl.max(peaks, 0)
    lift = _lift(peak, 0)
    ratio = tl.div_rn(lift + tl.zeros_like(peaks), _lift(peaks, 0))
    factor = _over_norm(scale, tl.sum(sums * ratio * ratio, 0), peak)

    n_columns, x_row = _hinted(n_columns, HINT), _hinted(x_row, HINT)
    across = tl.cdiv(n_columns, TILE)
    top, left = tl.program_id(0) // across * TILE, tl.program_id(0) % across * TILE
    i, j = tl.arange(0, TILE), tl.arange(0, TILE)
    inside = (i < n_rows - top)[:, None] & (left + j < n_columns)[None, :]
    g = pointer(tl.load(matrices + k), FORMAT, HINT) + top.to(tl.int64) * n_columns + left
    v = tl.load(g + i[:, None] * n_columns + j[None, :], mask=inside, other=0)
    y = (widened(v, FORMAT, FORMAT).to(tl.float32) * lift * factor).to(tl.float16)
    x += k * _hinted(x_batch, HINT)
    if TALL:
        x += left.to(tl.int64) * x_row + top
        inside = (left + i < n_columns)[:, None] & (top + j < _hinted(n_rows, HINT))[None, :]
        y = tl.trans(y)
    else:
        x += top.to(tl.int64) * x_row + left
    tl.store(x + i[:, None] * x_row + j[None, :], y, mask=inside)


@triton.jit
def triangle(p, n):
    """Tile (i, j), j <= i < n, of number p < n (n + 1) / 2; integers only.

    Line r of n + 1 places (n where n is odd) holds row n - 1 - r and, behind it, row r (r - 1).
    """
    odd = n % 2
    r = p // (n + 1 - odd)
    c = p % (n + 1 - odd)
    long = n - 1 - r
    behind = c > long
    return tl.where(behind, r - odd, long), tl.where(behind, c - long - 1, c)


@triton.jit
def _grouped(p, n_rows, n_columns):
    """Tile (i, j) of number p: down GROUP rows, then to the next column."""
    top = p // (GROUP * n_columns) * GROUP
    height = tl.minimum(n_rows - top, GROUP)
    within = p % (GROUP * n_columns)
    return top + within % height, within // height


@triton.jit
def _tile(p, i, j, row, m, n, TILE: tl.constexpr):
    """Pointers to tile (i, j) of a matrix (m, n), and which of them lie inside."""
    r, c = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    p += (i * TILE).to(tl.int64) * row + tl.arange(0, TILE)[:, None] * row + c[None, :]
    return p, (r < m)[:, None] & (c < n)[None, :]


@triton.jit
def _read(p, i, j, row, m, n, FULL: tl.constexpr, TILE: tl.constexpr):
    """Tile (i, j) of a matrix (m, n)."""
    at, inside = _tile(p, i, j, row, m, n, TILE)
    if FULL:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside, other=0)


@triton.jit
def _write(p, i, j, row, m, n, v, FULL: tl.constexpr, TILE: tl.constexpr):
    """Stores tile (i, j) of a matrix (m, n)."""
    at, inside = _tile(p, i, j, row, m, n, TILE)
    if FULL:
        tl.store(at, v)
    else:
        tl.store(at, v, mask=inside)


@triton.jit(
    do_not_specialize=["m", "n", "k", "a_batch", "a_row", "b_batch", "b_row", "c_batch", "c_row", "d_batch", "d_row"]
)
def product(a, b, c, d, m, n, k, a_batch, a_row, b_batch, b_row, c_batch, c_row, d_batch, d_row, alpha, beta,
            B_TRANSPOSED: tl.constexpr, D_TRANSPOSED: tl.constexpr, ADD: tl.constexpr, TRIANGLE: tl.constexpr,
            FORMAT: tl.constexpr, FULL: tl.constexpr, HINT: tl.constexpr, TILE: tl.constexpr,
            DEPTH: tl.constexpr):  # fmt: skip
    """D = alpha A B + beta C for every matrix of a batch; (m, k) (k, n), the grid is (tiles, matrices).

    B_TRANSPOSED: B is stored as (n, k); D_TRANSPOSED: D as (n, m). ADD: there is a C, which may be D: what an element
    becomes depends on the element of C alone. TRIANGLE: D is symmetric, only tiles on and below the diagonal are
    computed. FULL: m, n and k are multiples of the tile's.
    """
    batch = tl.program_id(1).to(tl.int64)
    m, n, k = _hinted(m, HINT), _hinted(n, HINT), _hinted(k, HINT)
    a_row, b_row, c_row, d_row = _hinted(a_row, HINT), _hinted(b_row, HINT), _hinted(c_row, HINT), _hinted(d_row, HINT)
    if TRIANGLE:
        i, j = triangle(tl.program_id(0), tl.cdiv(n, TILE))
    else:
        i, j = _grouped(tl.program_id(0), tl.cdiv(m, TILE), tl.cdiv(n, TILE))

    r, s = tl.arange(0, TILE), tl.arange(0, DEPTH)
    a += batch * _hinted(a_batch, HINT) + (i * TILE).to(tl.int64) * a_row
    a += r[:, None] * a_row + s[None, :]
    b += batch * _hinted(b_batch, HINT)
    if B_TRANSPOSED:
        b += (j * TILE).to(tl.int64) * b_row
        b += r[None, :] * b_row + s[:, None]
        b_step = DEPTH
    else:
        b += (j * TILE).to(tl.int64)
        b += r[None, :] + s[:, None] * b_row
        b_step = DEPTH * b_row
    acc = tl.zeros((TILE, TILE), tl.float32)
    for o in range(0, k, DEPTH):
        if FULL:
            av, bv = tl.load(a), tl.load(b)
        else:
            av = tl.load(a, mask=(i * TILE + r < m)[:, None] & (o + s < k)[None, :], other=0.0)
            bv = tl.load(b, mask=(j * TILE + r < n)[None, :] & (o + s < k)[:, None], other=0.0)
        acc = tl.dot(av, bv, acc)
        a += DEPTH
        b += b_step

    y = alpha * acc
    if ADD:
        y += beta * _read(c + batch * _hinted(c_batch, HINT), i, j, c_row, m, n, FULL, TILE).to(tl.float32)
    y = nearest(y, FORMAT)
    d += batch * _hinted(d_batch, HINT)
    if TRIANGLE:
        # Mirrored in each branch: in front of both, it takes 30 registers more, and one program has an SM alone.
        if i == j:  # the sums of (r, s) and (s, r) have their terms in different order
            y = tl.where(r[:, None] >= r[None, :], y, tl.trans(y))
        else:
            _write(d, j, i, d_row, n, m, tl.trans(y), FULL, TILE)
    if D_TRANSPOSED:
        _write(d, j, i, d_row, n, m, tl.trans(y), FULL, TILE)
    else:
        _write(d, i, j, d_row, m, n, y, FULL, TILE)


@triton.jit
def _columns(o, n, m, stride, TALL: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets and mask of columns o .. o + BLOCK of a matrix (n, m): (N, BLOCK), or (BLOCK, N) where TALL."""
    i, j = tl.arange(0, N), o + tl.arange(0, BLOCK)
    if TALL:
        return j[:, None] * stride + i[None, :], (j < m)[:, None] & (i < n)[None, :]
    else:
        return i[:, None] * stride + j[None, :], (i < n)[:, None] & (j < m)[None, :]


@triton.jit
def _peak(x, n, m, stride, TALL: tl.constexpr, FORMAT: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """max |x|; infinity where a NaN is."""
    if TALL:
        peaks = tl.zeros((BLOCK, N), tl.float32)
    else:
        peaks = tl.zeros((N, BLOCK), tl.float32)
    for o in range(0, m, BLOCK):
        at, inside = _columns(o, n, m, stride, TALL, N, BLOCK)
        v = widened(tl.load(x + at, mask=inside, other=0), FORMAT, FORMAT)
        peaks = tl.maximum(peaks, _magnitude(v.to(tl.float32)))
    return tl.max(tl.max(peaks, 1), 0)


@triton.jit
def _lifted(x, at, inside, lift, FORMAT: tl.constexpr):
    """fp16(lift x), where the mask is."""
    v = widened(tl.load(x + at, mask=inside, other=0), FORMAT, FORMAT)
    return (v.to(tl.float32) * lift).to(tl.float16)


@triton.jit
def _gram(x, n, m, stride, lift, TALL: tl.constexpr, FORMAT: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """R = 2^-16 X X^T (N, N) of X = fp16(lift x), in fp32.

    The factor keeps the sum over blocks out of the tensor cores, which do not round to nearest.
    """
    R = tl.zeros((N, N), tl.float32)
    for o in range(0, m, BLOCK):
        at, inside = _columns(o, n, m, stride, TALL, N, BLOCK)
        v = _lifted(x, at, inside, lift, FORMAT)
        if TALL:
            R += tl.dot(tl.trans(v), v) * 2.0**-16
        else:
            R += tl.dot(v, tl.trans(v)) * 2.0**-16
    return R


@triton.jit
def _apply(out, x, n, m, stride, lift, high, low, factor, TALL: tl.constexpr, FORMAT: tl.constexpr,
           O_FORMAT: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """O = factor (high + low) X; symmetric `high` and `low`, X = fp16(lift x)."""
    for o in range(0, m, BLOCK):
        at, inside = _columns(o, n, m, stride, TALL, N, BLOCK)
        v = _lifted(x, at, inside, lift, FORMAT)
        if TALL:
            y = tl.dot(v, high, tl.dot(v, low))
        else:
            y = tl.dot(high, v, tl.dot(low, v))
        tl.store(out + at, nearest(y * factor, O_FORMAT), mask=inside)


@triton.jit(do_not_specialize=["steps"])
def small(items, coefficients, steps, scale, shift, FORMAT: tl.constexpr, O_FORMAT: tl.constexpr, HINT: tl.constexpr,
          N: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """O_k = Newton-Schulz of G_k / ||G_k||_F for every row of `items`, one program each, of n <= N.

    Gram form: R = X X^T, Q = I; at each step Z = a I + b R + c R R, Q <- Q Z, R <- Z R Z; O = Q X. All factors are
    polynomials in R: they commute and stay symmetric. The steps amplify what rounding adds to R and Q, which are fp32
    and stay on chip, but not the rounding of X to fp16; ||X||^2 is trace(R). Long schemes add `shift` to R, since what
    rounding makes an eigenvalue below 0 runs away from there.
    """
    item = items + tl.program_id(0) * ITEM
    x, out = pointer(tl.load(item + IN), FORMAT, HINT), pointer(tl.load(item + OUT), O_FORMAT, HINT)
    n, m = _hinted(tl.load(item + N_SHORT).to(tl.int32), HINT), _hinted(tl.load(item + N_LONG).to(tl.int32), HINT)
    stride_n, stride_m = tl.load(item + STRIDE_N).to(tl.int32), tl.load(item + STRIDE_M).to(tl.int32)
    tall = stride_m != 1
    stride = _hinted(tl.maximum(stride_n, stride_m), HINT)
    if tall:
        peak = _peak(x, n, m, stride, True, FORMAT, N, BLOCK)
    else:
        peak = _peak(x, n, m, stride, False, FORMAT, N, BLOCK)
    lift = _lift(peak, 14)  # to the upper end of fp16, whose lower end is then 2^-39 of the peak
    if tall:
        R = _gram(x, n, m, stride, lift, True, FORMAT, N, BLOCK)
    else:
        R = _gram(x, n, m, stride, lift, False, FORMAT, N, BLOCK)

    i = tl.arange(0, N)
    diagonal = i[:, None] == i[None, :]
    factor = _over_norm(scale, tl.sum(tl.sum(tl.where(diagonal, R, 0.0), 1), 0), peak)
    R = R * factor * factor + tl.where(diagonal, shift, 0.0)
    Q = tl.where(diagonal, 1.0, 0.0)
    for _ in range(0, steps):
        # Also where c = 0: without this product, or with it under a condition, the others spill.
        Z = tl.load(coefficients + 2) * tl.dot(R, R, input_precision="ieee")
        Z += tl.where(diagonal, tl.load(coefficients), 0.0) + tl.load(coefficients + 1) * R
        Q = tl.dot(Q, Z, input_precision="ieee")
        tl.debug_barrier()  # keeps the operands of one product at a time in registers
        R = tl.dot(tl.dot(Z, R, input_precision="ieee"), Z, input_precision="ieee")
        coefficients += 3

    shrink = _lift(tl.max(tl.max(_magnitude(Q), 1), 0), 0)
    Q *= shrink
    high = Q.to(tl.float16)
    low = (Q - high.to(tl.float32)).to(tl.float16)
    factor = tl.div_rn(factor * 2.0**-8, shrink)
    if tall:
        _apply(out, x, n, m, stride, lift, high, low, factor, True, FORMAT, O_FORMAT, N, BLOCK)
    else:
        _apply(out, x, n, m, stride, lift, high, low, factor, False, FORMAT, O_FORMAT, N, BLOCK)
