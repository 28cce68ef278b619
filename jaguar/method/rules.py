"""Update rules: their arithmetic on values, in the order of operations that fixes the bits, and what each declares.

Each product and each sum is rounded on its own (no `alpha=`, `lerp` or `addcmul`, whose fused multiply-add changes
6 % of the entries). Every function takes and returns values in the compute dtype (fp32, or fp64 for fp64 parameters);
storage rounds once, in `method.rounding`. `triton_kernels.rules` has functions of the same names and arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from jaguar.method.directions import Direction, Mixed
from jaguar.method.params import Slot
from jaguar.method.rounding import root
from jaguar.method.rule import FACTOR, NOT_NEGATIVE, POSITIVE, Buffer, Range, Rule, Seen, rounded

__all__ = [
    "FACTOR",
    "NOT_NEGATIVE",
    "POSITIVE",
    "SGD",
    "AdaMM",
    "AlongMomentum",
    "AveragedSign",
    "Buffer",
    "Range",
    "Recursive",
    "Rule",
    "ScalarSign",
    "Sign",
    "rounded",
]

# -- arithmetic --------------------------------------------------------------------------------------------------------


def perturbed(x: Tensor, e: Tensor, scale: float) -> Tensor:
    """x + scale * e, scale a multiple of tau.

    Equivalent to: `x + scale * e`.
    """
    return x + e * scale


def mean_gradient(directions: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """g = (1 / n) sum over k of w_k e_k, summed in order.

    Equivalent to: `torch.stack([w * e for w, e in zip(weights, directions)]).mean(0)`.
    """
    g = directions[0] * weights[0]
    for e, w in zip(directions[1:], weights[1:], strict=True):
        g = g + e * w
    # By a tensor: by a Python number, CUDA multiplies with the reciprocal, which is not the rounded quotient.
    return g / g.new_full((), len(weights)) if len(weights) > 1 else g


def heavy_ball(m: Tensor, g: Tensor, momentum: float) -> Tensor:
    """m <- momentum m + g, as `torch.optim.SGD`: without a factor of 1 - momentum.

    Equivalent to: `momentum * m + g`.
    """
    return m * momentum + g


def sgd_step(x: Tensor, m: Tensor, decay: float, lr: float) -> Tensor:
    """x <- (1 - lr wd) x - lr m, m = g where there is no state.

    Source: arXiv 2305.17333 (MeZO), Algorithm 1.
    Equivalent to: `x * decay - lr * m`.
    """
    return x * decay - m * lr


def blend(z: Tensor, y: Tensor, share: float, rest: float) -> Tensor:
    """share z + rest y.

    Source: arXiv 2312.15184 (ZO-AdaMU), equations 3 and 5.
    Equivalent to: `share * z + rest * y`.
    """
    return z * share + y * rest


def momentum_step(x: Tensor, m: Tensor, decay: float, rate: float, v: Tensor) -> Tensor:
    """x <- (1 - lr wd) x - (lr rho) m / sqrt(v + 1e-8), rate = lr rho.

    Source: arXiv 2312.15184 (ZO-AdaMU), Algorithm 1.
    Equivalent to: `x * decay - rate * m / (v + 1e-8).sqrt()`.
    """
    return x * decay - (m * rate) / root(v + 1e-8)


def recursive_step(x: Tensor, v: Tensor, decay: float, lr: float, eta: float) -> Tensor:
    """x <- (1 - lr wd) x - lr (eta v).

    Source: Huang, Gao, Pei, Huang, JMLR 23 (2022), Algorithm 1 (Acc-ZOM).
    Equivalent to: `x * decay - lr * (eta * v)`.
    """
    return x * decay - (v * eta) * lr


def sign_step(x: Tensor, m: Tensor, decay: float, lr: float) -> Tensor:
    """x <- (1 - lr wd) x - lr sign(m), sign(0) = 0, m = g where there is no state.

    Source: arXiv 2506.04430, Algorithm 1; decoupled weight decay: arXiv 1711.05101.
    Equivalent to: `x * decay - lr * m.sign()`.
    """
    return x * decay - m.sign() * lr


def adam(m: Tensor, v: Tensor, g: Tensor, beta1: float, rest1: float, beta2: float, rest2: float) -> tuple[Tensor, ...]:
    """m <- beta1 m + (1 - beta1) g; v <- beta2 v + (1 - beta2) g^2; rest = 1 - beta.

    Source: arXiv 1412.6980, Algorithm 1.
    Equivalent to: `(beta1 * m + rest1 * g, beta2 * v + rest2 * g * g)`.
    """
    return m * beta1 + g * rest1, v * beta2 + (g * g) * rest2


def amsgrad(
    m: Tensor, v: Tensor, h: Tensor, g: Tensor, beta1: float, rest1: float, beta2: float, rest2: float
) -> tuple[Tensor, ...]:
    """`adam`, and h <- max(h, v).

    Source: arXiv 1904.09237, Algorithm 2.
    Equivalent to: `(*adam(m, v, g, ...), torch.maximum(h, v))`.
    """
    m, v = adam(m, v, g, beta1, rest1, beta2, rest2)
    return m, v, torch.maximum(h, v)


def adam_step(x: Tensor, m: Tensor, v: Tensor, decay: float, lr: float, eps: float, c1: float, c2: float) -> Tensor:
    """x <- (1 - lr wd) x - lr ((c1 m) / (sqrt(c2 v) + eps)); c = 1 / (1 - beta^t) corrects the bias, or is 1.

    Equivalent to: `x * decay - lr * ((c1 * m) / ((c2 * v).sqrt() + eps))`.
    """
    return x * decay - (m * c1) / (root(v * c2) + eps) * lr


def amsgrad_step(
    x: Tensor, m: Tensor, v: Tensor, h: Tensor, decay: float, lr: float, eps: float, c1: float, c2: float
) -> Tensor:
    """`adam_step` with h in place of v."""
    return adam_step(x, m, h, decay, lr, eps, c1, c2)


# -- rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SGD(Rule):
    """m <- momentum m + g; x <- (1 - lr wd) x - lr m. Where momentum is 0 no state is kept, and m = g.

    Attributes:
        momentum: False: groups have none.
    """

    momentum: bool = True

    called: ClassVar[str] = "ZOSGD"
    widths: ClassVar[tuple[int, int]] = (1, 0)

    @property
    def keys(self) -> Mapping[str, Range]:  # type: ignore[override]
        """momentum."""
        return {"momentum": FACTOR} if self.momentum else {}

    @property
    def entry(self) -> Callable[..., Any]:
        """`heavy_ball`."""
        return heavy_ball

    @property
    def step(self) -> Callable[..., Tensor]:
        """`sgd_step`."""
        return sgd_step

    def state(self, group: Mapping[str, Any]) -> tuple[Buffer, ...]:
        """Momentum, where it is not 0."""
        return (Buffer("momentum"),) if float(group.get("momentum", 0.0)) > 0.0 else ()

    def entry_numbers(self, group: Mapping[str, Any], t: int) -> tuple[float, ...]:
        """The momentum factor."""
        return (float(group.get("momentum", 0.0)),)

    def best_lr(self, seen: Seen, group: Mapping[str, Any], n: int, fraction: float) -> float:
        """(1 - momentum) n g'Cg / (E[rho^2] tr(CH)): momentum adds up what follows each other."""
        return (1.0 - float(group.get("momentum", 0.0))) * n * seen.share / seen.curvature

    def options(self) -> dict[str, Any]:
        """The mark of a rule without momentum."""
        return {} if self.momentum else {"momentum": False}


@dataclass(frozen=True)
class Sign(SGD):
    """m <- momentum m + g; x <- (1 - lr wd) x - lr sign(m)."""

    called: ClassVar[str] = "ZOSignSGD"

    @property
    def step(self) -> Callable[..., Tensor]:
        """`sign_step`."""
        return sign_step

    def best_lr(self, seen: Seen, group: Mapping[str, Any], n: int, fraction: float) -> float:
        """sqrt(2 n / pi) g'Cg / (sqrt(E[rho^2]) tr(CH)), changed by what momentum does to signs."""
        momentum = float(group.get("momentum", 0.0))
        return math.sqrt(n) * seen.along_signs(momentum, momentum)


@dataclass(frozen=True)
class ScalarSign(SGD):
    """m <- momentum m + g; x <- (1 - lr wd) x - lr m, g = mean over directions of sign(rho) e: |rho| counts as 1."""

    def weights(self, rho: Sequence[float], group: Mapping[str, Any], double: bool, t: int) -> tuple[float, ...]:
        """sign(rho), 0 of 0; what is not finite stays, and skips the step."""
        return tuple(math.copysign(1.0, r) if r and math.isfinite(r) else r for r in rho)


@dataclass(frozen=True)
class AveragedSign(Rule):
    """m <- beta m + (1 - beta) g; x <- (1 - lr wd) x - lr sign(m): the rule of JAGUAR SignSGD.

    Along coordinate directions m is entered where they sample; the entries of several directions follow each other.

    Attributes:
        update: what the sign step moves then: "sampled" coordinates, or "all".
        averages: False: m begins at 0 in every step, as in the authors' released code, and there is no beta.
    """

    update: str = "sampled"  # type: ignore[misc]
    averages: bool = True

    called: ClassVar[str] = "JaguarSignSGD"
    widths: ClassVar[tuple[int, int]] = (1, 0)

    def __post_init__(self) -> None:
        if self.update not in ("sampled", "all"):
            raise ValueError(f"update={self.update!r}: choose 'sampled' or 'all'")

    @property
    def keys(self) -> Mapping[str, Range]:  # type: ignore[override]
        """beta."""
        return {"beta": FACTOR} if self.averages else {}

    @property
    def entry(self) -> Callable[..., Any]:
        """`heavy_ball`, of (1 - beta) g."""
        return heavy_ball

    @property
    def step(self) -> Callable[..., Tensor]:
        """`sign_step`."""
        return sign_step

    def state(self, group: Mapping[str, Any]) -> tuple[Buffer, ...]:
        """Momentum."""
        return (Buffer("momentum"),)

    def entry_numbers(self, group: Mapping[str, Any], t: int) -> tuple[float, ...]:
        """beta."""
        return (float(group.get("beta", 0.0)),)

    def weights(self, rho: Sequence[float], group: Mapping[str, Any], double: bool, t: int) -> tuple[float, ...]:
        """(1 - beta) rho: two roundings."""
        share = rounded(1.0 - float(group.get("beta", 0.0)), double)
        return tuple(rounded(share * r, double) for r in rho)

    def best_lr(self, seen: Seen, group: Mapping[str, Any], n: int, fraction: float) -> float:
        """sqrt(2 / pi) g'Cg / (sqrt(E[rho^2]) tr(CH)), changed by what momentum does to signs.

        Where all coordinates move, a sign moves its coordinate until the coordinate is sampled again.
        """
        beta, visits = float(group.get("beta", 0.0)), n * fraction
        best = seen.along_signs(beta, beta ** max(1.0, visits))
        return best * min(1.0, visits) if self.update == "all" else best

    def options(self) -> dict[str, Any]:
        """`update`; that m begins at 0 in every step is among the direction's options."""
        return {"update": self.update}

    def shown(self, groups: Sequence[Mapping[str, Any]], fraction: float, momentum: str) -> list[str]:
        """Number of steps that momentum remembers."""
        betas = sorted({float(group.get("beta", 0.0)) for group in groups})
        memory = " / ".join(f"{1.0 / (fraction * (1.0 - beta)):,.0f}" for beta in betas)
        return [f"momentum: {momentum}, remembers {memory} steps"]


@dataclass(frozen=True)
class AlongMomentum(Rule):
    """m <- e; x <- (1 - lr wd) x - (lr rho) e / sqrt(v + 1e-8), along `directions.Mixed`, whose launches compute it."""

    called: ClassVar[str] = "ZOAdaMU"

    @property
    def entry(self) -> Callable[..., Any]:
        """`blend`."""
        return blend

    @property
    def step(self) -> Callable[..., Tensor]:
        """`momentum_step`."""
        return momentum_step

    def state(self, group: Mapping[str, Any]) -> tuple[Buffer, ...]:
        """m."""
        return (Buffer("momentum"),)

    def check(self, direction: Direction) -> None:
        """Raises ValueError for other directions."""
        if not isinstance(direction, Mixed):
            raise ValueError(f"AlongMomentum moves along Mixed(...) directions, and not along {direction}")


@dataclass(frozen=True)
class Recursive(Rule):
    """v <- g(x_t) + (1 - a_t) (v - g(x_t-1)); x <- (1 - lr wd) x - lr eta_t v: momentum with reduced variance.

    Both estimates have one direction e, so that v <- (1 - a_t) v + (rho(x_t) - (1 - a_t) rho(x_t-1)) e.

        eta_t = k / (m0 + t)^(1/3),   a_1 = 1,   a_t+1 = c eta_t^2,   t = 1, 2, ... steps that moved something

    Attributes:
        k, m0, c: constants of the schedule; no a_t may exceed 1.
    """

    k: float = 1.0
    m0: float = 2.0
    c: float = 2.0

    called: ClassVar[str] = "AccZOM"
    widths: ClassVar[tuple[int, int]] = (1, 1)

    def __post_init__(self) -> None:
        for name in ("k", "m0", "c"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
                raise ValueError(f"{name}={value!r}: give a number above 0")
            object.__setattr__(self, name, float(value))
        if (largest := self._share(2)) > 1.0:
            raise ValueError(
                f"k={self.k:g}, m0={self.m0:g}, c={self.c:g} give a_2 = c k^2 / (m0 + 1)^(2/3) = {largest:.3g}, and no "
                "a_t may exceed 1: lower c or k, or raise m0"
            )

    @property
    def entry(self) -> Callable[..., Any]:
        """`heavy_ball`, with 1 - a_t for momentum."""
        return heavy_ball

    @property
    def step(self) -> Callable[..., Tensor]:
        """`recursive_step`."""
        return recursive_step

    def state(self, group: Mapping[str, Any]) -> tuple[Buffer, ...]:
        """v."""
        return (Buffer("momentum"),)

    def copies(self, slot: Slot, group: Mapping[str, Any]) -> tuple[str, ...]:
        """x_t-1."""
        return ("previous",)

    def entry_numbers(self, group: Mapping[str, Any], t: int) -> tuple[float, ...]:
        """1 - a_t."""
        return (1.0 - self._share(t),)

    def step_numbers(self, group: Mapping[str, Any], t: int) -> tuple[float, ...]:
        """eta_t."""
        return (self._eta(t),)

    def weights(self, rho: Sequence[float], group: Mapping[str, Any], double: bool, t: int) -> tuple[float, ...]:
        """rho(x_t) - (1 - a_t) rho(x_t-1): two roundings."""
        now, before = rho
        return (rounded(now - rounded(rounded(1.0 - self._share(t), double) * before, double), double),)

    def _eta(self, t: int) -> float:
        return float(self.k / (self.m0 + t) ** (1.0 / 3.0))

    def _share(self, t: int) -> float:
        return 1.0 if t == 1 else self.c * self._eta(t - 1) ** 2


@dataclass(frozen=True)
class AdaMM(Rule):
    """m <- beta1 m + (1 - beta1) g; v <- beta2 v + (1 - beta2) g^2; x <- (1 - lr wd) x - lr m / (sqrt(v) + eps).

    v and h = max(h, v), which stands in its place with `amsgrad`, are fp32 for parameters of half precision.

    Attributes:
        amsgrad: divide by the root of the largest v so far.
        bias_correction: divide m by 1 - beta1^t and v by 1 - beta2^t, t the number of steps that moved something.
    """

    amsgrad: bool = True
    bias_correction: bool = False

    called: ClassVar[str] = "ZOAdaMM"
    keys: ClassVar[Mapping[str, Range]] = {"beta1": FACTOR, "beta2": FACTOR, "eps": POSITIVE}
    widths: ClassVar[tuple[int, int]] = (4, 3)

    def __post_init__(self) -> None:
        for name in ("amsgrad", "bias_correction"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name}={value!r}: choose True or False")

    @property
    def entry(self) -> Callable[..., Any]:
        """`amsgrad` or `adam`."""
        return amsgrad if self.amsgrad else adam

    @property
    def step(self) -> Callable[..., Tensor]:
        """`amsgrad_step` or `adam_step`."""
        return amsgrad_step if self.amsgrad else adam_step

    def state(self, group: Mapping[str, Any]) -> tuple[Buffer, ...]:
        """m, v and h."""
        more = (Buffer("h", wide=True),) if self.amsgrad else ()
        return (Buffer("momentum"), Buffer("v", wide=True), *more)

    def entry_numbers(self, group: Mapping[str, Any], t: int) -> tuple[float, ...]:
        """Both factors, and one minus each."""
        beta1, beta2 = float(group["beta1"]), float(group["beta2"])
        return beta1, 1.0 - beta1, beta2, 1.0 - beta2

    def step_numbers(self, group: Mapping[str, Any], t: int) -> tuple[float, ...]:
        """eps and both corrections."""
        c1 = c2 = 1.0
        if self.bias_correction:
            c1, c2 = (1.0 / (1.0 - float(group[key]) ** t) for key in ("beta1", "beta2"))
        return float(group["eps"]), c1, c2
