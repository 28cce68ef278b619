"""ZO-SignSGD (Liu, Chen, Chen, Hong, ICLR 2019)."""

from __future__ import annotations

from typing import Any, Unpack

from jaguar.method.directions import dense
from jaguar.method.method import Method
from jaguar.method.rules import ScalarSign, Sign
from jaguar.optimizers.base import ZerothOrder
from jaguar.optimizers.common import Common, parts


class ZOSignSGD(ZerothOrder):
    """ZO-SignSGD: the sign of a two-point estimate along dense random directions, every coordinate moves by lr.

        g = mean over directions of rho z;   m <- momentum m + g;   x <- (1 - lr wd) x - lr sign(m)

    (m = g without momentum.) With one direction and no momentum sign(g) = sign(rho) sign(z). With `scalar_sign` it is
    what the public codes run under this name: g = mean over directions of sign(rho) z, x <- (1 - lr wd) x - lr m, which
    is ZO-SGD with |rho| = 1. State: none, or m: 4 bytes per fp32 parameter.

    Args:
        params: tensors (fp32, bf16, fp16, fp64), dicts with their own lr, tau, momentum, weight_decay, or
            model.named_parameters(), whose names make the random numbers independent of the order.
        lr: length of every coordinate's step, or "auto" as `ZOSGD`.
        momentum: heavy-ball factor in [0, 1), without a factor of 1 - momentum, as torch.optim.SGD; 0 keeps no state.
        weight_decay: decoupled, multiplied by lr.
        scalar_sign: take the sign of rho alone.
        distribution: law of z: "gaussian" or "rademacher".
        common: tau, seed, backend, restore, estimator, n_directions, rho_clip, rounding, momentum_dtype, maximize,
            shards and direction_group, as `ZOSGD`.

    Raises:
        ValueError: an argument is out of range; the message names what would be right.

    Source: Liu, Chen, Chen, Hong, "signSGD via zeroth-order oracle", ICLR 2019, Algorithm 1; `scalar_sign`: the sweeps
    of arXiv 2402.11592 (ZO-Bench), which besides ran AdamW on that.
    Equivalent to: `g = rho * z; m = momentum * m + g; x -= lr * m.sign()`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | str = 1e-6,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        scalar_sign: bool = False,
        distribution: str = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        if not isinstance(scalar_sign, bool):
            raise ValueError(f"scalar_sign={scalar_sign!r}: choose True or False")
        decides, runs = parts(common)
        method = Method(dense(distribution), ScalarSign() if scalar_sign else Sign(), **decides)
        super().__init__(params, method, lr=lr, momentum=momentum, weight_decay=weight_decay, **runs)
