"""JAGUAR Muon (arXiv 2506.04430, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from jaguar.method.directions import Coordinates, ReleasedBlock
from jaguar.method.method import Method
from jaguar.method.orthogonal import Orthogonal, ReleasedOrthogonal
from jaguar.method.params import Shard
from jaguar.optimizers.base import ZerothOrder
from jaguar.optimizers.common import Common, parts, refuse_with_released


class JaguarMuon(ZerothOrder):
    """Muon with momentum on sampled coordinates: matrices move along the polar factor of their momentum.

        rho = (f(x + tau e) - f(x - tau e)) / (2 tau),   e = sum over i in S of s_i e_i
        m_i <- beta m_i + (1 - beta) rho s_i             for i in S
        X   <- (1 - lr wd) X - lr NewtonSchulz(M)        hidden matrices
        x_i <- x_i - vector_lr sign(m_i)                 everything else, by JAGUAR SignSGD's rule

    `jaguar.param_groups(model)` says which is which. One Newton-Schulz per matrix and step.

    `ns_period=r`: each step orthogonalises every r-th matrix (round-robin in canonical order) and moves it by r lr
    (weight decay by r lr wd): Newton-Schulz costs 1/r. When a run ends, some matrices lack up to r - 1 steps. Powers of
    two balance a transformer's layers, as matrices are dealt by number, not by size.

    `released=True` is the closed form of what the authors' released code does: momentum starts at 0 in each step, so
    that of a block of r x c entries (a tenth of the rows and columns) has rank one, and its ten quintic steps are

        X <- X - lr sign(rho) s / sqrt(r c) on the block, s = 1.1246...;   x <- x - lr sign(rho) / sqrt(k) on k entries,

    embeddings included. That code's second, clipped update of each step is a bug and not kept.

    Args:
        params: groups from `jaguar.param_groups(model)`, or dicts with `ns` (and their own lr, tau, beta, weight_decay,
            vector_lr): True: matrices, and three dimensions are a batch of them; "flatten": (first, rest);
            False: the sign rule. Tensors with fewer than two dimensions take the sign rule in any group.
        lr: learning rate of the matrices; the polar factor has singular values near 1.
        beta: momentum factor in [0, 1).
        weight_decay: decoupled, multiplied by lr (of the sign rule's tensors: by vector_lr).
        tau: length of the perturbation of a coordinate.
        coordinates: int: number over the whole set; float in (0, 1]: fraction of every tensor.
        layout: "uniform": elements; "block": rows x columns of each matrix.
        signs: "rademacher": random s_i; "ones": s_i = 1.
        update: what the sign rule moves: "sampled" or "all".
        ns_steps: iterations; None: 10 for cubic, 5 for quintic, 8 for polar_express.
        ns_coefficients: "cubic" (the paper's), "quintic" or "polar_express".
        ns_dtype: torch.bfloat16, or float32 or float64, which the reference has. CPUs without products in bf16 multiply
            bf16 values in fp32 and round.
        ns_period: r, at least 1.
        vector_lr: learning rate of the sign rule; None: 0.01 lr. Groups keep it as its ratio to lr, so that schedulers
            scale both.
        adjust_lr: None; "original": lr sqrt(max(1, rows / columns)); "match_rms_adamw": 0.2 lr sqrt(max(rows,
            columns)), as in torch.optim.Muon.
        momentum_dtype: torch.float32, bfloat16 or float8_e5m2; None: the parameter's (bfloat16 for fp16 parameters).
        rounding: "stochastic" (the default) or "nearest", for everything stored in less than fp32.
        n_directions: directions per step; entry updates in order, then one step.
        estimator: "two-sided", or "one-sided": (f(x + tau e) - f(x)) / tau.
        rho_clip: bound on |rho|.
        maximize: make the loss larger, as in torch.optim.
        seed: key of all directions and rounding noise, in [0, 2**64).
        backend: "auto", or a name that `jaguar info` lists; "cuda": Newton-Schulz in csrc, other launches as "auto".
        released: see above; excludes the sampling, beta, update, ns and vector_lr arguments.
        shards: by name, the tensors that are parts of bigger ones, each a `jaguar.Shard`.
        direction_group: processes that share a step's directions, a `torch.distributed.ProcessGroup`.

    Raises:
        ValueError: an argument is out of range, or a group has no `ns`; the message names what would be right.

    Source: arXiv 2506.04430, Algorithm 2.
    Equivalent to: `M[S] = beta * M[S] + (1 - beta) * rho * s; X -= lr * jaguar.newton_schulz(M)`.
    """

    by_role: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        *,
        tau: float = 1e-3,
        coordinates: int | float = 0.01,
        layout: str = "uniform",
        signs: str = "rademacher",
        update: str = "sampled",
        ns_steps: int | None = None,
        ns_coefficients: str = "cubic",
        ns_dtype: torch.dtype = torch.bfloat16,
        ns_period: int = 1,
        vector_lr: float | None = None,
        adjust_lr: str | None = None,
        momentum_dtype: torch.dtype | None = None,
        rounding: str | None = None,
        n_directions: int = 1,
        estimator: str = "two-sided",
        rho_clip: float | None = None,
        maximize: bool = False,
        seed: int = 0,
        backend: str = "auto",
        released: bool = False,
        shards: Mapping[str, Shard] | None = None,
        direction_group: Any = None,
    ) -> None:
        refuse_with_released(
            JaguarMuon,
            released,
            coordinates=coordinates,
            layout=layout,
            signs=signs,
            update=update,
            beta=beta,
            ns_steps=ns_steps,
            ns_coefficients=ns_coefficients,
            ns_dtype=ns_dtype,
            ns_period=ns_period,
            vector_lr=vector_lr,
            adjust_lr=adjust_lr,
        )
        common = Common(
            tau=tau,
            momentum_dtype=momentum_dtype,
            rounding=rounding,
            n_directions=n_directions,
            estimator=estimator,
            rho_clip=rho_clip,
            maximize=maximize,
            seed=seed,
            backend=backend,
            shards=shards,
            direction_group=direction_group,
        )
        decides, runs = parts(common)
        own: dict[str, Any] = {}
        if released:
            method = Method(ReleasedBlock(), ReleasedOrthogonal(), **decides)
        else:
            rule = Orthogonal(update, True, ns_steps, ns_coefficients, ns_dtype, ns_period, adjust_lr)
            method = Method(Coordinates(coordinates, layout, signs), rule, **decides)
            own = {"beta": beta, "vector_lr": vector_lr}
        super().__init__(params, method, lr=lr, weight_decay=weight_decay, **own, **runs)
