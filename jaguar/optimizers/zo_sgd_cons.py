"""ZO-SGD-Cons (ZO-Bench, arXiv 2402.11592)."""

from __future__ import annotations

from typing import Any, Unpack

from jaguar.method.directions import dense
from jaguar.method.estimators import Conservative
from jaguar.method.method import Method
from jaguar.method.rules import SGD
from jaguar.optimizers.base import ZerothOrder
from jaguar.optimizers.common import Common, parts


class ZOSGDCons(ZerothOrder):
    """ZO-SGD-Cons: ZO-SGD that takes its step, the opposite step, or none, whichever has the lowest loss on the batch.

        rho = (f(x + tau z) - f(x - tau z)) / (2 tau);   g = mean over directions of rho z
        x <- argmin of f over x, (1 - lr wd) x - lr g, (1 - lr wd) x + lr g         ties: x, then x - lr g

    Five evaluations a step (2 n + 3 with n directions). What is accepted has the bits that were scored, with stochastic
    rounding too; a step that stays changes no bit. A loss that is not finite, of a trial too, skips the step. No state;
    during a step a copy of all trained tensors.

    Args:
        params: tensors (fp32, bf16, fp16, fp64), dicts with their own lr, tau, weight_decay, or
            model.named_parameters(), whose names make the random numbers independent of the order.
        lr: learning rate; a parameter moves lr rho z_i.
        weight_decay: decoupled, multiplied by lr; a part of both steps.
        distribution: law of z: "gaussian" or "rademacher".
        common: tau, seed, backend, restore ("copy" or "module"), n_directions, rho_clip, rounding, maximize and shards,
            as `ZOSGD`.

    Raises:
        ValueError: an argument is out of range; the message names what would be right.

    Source: arXiv 2402.11592 (ZO-Bench), whose published sweeps under this name ran AdamW.
    Equivalent to: `x = min((x, x - lr * g, x + lr * g), key=f)`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        *,
        weight_decay: float = 0.0,
        distribution: str = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        decides, runs = parts(common, Conservative)
        method = Method(dense(distribution), SGD(momentum=False), **decides)
        super().__init__(params, method, lr=lr, weight_decay=weight_decay, **runs)
