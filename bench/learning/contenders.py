"""Methods that are compared, the settings that each is tried with, and what a step of it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import jaguar
from jaguar.optimizers.names import FIRST_ORDER, METHODS

# Learning rates that are tried first, as multiples of a contender's own; where an end is the best, it goes on there.
GRID = (0.1, 0.316, 1.0, 3.16, 10.0)
_BEYOND = 3.16


def _keys(where: str) -> tuple[str, ...]:
    """Where a value for a work and a variant is looked for; the reviews in another prompt begin as the reviews do."""
    where = where.replace("sst2", "reviews")
    return where, where.split(" ")[0], ""


def _at(where: str, values: Mapping[str, Any]) -> Any:
    """The value for a work and a variant (`"reviews lora"`), else for the work, else for all (`""`)."""
    return next(values[key] for key in _keys(where) if key in values)


@dataclass(frozen=True)
class Contender:
    """A method with what distinguishes it from another one of its class.

    Attributes:
        name: in the table.
        method: name on the command line, which says the class.
        lr: learning rate in the middle of the grid; by work and variant, by work, or for all, as is tau. Empty: its
            options say what it is, and there is nothing to search.
        options: arguments of the class.
        tau: length of the perturbation.
        unfit: where it is not run, and why.
        cost: forward passes that an evaluation stands for: a backward pass counts two, a forward pass with a tangent
            two in all.
        runs: works, and variants of works, in which it is without being asked for (`--all` asks for every one).
    """

    name: str
    method: str
    lr: Mapping[str, float]
    options: Mapping[str, Any] = field(default_factory=dict)
    tau: Mapping[str, float] = field(default_factory=lambda: {"": 1e-3, "reviews": 1e-2, "reviews full": 1e-3})
    unfit: Mapping[str, str] = field(default_factory=dict)
    cost: float = 1.0
    runs: Sequence[str] = ("bytes",)

    def runs_in(self, where: str) -> bool:
        """Whether it is in a work and a variant without being asked for."""
        return any(key in self.runs for key in _keys(where))

    @property
    def by_row(self) -> bool:
        """Whether its closures return the loss of each row, by which it chooses lr or tau itself."""
        return "auto" in (self.options.get("lr"), self.options.get("tau"))

    def refusal(self, where: str) -> str:
        """Why it cannot run in a work and a variant; empty: it can."""
        return str(_at(where, {"": ""} | dict(self.unfit)))

    def settings(self, where: str, grid: Sequence[float] = GRID) -> list[dict[str, float]]:
        """The settings for a work and a variant: lr by the multiples of the grid, and tau where the method has one."""
        if not self.lr:
            return [{}]
        tau = {} if self.method == FIRST_ORDER else {"tau": _at(where, self.tau)}
        return [{"lr": float(f"{_at(where, self.lr) * factor:.3g}")} | tau for factor in grid]

    @staticmethod
    def beyond(setting: Mapping[str, float], up: bool) -> dict[str, float]:
        """The setting next to one at an end of the grid."""
        lr = setting["lr"] * _BEYOND if up else setting["lr"] / _BEYOND
        return dict(setting) | {"lr": float(f"{lr:.3g}")}

    def passes(self, optimizer: Any) -> float:
        """Forward passes that a step of its optimizer stands for."""
        if self.method == FIRST_ORDER:
            return self.cost
        estimator = optimizer.method.estimator
        return self.cost * estimator.evaluations([0.0] * estimator.n_losses)

    def steps(self, optimizer: Any, budget: float) -> int:
        """Steps of its optimizer that a number of forward passes is enough for, at least one."""
        each = self.passes(optimizer)
        if not self.by_row:
            return max(1, int(budget / each))
        method, steps, spent = optimizer.method, 0, 0.0
        while spent <= budget:
            curvature, resolution = method.step_size.looks(method.estimator, steps)
            spent, steps = spent + each + curvature + 2 * resolution, steps + 1
        return max(1, steps - 1)

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
_FOUR = {"estimator": "one-sided", "n_directions": 4}
_EIGHT = {"estimator": "one-sided", "n_directions": 8}
_AUTO = {"lr": "auto", "tau": "auto"}
_ONE_SIDED = {"": 1e-3, "reviews": 1e-2, "reviews norms": 5e-3, "reviews full": 2e-3}
# Not "reviews full": directions of 134.5 M numbers take a CPU 15 times as long as the forward passes.
_REVIEWS = ("reviews norms", "reviews lora")
_VECTORS = {"reviews norms": "weights of normalisation layers are vectors, which it moves by JAGUAR SignSGD's rule"}
_NO_LAYER = {"reviews norms": "it projects query and value projections, which are not trained"}
_JAGUAR = {"": 3e-3, "reviews norms": 1.2e-3, "reviews lora": 4e-3, "reviews full": 1e-3}
ZO_SGD = {"": 3e-4, "reviews norms": 3e-4, "reviews lora": 5e-3, "reviews full": 1e-4}
_SHARED = {"": 1e-3, "reviews norms": 2e-3, "reviews lora": 3e-2, "reviews full": 6e-4}
_FZOO = {"": 3e-5, "reviews norms": 6e-5, "reviews lora": 4e-4, "reviews full": 1e-5}

CONTENDERS = [
    Contender("ZO-SGD", "zo-sgd", ZO_SGD, runs=("bytes", *_REVIEWS)),
    Contender("ZO-SGD, one-sided, 8", "zo-sgd", _SHARED, _EIGHT, _ONE_SIDED, runs=("bytes", *_REVIEWS)),
    Contender(
        "JAGUAR SignSGD, one-sided, 4",
        "jaguar-signsgd",
        _JAGUAR,
        {"coordinates": 1.0, **_FOUR},
        _ONE_SIDED,
        runs=_REVIEWS,
    ),
    Contender(
        "JAGUAR Muon, one-sided, 4",
        "jaguar-muon",
        {"": 1e-1},
        {"coordinates": 1.0, **_FOUR, **NS_OPTIONS},
        _ONE_SIDED,
        _VECTORS,
        runs=_REVIEWS,
    ),
    Contender("ZO-SGD, one-sided, 8, auto", "zo-sgd", {}, {**_EIGHT, **_AUTO}, runs=("bytes", *_REVIEWS)),
    Contender(
        "JAGUAR SignSGD, one-sided, 4, auto",
        "jaguar-signsgd",
        {},
        {"coordinates": 1.0, **_FOUR, **_AUTO},
        runs=_REVIEWS,
    ),
    Contender("ZO-SGD, auto", "zo-sgd", {}, _AUTO),
    Contender("FZOO, 8", "fzoo", _FZOO, {"n_directions": 8}, _ONE_SIDED, runs=("bytes", "reviews norms")),
    Contender("JAGUAR SignSGD", "jaguar-signsgd", {"": 3e-3}, {"coordinates": 0.01}),
    Contender("JAGUAR SignSGD, all", "jaguar-signsgd", {"": 3e-5}, {"coordinates": 0.01, "update": "all"}),
    Contender("JAGUAR SignSGD, every coordinate", "jaguar-signsgd", _JAGUAR, {"coordinates": 1.0}, runs=()),
    Contender(
        "JAGUAR Muon", "jaguar-muon", {"": 3e-3, "reviews": 3e-1}, {"coordinates": 0.01, **NS_OPTIONS}, unfit=_VECTORS
    ),
    Contender("ZO-SGD, one-sided, 4", "zo-sgd", _SHARED, _FOUR, _ONE_SIDED),
    Contender("ZO-SignSGD", "zo-signsgd", {"": 1e-5, "reviews": 1e-3}),
    Contender("ZO-AdaMM", "zo-adamm", {"": 1e-4, "reviews": 1e-3}),
    Contender("LeZO", "lezo", {key: 2 * lr for key, lr in ZO_SGD.items()} | {"": 1e-3}, {"keep": 0.5}),
    Contender("ZO-SGD-Cons", "zo-sgd-cons", ZO_SGD),
    Contender("Acc-ZOM", "acc-zom", ZO_SGD),
    Contender("ZO-Muon", "zo-muon", {"": 3e-4, "reviews": 3e-2}, NS_OPTIONS, unfit=_VECTORS),
    Contender("DiZO", "dizo", ZO_SGD, unfit=_NO_LAYER),
    Contender("ZO-AdaMU", "zo-adamu", {"": 1e-5, "reviews": 1e-3}),
    Contender("Forward-Grad", "forward-grad", ZO_SGD, cost=2.0),
    Contender("FO-SGD", "fo-sgd", {"": 3e-2}, cost=3.0),
]
