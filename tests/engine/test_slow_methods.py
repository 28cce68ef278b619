"""Slow versions of seven more methods, written from their definitions alone, and the package beside them.

ZO-SignSGD by the sign of rho, FZOO, Acc-ZOM, DiZO, ZO-AdaMU, ForwardGrad and ZO-Muon. Numbers are the helpers'
plain ints, but for Gaussian ones, whose bits are tested elsewhere (`rng.normals_of`); arithmetic is one numpy operation
at a time. Losses, parameters and state agree bit for bit after every step, except where a product of matrices or a
forward pass sums in an order of its own: those tests say what they allow, and why.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import jaguar
from helpers.oracles import DIRECTION, ROUND_STATE, step_key_ints, stream_ints
from helpers.slow import (
    SEED,
    STEPS,
    Arrays,
    Dense,
    loss_of,
    nearest,
    normals,
    pair,
    side_by_side,
    signs,
    start,
    went_down,
)
from helpers.steps import skipping
from helpers.tensors import numpy_of
from jaguar import FZOO, ZOSignSGD

SEARCH, PROJECT, DIRECTION_1 = 10, 11, 12  # purposes beside the helpers'


class SlowScalarSign(Dense):
    """x <- (1 - lr wd) x - lr m of the mean of sign(rho_k) e_k."""

    defaults: ClassVar = {"momentum": 0.0, "scalar_sign": True}

    def estimate(self) -> Arrays:
        base = self.loss({}) if self.one_sided else None
        found = []
        for k in range(self.n):
            e = self.draw(k)
            if self.one_sided:
                up = {v.name: nearest(v.x + self.num(v.tau) * e[v.name], self.storage) for v in self.variables}
                difference = self.loss(up) - base
            else:
                plus, minus = self.around(e)
                difference = plus - minus
            found.append({name: np.sign(difference) * value for name, value in e.items()})
        return self.mean(found)


def fzoo_weights(losses: list[float], tau: float, scale: str) -> list[float] | None:
    """What the directions are multiplied by; None where all losses are the same. In Python's own numbers."""
    f0, *rest = losses
    n = len(rest)
    mean = math.fsum(rest) / n
    sigma = math.sqrt(math.fsum((f - mean) * (f - mean) for f in rest) / (n - 1 if scale == "paper" else n))
    if sigma == 0:
        return None
    return [(f - f0) / (sigma * tau if scale == "paper" else sigma) for f in rest]


class SlowFZOO(Dense):
    defaults: ClassVar = {"scale": "paper"}

    def estimate(self) -> Any:
        self.loss({})
        es = [self.draw(k) for k in range(self.n)]
        for e in es:
            self.loss({v.name: nearest(v.x + self.num(v.tau) * e[v.name], self.storage) for v in self.variables})
        g = {}
        for v in self.variables:
            weights = fzoo_weights(self.losses, v.tau, self.own.scale)
            if weights is None:
                return None
            one = self.mean([{v.name: self.num(w) * e[v.name]} for w, e in zip(weights, es, strict=True)])
            g[v.name] = one[v.name]
        return g

    def choose(self, g: Any) -> Any:
        return super().choose(g) if g is not None else lambda: None


class SlowAccZOM(Dense):
    defaults: ClassVar = {"k": 1.0, "m0": 2.0, "c": 2.0}

    def eta(self, t: int) -> float:
        return self.own.k / (self.own.m0 + t) ** (1 / 3)

    def estimate(self) -> Arrays:
        self.t = self.finite + 1
        self.a = 1.0 if self.t == 1 else self.own.c * self.eta(self.t - 1) ** 2
        z = self.draw()
        squares = sum(int(n) for value in z.values() for n in np.rint(value.astype(np.float64) ** 2 * 2.0**20))
        s = math.sqrt(sum(v.x.size for v in self.variables) / (squares / 2**20))  # one root: one rounding
        here = self.around(z, lambda v: v.tau * s)
        there = self.around(
            z, lambda v: v.tau * s, {v.name: v.state.get("previous", v.x).astype(self.num) for v in self.variables}
        )
        g = {}
        for v in self.variables:
            weight = self.rho(v, *here) - self.num(1 - self.a) * self.rho(v, *there)
            g[v.name] = self.num(float(weight) * s) * z[v.name]
        return g

    def choose(self, g: Arrays) -> Any:
        def move() -> None:
            for v in self.variables:
                m = self.momentum(v, 1 - self.a, g[v.name])
                v.state["previous"] = v.x
                v.x = self.store(v, self.decayed(v) - self.num(v.lr) * (self.num(self.eta(self.t)) * m))

        return move


class SlowDiZO(Dense):
    defaults: ClassVar = {
        "momentum": 0.0,
        "every": 50,
        "search_steps": 10,
        "search_scale": 0.2,
        "search_lr": 10.0,
        "bounds": (0.8, 1.2),
    }

    def __init__(self, *args: Any, project: tuple[str, ...], **options: Any) -> None:
        super().__init__(*args, **options)
        self.first = {v.name: v.x for v in self.variables if v.name in project or set(v.name.split(".")) & set(project)}
        self.chosen: list[float] = []  # all scales that were chosen

    def scaled(self, scales: dict[str, float]) -> Arrays:
        x = {v.name: v.x for v in self.variables}
        return {n: first + self.num(scales[n]) * (x[n] - first) for n, first in self.first.items()}

    def search(self) -> dict[str, float]:
        own, key = self.own, self.key(SEARCH)
        low, high = own.bounds
        scales = dict.fromkeys(self.first, 1.0)
        for j in range(own.search_steps):
            n = {name: float(normals(key, (stream_ints(name), j, 1))[0]) for name in scales}
            plus, minus = (
                self.loss(
                    {
                        name: nearest(x, self.storage)
                        for name, x in self.scaled({m: s + side * n[m] for m, s in scales.items()}).items()
                    }
                )
                for side in (own.search_scale, -own.search_scale)
            )
            r = (float(plus) - float(minus)) / (2 * own.search_scale)
            scales = {name: min(max(s - own.search_lr * r * n[name], low), high) for name, s in scales.items()}
        return scales

    def run(self, f: Any) -> list[float]:
        if self.step == 0 or self.step % self.own.every:
            return super().run(f)
        self.f, self.losses = f, []
        before, moved = {v.name: v.x for v in self.variables}, self.finite
        scales = self.search()
        searched = list(self.losses)
        there = self.scaled(scales)
        for v in self.variables:
            v.x = self.store(v, there[v.name], PROJECT) if v.name in there else v.x
        finite = all(map(math.isfinite, searched))
        measured = super().run(lambda tensors, step, at: f(tensors, step, at + len(searched)) if finite else math.nan)
        if self.finite == moved:
            for v in self.variables:
                v.x = before[v.name]
        else:
            self.chosen += scales.values()
        return searched + measured

    def choose(self, g: Arrays) -> Any:
        def move() -> None:
            for v in self.variables:
                if v.name in self.first:
                    v.state["x0"] = self.first[v.name]
                self.sgd(v, g[v.name], self.own.momentum)

        return move


class SlowAdaMU(Dense):
    defaults: ClassVar = {"alpha": 0.5, "beta1": 0.9, "beta2": 0.01, "warmup": 1024, "total": 20000}

    def value(self, final: float) -> float:
        t, warmup, end = self.step, self.own.warmup, 0.8 * self.own.total
        if t < warmup:
            return 1.0
        if t >= end:
            return final
        return final + (1 - final) * (0.5 + 0.5 * math.cos(math.pi * (t - warmup) / (end - warmup)))

    def estimate(self) -> Any:
        num = self.num
        alpha, b1, b2 = map(self.value, (self.own.alpha, self.own.beta1, self.own.beta2))
        n1, n2 = self.draw(), self.draw(purpose=DIRECTION_1)
        m, second = {}, {}
        for v in self.variables:
            zd = num(math.sqrt(alpha)) * n1[v.name]
            zdd = v.state.get("momentum", np.zeros_like(v.x)) + num(math.sqrt(1 - alpha)) * n2[v.name]
            mixed = num(b1) * zd + num(1 - b1) * zdd
            m[v.name] = self.store(v, mixed, ROUND_STATE, "bf16" if self.storage == "fp16" else "")
            second[v.name] = num(b2) * (zd * zd) + num(1 - b2) * (zdd * zdd)
        return m, second, self.around(m)

    def choose(self, found: Any) -> Any:
        m, second, (plus, minus) = found

        def move() -> None:
            for v in self.variables:
                rate = self.num(v.lr) * self.rho(v, plus, minus)
                root = np.sqrt(second[v.name] + self.num(1e-8))
                v.x = self.store(v, self.decayed(v) - rate * m[v.name] / root)
                v.state["momentum"] = m[v.name]

        return move


storages = pytest.mark.parametrize("storage", ["fp64", "fp32", "bf16", "fp16"])


def steps_of(storage: str, first: bool = True) -> int:
    """All steps for the first settings of a method; fp16 shares all but its rounding with bf16."""
    return 60 if storage == "fp16" else STEPS if first else 100


@pytest.mark.parametrize(
    ("distribution", "n_directions", "momentum", "estimator"),
    [
        ("rademacher", 1, 0.0, "two-sided"),
        ("gaussian", 3, 0.5, "two-sided"),
        ("gaussian", 2, 0.0, "one-sided"),
    ],
)
@storages
def test_zo_signsgd_by_the_sign_of_rho(
    storage: str, distribution: str, n_directions: int, momentum: float, estimator: str
) -> None:
    options = {"lr": 1e-3, "momentum": momentum, "distribution": distribution, "scalar_sign": True}
    options |= {"n_directions": n_directions, "estimator": estimator}
    first = distribution == "rademacher"
    went_down(side_by_side(*pair(ZOSignSGD, SlowScalarSign, storage, options), steps_of(storage, first)))


def test_a_derivative_of_zero_has_the_sign_zero() -> None:
    """Then only weight decay moves x."""
    opt, slow, params = pair(ZOSignSGD, SlowScalarSign, "fp32", {"lr": 1e-3, "scalar_sign": True})
    side_by_side(opt, slow, params, 3, f=lambda *_: 2.5, falling=1.0)
    for v in slow.variables:
        x = start(v.name).astype(np.float32)
        for _ in range(3):
            x = x * np.float32(1 - v.lr * v.weight_decay)
        assert np.array_equal(v.x, x)


@pytest.mark.parametrize(("n_directions", "scale"), [(3, "paper"), (3, "released"), (8, "paper")])
@storages
def test_fzoo(storage: str, n_directions: int, scale: str) -> None:
    options = {"lr": 4e-4 if scale == "paper" else 2e-3, "n_directions": n_directions, "scale": scale}
    opt, slow, params = pair(FZOO, SlowFZOO, storage, options)
    slow.rademacher = True
    went_down(side_by_side(opt, slow, params, steps_of(storage, n_directions == 3)))


ROOT3 = 1.7320508075688772
ROOT8 = 2.8284271247461903


@pytest.mark.parametrize(
    ("losses", "scale", "weights"),
    [
        # Mean 5, deviations 3, -1, -1, -1: squares add to 12. sigma = sqrt(12/3) = 2, times tau = 1/2 is 1.
        ([2.0, 8.0, 4.0, 4.0, 4.0], "paper", [6.0, 2.0, 2.0, 2.0]),
        # sigma = sqrt(12/4) = sqrt(3), and tau does not appear.
        ([2.0, 8.0, 4.0, 4.0, 4.0], "released", [6 / ROOT3, 2 / ROOT3, 2 / ROOT3, 2 / ROOT3]),
        # Mean 3, deviations -2, 2: squares add to 8. sigma = sqrt(8), times 1/2.
        ([4.0, 1.0, 5.0], "paper", [-6 / ROOT8, 2 / ROOT8]),
        # sigma = sqrt(8/2) = 2.
        ([4.0, 1.0, 5.0], "released", [-1.5, 0.5]),
    ],
)
def test_fzoo_scales_by_hand(losses: list[float], scale: str, weights: list[float]) -> None:
    """The weights were worked out on paper; 1e-15 is for the roots."""
    assert fzoo_weights(losses, 0.5, scale) == pytest.approx(weights, rel=1e-15)
    x = nn.Parameter(torch.zeros(40, dtype=torch.float64))
    n = len(weights)
    opt = FZOO([("x", x)], 0.25, n_directions=n, scale=scale, tau=0.5, seed=SEED)
    given = iter(losses)
    opt.step(lambda: torch.tensor(next(given), dtype=torch.float64))
    e = [signs(step_key_ints(SEED, 0, k, DIRECTION), stream_ints("x"), 40) for k in range(n)]
    expected = -0.25 * sum(w * one for w, one in zip(weights, e, strict=True)) / n
    assert np.allclose(numpy_of(x), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("scale", ["paper", "released"])
def test_fzoo_does_not_move_where_all_losses_are_the_same(scale: str) -> None:
    """Weight decay does not either. f(x) itself may differ: sigma is that of the others."""
    opt, slow, params = pair(FZOO, SlowFZOO, "fp32", {"lr": 1e-3, "n_directions": 3, "scale": scale})
    slow.rademacher = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        side_by_side(opt, slow, params, 8, f=lambda x, t, i: 2.0 + (i == 0) if t % 2 else loss_of(x))
        before = {n: numpy_of(p) for n, p in params.items()}
        opt.step(lambda: torch.tensor(3.0))
    assert all(np.array_equal(numpy_of(p), before[n]) for n, p in params.items())


@pytest.mark.parametrize("options", [{}, {"k": 0.7, "m0": 5.0, "c": 1.5}], ids=["defaults", "others"])
@storages
def test_acc_zom(storage: str, options: dict[str, float]) -> None:
    went_down(side_by_side(*pair(jaguar.AccZOM, SlowAccZOM, storage, {"lr": 1e-3} | options), steps_of(storage)))


PROJECTED = ("head", "layers.2.b", "3")  # a component, a whole name, a component that is a number


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@storages
def test_dizo(storage: str, momentum: float) -> None:
    options = {"lr": 5e-4, "momentum": momentum, "every": 7, "search_steps": 4, "search_scale": 0.15}
    options |= {"search_lr": 2e-2, "bounds": (0.9, 1.05), "project": PROJECTED}
    opt, slow, params = pair(jaguar.DiZO, SlowDiZO, storage, options)
    assert set(slow.first) == {"head.w", "layers.2.b", "layers.3.w"}
    steps = steps_of(storage)
    went_down(side_by_side(opt, slow, params, steps))
    inside = [0.9 < s < 1.05 for s in slow.chosen]
    assert len(inside) == 3 * ((steps - 1) // 7) and any(inside) and not all(inside)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_dizo_with_its_own_settings(distribution: str) -> None:
    options = {"lr": 5e-4, "project": PROJECTED, "distribution": distribution}
    opt, slow, params = pair(jaguar.DiZO, SlowDiZO, "fp32", options)
    went_down(side_by_side(opt, slow, params, 160))
    assert len(slow.chosen) == 3 * 3


@storages
def test_zo_adamu(storage: str) -> None:
    """All three parts of the schedule: until 90, until 0.8 times 325 = 260, and after."""
    options = {"lr": 3e-4, "warmup": 90, "total": 325, "alpha": 0.4, "beta1": 0.8, "beta2": 0.05}
    went_down(side_by_side(*pair(jaguar.ZOAdaMU, SlowAdaMU, storage, options), steps_of(storage)))


def test_zo_adamu_with_its_own_settings() -> None:
    """The warm-up of 1024 steps makes m the fresh noise and v its square."""
    went_down(side_by_side(*pair(jaguar.ZOAdaMU, SlowAdaMU, "fp32", {"lr": 3e-4})))


# -- Steps that are skipped --------------------------------------------------------------------------------------------


SKIPPING: dict[str, tuple[Any, dict[str, Any], dict[tuple[int, int], float]]] = {
    "ZOSignSGD": (SlowScalarSign, {"lr": 1e-3, "momentum": 0.5, "scalar_sign": True}, {}),
    "FZOO": (SlowFZOO, {"lr": 1e-4, "n_directions": 3}, {(11, 3): math.nan, (13, 2): math.inf}),
    "AccZOM": (SlowAccZOM, {"lr": 1e-3}, {(11, 2): math.nan, (13, 3): math.inf}),
    "DiZO": (
        SlowDiZO,
        {"lr": 5e-4, "momentum": 0.5, "every": 6, "search_steps": 2, "search_lr": 2e-2, "project": PROJECTED},
        {(6, 2): math.nan, (12, 5): math.inf, (18, 4): math.nan},  # in the search, and in the step after it
    ),
    "ZOAdaMU": (SlowAdaMU, {"lr": 3e-4, "warmup": 8, "total": 25}, {}),
}


@pytest.mark.parametrize("storage", ["fp64", "bf16"])
@pytest.mark.parametrize("method", SKIPPING)
def test_a_loss_that_is_not_finite_skips_the_step(method: str, storage: str) -> None:
    """Nothing moves, state included; AccZOM's t stands still, the schedules of DiZO and ZO-AdaMU go on."""
    slow_cls, options, more = SKIPPING[method]
    opt, slow, params = pair(getattr(jaguar, method), slow_cls, storage, options)
    slow.rademacher = slow.rademacher or method == "FZOO"
    broken = {(0, 0): math.nan, (3, 1): math.inf, (7, 1): math.nan, (9, 0): -math.inf} | more
    with skipping():
        side_by_side(opt, slow, params, 25, f=lambda tensors, *at: broken.get(at, loss_of(tensors)))
    assert slow.finite == 25 - len({step for step, _ in broken})
