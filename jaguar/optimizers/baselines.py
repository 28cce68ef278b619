"""The methods that JAGUAR is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from jaguar import ops
from jaguar.directions import DENSE, Gaussian, Rademacher
from jaguar.estimators import RESTORES, choose_restore
from jaguar.launches import Launches
from jaguar.optimizers.base import ZerothOrder
from jaguar.params import Slot


class ZOSGD(ZerothOrder):
    """ZO-SGD (MeZO): SGD on a two-point estimate along one dense random direction, optionally with momentum.

        rho = (f(x + tau z) - f(x - tau z)) / (2 tau),   z ~ N(0, I)
        g = rho z;   m <- momentum m + g;   x <- (1 - lr wd) x - lr m        (m = g without momentum)

    Args:
        params: tensors (fp32, bf16, fp16, fp64), dicts with their own lr, tau, momentum, weight_decay, or
            model.named_parameters(), whose names make the random numbers independent of the order.
        lr: learning rate; a parameter moves lr rho z_i.
        momentum: heavy-ball factor in [0, 1), without a factor of 1 - momentum, as torch.optim.SGD; 0 keeps no state.
        weight_decay: decoupled, multiplied by lr.
        tau: length of the perturbation in units of z (MeZO's eps).
        distribution: of z: "gaussian" or "rademacher".
        restore: how `measure` gets back: "copy" of the trained tensors, "module" by module while the model runs, or
            "walk" (MeZO's way: no memory, and a drift that replays reproduce); None: a copy where it needs under a
            tenth of the free memory, else "module".
        momentum_dtype: torch.float32, bfloat16 or float8_e5m2; None: the parameter's (bfloat16 for fp16 parameters).
        rounding: "stochastic" (the default) or "nearest", for everything stored in less than fp32.
        n_directions: directions per step; g is their mean, in order.
        estimator: "two-sided", or "one-sided": (f(x + tau z) - f(x)) / tau.
        rho_clip: bound on |rho|.
        maximize: make the loss larger, as in torch.optim.
        seed: of all directions and rounding noise, in [0, 2**64).
        backend: "auto", or a name that `jaguar info` lists.

    Raises:
        ValueError: an argument is out of range; the message names what would be right.

    Source: arXiv 2305.17333 (MeZO), Algorithm 1.
    Equivalent to: `g = rho * z; m = momentum * m + g; x -= lr * m`.
    """

    group_keys: tuple[str, ...] = ("lr", "tau", "momentum", "weight_decay")
    momentum_key = "momentum"
    _rule = "sgd"
    _direction: Gaussian | Rademacher

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        tau: float = 1e-3,
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
    ) -> None:
        if distribution not in DENSE:
            raise ValueError(f"distribution={distribution!r}: choose {' or '.join(map(repr, DENSE))}")
        if restore is not None and restore not in RESTORES:
            raise ValueError(f"restore={restore!r}: choose {', '.join(map(repr, RESTORES))}, or None")
        self._direction, self._restore = DENSE[distribution], restore
        options = {"optimizer": type(self).__name__, "distribution": distribution, "restore": restore}
        defaults = {"lr": lr, "tau": tau, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(
            params,
            defaults,
            options=options,
            estimator=estimator,
            n_directions=n_directions,
            rho_clip=rho_clip,
            maximize=maximize,
            rounding=rounding,
            momentum_dtype=momentum_dtype,
            seed=seed,
            backend=backend,
        )

    def _make_steps(self, slots: Sequence[Slot]) -> Launches:
        return ops.dense_steps(
            self._backend,
            slots,
            self._direction,
            restore=self._restore or choose_restore(slots),
            rule=self._rule,
            stochastic=self._stochastic,
            two_sided=self._estimator.name == "two-sided",
            n_directions=self._n_directions,
        )

    def _has_momentum(self, group: dict[str, Any]) -> bool:
        return float(group["momentum"]) > 0.0


class ZOSignSGD(ZOSGD):
    """ZO-SignSGD: the sign of a two-point estimate along dense random directions, every coordinate moves by lr.

        g = mean over directions of rho z;   m <- momentum m + g;   x <- (1 - lr wd) x - lr sign(m)

    (m = g without momentum.) With one direction and no momentum sign(g) = sign(rho) sign(z). The public codes multiply
    z by sign(rho) and keep its magnitudes, which is ZO-SGD with |rho| = 1.

    Args:
        params: as `ZOSGD`, and all further arguments too.
        lr: length of every coordinate's step.

    Raises:
        ValueError: an argument is out of range; the message names what would be right.

    Source: Liu, Chen, Chen, Hong, "signSGD via zeroth-order oracle", ICLR 2019, Algorithm 1.
    Equivalent to: `g = rho * z; m = momentum * m + g; x -= lr * m.sign()`.
    """

    _rule = "sign"
