"""JAGUAR SignSGD (arXiv 2506.04430, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from jaguar.method.directions import Coordinates, ReleasedBlock
from jaguar.method.method import Method
from jaguar.method.params import Shard
from jaguar.method.rules import AveragedSign
from jaguar.optimizers.base import ZerothOrder
from jaguar.optimizers.common import Common, parts, refuse_with_released

_DEFAULT_LR = {"sampled": 1e-4, "all": 1e-6}


class JaguarSignSGD(ZerothOrder):
    """SignSGD with momentum on sampled coordinates: two forward passes a step, one momentum buffer.

        rho = (f(x + tau e) - f(x - tau e)) / (2 tau),   e = sum over i in S of s_i e_i
        m_i <- beta m_i + (1 - beta) rho s_i             for i in S
        x_i <- (1 - lr wd) x_i - lr sign(m_i)            for i in S (update="sampled"), for all i (update="all")

    `coordinates=1, update="all"` is Algorithm 1 to the letter. With fraction p, "all" moves a coordinate 1/p times per
    visit, so equal travel means lr_all = p lr_sampled; momentum remembers 1 / (p (1 - beta)) steps. With "sampled",
    weight decay acts on S only, at the effective rate p lr wd.

    Args:
        params: tensors (fp32, bf16, fp16, fp64), dicts with their own lr, tau, beta, weight_decay, or
            model.named_parameters(), whose names make the random numbers independent of the order.
        lr: length of a coordinate's step; None: 1e-4 for "sampled", 1e-6 for "all"; "auto": from the losses, as
            `jaguar.StepSize` says; the closure then returns the loss of each row of its batch, a vector.
        beta: momentum factor in [0, 1).
        weight_decay: decoupled, multiplied by lr.
        tau: length of the perturbation of a coordinate, or "auto".
        coordinates: int: number over the whole set; float in (0, 1]: fraction of every tensor.
        layout: "uniform": elements; "block": rows x columns of each matrix.
        signs: "rademacher": random s_i; "ones": s_i = 1.
        update: "sampled" or "all".
        momentum_dtype: torch.float32, bfloat16 or float8_e5m2; None: the parameter's (bfloat16 for fp16 parameters).
        rounding: "stochastic" (the default) or "nearest", for everything stored in less than fp32.
        n_directions: directions per step; entry updates in order, then one sign step.
        estimator: "two-sided", or "one-sided": (f(x + tau e) - f(x)) / tau.
        rho_clip: bound on |rho|.
        maximize: make the loss larger, as in torch.optim.
        seed: key of all directions and rounding noise, in [0, 2**64).
        backend: "auto", or a name that `jaguar info` lists.
        released: what the authors' released code computes (one joint block of 10 % of the rows x 10 % of the columns
            per matrix, the same sign, no momentum), for table parity; excludes the sampling, beta and update arguments.
        shards: by name, the tensors that are parts of bigger ones, each a `jaguar.Shard`.
        direction_group: processes that share a step's directions, a `torch.distributed.ProcessGroup`.

    Raises:
        ValueError: an argument is out of range; the message names what would be right.

    Source: arXiv 2506.04430, Algorithm 1.
    Equivalent to: `m[S] = beta * m[S] + (1 - beta) * rho * s; x[S] -= lr * m[S].sign()`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | str | None = None,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        *,
        tau: float | str = 1e-3,
        coordinates: int | float = 0.01,
        layout: str = "uniform",
        signs: str = "rademacher",
        update: str = "sampled",
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
            JaguarSignSGD, released, coordinates=coordinates, layout=layout, signs=signs, update=update, beta=beta
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
        direction = ReleasedBlock() if released else Coordinates(coordinates, layout, signs)
        method = Method(direction, AveragedSign(update, averages=not released), **decides)
        own: dict[str, Any] = {} if released else {"beta": beta}
        lr = _DEFAULT_LR[update] if lr is None else lr
        super().__init__(params, method, lr=lr, weight_decay=weight_decay, **own, **runs)
