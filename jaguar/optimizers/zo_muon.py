"""ZO-Muon (arXiv 2506.04430, Algorithms 3 and 4)."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch

from jaguar.method.directions import Gaussian, Orthonormal
from jaguar.method.method import Method
from jaguar.method.orthogonal import DenseOrthogonal, SampledOrthogonal
from jaguar.method.params import is_int
from jaguar.optimizers.base import ZerothOrder
from jaguar.optimizers.common import Common, parts

# tau of Algorithm 4, whose E has entries of about 1 / sqrt(columns).
_TAU_4 = 3e-2


class ZOMuon(ZerothOrder):
    """ZO-Muon: matrices move along the polar factor of a two-point estimate.

        rho = (f(x + tau e) - f(x - tau e)) / (2 tau)
        algorithm 3     e = Z ~ N(0, I);   M <- momentum M + rho Z;   X <- (1 - lr wd) X - lr NewtonSchulz(M)
        algorithm 4     E = U V^T with orthonormal rows or columns;   X <- (1 - lr wd) X - lr sign(rho) E
        the others      x <- (1 - lr wd) x - vector_lr sign(m); in algorithm 4 e_i = +1 or -1, m = rho e

    `jaguar.param_groups(model)` says which is which. Two evaluations a step. State: M where there is momentum, 4 bytes
    per fp32 parameter; else 0 bytes, and g is in memory while the matrices move. In algorithm 4 E is in memory during a
    step; it is made by a QR of each matrix, on the reference backend. Another method of the name (arXiv 2602.17155)
    looks along random subspaces. The authors' code has five quintic steps and skips matrices of 10,000 rows and more.

    Args:
        params: groups from `jaguar.param_groups(model)`, or dicts with `ns`, as `JaguarMuon`.
        lr: learning rate of the matrices; a step's matrix has singular values near 1.
        algorithm: 3 or 4.
        momentum: heavy-ball factor in [0, 1), without a factor of 1 - momentum; of algorithm 3.
        weight_decay: decoupled, multiplied by lr (of the sign rule's tensors: by vector_lr).
        ns_steps, ns_coefficients, ns_dtype: settings of Newton-Schulz, as `JaguarMuon`.
        vector_lr: learning rate of the sign rule; None: 0.01 lr.
        common: tau (1e-3, in algorithm 4 3e-2: E has entries of about 1 / sqrt(columns)), seed, backend, restore,
            estimator, n_directions, rho_clip, rounding, momentum_dtype, maximize, shards and
            direction_group, as `ZOSGD`.

    Raises:
        ValueError: an argument is out of range, or a group has no `ns`; the message names what would be right.

    Source: arXiv 2506.04430, Algorithms 3 and 4.
    Equivalent to: `X -= lr * jaguar.newton_schulz(rho * Z)`, or `X -= lr * rho.sign() * E`.
    """

    by_role: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        algorithm: int = 3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        ns_steps: int | None = None,
        ns_coefficients: str = "cubic",
        ns_dtype: torch.dtype = torch.bfloat16,
        vector_lr: float | None = None,
        **common: Unpack[Common],
    ) -> None:
        decides, runs = parts(common)
        own: dict[str, Any] = {"vector_lr": vector_lr}
        if not is_int(algorithm):
            raise ValueError(f"algorithm={algorithm!r}: choose 3 or 4")
        if algorithm == 3:
            rule = DenseOrthogonal("all", True, ns_steps, ns_coefficients, ns_dtype)
            method = Method(Gaussian(), rule, **decides)
            own["momentum"] = momentum
        elif algorithm == 4:
            given = {
                "momentum": (momentum, 0.0),
                "ns_steps": (ns_steps, None),
                "ns_coefficients": (ns_coefficients, "cubic"),
                "ns_dtype": (ns_dtype, torch.bfloat16),
                "momentum_dtype": (common.get("momentum_dtype"), None),
            }
            for name, (value, usual) in given.items():
                if value != usual:
                    raise ValueError(
                        f"{name}={value!r}: algorithm 4 moves along E itself; leave it out, or choose algorithm=3"
                    )
            method = Method(Orthonormal(), SampledOrthogonal(), **decides)
            runs.setdefault("tau", _TAU_4)
        else:
            raise ValueError(f"algorithm={algorithm!r}: choose 3 or 4")
        super().__init__(params, method, lr=lr, weight_decay=weight_decay, **own, **runs)
