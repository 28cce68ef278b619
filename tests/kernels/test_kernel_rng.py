"""Random words, noise, signs, normals and rounding in kernels: the plain ints' and the reference's, bit for bit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl
from torch import Tensor

from helpers.kernels import interpreted, same
from helpers.oracles import DIRECTION, ROUND, step_key_ints
from helpers.random_kernels import (  # noqa: F401
    NARROW,
    elements,
    near_every_value,
    stored,
    test_every_pattern_widens_and_comes_back,
    test_mulhi64_equals_ints,
    test_nearest,
    test_nearest_from_fp64,
    test_noise,
    test_normals,
    test_philox_of_random_counters,
    test_random123_vectors,
    test_signs,
    test_stochastic,
    test_words_in_a_row_need_no_carry,
    test_words_use_both_halves_of_the_group,
)
from helpers.rounding import interesting, law
from helpers.tensors import bits, dtype_id
from jaguar.method import rng, rounding
from jaguar.method.rng import Purpose
from jaguar.triton_kernels import rng as kernel_rng
from jaguar.triton_kernels import rounding as kernel_rounding

pytestmark = [interpreted, pytest.mark.usefixtures("poisoned")]

MILLION = 10**6


@pytest.mark.parametrize("start", [5, 8191, 2**35 - 3, 2**40 + 8195])
def test_single_elements_wherever_a_shard_begins(start: int) -> None:
    key = step_key_ints(5, 6, 7, DIRECTION)
    assert bits(elements("signs", start, n=256)[1]) == bits(rng.signs(key, 0xC0FFEE11, start, 256))
    assert bits(elements("normals", start, n=256)[1]) == bits(rng.normals(key, 0xC0FFEE11, start, 256))
    noise = rng.noise16(step_key_ints(5, 6, 7, ROUND), 0xC0FFEE11, start, 256, Purpose.ROUND)
    assert elements("noise", start, ROUND, 256)[1].tolist() == noise.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", NARROW, ids=dtype_id)
def test_stochastic_of_ten_million_values(dtype: torch.dtype) -> None:
    """Patterns of any kind, many near the format's range, exact values, ties, and noise that decides or does not."""
    generator = torch.Generator().manual_seed(5)

    def random(bound: int) -> Tensor:
        return torch.randint(0, bound, (MILLION,), generator=generator)

    grid = near_every_value(dtype)
    for kind in range(10):
        if kind < 3:  # any pattern: subnormal, extreme, infinite, NaN
            x = (random(1 << 32) - (1 << 31)).to(torch.int32).view(torch.float32)
        elif kind < 6:  # exponents of what the format can hold, and a few to either side
            u = (random(1 << 23) | (random(62) + 85 << 23)) - (random(2) << 31)
            x = u.to(torch.int32).view(torch.float32)
        else:  # at and around values and ties
            x = grid[random(len(grid))]
        w = random(1 << 16)
        if kind % 3 == 0:  # as much as is missing to the neighbour, or one less
            low = 13 if dtype == torch.float16 else 16 if dtype == torch.bfloat16 else 21
            rest = -x.view(torch.int32).to(torch.int64) & ((1 << low) - 1)
            w = ((rest << 16 >> low) - random(2)).clamp(0, 0xFFFF)
        got, wanted = stored(x, dtype, w), rounding.store(x, dtype, w)
        assert bool(same(got, wanted).all()), kind


@pytest.mark.parametrize("dtype", NARROW, ids=dtype_id)
def test_exact_law_over_all_noise(dtype: torch.dtype) -> None:
    for value in interesting(dtype)[:40:2]:
        down, up, count = law(value, dtype)
        got = stored(torch.full((1 << 16,), value), dtype, torch.arange(1 << 16)).to(torch.float64)
        assert set(got.tolist()) <= {down, up}, value
        assert int((got == up).sum()) == (count if up != down else 1 << 16), value


@pytest.mark.parametrize("breakage", ["purpose", "half", "truncated"])
def test_the_laws_notice(breakage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if breakage == "purpose":
        monkeypatch.setattr(kernel_rng, "DIRECTION", tl.constexpr(2))
        with pytest.raises(AssertionError):
            test_signs(0)
    elif breakage == "half":
        monkeypatch.setattr(kernel_rng, "noise16_at", kernel_rng.noise16_at.__class__(low_half))
        with pytest.raises(AssertionError):
            test_noise(0)
    else:
        monkeypatch.setattr(kernel_rounding, "_bf16_nearest", kernel_rounding._bf16_nearest.__class__(truncated))
        with pytest.raises(AssertionError):
            test_nearest(torch.bfloat16)


def low_half(k, index, stream, PURPOSE):
    w0, _, _, _ = kernel_rng.words(k, index >> 3, stream, PURPOSE)
    return w0 & 0xFFFF


def truncated(v):
    return (v.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
