"""LeZO (arXiv 2410.09823)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Unpack

from jaguar.method.directions import Layers, dense
from jaguar.method.method import Method
from jaguar.method.rules import SGD
from jaguar.optimizers.base import ZerothOrder
from jaguar.optimizers.common import Common, parts


class LeZO(ZerothOrder):
    """LeZO: ZO-SGD on a random part of the layers in each step.

        A = round(keep L) of the L layers, without replacement, and what is outside the layers
        rho = (f(x + tau z_A) - f(x - tau z_A)) / (2 tau);   x_A <- (1 - lr wd) x_A - lr rho z_A

    The other tensors are neither read nor written in the step, so it costs memory traffic for `keep` of the model. No
    state. `keep=1` is ZO-SGD bit for bit. With several directions a step has the same layers for all.

    Args:
        params: model.named_parameters(), whose names say which layer a tensor is in, or dicts of such with their own
            lr, tau, weight_decay.
        lr: learning rate; a parameter of a layer that takes part moves lr rho z_i; or "auto" as `ZOSGD`.
        weight_decay: decoupled, multiplied by lr; of the tensors that take part.
        keep: share of the layers, in (0, 1]; rounded to a number, halves to even, at least one. The paper drops 75 %.
        layers: prefixes of parameter names, one per layer; None: what comes before the first number in a name, and
            the number ("model.decoder.layers.3").
        distribution: law of z: "gaussian" or "rademacher".
        common: tau, seed, backend, restore, estimator, n_directions, rho_clip, rounding, maximize, shards
            and direction_group, as `ZOSGD`.

    Raises:
        ValueError: an argument is out of range, or no name has a layer; the message names what would be right.

    Source: arXiv 2410.09823, Algorithm 1; its constants are known here from secondary sources.
    Equivalent to: `for x, z in drawn_layers: x -= lr * rho * z`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | str = 1e-6,
        *,
        keep: float = 0.25,
        layers: Collection[str] | None = None,
        weight_decay: float = 0.0,
        distribution: str = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        decides, runs = parts(common)
        direction = Layers(dense(distribution), keep, layers)
        method = Method(direction, SGD(momentum=False), **decides)
        super().__init__(params, method, lr=lr, weight_decay=weight_decay, **runs)
