"""Stochastic rounding: the exact law over all noise values, and what it is for."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.oracles import ROUND, noise_at, step_key_ints
from helpers.rounding import NARROW, interesting, law, magnitudes
from helpers.tensors import bits, dtype_id
from jaguar import JaguarSignSGD
from jaguar.method import rng, rounding
from jaguar.method.rng import Purpose
from jaguar.method.rounding import compute_dtype, needs_noise, store

NOISE = torch.arange(1 << 16)


@pytest.mark.parametrize("dtype", NARROW, ids=dtype_id)
def test_exact_law_over_all_noise(dtype: torch.dtype) -> None:
    for value in interesting(dtype):
        down, up, count = law(value, dtype)
        got = store(torch.full(NOISE.shape, value), dtype, NOISE)
        assert got.dtype == dtype
        got = got.to(torch.float64)
        assert torch.isfinite(got).all(), value
        assert set(got.unique().tolist()) <= {down, up}, value
        assert int((got == up).sum()) == (count if up != down else len(NOISE)), value
        assert (torch.signbit(got) == (value < 0)).all()
        if 0 < count < len(NOISE):
            assert got.abs().diff().min() >= 0  # more noise never rounds less


@pytest.mark.parametrize("dtype", NARROW, ids=dtype_id)
def test_values_of_the_dtype_stay(dtype: torch.dtype) -> None:
    grid = torch.tensor(magnitudes(dtype), dtype=torch.float32)
    for x in (grid, -grid):
        for noise in (0, 1, 0x8000, 0xFFFF):
            got = store(x, dtype, torch.full(x.shape, noise))
            assert torch.equal(got.float(), x) and torch.equal(torch.signbit(got.float()), torch.signbit(x))


@pytest.mark.parametrize("noise", [None, 0, 0xFFFF], ids=["nearest", "low", "high"])
@pytest.mark.parametrize("dtype", NARROW, ids=dtype_id)
def test_special_values(dtype: torch.dtype, noise: int | None) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0])
    got = store(x, dtype, None if noise is None else torch.full(x.shape, noise)).float()
    assert got[0] == math.inf and got[1] == -math.inf and got[2].isnan()
    assert got[3] == 0 and not got[3].signbit() and got[4] == 0 and got[4].signbit()


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32, torch.float64], ids=dtype_id)
def test_without_noise_it_is_to(dtype: torch.dtype) -> None:
    x = torch.randn(1000, dtype=torch.float64) * 10
    x = x if dtype == torch.float64 else x.float()
    assert bits(store(x, dtype)) == bits(x.to(dtype))
    assert needs_noise(dtype) == (dtype in NARROW)
    assert compute_dtype(dtype) == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_wide_values_ignore_noise(dtype: torch.dtype) -> None:
    x = torch.randn(100, dtype=dtype)
    assert bits(store(x, dtype, torch.full((100,), 0xFFFF))) == bits(x)


def mean_step(dtype: torch.dtype, x: float, lr: float, n: int = 100_000) -> tuple[float, float, float]:
    """(mean of n stored steps, intended step, standard error)."""
    start = torch.full((n,), x).to(dtype).float()
    value = start - lr
    noise = rng.noise16(step_key_ints(3, 4, 0, ROUND), 5, 0, n, Purpose.ROUND)
    moves = (store(value, dtype, noise).double() - start.double()).numpy()
    return moves.mean(), float(value[0].double() - start[0].double()), moves.std() / math.sqrt(n)


STEPS = [(torch.bfloat16, 0.0201, 1e-6), (torch.bfloat16, -0.0201, 1e-6), (torch.float16, 0.0201, 1e-6),
         (torch.float8_e5m2, 0.02, 1e-4), (torch.float16, 3e-5, 1e-8)]  # fmt: skip


@pytest.mark.parametrize(("dtype", "x", "lr"), STEPS)
def test_mean_of_many_steps_is_the_intended_step(dtype: torch.dtype, x: float, lr: float) -> None:
    mean, intended, error = mean_step(dtype, x, lr)
    assert error > 0
    assert abs(mean - intended) < 5 * error


def one_step(rounding_mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves of 200,000 bf16 weights N(0, 0.02^2) in one step of 1e-6, and the directions they should have."""
    before = (torch.randn(200_000) * 0.02).to(torch.bfloat16)
    x = before.clone().requires_grad_()
    opt = JaguarSignSGD([x], lr=1e-6, coordinates=1.0, tau=1e-2, rounding=rounding_mode)
    opt.step(lambda: (x.float() * torch.linspace(-1, 1, x.numel())).sum())
    return x.detach().double() - before.double(), -opt.state[x]["momentum"].double().sign()


def test_nearest_rounding_stands_still() -> None:
    moves, _ = one_step("nearest")
    assert (moves != 0).double().mean() < 0.05  # measured: 1 %


def test_stochastic_rounding_moves_the_mean_right() -> None:
    moves, direction = one_step("stochastic")
    along = moves * direction
    error = along.std() / math.sqrt(along.numel())
    assert abs(along.mean() - 1e-6) < 5 * error
    assert error < 1e-7  # so that the line above can tell 1e-6 from nothing


def test_noise_of_a_step_is_keyed_by_the_element() -> None:
    x = torch.full((50,), 0.0201, dtype=torch.bfloat16, requires_grad=True)
    before = x.detach().float().clone()
    opt = JaguarSignSGD([("layer.weight", x)], lr=3e-5, coordinates=1.0, tau=1e-2, seed=9)
    opt.step(lambda: x.float().sum())
    stream = opt.slots[0].stream
    value = before - opt.state[x]["momentum"].float().sign() * torch.tensor(3e-5, dtype=torch.float32)
    for i in range(50):
        down, up, count = law(float(value[i]), torch.bfloat16)
        noise = noise_at(step_key_ints(9, 0, 0, ROUND), stream, i, ROUND)
        assert x[i].item() == (up if noise >= 65536 - count else down)


@pytest.mark.parametrize("breakage", ["nearest", "always-up"])
def test_the_laws_notice_broken_rounding(breakage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = rounding.store
    broken = {"nearest": lambda v, d, n=None: real(v, d), "always-up": lambda v, d, n=None: real(v, d, n | 0xFFFF)}[
        breakage
    ]
    monkeypatch.setitem(globals(), "store", broken)
    with pytest.raises(AssertionError):
        test_exact_law_over_all_noise(torch.float16)
    with pytest.raises(AssertionError):
        test_mean_of_many_steps_is_the_intended_step(torch.bfloat16, 0.0201, 1e-6)
