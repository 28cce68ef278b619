"""Update rules: their arithmetic on values, in the order of operations that fixes the bits, and what each declares.

Each product and each sum is rounded on its own (no `alpha=`, `lerp` or `addcmul`, whose fused multiply-add changes
6 % of the entries). Every function takes and returns values in the compute dtype (fp32, or fp64 for fp64 parameters);
storage rounds once, in `jaguar.rounding`. `jaguar.triton_kernels.rules` has functions of the same names and arguments.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from jaguar.directions import Direction
from jaguar.params import Slot


def rounded(value: float, double: bool = False) -> float:
    """`value` rounded to fp32 (unless `double`), overflowing to infinity.

    One operation on fp32 numbers done in fp64 and then rounded is the correctly rounded fp32 operation.
    """
    return value if double else ctypes.c_float(value).value


@dataclass(frozen=True)
class Scalars:
    """The numbers of one step that launches read, for tensors of one kind, rounded to their compute dtype.

    Attributes:
        tau: length of the perturbation.
        decay: 1 - lr * weight_decay, made in fp64.
        lr: length of the step.
        entry: the rule's own numbers for its entry into state.
        step: the rule's own numbers for its step.
        weights: what each direction contributes to g, rho or a multiple of it; () before the losses are known.
    """

    tau: float
    decay: float
    lr: float
    entry: tuple[float, ...] = ()
    step: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether all weights are finite."""
        return all(map(math.isfinite, self.weights))


def all_finite(scalars: Mapping[Any, Scalars]) -> bool:
    """Whether the weights of all kinds of tensors are finite."""
    return all(s.finite for s in scalars.values())


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


# -- rules -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """The values that a number of a parameter group may have.

    Attributes:
        admits: whether a value is one of them.
        wanted: the end of the message that refuses others.
    """

    admits: Callable[[float], bool]
    wanted: str


NOT_NEGATIVE = Range(lambda value: 0.0 <= value < math.inf, " must be at least 0")
POSITIVE = Range(lambda value: value < math.inf and rounded(value) > 0.0, " must be positive")
FACTOR = Range(lambda value: 0.0 <= value < 1.0, " must lie in [0, 1)")
LENGTH = Range(POSITIVE.admits, ": the length of the perturbation must be positive (1e-3 is common)")

# What every parameter group has.
COMMON: Mapping[str, Range] = {"lr": NOT_NEGATIVE, "tau": LENGTH, "weight_decay": NOT_NEGATIVE}


@dataclass(frozen=True)
class Buffer:
    """A state tensor of every parameter's shape.

    Attributes:
        name: its key in the optimizer's state.
        wide: stored in the compute dtype (fp32, or fp64 for fp64 parameters), whatever `momentum_dtype` says; else in
            the method's `momentum_dtype`, or in the parameter's dtype (bfloat16 for fp16 parameters).
    """

    name: str
    wide: bool = False


@dataclass(frozen=True)
class Rule:
    """What a step does with g: state <- entry(*state, g, *numbers), then x <- step(x, *state, decay, lr, *numbers).

    Without state, g stands in its place. A subclass is a frozen dataclass whose fields decide bits; the numbers that
    users may set per parameter group are declared by `keys`. Its two functions are plain torch on values in the compute
    dtype; for the Triton backend `jaguar.triton_kernels.rules` has functions of the same names and arguments.
    """

    # Numbers of a parameter group besides lr, tau and weight_decay, and what they may be; and what is no number.
    keys: ClassVar[Mapping[str, Range]] = {}
    flags: ClassVar[tuple[str, ...]] = ()
    # How many numbers of their own `entry` and `step` take.
    widths: ClassVar[tuple[int, int]] = (0, 0)
    # What coordinate directions move: "sampled" coordinates, or "all".
    update: ClassVar[str] = "sampled"

    @property
    def name(self) -> str:
        """What a checkpoint calls it: `called` of its own class, else the class's name."""
        return str(vars(type(self)).get("called", type(self).__name__))

    @property
    def entry(self) -> Callable[..., Any]:
        """The function that enters g into state: a tensor, or a tuple where there are several buffers."""
        raise NotImplementedError

    @property
    def step(self) -> Callable[..., Tensor]:
        """The function that moves a parameter."""
        raise NotImplementedError

    def state(self, group: Mapping[str, Any]) -> tuple[Buffer, ...]:
        """The state of the parameters of a group."""
        return ()

    def entry_numbers(self, group: Mapping[str, Any], t: int) -> tuple[float, ...]:
        """The own numbers of `entry` in the t-th step that moves something, t = 1, 2, ..."""
        return ()

    def step_numbers(self, group: Mapping[str, Any], t: int) -> tuple[float, ...]:
        """The own numbers of `step`."""
        return ()

    def weights(self, rho: Sequence[float], group: Mapping[str, Any], double: bool) -> tuple[float, ...]:
        """What each direction contributes, per unit of e."""
        return tuple(rho)

    def completed(self, values: dict[str, Any]) -> dict[str, Any]:
        """The numbers that a user gave for all groups, completed."""
        return values

    def prepared(self, group: dict[str, Any], number: int, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """A parameter group that a user gave, checked and completed; `number` is its place."""
        return group

    def role(self, slot: Slot, group: Mapping[str, Any]) -> dict[str, Any]:
        """What a slot's `rate`, `gain` and `signed` are, where they are not the usual ones."""
        return {}

    def check(self, direction: Direction) -> None:
        """Raises ValueError if it cannot move along `direction`."""

    def check_numbers(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError if it does not give as many numbers as it declares."""
        given = len(self.entry_numbers(group, 1)), len(self.step_numbers(group, 1))
        if given != self.widths:
            raise ValueError(
                f"{self.name} declares widths={self.widths}, and entry_numbers and step_numbers give {given} numbers"
            )

    def options(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}

    def shown(self, groups: Sequence[Mapping[str, Any]], fraction: float, momentum: str) -> list[str]:
        """Lines about it.

        Args:
            fraction: share of the coordinates that a step samples.
            momentum: in what the state is stored.
        """
        state = any(self.state(group) for group in groups)
        return [f"rule: {self!r}" + (f", momentum: {momentum}" if state else "")]


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


def plain(value: Any) -> Any:
    """A field's value as JSON has it: dtypes by name."""
    return str(value) if isinstance(value, torch.dtype) else value
