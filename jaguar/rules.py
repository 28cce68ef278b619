"""Update rules: their arithmetic on values, in the order of operations that fixes the bits, and what each declares.

Each product and each sum is rounded on its own (no `alpha=`, `lerp` or `addcmul`, whose fused multiply-add changes
6 % of the entries). Every function takes and returns values in the compute dtype (fp32, or fp64 for fp64 parameters);
storage rounds once, in `jaguar.rounding`. `jaguar.triton_kernels.rules` has functions of the same names and arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from jaguar.rule import FACTOR, NOT_NEGATIVE, POSITIVE, Buffer, Range, Rule, rounded

__all__ = ["FACTOR", "NOT_NEGATIVE", "POSITIVE", "SGD", "AveragedSign", "Buffer", "Range", "Rule", "Sign"]

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


def sign_step(x: Tensor, m: Tensor, decay: float, lr: float) -> Tensor:
    """x <- (1 - lr wd) x - lr sign(m), sign(0) = 0, m = g where there is no state.

    Source: arXiv 2506.04430, Algorithm 1; decoupled weight decay: arXiv 1711.05101.
    Equivalent to: `x * decay - lr * m.sign()`.
    """
    return x * decay - m.sign() * lr


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

    def options(self) -> dict[str, Any]:
        """Whether there is no momentum."""
        return {} if self.momentum else {"momentum": False}


@dataclass(frozen=True)
class Sign(SGD):
    """m <- momentum m + g; x <- (1 - lr wd) x - lr sign(m)."""

    called: ClassVar[str] = "ZOSignSGD"

    @property
    def step(self) -> Callable[..., Tensor]:
        """`sign_step`."""
        return sign_step


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

    def weights(self, rho: Sequence[float], group: Mapping[str, Any], double: bool) -> tuple[float, ...]:
        """(1 - beta) rho: two roundings."""
        share = rounded(1.0 - float(group.get("beta", 0.0)), double)
        return tuple(rounded(share * r, double) for r in rho)

    def options(self) -> dict[str, Any]:
        """What is moved; whether it averages is told by the direction."""
        return {"update": self.update}

    def shown(self, groups: Sequence[Mapping[str, Any]], fraction: float, momentum: str) -> list[str]:
        """How many steps momentum remembers."""
        betas = sorted({float(group.get("beta", 0.0)) for group in groups})
        memory = " / ".join(f"{1.0 / (fraction * (1.0 - beta)):,.0f}" for beta in betas)
        return [f"momentum: {momentum}, remembers {memory} steps"]
