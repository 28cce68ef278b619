"""`jaguar.rounding` in registers: stored formats to fp32 and back, one rounding at the end.

Formats are named "fp64", "fp32", "fp16", "bf16" and "e5m2". The last two are read and written as integers and rounded
by integer arithmetic: Triton's interpreter has no bf16, and what it proves should be the code that the GPU runs.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def noisy(format, stochastic):
    """Whether storing as `format` takes rounding noise."""
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
def _finite(v):
    return tl.abs(v) < float("inf")


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
def _split(v, MANTISSA: tl.constexpr):
    """|v| in units of the spacing of a format whose smallest normal number is 2**-14: whole, fraction, spacing."""
    power = tl.maximum((v.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True), 6.103515625e-05)
    spacing = power * 2.0**-MANTISSA
    scaled = tl.div_rn(tl.abs(v), spacing)
    whole = tl.floor(scaled)
    return whole, scaled - whole, spacing


@triton.jit
def _joined(v, whole, spacing, LARGEST: tl.constexpr):
    """whole * spacing with the sign of v, at most the largest finite number; fp32 and exact."""
    size = tl.minimum(whole * spacing, LARGEST)
    u = size.to(tl.uint32, bitcast=True) | (v.to(tl.uint32, bitcast=True) & 0x80000000)
    return u.to(tl.float32, bitcast=True)


@triton.jit
def _narrow_stochastic(v, noise, MANTISSA: tl.constexpr, LARGEST: tl.constexpr):
    whole, fraction, spacing = _split(v, MANTISSA)
    up = tl.floor(fraction * 65536.0) + noise.to(tl.float32) >= 65536.0
    return _joined(v, whole + up.to(tl.float32), spacing, LARGEST)


@triton.jit
def _e5m2_nearest(v):
    whole, fraction, spacing = _split(v, 2)
    odd = (whole.to(tl.int32) & 1) == 1
    up = (fraction > 0.5) | ((fraction == 0.5) & odd)
    return _joined(v, whole + up.to(tl.float32), spacing, 57344.0)


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
        w = v.to(tl.float32)
        y = _e5m2_bits(tl.where(_finite(w), _e5m2_nearest(w), w))
    return y


@triton.jit
def stochastic(v, noise, FORMAT: tl.constexpr):
    """Values rounded to a neighbour with the probability that makes the mean right; `noise` has 16 bits."""
    w = v.to(tl.float32)
    if FORMAT == "bf16":
        y = _bf16_stochastic(w, noise)
    elif FORMAT == "fp16":
        y = tl.where(_finite(w), _narrow_stochastic(w, noise, 10, 65504.0), w).to(tl.float16)
    else:
        tl.static_assert(FORMAT == "e5m2")
        y = _e5m2_bits(tl.where(_finite(w), _narrow_stochastic(w, noise, 2, 57344.0), w))
    return y


@triton.jit
def _e5m2_bits(v):
    """The byte of an fp32 value that float8_e5m2 holds exactly."""
    return (v.to(tl.float16).to(tl.uint16, bitcast=True) >> 8).to(tl.uint8)
