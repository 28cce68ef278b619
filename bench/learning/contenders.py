"""Methods that are compared, the settings that each is tried with, and what a step of it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

import jaguar
from jaguar.optimizers.names import FIRST_ORDER, METHODS

# Learning rates that are tried first, as multiples of a contender's own; where an end is the best, it goes on there.
GRID = (0.1, 0.316, 1.0, 3.16, 10.0)
_BEYOND = 3.16


@dataclass(frozen=True)
class Contender:
    """A method with what distinguishes it from another one of its class.

    Attributes:
        name: in the table.
        method: name on the command line, which says the class.
        lr: learning rate in the middle of the grid, by work and variant (`"bytes full"`), else by "".
        options: arguments of the class.
        taus: lengths of the perturbation that are tried.
        cost: forward passes that an evaluation stands for: a backward pass counts two, a forward pass with a tangent
            two in all.
    """

    name: str
    method: str
    lr: Mapping[str, float]
    options: Mapping[str, Any] = field(default_factory=dict)
    taus: Sequence[float] = (1e-3,)
    cost: float = 1.0

    def settings(self, where: str) -> list[dict[str, float]]:
        """The grid for a work and a variant: lr, and tau where the method has one."""
        middle = self.lr.get(where, self.lr[""])
        taus = [{}] if self.method == FIRST_ORDER else [{"tau": tau} for tau in self.taus]
        return [{"lr": float(f"{middle * factor:.3g}")} | tau for factor, tau in product(GRID, taus)]

    @staticmethod
    def beyond(setting: Mapping[str, float], up: bool) -> dict[str, float]:
        """The setting next to one at an end of the grid."""
        lr = setting["lr"] * _BEYOND if up else setting["lr"] / _BEYOND
        return dict(setting) | {"lr": float(f"{lr:.3g}")}

    def optimizer(self, net: Any, steps: int, seed: int, setting: Mapping[str, float]) -> Any:
        """A new one over the trained parameters of a network.

        Args:
            steps: of the run, which some schedules depend on.
        """
        if self.method == FIRST_ORDER:
            return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], momentum=0.9, **setting)
        cls = getattr(jaguar, METHODS[self.method].cls or "")
        options = dict(self.options) | dict(setting)
        if self.method == "zo-adamu":
            options |= {"warmup": steps // 20, "total": steps}
        if self.method == "forward-grad":
            options["model"] = net
        named = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
        return cls(jaguar.param_groups(net) if cls.by_role else named, seed=seed, **options)


NS_OPTIONS = {"ns_dtype": torch.float32}  # products in bf16 are emulated on most CPUs, and slow

CONTENDERS = [
    Contender("JAGUAR SignSGD", "jaguar-signsgd", {"": 3e-3}, {"coordinates": 0.01}),
    Contender("JAGUAR SignSGD, all", "jaguar-signsgd", {"": 3e-5}, {"coordinates": 0.01, "update": "all"}),
    Contender("JAGUAR Muon", "jaguar-muon", {"": 3e-3}, {"coordinates": 0.01, **NS_OPTIONS}),
    Contender("ZO-SGD", "zo-sgd", {"": 3e-4}),
    Contender("ZO-SGD, one-sided, 4", "zo-sgd", {"": 1e-3}, {"estimator": "one-sided", "n_directions": 4}),
    Contender("ZO-SGD, one-sided, 8", "zo-sgd", {"": 1e-3}, {"estimator": "one-sided", "n_directions": 8}),
    Contender("FZOO, 8", "fzoo", {"": 3e-5}, {"n_directions": 8}),
    Contender("ZO-SignSGD", "zo-signsgd", {"": 1e-5}),
    Contender("ZO-AdaMM", "zo-adamm", {"": 1e-4}),
    Contender("LeZO", "lezo", {"": 1e-3}, {"keep": 0.5}),
    Contender("ZO-SGD-Cons", "zo-sgd-cons", {"": 3e-4}),
    Contender("Acc-ZOM", "acc-zom", {"": 3e-4}),
    Contender("ZO-Muon", "zo-muon", {"": 3e-4}, NS_OPTIONS),
    Contender("DiZO", "dizo", {"": 3e-4}),
    Contender("ZO-AdaMU", "zo-adamu", {"": 1e-5}),
    Contender("Forward-Grad", "forward-grad", {"": 3e-4}, cost=2.0),
    Contender("FO-SGD", "fo-sgd", {"": 3e-2}, cost=3.0),
]
