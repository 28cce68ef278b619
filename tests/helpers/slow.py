"""Parts of slow versions of the optimizers: a problem, random numbers in plain ints, rounding, losses.

Nothing here computes with jaguar, but for Gaussian numbers, whose bits are tested elsewhere: arithmetic is one numpy
operation at a time in the compute dtype, with one rounding to the storage dtype. The loss is a quadratic summed by
`math.fsum`, so that both sides see the same losses as long as they hold the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from helpers.oracles import DIRECTION, ROUND, ROUND_STATE, step_key_ints, stream_ints, words_ints
from helpers.tensors import numpy_of
from jaguar.method.rng import Elements, normals_of

SEED, STEPS, TAU = 2**40 + 12345, 300, 2.0**-4
SHAPES = {
    "embed.w": (7,),
    **{f"layers.{i}.w": (4, 9) for i in range(5)},
    "layers.2.b": (3,),
    "head.w": (13, 11),  # more than the 128 signs of one call
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# The problem


def start(name: str) -> np.ndarray:
    """Where a tensor begins, in every storage dtype the same: multiples of 1/64 in [-2, 2]."""
    return np.random.default_rng(stream_ints(name)).integers(-128, 129, math.prod(SHAPES[name])) / 64


def loss_of(tensors: dict[str, np.ndarray]) -> float:
    """sum c (x - 1/4)^2 with c in [1/2, 2), correctly rounded: no order of summing changes it."""
    terms = []
    for x in tensors.values():
        curvature = 0.5 + 1.5 * np.arange(x.size) / x.size
        terms.append(curvature * (x.astype(np.float64) - 0.25) ** 2)
    return math.fsum(np.concatenate(terms))


# Random numbers and rounding


def signs(key: tuple[int, int], stream: int, size: int) -> np.ndarray:
    words = [w for group in range(-(-size // 128)) for w in words_ints(key, group, stream, DIRECTION)]
    return np.array([-1.0 if words[i // 32] >> i % 32 & 1 else 1.0 for i in range(size)])


def normals(key: tuple[int, int], *spans: tuple[int, int, int]) -> np.ndarray:
    """Elements of streams (stream, first, count), one after the other; tested bit for bit elsewhere."""
    return normals_of(key, Elements(spans)).numpy().astype(np.float64)


def noise(key: tuple[int, int], stream: int, size: int, purpose: int) -> np.ndarray:
    words = [w for group in range(-(-size // 8)) for w in words_ints(key, group, stream, purpose)]
    return np.array([words[i // 2] >> 16 * (i % 2) & 0xFFFF for i in range(size)], dtype=np.uint64)


def nearest(x: np.ndarray, storage: str) -> np.ndarray:
    """x rounded to nearest, ties to even, in its own dtype."""
    if storage == "bf16":
        word = x.view(np.uint32).astype(np.uint64)
        return ((word + 0x7FFF + (word >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return x.astype(np.float16).astype(np.float32) if storage == "fp16" else x


def stochastic(x: np.ndarray, storage: str, draws: np.ndarray) -> np.ndarray:
    """x moved to one of its two neighbours: 16 random bits are added below the mantissa, then what is below is cut."""
    if storage == "bf16":
        return (x.view(np.uint32).astype(np.uint64) + draws & 0xFFFF0000).astype(np.uint32).view(np.float32)
    half = np.abs(x).astype(np.float16)
    below = np.where(half > np.abs(x), np.nextafter(half, np.float16(0)), half)
    above = np.nextafter(below, np.float16(np.inf))
    share = (np.abs(x) - below.astype(np.float32)) / (above.astype(np.float32) - below.astype(np.float32))
    up = share.astype(np.float64) * 65536 + draws >= 65536
    return np.copysign(np.where(up, above, below).astype(np.float32), x)


# Tensors, directions, losses


@dataclass
class Var:
    """One tensor: its values, which are exact in the storage dtype, and the settings of its group."""

    name: str
    stream: int
    x: np.ndarray
    lr: float
    tau: float
    weight_decay: float
    settings: dict[str, Any]
    state: dict[str, np.ndarray] = field(default_factory=dict)


class Slow:
    """What the methods have in common: directions, losses and the mean estimate g."""

    def __init__(
        self, variables: list[Var], storage: str, *, n_directions: int = 1, estimator: str = "two-sided", seed: int
    ) -> None:
        self.variables, self.storage, self.seed = variables, storage, seed
        self.n, self.one_sided = n_directions, estimator == "one-sided"
        self.step, self.finite = 0, 0
        self.num = np.float64 if storage == "fp64" else np.float32
        self.losses: list[float] = []

    def taking_part(self) -> list[Var]:
        return self.variables

    def key(self, purpose: int, direction: int = 0) -> tuple[int, int]:
        return step_key_ints(self.seed, self.step, direction, purpose)

    def loss(self, changed: dict[str, np.ndarray]) -> Any:
        tensors = {v.name: changed.get(v.name, v.x) for v in self.variables}
        self.losses.append(float(self.num(self.f(tensors, self.step, len(self.losses)))))
        return self.num(self.losses[-1])

    def estimate(self) -> dict[str, np.ndarray]:
        """g by name: rho_k e_k of every direction, added in order, divided by their number."""
        g = {v.name: np.zeros_like(v.x) for v in self.taking_part()}
        base = self.loss({}) if self.one_sided else None
        for k in range(self.n):
            key = self.key(DIRECTION, k)
            e = {v.name: signs(key, v.stream, v.x.size).astype(self.num) for v in self.taking_part()}
            up, down = (
                {v.name: nearest(v.x + side * self.num(v.tau) * e[v.name], self.storage) for v in self.taking_part()}
                for side in (self.num(1), self.num(-1))
            )
            plus = self.loss(up)
            minus = base if self.one_sided else self.loss(down)
            for v in self.taking_part():
                rho = (plus - minus) / self.num(v.tau if self.one_sided else 2 * v.tau)
                g[v.name] = g[v.name] + rho * e[v.name] if k else rho * e[v.name]
        return {name: value / self.num(self.n) for name, value in g.items()}

    def store(self, v: Var, value: np.ndarray, purpose: int = ROUND, storage: str = "") -> np.ndarray:
        storage = storage or self.storage
        if storage in ("fp64", "fp32"):
            return value
        return stochastic(value, storage, noise(self.key(purpose), v.stream, v.x.size, purpose))

    def decayed(self, v: Var) -> np.ndarray:
        return v.x * self.num(1 - v.lr * v.weight_decay)

    def run(self, f: Any) -> list[float]:
        """One step on f; what was measured, in order."""
        self.f, self.losses = f, []
        with np.errstate(invalid="ignore"):
            g = self.estimate()
            move = self.choose(g)
        if all(map(math.isfinite, self.losses)):
            self.finite += 1
            move()
        self.step += 1
        return self.losses


Arrays = dict[str, np.ndarray]


class Dense(Slow):
    """A direction over all elements, and the options of a method under their public names in `own`."""

    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, variables: list[Var], storage: str, *, distribution: str = "gaussian", **options: Any) -> None:
        common = {key: options.pop(key) for key in ("seed", "n_directions", "estimator") if key in options}
        super().__init__(variables, storage, **common)
        self.rademacher = distribution == "rademacher"
        self.own = SimpleNamespace(**self.defaults | options)

    def draw(self, k: int = 0, purpose: int = DIRECTION) -> Arrays:
        key = self.key(purpose, k)
        if self.rademacher:
            return {v.name: signs(key, v.stream, v.x.size).astype(self.num) for v in self.variables}
        z = normals(key, *((v.stream, 0, v.x.size) for v in self.variables)).astype(self.num)
        ends = np.cumsum([v.x.size for v in self.variables])
        return {v.name: part for v, part in zip(self.variables, np.split(z, ends[:-1]), strict=True)}

    def around(self, e: Arrays, scale: Callable[[Var], float] = lambda v: v.tau, at: Arrays | None = None) -> list[Any]:
        """f(x + scale e), f(x - scale e); at says from where, if not from x."""
        points = {v.name: v.x for v in self.variables} if at is None else at
        return [
            self.loss(
                {
                    v.name: nearest(points[v.name] + self.num(side * scale(v)) * e[v.name], self.storage)
                    for v in self.variables
                }
            )
            for side in (1, -1)
        ]

    def rho(self, v: Var, plus: Any, minus: Any) -> Any:
        return (plus - minus) / self.num(2 * v.tau)

    def mean(self, weighted: list[Arrays]) -> Arrays:
        """The sum in order, divided by its number of terms."""
        total = weighted[0]
        for one in weighted[1:]:
            total = {name: total[name] + one[name] for name in total}
        return {name: value / self.num(len(weighted)) for name, value in total.items()}

    def momentum(self, v: Var, keep: float, g: np.ndarray) -> np.ndarray:
        """keep m + g as it is stored."""
        m = self.num(keep) * v.state.get("momentum", np.zeros_like(v.x)) + g
        v.state["momentum"] = self.store(v, m, ROUND_STATE, "bf16" if self.storage == "fp16" else "")
        return v.state["momentum"]

    def sgd(self, v: Var, g: np.ndarray, momentum: float = 0.0) -> None:
        m = self.momentum(v, momentum, g) if momentum else g
        v.x = self.store(v, self.decayed(v) - self.num(v.lr) * m)

    def estimate(self) -> Arrays:
        """Of one direction and both sides."""
        e = self.draw()
        plus, minus = self.around(e)
        return {v.name: self.rho(v, plus, minus) * e[v.name] for v in self.variables}

    def choose(self, g: Arrays) -> Any:
        def move() -> None:
            for v in self.variables:
                self.sgd(v, g[v.name], getattr(self.own, "momentum", 0.0))

        return move


# The package beside them


GROUPS: dict[str, dict[str, dict[str, float]]] = {
    "one group": {"": {}},
    "groups": {"head": {"lr": 3.0, "tau": 2.0**-3, "weight_decay": 0.3}, "layers.2": {"tau": 0.07}, "": {}},
}


def pair(
    cls: Any,
    slow: Any,
    storage: str,
    options: dict[str, Any],
    groups: dict[str, dict[str, Any]] = GROUPS["groups"],
    **only_package: Any,
) -> tuple[Any, Any, dict[str, nn.Parameter]]:
    """An optimizer of the package and the slow version on equal tensors; groups are by the start of a name.

    A group's "lr" is in units of the options' lr.
    """
    options = {"tau": TAU, "seed": SEED, "weight_decay": 0.1} | options
    params = {n: nn.Parameter(torch.tensor(start(n)).reshape(s).to(DTYPES[storage])) for n, s in SHAPES.items()}
    own = {at: changes | {"lr": options["lr"] * changes.get("lr", 1.0)} for at, changes in groups.items()}
    of = {name: next(at for at in own if name.startswith(at)) for name in SHAPES}
    opt = cls(
        [{"params": [(n, p) for n, p in params.items() if of[n] == at], **changes} for at, changes in own.items()],
        **options,
        **only_package,
    )
    values = {key: options.pop(key) for key in ("lr", "tau", "weight_decay")}
    num = np.float64 if storage == "fp64" else np.float32
    variables = []
    for n in SHAPES:
        settings = values | own[of[n]]
        numbers = {key: settings.pop(key) for key in values}
        variables.append(Var(n, stream_ints(n), start(n).astype(num), settings=settings, **numbers))
    return opt, slow(variables, storage, **options), params


def same(found: np.ndarray, v: Var) -> None:
    assert np.array_equal(found, v.x), np.abs(found - v.x).max()


def side_by_side(
    opt: Any,
    slow: Any,
    params: dict[str, nn.Parameter],
    steps: int = STEPS,
    *,
    f: Any = None,
    falling: float = 0.997,
    check: Callable[[np.ndarray, Var], None] = same,
) -> list[float]:
    """Both for so many steps of a schedule: losses, parameters and state agree after every step; the first losses.

    f(tensors, step, evaluation) is the loss. State is compared under whatever names the package gives its buffers.
    After a check that allows a difference the slow version goes on from the package's x: one step is held to it.
    """
    f = f or (lambda tensors, *_: loss_of(tensors))
    wide = torch.float64 if slow.storage == "fp64" else torch.float32
    seen: list[float] = []
    firsts = []

    def closure() -> torch.Tensor:
        tensors = {n: numpy_of(p).reshape(-1) for n, p in params.items()}
        loss = torch.tensor(f(tensors, slow.step, len(seen)), dtype=wide)
        seen.append(float(loss))
        return loss

    for step in range(steps):
        seen.clear()
        opt.step(closure)
        measured = slow.run(f)
        firsts.append(measured[0])
        if all(map(math.isfinite, measured)):
            assert seen == measured == list(opt.last_record.losses), (step, seen, measured)
        else:  # what is measured after a loss that is not finite decides nothing
            until = [math.isfinite(one) for one in measured].index(False) + 1
            assert np.array_equal(seen[:until], measured[:until], equal_nan=True), (step, seen, measured)
        for v in slow.variables:
            found = numpy_of(params[v.name]).reshape(-1)
            try:
                check(found, v)
                state = [numpy_of(one).reshape(-1) for one in opt.state.get(params[v.name], {}).values()]
                own = [one.astype(np.float64) for one in v.state.values()]
                assert sorted((one + 0.0).tobytes() for one in state) == sorted((one + 0.0).tobytes() for one in own)
            except AssertionError as error:
                raise AssertionError(f"step {step}, {v.name}") from error
            v.x = found.astype(slow.num)
        for group in (*opt.param_groups, *(vars(v) for v in slow.variables)):
            group["lr"] *= falling
    return firsts


def went_down(firsts: list[float]) -> None:
    """That the run was one that means something: all of it finite, and lower at the end than at the start."""
    assert all(map(math.isfinite, firsts)) and np.mean(firsts[-10:]) < 0.97 * np.mean(firsts[:10]), firsts
