"""Rounding in exact fractions: slow, and independent of the package."""

from __future__ import annotations

import bisect
import math
from fractions import Fraction
from functools import cache

import torch

NARROW = [torch.bfloat16, torch.float16, torch.float8_e5m2]


@cache
def magnitudes(dtype: torch.dtype) -> list[float]:
    """Every finite magnitude of `dtype`, ascending, from its bit patterns."""
    width = {1: torch.int8, 2: torch.int16}[dtype.itemsize]
    patterns = torch.arange(1 << (8 * dtype.itemsize - 1)).to(width).view(dtype).to(torch.float64)
    return patterns[torch.isfinite(patterns)].tolist()


def law(value: float, dtype: torch.dtype) -> tuple[float, float, int]:
    """(towards zero, away from zero, how many of the 65536 noise values round away) of an fp32 value."""
    grid, v = magnitudes(dtype), abs(value)
    i = bisect.bisect_right(grid, v) - 1
    if i + 1 == len(grid):
        return math.copysign(grid[i], value), math.copysign(grid[i], value), 0
    share = (Fraction(v) - Fraction(grid[i])) / (Fraction(grid[i + 1]) - Fraction(grid[i]))
    return math.copysign(grid[i], value), math.copysign(grid[i + 1], value), math.floor(share * 65536)


def interesting(dtype: torch.dtype) -> list[float]:
    grid = magnitudes(dtype)
    largest, smallest = grid[-1], grid[1]
    edges = [smallest * 0.3, smallest * 1.7, smallest * 2.5, grid[-2] * 1.00001, largest, largest * 0.9999]
    small = [1e-3, math.pi * 2.0**-14, 6.1e-5, 6.0e-5, 1e-30, 1e-41]
    values = [*edges, *small, 0.02, 1.0, 1 / 3, 1.9999, 123.456, 65519.9, 65535.0, 7e4, 3.4e38, 3.3895e38]
    exact = torch.tensor([*values, *(-v for v in values)], dtype=torch.float32)
    random = torch.randn(40, generator=torch.Generator().manual_seed(3)) * torch.logspace(-8, 4, 40)
    return [v for v in torch.cat([exact, random]).tolist() if math.isfinite(v)]
