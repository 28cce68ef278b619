"""A method: the frozen value that decides every bit of a run, given group values and a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch

from jaguar.method import rng
from jaguar.method.directions import Direction, Mixed, Sparse
from jaguar.method.estimators import Estimator, TwoSided
from jaguar.method.params import Kind, Slot
from jaguar.method.probe import Derivatives
from jaguar.method.rule import COMMON, Range, Rule, Scalars, plain, rounded
from jaguar.method.rules import AlongMomentum
from jaguar.method.step_size import StepSize

_HOME = {"direction": "jaguar.directions", "rule": "jaguar.rules", "estimator": "jaguar.estimators"}
_MOMENTUM_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e5m2)


@dataclass(frozen=True)
class Method:
    """A zero-order optimizer as data: a direction to look along, points to evaluate, a rule to move by.

        rho_k = estimator(losses along e_k),   e_k = direction;   state, x <- rule(g),   g = mean over k of rho_k e_k

    (Along coordinate directions g is entered into state one direction after the other.) Two runs with equal methods,
    group values, seeds, names and losses have equal bits. Backend, copy or module restore are execution and no part
    of it. `jaguar.ZerothOrder(params, method, **group_values)` runs any.

    The parts are public in their modules: `jaguar.directions`, `jaguar.rules` (and `jaguar.orthogonal`),
    `jaguar.estimators`.

    Example:

        method = jaguar.Method(jaguar.directions.Rademacher(), jaguar.rules.Sign(), jaguar.estimators.OneSided(4))
        optimizer = jaguar.ZerothOrder(model.named_parameters(), method, lr=1e-4, momentum=0.9)
        optimizer.step(closure)

    Attributes:
        direction: `Gaussian()`, `Rademacher()`, `Coordinates(...)`, ...
        rule: `SGD()`, `Sign()`, `AveragedSign(...)`, ...
        estimator: `TwoSided(...)`, `OneSided(...)`, ...
        rounding: "stochastic" or "nearest", for everything stored in less than fp32.
        momentum_dtype: torch.float32, bfloat16 or float8_e5m2; None: the parameter's (bfloat16 for fp16 parameters).
        maximize: make the loss larger, as in torch.optim.
        walk: go back by steps along e, which leaves the drift of their roundings; a part of the method for its bits.
        step_size: chooses lr, tau or both from the losses; None: they are numbers.

    Raises:
        ValueError: a field is out of range, or two parts do not fit; the message names what would be right.
    """

    direction: Direction
    rule: Rule
    estimator: Estimator = field(default_factory=TwoSided)
    rounding: str = "stochastic"
    momentum_dtype: torch.dtype | None = None
    maximize: bool = False
    walk: bool = False
    step_size: StepSize | None = None

    def __post_init__(self) -> None:
        for name, kind in (("direction", Direction), ("rule", Rule), ("estimator", Estimator)):
            part = getattr(self, name)
            if not isinstance(part, kind):
                raise ValueError(
                    f"{name}={part!r} is no {kind.__name__}: give an instance of one ({_HOME[name]} has some)"
                )
        if self.rounding not in ("stochastic", "nearest"):
            raise ValueError(f"rounding={self.rounding!r}: choose 'stochastic' (the default) or 'nearest'")
        if self.momentum_dtype is not None and self.momentum_dtype not in _MOMENTUM_DTYPES:
            raise ValueError(
                f"momentum_dtype={self.momentum_dtype}: choose one of {', '.join(map(str, _MOMENTUM_DTYPES))}, "
                "or None for the parameters' precision"
            )
        if not isinstance(self.maximize, bool):
            raise ValueError(f"maximize={self.maximize!r}: choose True, to make the loss larger, or False")
        if self.direction.alone and self.estimator.n_directions > 1:
            raise ValueError(
                f"n_directions={self.estimator.n_directions}: {type(self.direction).__name__} is one direction a step; "
                "leave it out"
            )
        if self.walk and isinstance(self.direction, Sparse):
            raise ValueError("walk=True is for dense directions; the few values that coordinates touch are saved")
        taken = {"optimizer", "rng", "restore", "padding_rows", "auto"} | {f.name for f in fields(self)}
        for part in (self.direction, self.rule, self.estimator):
            names = {f.name for f in fields(part)}
            if both := taken & names:
                raise ValueError(
                    f"{part!r} has a field {min(both)!r}, and so has another part of a checkpoint's options: give the "
                    "field another name"
                )
            taken |= names
        if isinstance(self.direction, Mixed) and not isinstance(self.rule, AlongMomentum):
            raise ValueError(
                f"Mixed(...) directions are momentum, which {self.rule!r} does not keep: give AlongMomentum()"
            )
        self.estimator.check(self.direction, self.walk)
        if self.step_size is not None:
            self.step_size.check(self.rule, self.estimator, self.walk)
        self.rule.check(self.direction)

    @property
    def stochastic(self) -> bool:
        """Tells whether values are rounded stochastically where storage is narrower than fp32."""
        return self.rounding == "stochastic"

    @property
    def keys(self) -> dict[str, Range]:
        """The numbers of a parameter group."""
        return {"lr": COMMON["lr"], "tau": COMMON["tau"], **self.rule.keys, "weight_decay": COMMON["weight_decay"]}

    def options(self) -> dict[str, Any]:
        """The method as plain values, for checkpoints."""
        return {
            "optimizer": self.rule.name,
            **self.direction.options(),
            **self.rule.options(),
            **({} if isinstance(self.direction, Sparse) else {"restore": "walk" if self.walk else None}),
            "rng": rng.TAG,
            **self.estimator.options(),
            "rounding": self.rounding,
            "momentum_dtype": plain(self.momentum_dtype),
            "maximize": self.maximize,
            **({} if self.step_size is None else self.step_size.options()),
        }

    def moves(self, losses: Sequence[float]) -> bool:
        """Tells whether a step with these losses, all finite, moves anything."""
        return self.estimator.moves(self._smaller(losses))

    def derivatives(self, losses: Sequence[float]) -> Derivatives:
        """The derivatives that a step with these losses moves along."""
        along = partial(self.estimator.along, self._smaller(losses))
        if not self.maximize:
            return along
        # For two equal losses it is -0, as in `downhill`: what becomes of a parameter that is -0 depends on it.
        return lambda tau, double: [-(0.0 - rho) for rho in along(tau, double)]

    def downhill(self, derivatives: Derivatives) -> Derivatives:
        """Derivatives of the loss, negated where `maximize`."""
        if not self.maximize:
            return derivatives
        return lambda tau, double: [-rho for rho in derivatives(tau, double)]

    def _smaller(self, losses: Sequence[float]) -> Sequence[float]:
        """The losses to minimise: as measured, or negated where `maximize`."""
        return [-loss for loss in losses] if self.maximize else losses

    def in_roles(self, slots: Sequence[Slot], groups: Sequence[Mapping[str, Any]]) -> list[Slot]:
        """The slots with the learning rate factors and the role that the rule gives them."""
        return [replace(slot, **self.rule.role(slot, groups[slot.group])) for slot in slots]

    def scalars(
        self,
        kind: Kind,
        group: Mapping[str, Any],
        lr: float,
        tau: float,
        rho: Sequence[float],
        t: int,
        length: float = 1.0,
    ) -> Scalars:
        """The numbers of a step for tensors of one kind, from the one place that makes them.

        Args:
            group: its parameter group.
            lr, tau: the group's learning rate and length of the perturbation in the step.
            rho: derivatives of what is made smaller; none before the losses are known.
            t: number of the step among those that moved something, from 1.
            length: length of the step's direction.
        """
        double, rule, clip = kind.double, self.rule, self.estimator.rho_clip
        if clip is not None:
            limit = rounded(clip, double)
            rho = [math.copysign(min(abs(r), limit), r) for r in rho]
        lr = lr * kind.rate
        return Scalars(
            tau=rounded(tau * length, double),
            decay=rounded(1.0 - lr * group["weight_decay"], double),
            lr=rounded(lr * kind.gain, double),
            entry=tuple(rounded(n, double) for n in rule.entry_numbers(group, t)),
            step=tuple(rounded(n, double) for n in rule.step_numbers(group, t)),
            weights=tuple(rounded(w * length, double) for w in rule.weights(rho, group, double, t)) if rho else (),
        )
