"""`jaguar.newton_schulz`."""

from __future__ import annotations

import torch
from torch import Tensor

from jaguar.backends.availability import choose
from jaguar.backends.polar.run import NewtonSchulz


def newton_schulz(
    G: Tensor,
    steps: int | None = None,
    coefficients: str = "cubic",
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> Tensor:
    """Orthogonalises matrices: singular values go towards 1, singular vectors stay.

        X_0 = G / ||G||_F;   X <- a X + (b R + c R R) X,   R = X X^T   (of G^T where G is tall)

    A zero matrix stays zero; a matrix with a NaN or an infinity becomes NaN and leaves the rest of its batch alone.
    Kernels iterate in 16 bits with fp32 sums whatever G's dtype, on operands in fp16, which rounds 8 times finer than
    bf16 and whose range normalised values fit; the reference iterates in `dtype` itself (on CPUs without products in
    bf16, such values are multiplied in fp32 and rounded, which is 30 times faster there).

    Args:
        G: (m, n), or a batch (b, m, n), of any floating dtype and any strides.
        steps: iterations; None: 10 for cubic, 5 for quintic, 8 for polar_express.
        coefficients: "cubic" (the paper's), "quintic" (Muon's) or "polar_express".
        dtype: precision of the iteration: torch.bfloat16, or float32 or float64, which the reference has.
        backend: "auto", or a name that `jaguar info` lists; "auto" takes csrc on NVIDIA GPUs, else Triton, else the
            reference.

    Returns:
        Tensor of G's shape and dtype, contiguous; empty where G is.

    Raises:
        TypeError: G is no floating-point tensor.
        ValueError: its shape, or an option, is not one of those above.
        jaguar.backends.availability.Unavailable: the named backend cannot do this; the message has the reason.

    Source: arXiv 2506.04430, Algorithm 2; quintic: K. Jordan, Muon, 2024; polar_express: arXiv 2505.16932.
    Equivalent to: `U, _, Vh = torch.linalg.svd(G, full_matrices=False); U @ Vh`, for many steps.
    """
    if not isinstance(G, Tensor) or not G.is_floating_point():
        what = f"{G.dtype} of shape {tuple(G.shape)}" if isinstance(G, Tensor) else type(G).__name__
        raise TypeError(f"newton_schulz takes a floating-point tensor, got {what}")
    if G.is_meta or G.layout != torch.strided:
        raise ValueError(
            f"newton_schulz takes dense values, got a tensor of shape {tuple(G.shape)} with layout {G.layout} on "
            f"{G.device}"
        )
    if G.dim() not in (2, 3):
        raise ValueError(
            f"newton_schulz takes a matrix (m, n) or a batch (b, m, n), got shape {tuple(G.shape)} on {G.device}; "
            "flatten other weights to (first, rest)"
        )
    run = NewtonSchulz(choose(backend), steps=steps, coefficients=coefficients, dtype=dtype)
    with torch.no_grad():
        out = torch.empty(G.shape, dtype=G.dtype, device=G.device)
        matrices = (G if G.dim() == 3 else G.unsqueeze(0)).detach().unbind() if G.numel() else ()
        outs = (out if G.dim() == 3 else out.unsqueeze(0)).unbind() if G.numel() else ()
        for where, factors in run(matrices):
            for i, factor in zip(where, factors, strict=True):
                outs[i].copy_(factor)
    return out
