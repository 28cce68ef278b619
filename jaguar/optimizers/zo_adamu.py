"""ZO-AdaMU (arXiv 2312.15184)."""

from __future__ import annotations

from typing import Any, Unpack

from jaguar.method.directions import Mixed
from jaguar.method.method import Method
from jaguar.method.rules import AlongMomentum
from jaguar.optimizers.base import ZerothOrder
from jaguar.optimizers.common import Common, parts


class ZOAdaMU(ZerothOrder):
    """ZO-AdaMU: the perturbation itself is momentum, mixed from fresh noise and noise around what it was.

        z ~ N(0, alpha I),   y ~ N(m, (1 - alpha) I),   m <- beta1 z + (1 - beta1) y,   v = beta2 z^2 + (1 - beta2) y^2
        rho = (f(x + tau m) - f(x - tau m)) / (2 tau);   x <- (1 - lr wd) x - (lr rho) m / sqrt(v + 1e-8)

    alpha, beta1 and beta2 are 1 for `warmup` steps (there m / sqrt(v) is the sign of z), then go by a cosine to the
    values given, which they have from step 0.8 total on. Two evaluations a step. State: m, 4 bytes per fp32 parameter.
    alpha and 1 - alpha are variances. The paper's annealing formula falls from 1 to 0.004 at the end of the warm-up,
    against its text and figure, which are followed here; the released trainer stops with a TypeError in its first step.

    Args:
        params: tensors (fp32, bf16, fp16, fp64), dicts with their own lr, tau, weight_decay, or
            model.named_parameters(), whose names make the random numbers independent of the order.
        lr: learning rate; a parameter moves about lr rho.
        alpha, beta1, beta2: where the schedule ends, in [0, 1].
        warmup: T1, steps of fresh noise.
        total: T3, steps of the run.
        weight_decay: decoupled, multiplied by lr.
        common: tau, seed, backend, restore, estimator, rho_clip, rounding, momentum_dtype, maximize and shards, as
            `ZOSGD`. There is one direction a step.

    Raises:
        ValueError: an argument is out of range; the message names what would be right.

    Source: arXiv 2312.15184, Algorithm 1.
    Equivalent to: `m = b1 * z + (1 - b1) * y; x -= lr * rho * m / (b2 * z**2 + (1 - b2) * y**2 + 1e-8).sqrt()`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        *,
        alpha: float = 0.5,
        beta1: float = 0.9,
        beta2: float = 0.01,
        warmup: int = 1024,
        total: int = 20000,
        weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        decides, runs = parts(common)
        method = Method(Mixed(alpha, beta1, beta2, warmup, total), AlongMomentum(), **decides)
        super().__init__(params, method, lr=lr, weight_decay=weight_decay, **runs)
