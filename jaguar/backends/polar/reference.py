"""Newton-Schulz orthogonalisation: the polar factor of a matrix from matrix products alone.

    X_0 = G / ||G||_F;   X <- a X + (b R + c R R) X,   R = X X^T

Singular vectors stay; every singular value s of X_0 goes through the odd polynomial a s + b s^3 + c s^5 at each step
and tends to 1. `jaguar.method.schemes` has the coefficients.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from jaguar.method.schemes import Coefficients


def newton_schulz(G: Tensor, coefficients: list[Coefficients], margin: float, dtype: torch.dtype) -> Tensor:
    """The iteration in `dtype`: (m, n) or (b, m, n) of any floating dtype -> the same shape, contiguous, in `dtype`.

    A zero matrix stays zero; a matrix with a NaN or an infinity becomes NaN and leaves the rest of its batch alone.
    On a CPU without products in bf16, those of bf16 values are made in fp32 and rounded: the same but for the order
    of the sums.

    Source: arXiv 2506.04430, Algorithm 2; quintic: K. Jordan, Muon, 2024; polar_express: arXiv 2505.16932.
    """
    if G.numel() == 0:
        return torch.empty(G.shape, dtype=dtype, device=G.device)
    tall = G.shape[-2] > G.shape[-1]
    X = normalised(G.mT if tall else G, margin, dtype)
    batch = X if X.dim() == 3 else X.unsqueeze(0)
    wide = dtype == torch.bfloat16 and G.device.type == "cpu" and not multiplies_bf16()
    batch = batch.to(torch.float32) if wide else batch
    with torch.autocast(G.device.type, enabled=False):  # which would make the products in its own precision
        for a, b, c in coefficients:
            R = _rounded(batch @ batch.mT, wide)
            B = _rounded(torch.baddbmm(R, R, R, beta=b, alpha=c), wide) if c else R
            batch = _rounded(torch.baddbmm(batch, B, batch, beta=a, alpha=1.0 if c else b), wide)
    X = (batch if X.dim() == 3 else batch.squeeze(0)).to(dtype)
    return (X.mT if tall else X).contiguous()


def most_bytes(count: int, held: torch.dtype, dtype: torch.dtype) -> int:
    """A bound on the memory that `newton_schulz` needs at a time, with its argument.

    Args:
        count: number of elements of the matrices.
        held: their dtype.
        dtype: precision of the iteration.
    """
    double = torch.float64 in (held, dtype)
    return count * (held.itemsize + 6 * (8 if double else 4))


@cache
def multiplies_bf16() -> bool:
    """Tells whether torch has fast products in bf16 on this CPU; its others take 30 times as long as those in fp32."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _rounded(values: Tensor, to_bf16: bool) -> Tensor:
    """fp32 that holds bf16 values."""
    return values.to(torch.bfloat16).to(torch.float32) if to_bf16 else values


def normalised(G: Tensor, margin: float, dtype: torch.dtype) -> Tensor:
    """G / (margin ||G||_F) in `dtype`; the norm is made in fp32 or better, of values scaled to at most 1.

    Momentum of a zero-order run can be as small as 1e-20, where squares vanish in fp32; an added epsilon would
    silently shrink it.
    """
    X = G.to(torch.float64 if dtype == torch.float64 or G.dtype == torch.float64 else torch.float32)
    largest = X.abs().amax((-2, -1), keepdim=True)
    X = X / torch.where(largest > 0, largest, torch.ones_like(largest))
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True) * margin
    X = X / torch.where(norm > 0, norm, torch.ones_like(norm))
    # inf / inf is NaN in one place only: all of the matrix is said to be undefined, not the places that it reaches.
    return torch.where(torch.isfinite(largest), X, torch.full_like(X, torch.nan)).to(dtype)
