"""ZO-AdaMM (Chen, Liu, Xu, Li, Lin, Hong, Cox, NeurIPS 2019, arXiv 1910.06513)."""

from __future__ import annotations

from typing import Any, Unpack

from jaguar.method.directions import dense
from jaguar.method.method import Method
from jaguar.method.rules import AdaMM
from jaguar.optimizers.base import ZerothOrder
from jaguar.optimizers.common import Common, parts


class ZOAdaMM(ZerothOrder):
    """ZO-AdaMM: AMSGrad on a two-point estimate along dense random directions.

        g = mean over directions of rho z;   m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2
        h <- max(h, v);   x <- (1 - lr wd) x - lr (m / (sqrt(h) + eps))      (v in place of h without amsgrad)

    With `amsgrad=False, bias_correction=True` it is `torch.optim.Adam` on g, which the public benchmark runs under this
    name, in the parameters' own dtype; here v and h are fp32 for parameters of half precision, so that g^2 does not
    vanish. State: m in `momentum_dtype`, v and h in fp32: 12 bytes per fp32 parameter, 8 without amsgrad.

    Args:
        params: tensors (fp32, bf16, fp16, fp64), dicts with their own lr, tau, beta1, beta2, eps, weight_decay, or
            model.named_parameters(), whose names make the random numbers independent of the order.
        lr: learning rate; a parameter moves by about lr.
        betas: factors of m and v, each in [0, 1).
        eps: added to the root, above 0.
        weight_decay: decoupled, multiplied by lr.
        amsgrad: divide by the root of the largest v so far.
        bias_correction: m / (1 - beta1^t), and v (or h) / (1 - beta2^t), as Adam's; the paper has none. Steps that were
            skipped, and steps that stayed where they were, do not count.
        distribution: law of z: "gaussian" or "rademacher".
        common: tau, seed, backend, restore, estimator, n_directions, rho_clip, rounding, momentum_dtype, maximize,
            shards and direction_group, as `ZOSGD`.

    Raises:
        ValueError: an argument is out of range; the message names what would be right.

    Source: arXiv 1910.06513, Algorithm 1 (with an unprojected step), on the two-point estimate of arXiv 2305.17333.
    Equivalent to: `m = b1 * m + (1 - b1) * g; v = b2 * v + (1 - b2) * g**2; h = h.maximum(v);
    x -= lr * (m / (h.sqrt() + eps))`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        weight_decay: float = 0.0,
        amsgrad: bool = True,
        bias_correction: bool = False,
        distribution: str = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas={betas!r}: give two factors, (0.9, 0.999) say")
        decides, runs = parts(common)
        method = Method(dense(distribution), AdaMM(amsgrad, bias_correction), **decides)
        own: dict[str, Any] = {"beta1": betas[0], "beta2": betas[1], "eps": eps}
        super().__init__(params, method, lr=lr, weight_decay=weight_decay, **own, **runs)
