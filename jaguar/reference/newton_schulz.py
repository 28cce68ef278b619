"""Newton-Schulz orthogonalisation: the polar factor of a matrix from matrix products alone.

    X_0 = G / ||G||_F;   X <- a X + (b R + c R R) X,   R = X X^T

Singular vectors stay; every singular value s of X_0 goes through the odd polynomial a s + b s^3 + c s^5 at each step
and tends to 1. `jaguar.schemes` has the coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jaguar.schemes import Coefficients


def newton_schulz(G: Tensor, coefficients: list[Coefficients], margin: float, dtype: torch.dtype) -> Tensor:
    """The iteration in `dtype`: (m, n) or (b, m, n) of any floating dtype -> the same shape, contiguous, in `dtype`.

    A zero matrix stays zero; a matrix with a NaN or an infinity becomes NaN and leaves the rest of its batch alone.

    Source: arXiv 2506.04430, Algorithm 2; quintic: K. Jordan, Muon, 2024; polar_express: arXiv 2505.16932.
    """
    if G.numel() == 0:
        return torch.empty(G.shape, dtype=dtype, device=G.device)
    tall = G.shape[-2] > G.shape[-1]
    X = normalised(G.mT if tall else G, margin, dtype)
    batch = X if X.dim() == 3 else X.unsqueeze(0)
    with torch.autocast(G.device.type, enabled=False):  # which would make the products in its own precision
        for a, b, c in coefficients:
            R = batch @ batch.mT
            B = torch.baddbmm(R, R, R, beta=b, alpha=c) if c else R
            batch = torch.baddbmm(batch, B, batch, beta=a, alpha=1.0 if c else b)
    X = batch if X.dim() == 3 else batch.squeeze(0)
    return (X.mT if tall else X).contiguous()


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
