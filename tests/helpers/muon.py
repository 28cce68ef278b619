"""A small model of matrices and vectors for JAGUAR Muon."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def model(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    shapes = {"a": (6, 4), "b": (3, 7), "c": (5,)}
    return {n: torch.randn(s, generator=gen, dtype=torch.float64).to(dtype).requires_grad_() for n, s in shapes.items()}


def groups(p: dict[str, Tensor], **more: Any) -> list[dict[str, Any]]:
    return [
        {"params": [(n, t) for n, t in p.items() if t.dim() >= 2], "ns": True} | more,
        {"params": [(n, t) for n, t in p.items() if t.dim() < 2], "ns": False} | more,
    ]


def loss_of(p: dict[str, Tensor]) -> Tensor:
    return (p["a"][:3] @ p["b"][:, :4].T).square().sum() + (p["c"] - 1).square().sum() + p["a"].sin().sum()
