"""The random numbers of `jaguar.method.rng`, in registers: the same words, noise, signs and normals, bit for bit."""

import triton
import triton.language as tl

# The purposes of `jaguar.method.rng.Purpose` that kernels draw for.
DIRECTION = tl.constexpr(1)
COORDINATES = tl.constexpr(2)
ROWS = tl.constexpr(3)
COLUMNS = tl.constexpr(4)
ROUND = tl.constexpr(6)
ROUND_STATE = tl.constexpr(7)
ROUND_STATE_1 = tl.constexpr(8)
ROUND_STATE_2 = tl.constexpr(9)
DIRECTION_1 = tl.constexpr(12)


@triton.jit
def _wide(a, MULTIPLIER: tl.constexpr):
    """High and low word of a product: one wide multiplication, where `umulhi` and a second product take two."""
    p = a.to(tl.uint64) * MULTIPLIER
    return (p >> 32).to(tl.uint32), p.to(tl.uint32)


@triton.jit
def philox(k0, k1, c0, c1, c2, c3):
    """Four words of Philox-4x32-10; uint32 scalars and tensors may be mixed, and what is scalar stays so."""
    for _ in tl.static_range(10):
        h0, l0 = _wide(c0, 0xD2511F53)
        h1, l1 = _wide(c2, 0xCD9E8D57)
        c0 = h1 ^ c1 ^ k0
        c1 = l1
        c2 = h0 ^ c3 ^ k1
        c3 = l0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def key(keys, PURPOSE: tl.constexpr):
    """The two words of one purpose, from the keys of one direction."""
    return tl.load(keys + 2 * PURPOSE).to(tl.uint32), tl.load(keys + 2 * PURPOSE + 1).to(tl.uint32)


@triton.jit
def signed(bit):
    """1 where the lowest bit of a word is 0, -1 where it is set: fp32, put together from its bits."""
    return ((bit << 31) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def words(k, group, stream, PURPOSE: tl.constexpr):
    """The four words of each `group` (int64) in a `stream` (uint32); `k` is a `key`."""
    purpose = tl.full([], PURPOSE, tl.uint32)
    return philox(k[0], k[1], group.to(tl.uint32), (group >> 32).to(tl.uint32), stream, purpose)


@triton.jit
def words_from(k, first, lane, stream, PURPOSE: tl.constexpr):
    """`words` of the groups first + lane; `first` (scalar) is a multiple of the number of lanes, so no carry."""
    purpose = tl.full([], PURPOSE, tl.uint32)
    low = first.to(tl.uint32) + lane.to(tl.uint32)
    return philox(k[0], k[1], low, (first >> 32).to(tl.uint32), stream, purpose)


@triton.jit
def mulhi64(high, low, bound):
    """floor((high * 2**32 + low) * bound / 2**64) for two words and an int64 `bound` below 2**63."""
    b1 = (bound >> 32).to(tl.uint64)
    b0 = (bound & 0xFFFFFFFF).to(tl.uint64)
    h = high.to(tl.uint64)
    w = low.to(tl.uint64)
    cross0 = w * b1
    cross1 = h * b0
    carry = ((cross0 & 0xFFFFFFFF) + (cross1 & 0xFFFFFFFF) + ((w * b0) >> 32)) >> 32
    return (h * b1 + (cross0 >> 32) + (cross1 >> 32) + carry).to(tl.int64)


@triton.jit
def interleaved(w0, w1, w2, w3):
    """[R] x 4 to [R, 4], word by word."""
    R: tl.constexpr = w0.shape[0]
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [R, 4])


@triton.jit
def noise16_at(k, index, stream, PURPOSE: tl.constexpr):
    """16 noise bits (uint32) of each logical element `index`: half i % 2 of word (i % 8) // 2 of call i // 8."""
    w0, w1, w2, w3 = words(k, index >> 3, stream, PURPOSE)
    j = (index & 7).to(tl.uint32)
    w = tl.where(j < 4, tl.where(j < 2, w0, w1), tl.where(j < 6, w2, w3))
    return (w >> ((j & 1) * 16)) & 0xFFFF


@triton.jit
def noise16_rows(k, first, stream, PURPOSE: tl.constexpr, R: tl.constexpr):
    """`noise16_at` of the 8 R elements from 8 `first` on: uint32 [R, 8]."""
    w0, w1, w2, w3 = words_from(k, first, tl.arange(0, R), stream, PURPOSE)
    w = interleaved(w0, w1, w2, w3)
    return tl.reshape(tl.join(w & 0xFFFF, w >> 16), [R, 8])


@triton.jit
def signs_at(k, index, stream):
    """Rademacher numbers (fp32) of each logical element: bit i % 32 of word (i % 128) // 32 of call i // 128."""
    w0, w1, w2, w3 = words(k, index >> 7, stream, DIRECTION)
    j = (index & 127).to(tl.uint32)
    w = tl.where(j < 64, tl.where(j < 32, w0, w1), tl.where(j < 96, w2, w3))
    return signed(w >> (j & 31))


@triton.jit
def signs_rows(k, first, stream, R: tl.constexpr):
    """`signs_at` of the 8 R elements from 128 `first` on: fp32 [R, 8]; one call serves 16 rows."""
    CALLS: tl.constexpr = R // 16
    w0, w1, w2, w3 = words_from(k, first, tl.arange(0, CALLS), stream, DIRECTION)
    w = interleaved(w0, w1, w2, w3)
    octets = tl.reshape(tl.join(tl.join(w, w >> 16), tl.join(w >> 8, w >> 24)), [R])
    return signed(octets[:, None] >> tl.arange(0, 8)[None, :].to(tl.uint32))


@triton.jit
def _log(u):
    """Natural logarithm of fp32 u in (0, 1]: Cephes' polynomial, every product and sum rounded on its own."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    x = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    z = x * x
    y = x * 7.0376836292e-2 + -1.1514610310e-1
    y = y * x + 1.1676998740e-1
    y = y * x + -1.2420140846e-1
    y = y * x + 1.4249322787e-1
    y = y * x + -1.6668057665e-1
    y = y * x + 2.0000714765e-1
    y = y * x + -2.4999993993e-1
    y = y * x + 3.3333331174e-1
    y = y * x * z + e * -2.12194440e-4
    return (y - z * 0.5 + x) + e * 0.693359375


@triton.jit
def _cos_sin_turns(u):
    """cos(2 pi u) and sin(2 pi u) of fp32 u in [0, 1]."""
    quarter = tl.floor(u * 4.0 + 0.5)
    a = (u * 4.0 - quarter) * 1.5707963267948966
    z = a * a
    sin = ((z * -1.9515295891e-4 + 8.3321608736e-3) * z + -1.6666654611e-1) * z * a + a
    cos = ((z * 2.443315711809948e-5 + -1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - z * 0.5 + 1.0
    q = quarter.to(tl.int32) & 3
    swapped = (q & 1) == 1
    c = tl.where(swapped, sin, cos)
    s = tl.where(swapped, cos, sin)
    # A product, because Triton's minus is 0 - c, which loses the sign of zero.
    return tl.where((q == 1) | (q == 2), c * -1.0, c), tl.where(q >= 2, s * -1.0, s)


@triton.jit
def _uniform(w):
    """(0, 1] in steps of 2**-24 from a word."""
    return ((w >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08


@triton.jit
def _normals(w0, w1, w2, w3):
    """Four standard normal numbers from the four words of a call: Box-Muller."""
    r0 = tl.sqrt_rn(_log(_uniform(w0)) * -2.0)
    c0, s0 = _cos_sin_turns(_uniform(w1))
    r1 = tl.sqrt_rn(_log(_uniform(w2)) * -2.0)
    c1, s1 = _cos_sin_turns(_uniform(w3))
    return r0 * c0, r0 * s0, r1 * c1, r1 * s1


@triton.jit
def normals_at(k, index, stream):
    """Standard normal numbers (fp32) of each logical element: number i % 4 of call i // 4."""
    w0, w1, w2, w3 = words(k, index >> 2, stream, DIRECTION)
    z0, z1, z2, z3 = _normals(w0, w1, w2, w3)
    j = (index & 3).to(tl.uint32)
    return tl.where(j < 2, tl.where(j < 1, z0, z1), tl.where(j < 3, z2, z3))


@triton.jit
def normals_rows(k, first, stream, R: tl.constexpr):
    """`normals_at` of the 8 R elements from 4 `first` on: fp32 [R, 8]; two calls a row, kept in registers."""
    even = 2 * tl.arange(0, R)
    a0, a1, a2, a3 = words_from(k, first, even, stream, DIRECTION)
    b0, b1, b2, b3 = words_from(k, first, even + 1, stream, DIRECTION)
    z0, z1, z2, z3 = _normals(a0, a1, a2, a3)
    z4, z5, z6, z7 = _normals(b0, b1, b2, b3)
    evens = tl.join(tl.join(z0, z4), tl.join(z2, z6))
    odds = tl.join(tl.join(z1, z5), tl.join(z3, z7))
    return tl.reshape(tl.join(evens, odds), [R, 8])
