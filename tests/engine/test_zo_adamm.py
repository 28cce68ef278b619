"""ZO-AdaMM: torch.optim.Adam and a numpy AMSGrad fed the same g, state that does not vanish, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import jaguar
from helpers.oracles import sign_at, step_key_ints, stream_ints
from helpers.tensors import DTYPES, Bag, bits, numpy_of, weights
from jaguar.method import directions, estimators, rounding, rules

SHAPE, SEED, TAU = (6, 7), 12345, 2.0**-7
LENGTHS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}


def rademacher(step: int, direction: int = 0) -> np.ndarray:
    """z of a step, from Philox in plain ints."""
    key = step_key_ints(SEED, step, direction, 1)
    return np.array([sign_at(key, stream_ints("p0"), i) for i in range(math.prod(SHAPE))]).reshape(SHAPE)


def run(dtype: torch.dtype, steps: int, **options: Any) -> tuple[Tensor, list[np.ndarray], Any]:
    """The parameter after some steps, the g of each, and the optimizer."""
    bag = Bag([weights(dtype, *SHAPE)])
    opt = jaguar.ZOAdaMM(bag.named_parameters(), tau=TAU, seed=SEED, distribution="rademacher", **(LENGTHS | options))
    estimates = []
    for t in range(steps):
        opt.step(bag)
        n = opt.method.estimator.n_directions
        rho = opt.rho(opt.last_record)
        estimates.append(sum(r * rademacher(t, k) for k, r in enumerate(rho)) / n)
    return bag.p0.detach(), estimates, opt


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("n_directions", [1, 3])
def test_with_adams_options_it_is_adam(dtype: torch.dtype, tolerance: float, n_directions: int) -> None:
    x, estimates, _ = run(dtype, 300, amsgrad=False, bias_correction=True, n_directions=n_directions)
    twin = weights(dtype, *SHAPE).requires_grad_()
    adam = torch.optim.Adam([twin], **LENGTHS)
    for g in estimates:
        twin.grad = torch.tensor(g, dtype=dtype)
        adam.step()
    assert (x - twin.detach()).abs().max() <= tolerance * twin.detach().abs().max()
    assert (x - weights(dtype, *SHAPE)).abs().max() > 0.1, "it moved"


# In fp32 1 - lr wd is off by 2^-25 of itself, 300 times.
@pytest.mark.parametrize(
    ("dtype", "decay", "tolerance"),
    [(torch.float32, 0.0, 1e-6), (torch.float32, 0.3, 1e-5), (torch.float64, 0.0, 1e-12), (torch.float64, 0.3, 1e-12)],
)
def test_amsgrad_in_numpy(dtype: torch.dtype, decay: float, tolerance: float) -> None:
    x, estimates, opt = run(dtype, 300, weight_decay=decay)
    y = numpy_of(weights(dtype, *SHAPE))
    m = v = h = np.zeros(SHAPE)
    for g in estimates:
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        h = np.maximum(h, v)
        y = (1 - 1e-2 * decay) * y - 1e-2 * m / (np.sqrt(h) + 1e-8)
    assert np.abs(numpy_of(x) - y).max() <= tolerance * np.abs(y).max()
    (state,) = opt.state.values()
    assert np.abs(numpy_of(state["h"]) - h).max() <= 1e-5 * h.max() and (state["h"] > state["v"]).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("amsgrad", [True, False])
def test_small_derivatives_do_not_vanish(dtype: torch.dtype, amsgrad: bool) -> None:
    """g^2 of 1e-8 is 0 in fp16; a step is about lr long whatever the scale of the loss."""
    x = weights(dtype, *SHAPE).requires_grad_()
    before = x.detach().clone()
    opt = jaguar.ZOAdaMM(
        [("x", x)], lr=1e-2, tau=1e-2, amsgrad=amsgrad, bias_correction=True, distribution="rademacher"
    )
    target = torch.linspace(-1, 1, x.numel()).view(SHAPE)
    for _ in range(20):
        opt.step(lambda: 1e-5 * (x.float() - target).square().sum())
    state = opt.state[x]
    for name in ("v", "h")[: 1 + amsgrad]:
        assert state[name].dtype == torch.float32 and (state[name] > 0).all() and state[name].max() < 1e-7
    assert state["momentum"].dtype == torch.bfloat16
    assert x.isfinite().all() and 0.02 < (x - before).abs().max() < 0.5


def test_without_any_derivative_nothing_moves() -> None:
    """0 / (0 + eps) is 0."""
    x = weights(torch.float32, *SHAPE).requires_grad_()
    before = x.detach().clone()
    opt = jaguar.ZOAdaMM([x], weight_decay=0.0)
    for _ in range(3):
        opt.step(lambda: torch.zeros(()))
    assert torch.equal(x, before)


def test_a_skipped_step_does_not_count_for_the_correction() -> None:
    def moved(losses: list[float]) -> Tensor:
        x = torch.zeros(40, requires_grad=True)
        opt = jaguar.ZOAdaMM([x], lr=1e-2, bias_correction=True, amsgrad=False)
        left = iter(losses)
        for _ in range(len(losses) // 2):
            opt.step(lambda: torch.tensor(next(left)))
        return x.detach().abs()

    with pytest.warns(UserWarning, match="skipped"):
        late = moved([math.nan, 1.0, 2.0, 1.0])
    assert torch.allclose(late, moved([2.0, 1.0]), rtol=1e-5), "the first step that moves is lr long everywhere"
    assert torch.allclose(late, torch.full((40,), 1e-2), rtol=1e-3)


def test_a_step_that_stays_does_not_count_for_the_correction() -> None:
    """Nor after loading, nor in replays, and loading forgets what was counted before."""
    method = jaguar.Method(directions.Rademacher(), rules.AdaMM(False, True), estimators.Conservative())

    def made() -> tuple[Tensor, jaguar.ZerothOrder]:
        x = torch.zeros(8, requires_grad=True)
        return x, jaguar.ZerothOrder([("x", x)], method, lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-12)

    stays, moves = (
        jaguar.Record(step, (1e-2,), losses) for step, losses in enumerate(((1, 1, 0, 1, 1), (1, 0, 2, 1, 3)))
    )
    (x, opt), (y, other), (_, fresh) = made(), made(), made()
    untouched = fresh.state_dict()
    opt.apply_(stays)
    other.load_state_dict(opt.state_dict())
    for each in (opt, other):
        each.apply_(moves)
    assert torch.allclose(x.abs(), torch.full((8,), 1e-2), rtol=1e-5) and torch.equal(x, y)
    opt.load_state_dict(untouched)
    x.data.zero_()
    opt.apply_(jaguar.Record(0, (1e-2,), moves.losses))
    assert torch.allclose(x.abs(), torch.full((8,), 1e-2), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amsgrad", [True, False])
def test_kernels_have_the_bits_of_the_reference(dtype: torch.dtype, amsgrad: bool) -> None:
    pytest.importorskip("triton")
    options = {"amsgrad": amsgrad, "bias_correction": True}
    runs = [run(dtype, 3, backend=backend, **options) for backend in ("reference", "triton")]
    states = [[bits(m) for own in opt.state.values() for m in own.values()] for _, _, opt in runs]
    assert bits(runs[0][0]) == bits(runs[1][0]) and states[0] == states[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_roots_are_rounded_correctly(dtype: torch.dtype) -> None:
    """As Python's, of numbers of any size; a library's root is not."""
    exponents = 250 if dtype == torch.float64 else 30
    x = (torch.randn(50000, dtype=torch.float64) * exponents).exp2().to(dtype)
    special = torch.tensor([0.0, 1.0, 4.0, math.inf, 2.0**-120, torch.finfo(dtype).max], dtype=dtype)
    right = torch.tensor([math.sqrt(v) for v in x.tolist()], dtype=torch.float64).to(dtype)
    assert torch.equal(rounding.root(x), right)
    roots = torch.tensor([math.sqrt(v) for v in special.tolist()], dtype=torch.float64).to(dtype)
    assert torch.equal(rounding.root(special), roots)
    assert rounding.root(torch.tensor([math.nan, -1.0], dtype=dtype)).isnan().all()


BAD = {
    "beta1": ({"betas": (1.0, 0.999)}, r"beta1=1\.0 .* must lie in \[0, 1\)"),
    "beta2": ({"betas": (0.9, -0.1)}, r"beta2=-0\.1 .* must lie in \[0, 1\)"),
    "one": ({"betas": 0.9}, "betas=0.9: give two factors"),
    "eps": ({"eps": 0.0}, r"eps=0\.0 .* must be positive"),
    "amsgrad": ({"amsgrad": "no"}, "amsgrad='no': choose True or False"),
    "correction": ({"bias_correction": 1}, "bias_correction=1: choose True or False"),
    "estimator": ({"estimator": "three-sided"}, "choose 'two-sided' or 'one-sided'"),
    "distribution": ({"distribution": "uniform"}, "choose 'gaussian' or 'rademacher'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        jaguar.ZOAdaMM([torch.zeros(3, requires_grad=True)], **options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentum'"):
        jaguar.ZOAdaMM([torch.zeros(3, requires_grad=True)], momentum=0.9)
