"""Matrices with known singular values."""

from __future__ import annotations

import torch
from torch import Tensor


def with_spectrum(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    """(G, U, s, V): a matrix or a batch with singular values from 1 to 1e-3, times something for each of a batch."""
    gen = torch.Generator().manual_seed(seed)
    *batch, m, n = shape
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(*batch, m, k, generator=gen, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(*batch, n, k, generator=gen, dtype=torch.float64))[0]
    s = torch.logspace(0, -3, k, dtype=torch.float64).expand(*batch, k)
    scale = torch.rand(*batch, 1, generator=gen, dtype=torch.float64) + 0.5
    return ((U * (s * scale).unsqueeze(-2)) @ V.mT).to(dtype), U, s, V
