"""One rounding, at the end: how an fp32 value becomes a stored bf16, fp16 or float8 value.

Nearest rounding loses small steps: a step of 1e-6 moves about 1 % of bf16 weights and training silently stands
still. Stochastic rounding moves each weight to a neighbour with the probability that makes the mean right; its
noise comes from the counter generator, so a replay is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

STORAGE = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2)

# dtype -> (mantissa bits, smallest normal exponent, largest finite value), for the formats narrower than bf16's range
_E5M2_MAX = torch.finfo(torch.float8_e5m2).max
_NARROW = {torch.float16: (10, -14, torch.finfo(torch.float16).max), torch.float8_e5m2: (2, -14, _E5M2_MAX)}
_BF16_MAX = torch.finfo(torch.bfloat16).max


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic on values stored as `dtype`: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def needs_noise(dtype: torch.dtype) -> bool:
    """Tells whether storing as `dtype` rounds an fp32 value."""
    return dtype in (torch.bfloat16, torch.float16, torch.float8_e5m2)


def store(value: Tensor, dtype: torch.dtype, noise: Tensor | None = None) -> Tensor:
    """`value` rounded to `dtype`: to nearest without `noise`, else stochastically.

        P(up) = (|v| - t) / (n - t)     t <= |v| < n: the neighbours of |v| in `dtype`, up: away from zero

    to within 2**-16. NaN and infinities stay, and a finite value never becomes infinite.

    Args:
        value: fp32 or fp64, any shape.
        noise: integers in [0, 2**16), value's shape; None rounds to nearest, ties to even.

    Equivalent to: `value.to(dtype)` without noise (float8_e5m2 saturates in both cases).
    """
    if noise is None or not needs_noise(dtype):
        if dtype == torch.float8_e5m2:  # its range is small enough for finite losses to leave it
            value = torch.where(value.abs() < torch.inf, value.clamp(-_E5M2_MAX, _E5M2_MAX), value)
        return value.to(dtype)
    value = value.to(torch.float32)
    rounded = _bf16(value, noise) if dtype == torch.bfloat16 else _narrow(value, dtype, noise)
    # Comparing |v| with infinity is false for NaN too, so one test leaves both as the hardware converts them.
    return torch.where(value.abs() < torch.inf, rounded, value.to(dtype).to(torch.float32)).to(dtype)


def _bf16(value: Tensor, noise: Tensor) -> Tensor:
    """Adds the noise below bf16's mantissa and truncates; fp32 in, fp32 holding a bf16 value out."""
    bits = value.view(torch.int32) + noise.to(torch.int32)
    return (bits & -0x10000).view(torch.float32).clamp(-_BF16_MAX, _BF16_MAX)


def _narrow(value: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Compares the noise with the fraction between neighbours, subnormals included."""
    mantissa, smallest, largest = _NARROW[dtype]
    power = (value.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min(2.0**smallest)
    spacing = power * 2.0**-mantissa  # a power of two: the divisions and products below are exact
    scaled = value.abs() / spacing
    whole = torch.floor(scaled)
    fraction = torch.floor((scaled - whole) * 65536.0)
    whole = whole + (fraction + noise.to(torch.float32) >= 65536.0).to(torch.float32)
    return torch.copysign((whole * spacing).clamp_max(largest), value)


def root(v: Tensor) -> Tensor:
    """The square root, rounded correctly: libraries' own on CPUs are off by one bit in some of the numbers.

    In fp32 by way of fp64. In fp64 one step of Newton's with the exact remainder v - y^2, from halves of y.
    """
    if v.dtype != torch.float64:
        return torch.sqrt(v.to(torch.float64)).to(v.dtype)
    y = torch.sqrt(v)
    shifted = y * 134217729.0  # 2^27 + 1
    high = shifted - (shifted - y)
    low = y - high
    remainder = ((v - high * high) - (high + high) * low) - low * low
    # Below, the remainder's last bits would be subnormal; above, the products overflow. Infinity and NaN stay.
    exact = (v > 2.0**-900) & (v < 2.0**900)
    return torch.where(exact, y + remainder / (y + y), y)
