"""Acc-ZOM (Huang, Gao, Pei, Huang, JMLR 23, 2022)."""

from __future__ import annotations

from typing import Any, Unpack

from jaguar.method.directions import Sphere
from jaguar.method.estimators import TwoPlaces
from jaguar.method.method import Method
from jaguar.method.rules import Recursive
from jaguar.optimizers.base import ZerothOrder
from jaguar.optimizers.common import Common, parts


class AccZOM(ZerothOrder):
    """Acc-ZOM: momentum that subtracts the last point's estimate along the same direction, on the same batch.

        rho(x) = (f(x + tau e) - f(x - tau e)) / (2 tau),   e = sqrt(d) z / ||z||,   g(x) = rho(x) e
        v_t = g(x_t) + (1 - a_t) (v_t-1 - g(x_t-1));   x_t+1 = (1 - lr wd) x_t - lr eta_t v_t
        eta_t = k / (m0 + t)^(1/3);   a_1 = 1;   a_t+1 = c eta_t^2

    Four evaluations a step. t counts steps that moved something. e is the paper's unit sphere at mu = tau sqrt(d), so
    that tau is what a coordinate moves, as elsewhere. State: v in `momentum_dtype` and x_t-1 in the parameter's dtype:
    8 bytes per fp32 parameter, 4 per bf16 one. What the JAGUAR paper calls Acc-ZOM in its tables is most likely ZO-SGD
    with momentum 0.9, which ZO-Bench runs in its place: `ZOSGD(momentum=0.9)`.

    Args:
        params: tensors (fp32, bf16, fp16, fp64), dicts with their own lr, tau, weight_decay, or
            model.named_parameters(), whose names make the random numbers independent of the order.
        lr: learning rate (gamma).
        k, m0, c: constants of the schedule of eta and a. The defaults meet the paper's conditions, c >= 2 / (3 k^3) +
            5/4 and m0 >= 2; it publishes no values for language models.
        weight_decay: decoupled, multiplied by lr.
        common: tau, seed, backend, restore ("copy" or "module"), rho_clip (of both derivatives), rounding,
            momentum_dtype, maximize and shards, as `ZOSGD`. There is one direction a step.

    Raises:
        ValueError: an argument is out of range; the message names what would be right.

    Source: Huang, Gao, Pei, Huang, "Accelerated zeroth-order and first-order momentum methods from mini to minimax
    optimization", JMLR 23 (2022), Algorithm 1, with an unprojected step.
    Equivalent to: `v = g(x) + (1 - a) * (v - g(previous)); previous, x = x, x - lr * eta * v`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        *,
        k: float = 1.0,
        m0: float = 2.0,
        c: float = 2.0,
        weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        decides, runs = parts(common, TwoPlaces)
        method = Method(Sphere(), Recursive(k, m0, c), **decides)
        super().__init__(params, method, lr=lr, weight_decay=weight_decay, **runs)
