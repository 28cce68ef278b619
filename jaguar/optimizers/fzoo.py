"""FZOO (arXiv 2506.09034)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from jaguar.method.directions import Rademacher
from jaguar.method.estimators import Normalised
from jaguar.method.method import Method
from jaguar.method.params import Shard
from jaguar.method.rules import SGD
from jaguar.optimizers.base import ZerothOrder
from jaguar.optimizers.common import Common, parts


class FZOO(ZerothOrder):
    """FZOO: sign directions that share f(x), and a step over the standard deviation of their losses.

        x <- (1 - lr wd) x - lr (1/n) sum over k of (f(x + tau e_k) - f(x)) e_k / (tau sigma),   e_k,i = +1 or -1

    sigma is the sample standard deviation of the n losses f(x + tau e_k): where they hardly differ, steps are long.
    n + 1 evaluations a step. No state: 0 bytes per parameter. Steps whose n losses are equal move nothing.

    Args:
        params: tensors (fp32, bf16, fp16, fp64), dicts with their own lr, tau, weight_decay, or
            model.named_parameters(), whose names make the random numbers independent of the order.
        lr: learning rate; a parameter moves by about lr / (tau sqrt(n)), with scale="released" by lr / sqrt(n).
        n_directions: n, at least 2.
        scale: "paper": sigma with n - 1, divided by tau, as above; "released": sigma with n and no tau, as in the
            authors' code, whose learning rates are therefore 1 / tau times as large.
        weight_decay: decoupled, multiplied by lr.
        rho_clip: bound on what e_k is multiplied by.
        tau, restore, rounding, maximize, seed, backend, shards, direction_group: as `ZOSGD`.

    Raises:
        ValueError: an argument is out of range; the message names what would be right.

    Source: arXiv 2506.09034, Algorithm 1; the authors' code at DKmiyan/FZOO for "released", whose batched forward
    cannot run as it was published.
    Equivalent to: `x -= lr * sum((f - f0) * e for f, e in zip(fs, es)) / (n * tau * statistics.stdev(fs))`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-7,
        *,
        n_directions: int = 8,
        scale: str = "paper",
        weight_decay: float = 0.0,
        tau: float = 1e-3,
        restore: str | None = None,
        rounding: str | None = None,
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
            rounding=rounding,
            n_directions=n_directions,
            rho_clip=rho_clip,
            maximize=maximize,
            seed=seed,
            backend=backend,
            shards=shards,
            direction_group=direction_group,
        )
        decides, runs = parts(common, partial(Normalised, scale=scale))
        method = Method(Rademacher(), SGD(momentum=False), **decides)
        super().__init__(params, method, lr=lr, weight_decay=weight_decay, **runs)
