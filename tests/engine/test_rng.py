"""The counter generator against plain ints, numpy and statistics."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from helpers.oracles import (
    BOUNDS,
    DIRECTION,
    M32,
    ROUND,
    ROUND_STATE,
    VECTORS,
    noise_at,
    numbers,
    philox_ints,
    sign_at,
    step_key_ints,
    words_ints,
)
from jaguar.method import rng
from jaguar.method.rng import Draw, Purpose

STARTS = [0, 5, 2**31 - 3, 2**31 + 77, 2**32 + 3, 2**40 + 1]
N = 1 << 20


@pytest.mark.parametrize(("key", "counter", "expected"), VECTORS, ids=["zeros", "ones", "pi"])
def test_random123_vectors(key: str, counter: str, expected: str) -> None:
    k, c, want = numbers(key, 2), numbers(counter, 4), numbers(expected, 4)
    assert philox_ints(k, c) == want
    assert rng.philox(k, c) == want
    tensors = rng.philox(tuple(torch.tensor([v]) for v in k), tuple(torch.tensor([v]) for v in c))
    assert tuple(int(w) for w in tensors) == want


def test_philox_tensors_equal_plain_ints() -> None:
    gen = np.random.default_rng(1)
    counters = gen.integers(0, 2**32, (50, 4), dtype=np.uint64)
    key = tuple(int(v) for v in gen.integers(0, 2**32, 2, dtype=np.uint64))
    got = rng.philox(key, tuple(torch.tensor(counters[:, i].astype(np.int64)) for i in range(4)))
    want = [philox_ints(key, tuple(int(v) for v in row)) for row in counters]
    assert torch.stack(got, 1).tolist() == [list(w) for w in want]


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**64 - 1])
@pytest.mark.parametrize("step", [0, 1, 2**32 + 9, 2**64 - 1])
def test_step_key_and_closure_seed(seed: int, step: int) -> None:
    for purpose in Purpose:
        assert rng.step_key(seed, step, 3, purpose) == step_key_ints(seed, step, 3, int(purpose))
        assert Draw(seed, step, 3).key(purpose) == step_key_ints(seed, step, 3, int(purpose))
    k0, k1 = step_key_ints(seed, step, 0, 0)
    assert rng.closure_seed(seed, step) == (k1 << 32 | k0) >> 1 < 2**63


def test_step_keys_differ_in_every_part() -> None:
    keys = {rng.step_key(s, t, d, p) for s in (0, 1, 2**32) for t in (0, 1, 2**32) for d in range(3) for p in Purpose}
    assert len(keys) == 3 * 3 * 3 * len(Purpose)


def test_words_use_both_halves_of_the_group() -> None:
    groups = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**62 + 12345]
    got = torch.stack(rng.words((3, 4), torch.tensor(groups), 0xDEADBEEF, Purpose.ROUND), 1).tolist()
    assert got == [list(words_ints((3, 4), g, 0xDEADBEEF, ROUND)) for g in groups]


@pytest.mark.parametrize("bound", BOUNDS)
def test_mulhi64_equals_ints(bound: int) -> None:
    gen = np.random.default_rng(bound % 1000)
    words = [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1] + [int(w) for w in gen.integers(0, 2**64, 200, dtype=np.uint64)]
    high, low = torch.tensor([w >> 32 for w in words]), torch.tensor([w & M32 for w in words])
    want = [w * bound >> 64 for w in words]
    assert rng.mulhi64(high, low, bound).tolist() == want
    assert rng.mulhi64(high, low, torch.full_like(high, bound)).tolist() == want


def test_mulhi64_with_a_bound_per_word() -> None:
    word = 0xFEDCBA9876543210
    got = rng.mulhi64(
        torch.full((len(BOUNDS),), word >> 32), torch.full((len(BOUNDS),), word & M32), torch.tensor(BOUNDS)
    )
    assert got.tolist() == [word * b >> 64 for b in BOUNDS]


@pytest.mark.parametrize("start", STARTS)
def test_bit_positions_of_signs_and_noise(start: int) -> None:
    key, stream, count = step_key_ints(1, 2, 3, DIRECTION), 0xC0FFEE11, 300
    assert rng.signs(key, stream, start, count).tolist() == [sign_at(key, stream, start + i) for i in range(count)]
    for purpose in (ROUND, ROUND_STATE):
        want = [noise_at(key, stream, start + i, purpose) for i in range(count)]
        assert rng.noise16(key, stream, start, count, Purpose(purpose)).tolist() == want
        index = torch.tensor([start + i for i in range(count)])
        order = torch.randperm(count)
        assert rng.noise16_at(key, stream, index[order], Purpose(purpose)).tolist() == [want[i] for i in order]


def split_law(start: int) -> None:
    """A range cut anywhere gives the pieces of the whole range."""
    kinds = [rng.signs, rng.normals, lambda k, s, a, n: rng.noise16(k, s, a, n, Purpose.ROUND)]
    cuts = sorted({0, 1000, *np.random.default_rng(start % 97).integers(0, 1000, 7).tolist(), 1, 130})
    for draw in kinds:
        whole = draw((11, 12), 13, start, 1000)
        pieces = [draw((11, 12), 13, start + a, b - a) for a, b in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(pieces), whole)
        assert draw((11, 12), 13, start, 0).numel() == 0


@pytest.mark.parametrize("start", STARTS)
def test_pieces_are_the_pieces_of_the_whole(start: int) -> None:
    split_law(start)


def box_muller_words(key: tuple[int, int], stream: int, start: int, count: int) -> np.ndarray:
    out = []
    for group in range(start // 4, -(-(start + count) // 4)):
        # u is rounded to fp32 by definition (half of 2**-24 is lost above 1/2); everything after it is fp64 here
        u = [
            float(np.float32(np.float32(w >> 8) + np.float32(0.5)) * 2.0**-24)
            for w in words_ints(key, group, stream, DIRECTION)
        ]
        for a, b in ((u[0], u[1]), (u[2], u[3])):
            r = math.sqrt(-2 * math.log(a))
            out += [r * math.cos(2 * math.pi * b), r * math.sin(2 * math.pi * b)]
    return np.array(out)[start % 4 :][:count]


@pytest.mark.parametrize("start", STARTS)
def test_normals_are_box_muller(start: int) -> None:
    key = step_key_ints(5, 6, 7, DIRECTION)
    want = box_muller_words(key, 99, start, 2001)
    got = rng.normals(key, 99, start, 2001).double().numpy()
    # 2 ulp each for log and cos / sin, the roundings of sqrt, angle and product: under 5 ulp of r <= 5.9
    assert np.abs(got - want).max() <= 5 * 2.0**-24 * 5.9
    assert (np.abs(got - want) / np.abs(want).clip(1e-3)).max() <= 8 * 2.0**-24


def test_log_and_turns_over_all_uniforms() -> None:
    w = torch.cat([torch.arange(0, 1 << 12), torch.arange(0, 1 << 24, 997), torch.arange((1 << 24) - 4096, 1 << 24)])
    u = (w.to(torch.float32) + 0.5) * 2.0**-24
    assert u.min() > 0 and u.max() == 1.0
    log, exact = rng._log(u).double(), u.double().log()
    assert ((log - exact).abs() <= 2 * 2.0**-23 * exact.abs()).all()  # 2 ulp, relative to the value, near u = 1 too
    cos, sin = (v.double() for v in rng._cos_sin_turns(u))
    for got, want in ((cos, (2 * math.pi * u.double()).cos()), (sin, (2 * math.pi * u.double()).sin())):
        assert (got - want).abs().max() <= 2 * 2.0**-23  # 2 ulp of 1
    assert ((cos**2 + sin**2) - 1).abs().max() < 1e-6


def test_normal_moments_and_distribution() -> None:
    z = rng.normals(step_key_ints(0, 0, 0, DIRECTION), 1, 0, N).double()
    # five standard errors: var(z) = 1, var(z^2) = 2, var(z^3) = 15, var(z^4) = 96
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - mean) < 5 * math.sqrt(variance / N)
    cdf = torch.special.ndtr(z.sort().values)
    ecdf = torch.arange(1, N + 1, dtype=torch.float64) / N
    distance = max((ecdf - cdf).max(), (cdf - ecdf + 1 / N).max())
    assert distance * math.sqrt(N) < 2.7  # P(Kolmogorov > 2.7) = 2 exp(-2 * 2.7^2) = 9e-7, a five sigma event


def test_rademacher_mean_and_values() -> None:
    s = rng.signs(step_key_ints(0, 0, 0, DIRECTION), 1, 0, N)
    assert set(s.unique().tolist()) == {-1.0, 1.0}
    assert abs(s.mean()) < 5 / math.sqrt(N)
    assert abs((s[1:] * s[:-1]).mean()) < 5 / math.sqrt(N)


OTHERS = {"stream": (0, 0, 0, 2), "direction": (0, 0, 1, 1), "step": (0, 1, 0, 1), "late-step": (0, 2**32, 0, 1),
          "seed": (1, 0, 0, 1), "high-seed": (2**32, 0, 0, 1)}  # fmt: skip


def drawn(draw: object, seed: int, step: int, direction: int, stream: int) -> torch.Tensor:
    return draw(Draw(seed, step, direction).key(Purpose.DIRECTION), stream, 0, N).double()


def uncorrelated(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(abs((a * b).mean()) < 5 / math.sqrt(N))  # both have variance 1


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("draw", [rng.signs, rng.normals], ids=["signs", "normals"])
def test_two_draws_are_uncorrelated(draw: object, other: str) -> None:
    assert uncorrelated(drawn(draw, 0, 0, 0, 1), drawn(draw, *OTHERS[other]))


def test_noise_is_uniform() -> None:
    noise = rng.noise16(step_key_ints(0, 0, 0, ROUND), 1, 0, N, Purpose.ROUND)
    counts = torch.bincount(noise >> 8, minlength=256).double()
    chi2 = ((counts - N / 256) ** 2 / (N / 256)).sum()
    assert noise.min() >= 0 and noise.max() <= 0xFFFF
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)  # chi-square: mean df, variance 2 df


@pytest.mark.parametrize("breakage", ["start-in-32-bits", "stream-ignored"])
def test_the_laws_notice_a_broken_generator(breakage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = rng.words
    if breakage == "start-in-32-bits":
        monkeypatch.setattr(
            rng, "words", lambda key, group, stream, purpose: real(key, group & 0x1FFFFFFF, stream, purpose)
        )
        with pytest.raises(AssertionError):
            test_bit_positions_of_signs_and_noise(2**40 + 1)
    else:
        monkeypatch.setattr(rng, "words", lambda key, group, stream, purpose: real(key, group, 0, purpose))
        with pytest.raises(AssertionError):
            test_two_draws_are_uncorrelated(rng.signs, "stream")


def test_the_sign_law_notices_a_flipped_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rng.signs
    monkeypatch.setattr(rng, "signs", lambda *a: -real(*a))
    with pytest.raises(AssertionError):
        test_bit_positions_of_signs_and_noise(0)
