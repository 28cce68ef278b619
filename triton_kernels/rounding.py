"""`jaguar.method.rounding` in registers: stored formats to fp32 and back, one rounding at the end.

Formats are named "fp64", "fp32", "fp16", "bf16" and "e5m2". The last two are read and written as integers, and all that
is stochastic is rounded by integer arithmetic: Triton's interpreter has no bf16, what it proves should be the code that
the GPU runs, and fractions by division made every third instruction of `tiles` in fp16.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def noisy(format, stochastic):
    """Tells whether storing as `format` takes rounding noise."""
    return stochastic and format not in ("fp64", "fp32")


@triton.jit
def widened(v, FORMAT: tl.constexpr, COMPUTE: tl.constexpr):
    """Stored values in the compute dtype: fp64 for parameters stored as COMPUTE = "fp64", fp32 for others."""
    if FORMAT == "bf16":
        w = (v.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif FORMAT == "fp16":
        w = v.to(tl.float32)
    elif FORMAT == "e5m2":  # the upper half of an fp16 number
        w = (v.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        w = v
    if COMPUTE == "fp64":
        w = w.to(tl.float64)
    elif FORMAT == "fp64":
        w = w.to(tl.float32)
    return w


@triton.jit
def _bf16_nearest(v):
    u = v.to(tl.uint32, bitcast=True)
    u = tl.where(v != v, 0x7FC00000, u + (0x7FFF + ((u >> 16) & 1)))
    return (u >> 16).to(tl.uint16)


@triton.jit
def _bf16_stochastic(v, noise):
    """Adds the noise below the mantissa and truncates; a finite value stays below infinity."""
    u = v.to(tl.uint32, bitcast=True)
    size = u & 0x7FFFFFFF
    moved = tl.minimum(size + noise, 0x7F7FFFFF)
    size = tl.where(size < 0x7F800000, moved, tl.where(size > 0x7F800000, 0x7FC00000, size))
    return ((size | (u & 0x80000000)) >> 16).to(tl.uint16)


@triton.jit
def _narrow(v, normal, subnormal, MANTISSA: tl.constexpr):
    """The pattern of a format whose smallest normal number is 2**-14, as uint32.

    Args:
        v: what was rounded, fp32.
        normal: its fp32 pattern rounded in its place: what is above the mantissa that stays, without the sign.
        subnormal: |v| in units of the format's smallest number, rounded, where it is below 2**-14.
    """
    u = v.to(tl.uint32, bitcast=True)
    size = u & 0x7FFFFFFF
    infinity: tl.constexpr = 31 << MANTISSA
    quiet: tl.constexpr = 1 << (MANTISSA - 1)
    # A finite value stays below infinity, infinity stays, and NaN is more than either.
    limit = tl.minimum(tl.maximum(size, 0x7F7FFFFF) - (0x7F800000 - infinity), infinity + quiet)
    # Exponents begin 112 lower than those of fp32.
    y = tl.where(size < 0x38800000, subnormal, tl.minimum(normal - (112 << MANTISSA), limit))
    return y | ((u & 0x80000000) >> (26 - MANTISSA))


@triton.jit
def _narrow_stochastic(v, noise, MANTISSA: tl.constexpr):
    """Adds the noise to what the format has no place for, and truncates."""
    size = v.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    if MANTISSA > 7:  # of the 16 bits of noise, those that such a fraction can tell apart
        moved = size + (noise >> (MANTISSA - 7))
    else:
        moved = size + (noise << (7 - MANTISSA))
    small = tl.minimum(tl.abs(v), 2.0**-14) * 2.0 ** (30 + MANTISSA)
    return _narrow(v, moved >> (23 - MANTISSA), (small.to(tl.uint32) + noise) >> 16, MANTISSA)


@triton.jit
def _e5m2_nearest(v):
    size = v.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    moved = size + (0xFFFFF + ((size >> 21) & 1))
    # A sum of fp32 numbers that rounds to multiples of 2**-16, the smallest number.
    small = (tl.abs(v) + 128.0).to(tl.uint32, bitcast=True) - 0x43000000
    return _narrow(v, moved >> 21, small, 2)


@triton.jit
def nearest(v, FORMAT: tl.constexpr):
    """Values rounded to nearest, ties to even; float8_e5m2 saturates."""
    if FORMAT == "fp64":
        y = v.to(tl.float64)
    elif FORMAT == "fp32":
        y = v.to(tl.float32)
    elif FORMAT == "fp16":
        y = v.to(tl.float32).to(tl.float16)
    elif FORMAT == "bf16":
        y = _bf16_nearest(v.to(tl.float32))
    else:
        y = _e5m2_nearest(v.to(tl.float32)).to(tl.uint8)
    return y


@triton.jit
def stochastic(v, noise, FORMAT: tl.constexpr):
    """Values rounded to a neighbour with the probability that makes the mean right; `noise` has 16 bits."""
    w = v.to(tl.float32)
    if FORMAT == "bf16":
        y = _bf16_stochastic(w, noise)
    elif FORMAT == "fp16":
        y = _narrow_stochastic(w, noise, 10).to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        tl.static_assert(FORMAT == "e5m2")
        y = _narrow_stochastic(w, noise, 2).to(tl.uint8)
    return y
