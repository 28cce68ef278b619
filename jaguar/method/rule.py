"""`Rule`, the base of update rules: numbers of parameter groups, state buffers, and the two functions of a step."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from jaguar.method.directions import Direction
from jaguar.method.params import Slot
from jaguar.method.rng import STATE_PURPOSES
from jaguar.method.rounding import compute_dtype


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
        """Tells whether all weights are finite."""
        return all(map(math.isfinite, self.weights))


def all_finite(scalars: Mapping[Any, Scalars]) -> bool:
    """Tells whether the weights of all kinds of tensors are finite."""
    return all(s.finite for s in scalars.values())


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

# Numbers that every parameter group has.
COMMON: Mapping[str, Range] = {"lr": NOT_NEGATIVE, "tau": LENGTH, "weight_decay": NOT_NEGATIVE}


@dataclass(frozen=True)
class Buffer:
    """A state tensor of every parameter's shape.

    Attributes:
        name: its key in the optimizer's state.
        wide: stored in the compute dtype (fp32, or fp64 for fp64 parameters), whatever `momentum_dtype` says; else in
            the method's `momentum_dtype`, or in the parameter's dtype (bfloat16 for fp16 parameters).
        lasting: False: it is made for each step and dropped after it.
    """

    name: str
    wide: bool = False
    lasting: bool = True


def state_dtype(parameter: torch.dtype, buffer: Buffer, chosen: torch.dtype | None) -> torch.dtype:
    """Dtype of a buffer: `chosen`, or the parameter's but bf16 for fp16; of a wide one, the compute dtype."""
    if buffer.wide:
        return compute_dtype(parameter)
    return chosen or (torch.bfloat16 if parameter == torch.float16 else parameter)


class Seen(NamedTuple):
    """Measurements on which the length of the best step depends.

    Attributes:
        share: g'Cg / E[rho^2], g the gradient, C the covariance of the directions.
        square: E[rho^2].
        curvature: tr(CH), H the Hessian.
    """

    share: float
    square: float
    curvature: float

    def along_signs(self, beta: float, again: float) -> float:
        """The best length of steps along sign(m), m an exponential mean of noisy derivatives.

            sqrt(2 / pi) sqrt((1 + beta) / (1 - beta)) g'Cg / (sqrt(E[rho^2]) tr(CH) c),
            c = 1 + 2 sum over k = 1, 2, ... of (2 / pi) asin(b^k)

        A mean of noise is smaller, so its sign is right more often; and the signs of two steps of a coordinate agree
        with the correlation (2 / pi) asin(b^k), so that wrong ones add up.

        Args:
            beta: factor of the mean.
            again: b: the correlation of m in two steps of a coordinate that follow each other.

        Source: Sheppard's orthant probability of two normals.
        """
        terms = min(100_000, math.ceil(math.log(1e-4) / math.log(again))) if again > 0.0 else 0
        together = 1.0 + 4.0 / math.pi * math.fsum(math.asin(again**k) for k in range(1, terms + 1))
        right = math.sqrt(2.0 / math.pi * (1.0 + beta) / (1.0 - beta))
        return right * self.share * math.sqrt(self.square) / (self.curvature * together)


@dataclass(frozen=True)
class Rule:
    """An update rule: state <- entry(*state, g, *numbers), then x <- step(x, *state, decay, lr, *numbers).

    Without state, g stands in its place and there is no entry; with state, `step` does not see g. A subclass is a
    frozen dataclass whose fields decide bits. Its two functions are elementwise plain torch on values in the compute
    dtype; for the Triton backend `jaguar.triton_kernels.rules` has functions of the same names and arguments.
    docs/adding-a-method.md writes one.

    Attributes:
        keys: numbers of a parameter group besides lr, tau and weight_decay, and what they may be: `FACTOR` (in [0, 1)),
            `POSITIVE`, `NOT_NEGATIVE` or another `Range`.
        flags: what else a parameter group may have.
        widths: how many numbers of their own `entry` and `step` take.
        update: coordinates that the step moves along coordinate directions: "sampled" ones, or "all".
    """

    keys: ClassVar[Mapping[str, Range]] = {}
    flags: ClassVar[tuple[str, ...]] = ()
    widths: ClassVar[tuple[int, int]] = (0, 0)
    update: ClassVar[str] = "sampled"

    @property
    def name(self) -> str:
        """Its name in checkpoints: `called` of its own class, else the class's name."""
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
        """Numbers that `entry` takes after g, in the t-th step that moved something, t = 1, 2, ..."""
        return ()

    def step_numbers(self, group: Mapping[str, Any], t: int) -> tuple[float, ...]:
        """Numbers that `step` takes after lr."""
        return ()

    def weights(self, rho: Sequence[float], group: Mapping[str, Any], double: bool, t: int) -> tuple[float, ...]:
        """Weights of the directions in g in the t-th step that moved something: rho, or a multiple of it."""
        return tuple(rho)

    def best_lr(self, seen: Seen, group: Mapping[str, Any], n: int, fraction: float) -> float:
        """The learning rate that lowers the loss most, where that is known; needed for `lr="auto"` only.

        It is not inherited: a rule of another step says its own.

        Args:
            n: directions of a step.
            fraction: share of the coordinates that a direction has.
        """
        raise NotImplementedError

    def copies(self, slot: Slot, group: Mapping[str, Any]) -> tuple[str, ...]:
        """State that begins as a copy of the parameter, in its dtype, and that no launch reads: its names."""
        return ()

    def completed(self, values: dict[str, Any]) -> dict[str, Any]:
        """The numbers that a user gave for all groups, completed."""
        return values

    def prepared(self, group: dict[str, Any], number: int, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """A parameter group that a user gave, checked and completed; `number` is its place."""
        return group

    def role(self, slot: Slot, group: Mapping[str, Any]) -> dict[str, Any]:
        """Values of a slot's `rate`, `gain` and `signed` that are not the defaults."""
        return {}

    def check(self, direction: Direction) -> None:
        """Raises ValueError if it cannot move along `direction`."""

    def check_numbers(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError for more state than can be stored, or if it gives other numbers than it declares."""
        if len(self.state(group)) > len(STATE_PURPOSES):
            raise ValueError(
                f"{self.name} has {len(self.state(group))} state buffers; there is rounding noise for "
                f"{len(STATE_PURPOSES)} at most"
            )
        given = len(self.entry_numbers(group, 1)), len(self.step_numbers(group, 1))
        if given != self.widths:
            raise ValueError(
                f"{self.name} declares widths={self.widths}, and entry_numbers and step_numbers give {given} numbers"
            )

    def options(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}

    def shown(self, groups: Sequence[Mapping[str, Any]], fraction: float, momentum: str) -> list[str]:
        """Lines for the optimizer's repr.

        Args:
            fraction: share of the coordinates that a step samples.
            momentum: dtype of the stored state.
        """
        state = any(self.state(group) for group in groups)
        return [f"rule: {self!r}" + (f", momentum: {momentum}" if state else "")]


def plain(value: Any) -> Any:
    """A field's value as JSON has it: dtypes by name."""
    return str(value) if isinstance(value, torch.dtype) else value
