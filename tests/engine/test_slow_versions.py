"""Slow versions of ZO-AdaMM, LeZO and ZO-SGD-Cons, written from their formulas alone, and the package against them.

Nothing here computes with jaguar: numbers from the helpers' plain ints, arithmetic one numpy operation at a time in the
compute dtype, one rounding to the storage dtype. The loss is a quadratic summed by `math.fsum`, so that both sides see
the same losses as long as they hold the same bits. Everything is compared bit for bit, at every step, but for Adam's
bias correction, which is in another order here than there (x of a single step is held to four roundings).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from helpers.oracles import LAYERS, ROUND_STATE, philox_ints, stream_ints
from helpers.slow import DTYPES, GROUPS, SEED, SHAPES, STEPS, Slow, Var, loss_of, start
from helpers.steps import skipping
from helpers.tensors import numpy_of
from jaguar import LeZO, ZOAdaMM, ZOSGDCons

# The three methods


class SlowLeZO(Slow):
    def __init__(self, *args: Any, keep: float, layers: list[str], **options: Any) -> None:
        super().__init__(*args, **options)
        self.layers, self.count = layers, max(1, round(keep * len(layers)))

    def choose(self, g: dict[str, np.ndarray]) -> Any:
        def move() -> None:
            for v in self.taking_part():
                v.x = self.store(v, self.decayed(v) - self.num(v.lr) * g[v.name])

        return move

    def kept(self) -> set[str]:
        def draw(layer: str) -> int:
            w0, w1, *_ = philox_ints(self.key(LAYERS), (0, 0, stream_ints(layer), LAYERS))
            return (w1 << 32 | w0) >> 1

        return set(sorted(self.layers, key=draw)[: self.count])

    def taking_part(self) -> list[Var]:
        kept = self.kept()
        resting = tuple(f"{layer}." for layer in self.layers if layer not in kept)
        return [v for v in self.variables if not v.name.startswith(resting)]


class SlowCons(Slow):
    def choose(self, g: dict[str, np.ndarray]) -> Any:
        there, back = (
            {v.name: self.store(v, self.decayed(v) + side * (self.num(v.lr) * g[v.name])) for v in self.variables}
            for side in (self.num(-1), self.num(1))
        )
        points = [{v.name: v.x for v in self.variables}, there, back]
        scores = [self.loss(point) for point in points]

        def move() -> None:
            for v in self.variables:
                v.x = points[scores.index(min(scores))][v.name]

        return move


class SlowAdaMM(Slow):
    def __init__(self, *args: Any, amsgrad: bool = True, bias_correction: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.amsgrad, self.bias_correction = amsgrad, bias_correction

    def choose(self, g: dict[str, np.ndarray]) -> Any:
        def move() -> None:
            for v in self.variables:
                self.update(v, g[v.name])

        return move

    def update(self, v: Var, g: np.ndarray) -> None:
        num = self.num
        b1, b2, eps = (v.settings[key] for key in ("beta1", "beta2", "eps"))
        zero = np.zeros_like(v.x)
        m = num(b1) * v.state.get("momentum", zero) + num(1 - b1) * g
        m = v.state["momentum"] = self.store(v, m, ROUND_STATE, "bf16" if self.storage == "fp16" else "")
        second = v.state["v"] = num(b2) * v.state.get("v", zero) + num(1 - b2) * (g * g)
        if self.amsgrad:
            second = v.state["h"] = np.maximum(v.state.get("h", zero), second)
        root, lr = np.sqrt(second), v.lr
        if self.bias_correction:  # as torch.optim.Adam: the step and the root are corrected, eps is not
            root = root / num(math.sqrt(1 - b2**self.finite))
            lr = v.lr / (1 - b1**self.finite)
        v.x = self.store(v, self.decayed(v) - num(lr) * (m / (root + num(eps))))


# The package beside them


def pair(
    cls: Any, slow: Any, storage: str, options: dict[str, Any], groups: str = "one group", **only_slow: Any
) -> tuple[Any, Slow, dict[str, torch.nn.Parameter]]:
    """An optimizer of the package and the slow version on equal tensors; groups are by the start of a name.

    A group's "lr" is in units of the options' lr.
    """
    options = {"tau": 2.0**-4, "seed": SEED, "distribution": "rademacher", "weight_decay": 0.0} | options
    params = {n: torch.nn.Parameter(torch.tensor(start(n)).reshape(s).to(DTYPES[storage])) for n, s in SHAPES.items()}
    own = {at: dict(changes) for at, changes in GROUPS[groups].items()}
    for changes in own.values():
        changes["lr"] = options["lr"] * changes.get("lr", 1.0)
    of = {name: next(at for at in own if name.startswith(at)) for name in SHAPES}
    opt = cls(
        [{"params": [(n, p) for n, p in params.items() if of[n] == at], **changes} for at, changes in own.items()],
        **options,
    )
    betas = options.pop("betas", (0.9, 0.999))
    settings = {"beta1": betas[0], "beta2": betas[1], "eps": options.pop("eps", 1e-8)}
    options.pop("distribution")
    values = {key: options.pop(key) for key in ("lr", "tau", "weight_decay")}
    num = np.float64 if storage == "fp64" else np.float32
    variables = [
        Var(n, stream_ints(n), start(n).astype(num), settings=settings, **(values | own[of[n]])) for n in SHAPES
    ]
    return opt, slow(variables, storage, **options, **only_slow), params


def compare(
    opt: Any, slow: Slow, params: dict[str, torch.nn.Parameter], steps: int, *, f: Any = None, tolerance: float = 0.0
) -> None:
    """Both for so many steps of a schedule: the losses seen, the parameters and the state agree after every step.

    f(tensors, step, evaluation) is the loss. With a tolerance (of x alone, in units of x and of lr) the
    slow version goes on from the package's x, so that it is one step that is held to it.
    """
    f = f or (lambda tensors, *_: loss_of(tensors))
    wide = torch.float64 if slow.storage == "fp64" else torch.float32
    seen: list[float] = []

    def closure() -> torch.Tensor:
        tensors = {n: numpy_of(p).reshape(-1) for n, p in params.items()}
        loss = torch.tensor(f(tensors, slow.step, len(seen)), dtype=wide)
        seen.append(float(loss))
        return loss

    for step in range(steps):
        seen.clear()
        opt.step(closure)
        measured = slow.run(f)
        assert np.array_equal(seen, measured, equal_nan=True), (step, seen, measured)
        for v in slow.variables:
            found, state = numpy_of(params[v.name]).reshape(-1), opt.state.get(params[v.name], {})
            assert np.allclose(found, v.x, rtol=tolerance, atol=tolerance * v.lr), (
                step,
                v.name,
                np.abs(found - v.x).max(),
            )
            v.x = found.astype(slow.num)
            for key in state.keys() | v.state.keys():
                assert np.array_equal(numpy_of(state[key]).reshape(-1), v.state[key]), (step, v.name, key)
        for group in (*opt.param_groups, *(vars(v) for v in slow.variables)):
            group["lr"] *= 0.997


LAYER_NAMES = [f"layers.{i}" for i in range(5)]
STORAGES = [pytest.param(storage, STEPS if storage == "fp64" else 25, id=storage) for storage in DTYPES]


def steps_of(steps: int, whole: bool) -> int:
    """All steps for one of the two estimates, few for the other."""
    return steps if whole else min(steps, 40)


SIDES = ["two-sided", "one-sided"]


@pytest.mark.parametrize("estimator", SIDES)
@pytest.mark.parametrize(("storage", "steps"), STORAGES)
def test_zo_adamm(storage: str, steps: int, estimator: str) -> None:
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "estimator": estimator, "weight_decay": 0.01, "n_directions": 2}
    compare(*pair(ZOAdaMM, SlowAdaMM, storage, options, "groups"), steps_of(steps, estimator == "two-sided"))


@pytest.mark.parametrize("storage", ["fp64", "fp32", "bf16"])
def test_zo_adamm_without_amsgrad(storage: str) -> None:
    compare(*pair(ZOAdaMM, SlowAdaMM, storage, {"lr": 1e-2, "amsgrad": False}), 60)


@pytest.mark.parametrize("amsgrad", [True, False])
@pytest.mark.parametrize("storage", ["fp64", "fp32"])
def test_zo_adamm_with_bias_correction(storage: str, amsgrad: bool) -> None:
    options = {"lr": 1e-2, "amsgrad": amsgrad, "bias_correction": True}
    opt, slow, params = pair(ZOAdaMM, SlowAdaMM, storage, options, "groups")
    compare(opt, slow, params, 60, tolerance=4 * float(np.finfo(slow.num).eps))


def test_zo_adamm_is_torchs_adam_on_the_estimate() -> None:
    options = {"lr": 1e-2, "amsgrad": False, "bias_correction": True}
    opt, slow, params = pair(ZOAdaMM, SlowAdaMM, "fp64", options)
    twins = {n: torch.nn.Parameter(p.detach().clone()) for n, p in params.items()}
    adam = torch.optim.Adam(twins.values(), lr=1e-2)
    for _ in range(60):
        slow.f, slow.losses = lambda tensors, *_: loss_of(tensors), []
        for name, g in slow.estimate().items():
            twins[name].grad = torch.tensor(g).reshape(SHAPES[name])
        slow.step += 1
        adam.step()
        opt.step(
            lambda: torch.tensor(loss_of({n: numpy_of(p).reshape(-1) for n, p in params.items()}), dtype=torch.float64)
        )
        for v in slow.variables:  # Adam keeps its state and goes on from the package's x
            torch.testing.assert_close(twins[v.name], params[v.name], rtol=1e-14, atol=1e-16)
            twins[v.name].data.copy_(params[v.name])
            v.x = numpy_of(params[v.name]).reshape(-1)


@pytest.mark.parametrize("estimator", SIDES)
@pytest.mark.parametrize(("storage", "steps"), STORAGES)
def test_lezo(storage: str, steps: int, estimator: str) -> None:
    options = {"lr": 1e-3, "keep": 0.4, "estimator": estimator, "weight_decay": 0.1, "n_directions": 2}
    compare(
        *pair(LeZO, SlowLeZO, storage, options, "groups", layers=LAYER_NAMES), steps_of(steps, estimator == "two-sided")
    )


@pytest.mark.parametrize(("keep", "count"), [(0.1, 1), (0.3, 2), (0.5, 2), (0.7, 4), (0.9, 4), (1.0, 5)])
def test_lezo_keeps_the_rounded_share_of_the_layers(keep: float, count: int) -> None:
    """Halves go to the even number, as Python's round; one layer at least."""
    opt, slow, params = pair(LeZO, SlowLeZO, "fp32", {"lr": 1e-3, "keep": keep}, layers=LAYER_NAMES)
    assert slow.count == count
    compare(opt, slow, params, 12)


@pytest.mark.parametrize("n_directions", [1, 2])
@pytest.mark.parametrize(("storage", "steps"), STORAGES)
def test_zo_sgd_cons(storage: str, steps: int, n_directions: int) -> None:
    options = {"lr": 1e-3, "weight_decay": 0.1, "n_directions": n_directions}
    compare(*pair(ZOSGDCons, SlowCons, storage, options, "groups"), steps_of(steps, n_directions == 1))


@pytest.mark.parametrize(
    "scores", list(itertools.product([1.0, 2.0], repeat=3)), ids=lambda three: "-".join(f"{one:g}" for one in three)
)
def test_zo_sgd_cons_ties(scores: tuple[float, float, float]) -> None:
    """Every order of f(x), f(x - lr g), f(x + lr g) with ties: x before x - lr g before x + lr g."""

    def f(tensors: dict[str, np.ndarray], step: int, evaluation: int) -> float:
        return loss_of(tensors) if evaluation < 2 else scores[evaluation - 2]

    opt, slow, params = pair(ZOSGDCons, SlowCons, "fp32", {"lr": 1e-3})
    compare(opt, slow, params, 3, f=f)
    assert all(np.any(v.x != start(v.name)) for v in slow.variables) == (scores[0] > min(scores))


ALL: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "zo-adamm": (ZOAdaMM, SlowAdaMM, {"lr": 1e-2}, {}),
    "lezo": (LeZO, SlowLeZO, {"lr": 1e-3, "keep": 0.4}, {"layers": LAYER_NAMES}),
    "zo-sgd-cons": (ZOSGDCons, SlowCons, {"lr": 1e-3}, {}),
}


@pytest.mark.parametrize("storage", ["fp64", "bf16"])
@pytest.mark.parametrize("method", ALL)
def test_a_loss_that_is_not_finite_skips_the_step(method: str, storage: str) -> None:
    cls, slow_cls, options, only_slow = ALL[method]
    opt, slow, params = pair(cls, slow_cls, storage, options | {"weight_decay": 0.1}, "groups", **only_slow)
    broken = {(0, 0): math.nan, (3, 1): math.inf, (7, 1): math.nan, (9, 0): -math.inf}
    if method == "zo-sgd-cons":
        broken |= {(11, 2): math.nan, (13, 3): math.inf, (15, 4): -math.inf, (16, 4): math.nan}
    with skipping():
        compare(opt, slow, params, 25, f=lambda tensors, *at: broken.get(at, loss_of(tensors)))
    assert slow.finite == 25 - len(broken)


def test_bias_correction_does_not_count_skipped_steps() -> None:
    options = {"lr": 1e-2, "amsgrad": False, "bias_correction": True}
    opt, slow, params = pair(ZOAdaMM, SlowAdaMM, "fp64", options)
    with skipping():
        compare(
            opt,
            slow,
            params,
            12,
            tolerance=1e-15,
            f=lambda tensors, step, _: math.nan if step in (0, 4, 5) else loss_of(tensors),
        )
    assert slow.finite == 9
