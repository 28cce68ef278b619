"""Update rules on values: what every kernel must compute, in the order of operations that fixes the bits.

Each product and each sum is rounded on its own (no `alpha=`, `lerp` or `addcmul`, whose fused multiply-add changes
6 % of the entries). Every rule takes and returns values in the compute dtype (fp32, or fp64 for fp64 parameters);
storage rounds once, in `jaguar.rounding`.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


def rounded(value: float, double: bool = False) -> float:
    """`value` rounded to fp32 (unless `double`), overflowing to infinity.

    One operation on fp32 numbers done in fp64 and then rounded is the correctly rounded fp32 operation.
    """
    return value if double else ctypes.c_float(value).value


@dataclass(frozen=True)
class Scalars:
    """The numbers of one step that an update reads, for one parameter group and one compute dtype.

    Attributes:
        tau: length of the perturbation.
        rho: directional derivative along each direction.
        entry: what a coordinate direction adds to momentum per unit of its sign: fl(fl(1 - beta) * rho).
        beta: momentum factor.
        decay: 1 - lr * weight_decay, made in fp64.
        lr: length of the step: the learning rate, times `gain`.
    """

    tau: float
    rho: tuple[float, ...]
    entry: tuple[float, ...]
    beta: float
    decay: float
    lr: float

    @property
    def finite(self) -> bool:
        """Whether every directional derivative is finite."""
        return all(map(math.isfinite, self.rho))


def step_scalars(
    rho: Sequence[float],
    *,
    lr: float,
    beta: float,
    weight_decay: float,
    tau: float,
    rho_clip: float | None,
    double: bool,
    gain: float = 1.0,
) -> Scalars:
    """The scalars of a step, from the one place that makes them; kernels only load them.

    `gain` multiplies the step but not the decay.
    """
    if rho_clip is not None:
        limit = rounded(rho_clip, double)
        rho = [math.copysign(min(abs(r), limit), r) for r in rho]
    share = rounded(1.0 - beta, double)
    return Scalars(
        tau=rounded(tau, double),
        rho=tuple(rho),
        entry=tuple(rounded(share * r, double) for r in rho),
        beta=rounded(beta, double),
        decay=rounded(1.0 - lr * weight_decay, double),
        lr=rounded(lr * gain, double),
    )


def perturbed(x: Tensor, e: Tensor, scale: float) -> Tensor:
    """x + scale * e, scale = tau or -tau.

    Equivalent to: `x + scale * e`.
    """
    return x + e * scale


def momentum_entry(m: Tensor, sign: Tensor, beta: float, entry: float) -> Tensor:
    """JAGUAR's momentum of the sampled coordinates: m_i <- beta m_i + (1 - beta) rho s_i.

    Source: arXiv 2506.04430, Algorithms 1 and 2.
    Equivalent to: `beta * m + entry * sign`.
    """
    return m * beta + sign * entry


def sign_step(x: Tensor, m: Tensor, decay: float, lr: float) -> Tensor:
    """x <- (1 - lr wd) x - lr sign(m), sign(0) = 0.

    Source: arXiv 2506.04430, Algorithm 1; decoupled weight decay: arXiv 1711.05101.
    Equivalent to: `x * decay - lr * m.sign()`.
    """
    return x * decay - m.sign() * lr


def mean_gradient(directions: Sequence[Tensor], rho: Sequence[float]) -> Tensor:
    """g = (1 / n) sum over k of rho_k e_k, summed in order.

    Equivalent to: `torch.stack([r * e for r, e in zip(rho, directions)]).mean(0)`.
    """
    g = directions[0] * rho[0]
    for e, r in zip(directions[1:], rho[1:], strict=True):
        g = g + e * r
    # By a tensor: by a Python number, CUDA multiplies with the reciprocal, which is not the rounded quotient.
    return g / g.new_full((), len(rho)) if len(rho) > 1 else g


def heavy_ball(m: Tensor, g: Tensor, momentum: float) -> Tensor:
    """m <- momentum m + g, as `torch.optim.SGD`: without a factor of 1 - momentum.

    Equivalent to: `momentum * m + g`.
    """
    return m * momentum + g


def sgd_step(x: Tensor, g: Tensor, decay: float, lr: float) -> Tensor:
    """x <- (1 - lr wd) x - lr g.

    Source: arXiv 2305.17333 (MeZO), Algorithm 1.
    Equivalent to: `x * decay - lr * g`.
    """
    return x * decay - g * lr
