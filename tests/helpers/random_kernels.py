"""Random words, noise, signs, normals and rounding in kernels: tests that run in the interpreter and on a GPU."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from helpers.kernels import same
from helpers.oracles import (
    BOUNDS,
    DIRECTION,
    M32,
    ROUND,
    ROUND_STATE,
    VECTORS,
    noise_at,
    numbers,
    sign_at,
    step_key_ints,
    words_ints,
)
from helpers.rounding import magnitudes
from helpers.tensors import bits, dtype_id
from jaguar.backends import availability
from jaguar.method import rng, rounding
from jaguar.method.rng import Purpose
from jaguar.triton_kernels import rng as kernel_rng
from jaguar.triton_kernels import rounding as kernel_rounding
from jaguar.triton_kernels.launch import launch
from jaguar.triton_kernels.tables import FORMATS

DEVICE, BLOCK = ("cpu", 1 << 16) if availability.interpreted() else ("cuda", 1024)
NARROW = [torch.bfloat16, torch.float16, torch.float8_e5m2]


STARTS = [0, 8192, 2**31 - 8192, 2**31, 2**32 + 8192, 2**35, 2**40 + 8192]


@triton.jit
def philox_kernel(inputs, outputs, N: tl.constexpr):
    i = tl.arange(0, N)
    k0, k1 = tl.load(inputs + i).to(tl.uint32), tl.load(inputs + N + i).to(tl.uint32)
    c0, c1 = tl.load(inputs + 2 * N + i).to(tl.uint32), tl.load(inputs + 3 * N + i).to(tl.uint32)
    c2, c3 = tl.load(inputs + 4 * N + i).to(tl.uint32), tl.load(inputs + 5 * N + i).to(tl.uint32)
    w0, w1, w2, w3 = kernel_rng.philox(k0, k1, c0, c1, c2, c3)
    tl.store(outputs + i, w0.to(tl.int64))
    tl.store(outputs + N + i, w1.to(tl.int64))
    tl.store(outputs + 2 * N + i, w2.to(tl.int64))
    tl.store(outputs + 3 * N + i, w3.to(tl.int64))


@triton.jit
def words_kernel(keys, groups, stream, outputs, PURPOSE: tl.constexpr, N: tl.constexpr, IN_A_ROW: tl.constexpr):
    i = tl.arange(0, N)
    k, s = kernel_rng.key(keys, PURPOSE), tl.load(stream).to(tl.uint32)
    if IN_A_ROW:
        w0, w1, w2, w3 = kernel_rng.words_from(k, tl.load(groups), i, s, PURPOSE)
    else:
        w0, w1, w2, w3 = kernel_rng.words(k, tl.load(groups + i), s, PURPOSE)
    tl.store(outputs + i, w0.to(tl.int64))
    tl.store(outputs + N + i, w1.to(tl.int64))
    tl.store(outputs + 2 * N + i, w2.to(tl.int64))
    tl.store(outputs + 3 * N + i, w3.to(tl.int64))


@triton.jit
def mulhi64_kernel(high, low, bounds, outputs, N: tl.constexpr, SCALAR: tl.constexpr):
    i = tl.arange(0, N)
    bound = tl.load(bounds) if SCALAR else tl.load(bounds + i)
    place = kernel_rng.mulhi64(tl.load(high + i).to(tl.uint32), tl.load(low + i).to(tl.uint32), bound)
    tl.store(outputs + i, place)


@triton.jit
def elements_kernel(keys, start, stream, together, apart, KIND: tl.constexpr, PURPOSE: tl.constexpr, N: tl.constexpr):
    j = tl.arange(0, N // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    k, s, first = kernel_rng.key(keys, PURPOSE), tl.load(stream).to(tl.uint32), tl.load(start)
    if KIND == "noise":
        a = kernel_rng.noise16_rows(k, first >> 3, s, PURPOSE, N // 8).to(tl.int64)
        b = kernel_rng.noise16_at(k, first + j, s, PURPOSE).to(tl.int64)
    elif KIND == "signs":
        a, b = kernel_rng.signs_rows(k, first >> 7, s, N // 8), kernel_rng.signs_at(k, first + j, s)
    else:
        a, b = kernel_rng.normals_rows(k, first >> 2, s, N // 8), kernel_rng.normals_at(k, first + j, s)
    tl.store(together + j, a)
    tl.store(apart + j, b)


@triton.jit
def rounding_kernel(values, noise, outputs, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    v = tl.load(values + i)
    if STOCHASTIC:
        y = kernel_rounding.stochastic(v, tl.load(noise + i).to(tl.uint32), FORMAT)
    else:
        y = kernel_rounding.nearest(v, FORMAT)
    tl.store(outputs + i, y)


@triton.jit
def widened_kernel(patterns, outputs, FORMAT: tl.constexpr, COMPUTE: tl.constexpr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(outputs + i, kernel_rounding.widened(tl.load(patterns + i), FORMAT, COMPUTE))


def int64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def unwritten(*shape: int) -> Tensor:
    return torch.full(shape, -7, dtype=torch.int64, device=DEVICE)


def key_table(key: tuple[int, int], purpose: int) -> Tensor:
    table = unwritten(16)
    table[2 * purpose : 2 * purpose + 2] = int64(key)
    return table


def philox(keys: Tensor, counters: Tensor) -> list[list[int]]:
    """Words of [n, 2] keys and [n, 4] counters, n a power of two."""
    out = unwritten(4, len(keys))
    launch(philox_kernel, 1, torch.cat((keys, counters), 1).t().contiguous(), out, N=len(keys))
    return out.t().tolist()


def test_random123_vectors() -> None:
    rows = [(numbers(k, 2), numbers(c, 4), numbers(w, 4)) for k, c, w in (*VECTORS, VECTORS[0])]
    assert philox(int64([k for k, _, _ in rows]), int64([c for _, c, _ in rows])) == [list(w) for _, _, w in rows]


def test_philox_of_random_counters() -> None:
    gen = np.random.default_rng(1)
    keys, counters = (int64(gen.integers(0, 2**32, (64, n), dtype=np.uint64).astype(np.int64)) for n in (2, 4))
    want = rng.philox(tuple(keys.T), tuple(counters.T))
    assert philox(keys, counters) == torch.stack(want, 1).tolist()


@pytest.mark.parametrize("purpose", [DIRECTION, ROUND])
def test_words_use_both_halves_of_the_group(purpose: int) -> None:
    groups = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**35 + 77, 2**62 + 12345, 2**63 - 1]
    key, stream, out = (0xFFFFFFF3, 4), 0xDEADBEEF, unwritten(4, 8)
    tables = key_table(key, purpose), int64(groups), int64([stream]), out
    launch(words_kernel, 1, *tables, PURPOSE=purpose, N=8, IN_A_ROW=False)
    assert out.t().tolist() == [list(words_ints(key, g, stream, purpose)) for g in groups]


@pytest.mark.parametrize("first", [0, 2**32 - 128, 2**32, 2**37 + 2**32 - 128, 2**60 + 128])
def test_words_in_a_row_need_no_carry(first: int) -> None:
    key, stream, out = (3, 0xFFFFFFF4), 0xFFFFFFFF, unwritten(4, 128)
    tables = key_table(key, ROUND), int64([first]), int64([stream]), out
    launch(words_kernel, 1, *tables, PURPOSE=ROUND, N=128, IN_A_ROW=True)
    assert out.t().tolist() == [list(words_ints(key, first + i, stream, ROUND)) for i in range(128)]


def mulhi64(words: list[int], bounds: Tensor, scalar: bool) -> list[int]:
    out = unwritten(len(words))
    high, low = int64([w >> 32 for w in words]), int64([w & M32 for w in words])
    launch(mulhi64_kernel, 1, high, low, bounds, out, N=len(words), SCALAR=scalar)
    return out.tolist()


def test_mulhi64_equals_ints() -> None:
    gen = np.random.default_rng(2)
    words = [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 2**64 - 2**32, 0xFEDCBA9876543210]
    words += [int(w) for w in gen.integers(0, 2**64, 120, dtype=np.uint64)]
    for bound in BOUNDS:
        assert mulhi64(words, int64([bound]), scalar=True) == [w * bound >> 64 for w in words], bound
    bounds = [BOUNDS[i % len(BOUNDS)] for i in range(128)]
    assert mulhi64(words, int64(bounds), scalar=False) == [w * b >> 64 for w, b in zip(words, bounds, strict=True)]


def elements(kind: str, start: int, purpose: int = DIRECTION, n: int = 1024) -> tuple[Tensor, Tensor]:
    """What `*_rows` and `*_at` give for n elements from `start` on."""
    out = [unwritten(n) if kind == "noise" else unwritten(n).to(torch.float32) for _ in range(2)]
    key = step_key_ints(5, 6, 7, purpose)
    tables = key_table(key, purpose), int64([start]), int64([0xC0FFEE11])
    launch(elements_kernel, 1, *tables, *out, KIND=kind, PURPOSE=purpose, N=n)
    return out[0].cpu(), out[1].cpu()


@pytest.mark.parametrize("start", STARTS)
def test_noise(start: int) -> None:
    for purpose in (ROUND, ROUND_STATE):
        together, apart = elements("noise", start, purpose)
        key = step_key_ints(5, 6, 7, purpose)
        assert together.tolist() == apart.tolist()
        assert together.tolist() == rng.noise16(key, 0xC0FFEE11, start, 1024, Purpose(purpose)).tolist()
        assert together[:64].tolist() == [noise_at(key, 0xC0FFEE11, start + i, purpose) for i in range(64)]


@pytest.mark.parametrize("start", STARTS)
def test_signs(start: int) -> None:
    together, apart = elements("signs", start)
    key = step_key_ints(5, 6, 7, DIRECTION)
    assert bits(together) == bits(apart) == bits(rng.signs(key, 0xC0FFEE11, start, 1024))
    assert together[:256].tolist() == [sign_at(key, 0xC0FFEE11, start + i) for i in range(256)]


@pytest.mark.parametrize("start", STARTS)
def test_normals(start: int) -> None:
    together, apart = elements("normals", start)
    assert bits(together) == bits(apart)
    assert bits(together) == bits(rng.normals(step_key_ints(5, 6, 7, DIRECTION), 0xC0FFEE11, start, 1024))


def padded(values: Tensor) -> Tensor:
    """On the device, with zeros up to a multiple of a block."""
    return torch.cat((values, values.new_zeros(-len(values) % BLOCK))).to(DEVICE)


def stored(values: Tensor, dtype: torch.dtype, noise: Tensor | None = None) -> Tensor:
    """`values` (fp32 or fp64) as a kernel stores them."""
    v, w = padded(values), padded(torch.zeros(len(values), dtype=torch.int64) if noise is None else noise)
    integer = {torch.bfloat16: torch.uint16, torch.float8_e5m2: torch.uint8}.get(dtype, dtype)
    out = torch.full((len(v) * dtype.itemsize,), 0xA5, dtype=torch.uint8, device=DEVICE).view(integer)
    stochastic = noise is not None
    launch(rounding_kernel, len(v) // BLOCK, v, w, out, FORMAT=FORMATS[dtype], STOCHASTIC=stochastic, N=BLOCK)
    return out.cpu().view(dtype)[: len(values)]


SPECIAL = [0.0, math.inf, math.nan, 1e-45, 1e-41, 1.1754944e-38, 1e-30, 3.4028235e38, 3.3895314e38, 3.39e38, 65504.0,
           65519.996, 65520.0, 57344.0, 61439.996, 61440.0, 65535.0, 7e4, 1 / 3, 1.9999999]  # fmt: skip


def near_every_value(dtype: torch.dtype) -> Tensor:
    """Every magnitude of a format, what lies half way between two of them, and fp32's neighbours of both: fp32."""
    grid = torch.tensor(magnitudes(dtype), dtype=torch.float64)
    ties = ((grid[1:] + grid[:-1]) / 2).to(torch.float32)  # exact: one bit more
    x = torch.cat((grid.to(torch.float32), ties, torch.tensor(SPECIAL, dtype=torch.float32)))
    around = [torch.nextafter(x, torch.full_like(x, to)) for to in (0.0, math.inf)]
    x = torch.cat((x, *around))
    return torch.cat((x, -x))


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32], ids=dtype_id)
def test_nearest(dtype: torch.dtype) -> None:
    x = near_every_value(dtype if dtype in NARROW else torch.bfloat16)
    assert bool(same(stored(x, dtype), rounding.store(x, dtype)).all())


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32, torch.float64], ids=dtype_id)
def test_nearest_from_fp64(dtype: torch.dtype) -> None:
    """Through fp32, as torch does it: just above a tie it rounds twice."""
    x = near_every_value(dtype if dtype in NARROW else torch.float16).to(torch.float64)
    x = torch.cat((x, x * (1 + 2.0**-40), x * (1 - 2.0**-40), torch.tensor([1e300, -1e300, 1e-300])))
    assert bool(same(stored(x, dtype), rounding.store(x, dtype)).all())


@pytest.mark.parametrize("dtype", NARROW, ids=dtype_id)
@pytest.mark.parametrize("noise", [0, 1, 0x7FFF, 0x8000, 0xFFFF, "random"])
def test_stochastic(dtype: torch.dtype, noise: int | str) -> None:
    x = near_every_value(dtype)
    w = torch.randint(0, 1 << 16, x.shape) if noise == "random" else torch.full(x.shape, noise)
    got = stored(x, dtype, w)
    assert bool(same(got, rounding.store(x, dtype, w)).all())
    finite = x.isfinite()
    assert bool(got.float()[finite].isfinite().all()) and bool(got.float()[x.isnan()].isnan().all())


@pytest.mark.parametrize("compute", [torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("dtype", NARROW, ids=dtype_id)
def test_every_pattern_widens_and_comes_back(dtype: torch.dtype, compute: torch.dtype) -> None:
    n = 1 << (8 * dtype.itemsize)
    integer = {1: torch.uint8, 2: torch.uint16}[dtype.itemsize]
    patterns = torch.arange(n).to(integer)
    read = patterns.view(torch.float16) if dtype == torch.float16 else patterns
    wide, block = unwritten(n).to(compute), min(n, BLOCK)
    formats = {"FORMAT": FORMATS[dtype], "COMPUTE": FORMATS[compute]}
    launch(widened_kernel, n // block, read.to(DEVICE), wide, **formats, N=block)
    wide, values = wide.cpu(), patterns.view(dtype)
    assert bool(same(wide, values.to(compute)).all())
    assert bool(same(stored(wide, dtype), values).all())
    if compute == torch.float32:
        for noise in (0, 0xFFFF):
            assert bool(same(stored(wide, dtype, torch.full((n,), noise)), values).all())
