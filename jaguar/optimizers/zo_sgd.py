"""ZO-SGD (MeZO, arXiv 2305.17333)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from jaguar.method.directions import dense
from jaguar.method.method import Method
from jaguar.method.params import Shard
from jaguar.method.rules import SGD
from jaguar.optimizers.base import ZerothOrder
from jaguar.optimizers.common import Common, parts


class ZOSGD(ZerothOrder):
    """ZO-SGD (MeZO): SGD on a two-point estimate along one dense random direction, optionally with momentum.

        rho = (f(x + tau z) - f(x - tau z)) / (2 tau),   z ~ N(0, I)
        g = rho z;   m <- momentum m + g;   x <- (1 - lr wd) x - lr m        (m = g without momentum)

    Args:
        params: tensors (fp32, bf16, fp16, fp64), dicts with their own lr, tau, momentum, weight_decay, or
            model.named_parameters(), whose names make the random numbers independent of the order.
        lr: learning rate; a parameter moves lr rho z_i. "auto": from the losses, as `jaguar.StepSize` says; the closure
            then returns the loss of each row of its batch, a vector.
        momentum: heavy-ball factor in [0, 1), without a factor of 1 - momentum, as torch.optim.SGD; 0 keeps no state.
        weight_decay: decoupled, multiplied by lr.
        tau: length of the perturbation in units of z (MeZO's eps), or "auto".
        distribution: law of z: "gaussian" or "rademacher".
        restore: how `measure` gets back: "copy" of the trained tensors, "module" by module while the model runs, or
            "walk" (MeZO's way: no memory, and a drift that replays reproduce); None: a copy where it needs under a
            tenth of the free memory, else "module".
        momentum_dtype: torch.float32, bfloat16 or float8_e5m2; None: the parameter's (bfloat16 for fp16 parameters).
        rounding: "stochastic" (the default) or "nearest", for everything stored in less than fp32.
        n_directions: directions per step; g is their mean, in order.
        estimator: "two-sided", or "one-sided": (f(x + tau z) - f(x)) / tau.
        rho_clip: bound on |rho|.
        maximize: make the loss larger, as in torch.optim.
        seed: key of all directions and rounding noise, in [0, 2**64).
        backend: "auto", or a name that `jaguar info` lists.
        shards: by name, the tensors that are parts of bigger ones, each a `jaguar.Shard`.
        direction_group: processes that share a step's directions, a `torch.distributed.ProcessGroup`.

    Raises:
        ValueError: an argument is out of range; the message names what would be right.

    Source: arXiv 2305.17333 (MeZO), Algorithm 1.
    Equivalent to: `g = rho * z; m = momentum * m + g; x -= lr * m`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | str = 1e-6,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        tau: float | str = 1e-3,
        distribution: str = "gaussian",
        restore: str | None = None,
        momentum_dtype: torch.dtype | None = None,
        rounding: str | None = None,
        n_directions: int = 1,
        estimator: str = "two-sided",
        rho_clip: float | None = None,
        maximize: bool = False,
        seed: int = 0,
        backend: str = "auto",
        shards: Mapping[str, Shard] | None = None,
        direction_group: Any = None,
    ) -> None:
        common = Common(
            tau=tau,
            restore=restore,
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
        method = Method(dense(distribution), SGD(), **decides)
        super().__init__(params, method, lr=lr, momentum=momentum, weight_decay=weight_decay, **runs)
