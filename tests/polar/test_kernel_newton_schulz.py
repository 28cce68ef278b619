"""Newton-Schulz products in kernels: against float64, and no byte changed outside of what they write.

They run in Triton's interpreter, or on the GPU where there is one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl

from jaguar.backends import availability
from jaguar.backends.polar import triton as newton_schulz
from jaguar.backends.polar.triton import TritonProducts
from jaguar.triton_kernels import newton_schulz as kernels
from jaguar.triton_kernels.launch import launch

DEVICE = "cpu" if availability.interpreted() else "cuda"
BAND = 8192  # more than any tile, so that stores without a mask end in it
INPUTS = [torch.float32, torch.bfloat16, torch.float16]
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TINY = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}  # half of the smallest number
CUBIC = [(1.5, -0.5, 0.0)] * 10
QUINTIC = [(3.4445, -4.7750, 2.0315)] * 5
Scheme: TypeAlias = list[tuple[float, float, float]]
# Ragged, one less or more than a tile, whole tiles (FULL), multiples of 8 that are no tiles (HINT alone).
SHAPES = [(1, 1, 1), (7, 33, 65), (33, 70, 7), (65, 1, 33), (70, 65, 70), (64, 128, 64), (72, 40, 136)]


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    with np.errstate(all="ignore"):  # the interpreter's numpy warns of NaN and overflow where a GPU is silent
        yield


class Guarded:
    """Batches of matrices of NaN between rows, columns and bands of NaN that nothing may write to."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, pitch: int = 0, transposed: bool = False) -> None:
        b, n, m = shape if not transposed else (shape[0], shape[2], shape[1])
        pitch = pitch or -(-m // 8) * 8 + 8
        self._bits = torch.uint16 if dtype.itemsize == 2 else torch.uint32
        self._all = torch.full((2 * BAND + b * n * pitch,), math.nan, dtype=dtype, device=DEVICE)
        inner = self._all[BAND:-BAND].view(b, n, pitch)[:, :, :m]
        self.inside = inner.mT if transposed else inner
        self._before = self._all.view(self._bits).to(torch.int64)

    def filled(self, values: Tensor) -> Tensor:
        self.inside.copy_(values)
        return self.inside

    def intact(self) -> bool:
        """Whether nothing outside was written."""
        after = self._all.clone()
        self._all.copy_(self._before.to(self._bits).view(self._all.dtype))
        self.inside.fill_(math.inf)
        outside = ~torch.isinf(self._all)
        self._all.copy_(after)
        return bool((after.view(self._bits).to(torch.int64) == self._before)[outside].all())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def spread(*shape: int, seed: int = 0) -> Tensor:
    """fp16 numbers between NaN of rows that are a multiple of 8 apart."""
    return Guarded(shape, torch.float16).filled(normal(*shape, seed=seed))


def excess(out: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float = 0.0, c: Tensor | None = None) -> Tensor:
    """|out - exact| less its bound u |exact| + (K + 3) 2^-23 (|alpha| |A| |B| + |beta C|), which is at most 0.

    One rounding, and sums of fp32 in any order; 2^-23 instead of 2^-24, because tensor cores truncate.
    """
    A, B, C = a.double(), b.double(), torch.zeros_like(out, dtype=torch.float64) if c is None else c.double()
    exact = alpha * (A @ B) + beta * C
    slack = (a.shape[-1] + 3) * 2.0**-23 * (abs(alpha) * (A.abs() @ B.abs()) + abs(beta) * C.abs())
    u = UNIT[out.dtype]
    error = (out.double() - exact).abs().nan_to_num(nan=math.inf)
    return error - (u * exact.abs() + (1 + u) * slack + TINY[out.dtype])


def close_to_product(*arguments: Any) -> bool:
    return bool((excess(*arguments) <= 0).all())


@pytest.mark.parametrize("adding", ["nothing", "other", "itself"])
@pytest.mark.parametrize("out_transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("b_transposed", [False, True], ids=["n-contiguous", "k-contiguous"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_product(dtype: torch.dtype, b_transposed: bool, out_transposed: bool, adding: str) -> None:
    if adding == "itself" and (out_transposed or dtype != torch.float16):
        pytest.skip("c has rows of fp16")
    for (m, n, k), batch in zip(SHAPES, (2, 1, 2, 1, 1, 2, 2), strict=True):
        a = spread(batch, m, k)
        b = spread(batch, n, k, seed=1).mT if b_transposed else spread(batch, k, n, seed=1)
        guarded = Guarded((batch, m, n), dtype, transposed=out_transposed)
        out, c = guarded.inside, None
        if adding != "nothing":
            c = spread(batch, m, n, seed=2)
        kept = c
        if adding == "itself":
            out = c = guarded.filled(c)
        TritonProducts().product(out, a, b, alpha=-0.7, beta=1.9, c=c)
        assert close_to_product(out, a, b, -0.7, 1.9 if adding != "nothing" else 0.0, kept), (m, n, k)
        assert guarded.intact(), (m, n, k)


def test_product_of_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton_schulz, "ENOUGH", 0)
    for m, n, k in ((136, 264, 72), (128, 128, 64)):
        a, b, c = spread(1, m, k), spread(1, k, n, seed=1), spread(1, m, n, seed=2)
        guarded = Guarded((1, m, n), torch.float16)
        TritonProducts().product(guarded.inside, a, b, alpha=1.0, beta=-1.0, c=c)
        assert close_to_product(guarded.inside, a, b, 1.0, -1.0, c) and guarded.intact()


def test_tiles_go_down_groups_of_rows() -> None:
    """Rows of more tiles than a group has: every tile once."""
    a, b = spread(1, 10 * 64 + 1, 8), spread(1, 8, 65, seed=1)
    guarded = Guarded((1, 641, 65), torch.float16)
    TritonProducts().product(guarded.inside, a, b, alpha=1.0)
    assert close_to_product(guarded.inside, a, b, 1.0) and guarded.intact()


@pytest.mark.parametrize("large", [False, True], ids=["little", "large"])
@pytest.mark.parametrize("adding", ["nothing", "other", "itself"])
def test_triangle(adding: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """X X^T, and a product of symmetric factors that commute but for their roundings."""
    if large:
        monkeypatch.setattr(newton_schulz, "ENOUGH", 0)
    products = TritonProducts()
    for n in (136, 256) if large else (1, 7, 33, 65, 70, 128, 136):
        batch = 1 if n > 70 else 2
        x = spread(batch, n, 40)
        x /= 8
        guarded = Guarded((batch, n, n), torch.float16)
        R = guarded.inside
        products.product(R, x, x.mT, alpha=0.5, triangle=True)
        assert torch.equal(R, R.mT) and close_to_product(R, x, x.mT, 0.5) and guarded.intact()
        square = Guarded((batch, n, n), torch.float16).filled(0.01 * (R.double() @ R.double()))
        assert torch.equal(square, square.mT)
        guarded = Guarded((batch, n, n), torch.float16)
        out, c, beta = guarded.inside, None, 0.0
        if adding != "nothing":
            c, beta = R, 0.3
        kept = c
        if adding == "itself":
            out = c = guarded.filled(R)
        products.product(out, R, square, alpha=0.1, beta=beta, c=c, triangle=True)
        assert torch.equal(out, out.mT) and guarded.intact(), n
        assert bool((excess(out, R, square, 0.1, beta, kept).tril() <= 0).all()), n


def test_products_are_not_symmetric_by_themselves() -> None:
    """What the mirror is for: rounded factors do not commute, and diagonal tiles have both halves."""
    x = spread(1, 33, 40)
    R = Guarded((1, 33, 33), torch.float16).filled(x.double() @ x.double().mT / 64)
    square = Guarded((1, 33, 33), torch.float16).filled(0.01 * (R.double() @ R.double()))
    out = Guarded((1, 33, 33), torch.float16).inside
    TritonProducts().product(out, R, square, alpha=0.1)
    assert not torch.equal(out, out.mT)
    TritonProducts().product(out, R, square, alpha=0.1, triangle=True)
    assert torch.equal(out, out.mT)


def test_product_refuses_other_strides() -> None:
    x = torch.zeros(1, 6, 6, dtype=torch.float16, device=DEVICE)[:, ::2, ::2]
    with pytest.raises(ValueError, match=r"shape \(1, 3, 3\) has strides .*one of the last two must be 1"):
        TritonProducts().product(torch.zeros_like(x), x, x, alpha=1.0)


@triton.jit
def _places(out, n, COUNT: tl.constexpr):
    p = tl.arange(0, COUNT)
    i, j = kernels.triangle(p, n)
    tl.store(out + p, i * 1000 + j, mask=p < n * (n + 1) // 2)


@pytest.mark.parametrize("n", range(1, 41))
def test_every_tile_of_the_triangle_has_one_number(n: int) -> None:
    count = n * (n + 1) // 2
    out = torch.full((1024,), -1, dtype=torch.int32, device=DEVICE)
    launch(_places, 1, out, n, COUNT=1024)
    assert sorted(out.tolist()[:count]) == [1000 * i + j for i in range(n) for j in range(i + 1)]
    assert out.tolist()[count:] == [-1] * (1024 - count)


def prepared(matrices: list[Tensor], scale: float = 1.0) -> Tensor:
    """X of a batch, after a look at the bands."""
    n, m = min(matrices[0].shape), max(matrices[0].shape)
    guarded = Guarded((len(matrices), n, m), torch.float16)
    statistics = torch.full((len(matrices), 2, 64), math.nan, device=DEVICE)
    TritonProducts().prepare(matrices, guarded.inside, statistics, scale)
    assert guarded.intact()
    return guarded.inside


def close_to_normalised(x: Tensor, matrix: Tensor, scale: float = 1.0) -> bool:
    """One rounding to fp16, and of the norm and the quotient some of fp32."""
    g = matrix.double() if x.shape == matrix.shape else matrix.double().mT
    exact = scale * g / torch.linalg.matrix_norm(g)
    error = (x.double() - exact).abs()
    return bool((error <= (2.0**-11 + 2.0**-20) * exact.abs() + 2.0**-25).all())


@pytest.mark.parametrize("dtype", INPUTS, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (33, 7), (65, 70), (64, 128), (128, 64), (70, 70), (1, 70), (9, 1)])
def test_prepare(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrices = [normal(*shape, seed=i).to(dtype) for i in range(2)]
    for x, matrix in zip(prepared(matrices, 0.99), matrices, strict=True):
        assert close_to_normalised(x, matrix, 0.99)


@pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])
def test_prepare_of_many_parts(tall: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of several tiles, a ragged last one, and magnitudes that differ from part to part."""
    monkeypatch.setattr(newton_schulz, "MEASURED", 1024)
    matrix = normal(250, 301) * torch.logspace(-30, -3, 250, dtype=torch.float64, device=DEVICE)[:, None]
    matrix = matrix.float().mT.contiguous() if tall else matrix.float()
    assert close_to_normalised(prepared([matrix])[0], matrix)


@pytest.mark.parametrize("dtype", INPUTS, ids=["fp32", "bf16", "fp16"])
def test_prepare_of_extreme_matrices(dtype: torch.dtype) -> None:
    """Whatever a matrix has, the others of its batch keep their values."""
    plain = normal(9, 24).to(dtype)
    sizes = [6e-8, 6e4 / 4] if dtype == torch.float16 else [1e-30, 1e30, 1e-40, 3e38 / 4]
    extreme = [(normal(9, 24, seed=1) * size).to(dtype) for size in sizes]
    broken = [plain.clone() for _ in range(3)]
    for matrix, value in zip(broken, (math.nan, math.inf, -math.inf), strict=True):
        matrix[8, 23] = value
    x = prepared([plain, torch.zeros_like(plain), *broken, *extreme, plain])
    assert close_to_normalised(x[0], plain) and torch.equal(x[0], x[-1])
    assert bool((x[1] == 0).all()) and bool(x[2:5].isnan().all())
    for one, matrix in zip(x[5:-1], extreme, strict=True):
        assert close_to_normalised(one, matrix)


def iterated(matrix: Tensor, coefficients: Scheme, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Newton-Schulz in float64, of directions that are taken for longer by `shift`."""
    g = matrix.double()
    x = g.mT if g.shape[0] > g.shape[1] else g
    x = x * (scale / torch.linalg.matrix_norm(x))
    U, s, Vh = torch.linalg.svd(x, full_matrices=False)
    grown, longer = s.clone(), (s * s + shift).sqrt()
    for a, b, c in coefficients:
        ratio = a + b * longer**2 + c * longer**4
        grown, longer = grown * ratio, longer * ratio
    o = U * grown @ Vh
    return o.mT if g.shape[0] > g.shape[1] else o


def allowed(coefficients: Scheme) -> float:
    """What fp32 may make of a result: its roundings, times the slope of the scheme at 0."""
    return 2.0**-20 * math.prod(a for a, _, _ in coefficients)


def small(matrices: list[Tensor], coefficients: Scheme, out: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """O of every matrix, after a look at the bands."""
    guarded = [Guarded((1, *matrix.shape), out, pitch=matrix.shape[1]) for matrix in matrices]
    outs = [each.inside[0] for each in guarded]
    TritonProducts().small_(matrices, outs, coefficients, scale)
    assert all(each.intact() for each in guarded)
    return outs


MIXED = [(1, 5), (1, 1), (5, 1), (2, 33), (8, 300), (300, 8), (16, 16), (70, 16)]
WIDER = [(17, 64), (32, 130), (130, 32), (16, 40), (3, 4)]
ALIGNED = [(8, 304), (304, 8), (16, 40), (32, 136), (136, 32)]


@pytest.mark.parametrize("coefficients", [CUBIC, QUINTIC], ids=["cubic", "quintic"])
@pytest.mark.parametrize("shapes", [MIXED, WIDER, ALIGNED], ids=["mixed", "wider", "aligned"])
@pytest.mark.parametrize("turn", range(3), ids=["fp32-bf16", "bf16-fp16", "fp16-fp32"])
def test_small(turn: int, shapes: list[tuple[int, int]], coefficients: Scheme) -> None:
    """fp16 numbers and bf16 numbers pass into fp16 exactly, so what is left are roundings of fp32 and of the result."""
    dtype, out = INPUTS[turn], INPUTS[(turn + 1) % 3]
    matrices = [normal(*shape, seed=i).half().to(dtype) for i, shape in enumerate(shapes)]
    for o, matrix in zip(small(matrices, coefficients, out, 0.98), matrices, strict=True):
        exact = iterated(matrix, coefficients, 0.98)
        assert bool(((o.double() - exact).abs() <= UNIT[out] * exact.abs() + allowed(coefficients)).all()), matrix.shape


def test_small_of_numbers_that_fp16_rounds() -> None:
    """||dO|| <= max p' ||dX||, and the cubic's slope is largest at 0: 1.5^10."""
    matrices = [normal(*shape, seed=i).float() for i, shape in enumerate([(16, 16), (8, 70), (70, 8)])]
    for o, matrix in zip(small(matrices, CUBIC, torch.float32), matrices, strict=True):
        error = torch.linalg.matrix_norm(o.double() - iterated(matrix, CUBIC))
        assert error <= 1.5**10 * 2.0**-11


@pytest.mark.parametrize("coefficients", [CUBIC, QUINTIC, 2 * QUINTIC], ids=["cubic", "quintic", "ten-quintics"])
def test_small_of_low_rank(coefficients: Scheme) -> None:
    """Eigenvalues 0 of R, which rounding puts below 0, do not run away."""
    matrices = [integers(16, rank) @ integers(rank, 70) for rank in (1, 3)]
    for o, matrix in zip(small(matrices, coefficients, torch.float32), matrices, strict=True):
        error = torch.linalg.matrix_norm(o.double() - iterated(matrix, coefficients), 2)
        assert error <= min(allowed(coefficients), 2e-3)


def integers(*shape: int) -> Tensor:
    return normal(*shape).mul(4).round().float()


def test_small_of_steep_schemes() -> None:
    """Directions of less than 2^-11 of the norm grow as if they were that long; others do not.

    Singular values where a scheme bends, at the inverse of its slope, answer to roundings of R most.
    """
    left, right = (torch.linalg.qr(normal(side, 16, seed=side))[0] for side in (16, 64))
    s = torch.logspace(0, -5, 16, dtype=torch.float64, device=DEVICE)
    matrix = (left * s @ right.mT).half().float()
    for coefficients, shift in ((QUINTIC, 0.0), (2 * QUINTIC, 2.0**-22)):
        (o,) = small([matrix], coefficients, torch.float32)
        error = torch.linalg.matrix_norm(o.double() - iterated(matrix, coefficients, shift=shift), 2)
        assert error <= min(8 * allowed(coefficients), 0.05)


@pytest.mark.parametrize("dtype", INPUTS, ids=["fp32", "bf16", "fp16"])
def test_small_of_extreme_matrices(dtype: torch.dtype) -> None:
    plain = normal(4, 24).half().to(dtype)
    sizes = [2.0**-10, 2.0**12] if dtype == torch.float16 else [2.0**-100, 2.0**100, 2.0**-120, 2.0**125]
    scaled = [plain * size for size in sizes]
    broken = [plain.clone() for _ in range(3)]
    for matrix, value in zip(broken, (math.nan, math.inf, -math.inf), strict=True):
        matrix[3, 23] = value
    zero = torch.zeros_like(plain)
    o = small([plain, zero, zero.mT.contiguous(), *broken, *(b.mT.contiguous() for b in broken), *scaled], CUBIC, dtype)
    assert bool((o[1] == 0).all()) and bool((o[2] == 0).all())
    assert all(bool(each.isnan().all()) for each in o[3:9])
    exact = iterated(plain, CUBIC)
    for each in (o[0], *o[9:]):
        assert bool(((each.double() - exact).abs() <= UNIT[dtype] * exact.abs() + allowed(CUBIC)).all())


def test_small_in_place_and_without_steps() -> None:
    matrix = normal(8, 24).half()
    expected = small([matrix.clone()], CUBIC, torch.float16)[0].clone()
    TritonProducts().small_([matrix], [matrix], CUBIC, 1.0)
    assert torch.equal(matrix, expected)
    (o,) = small([matrix], [], torch.float32)
    assert bool(((o.double() - iterated(matrix, [])).abs() <= 1e-6).all())


def test_tables_are_kept_and_the_longest_unused_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton_schulz, "TABLES", 2)
    products = TritonProducts()
    cpu = torch.device("cpu")
    one, two = products._table(cpu, torch.int64, [1]), products._table(cpu, torch.int64, [2])
    assert products._table(cpu, torch.int64, [1]) is one
    products._table(cpu, torch.int64, [3])
    assert products._table(cpu, torch.int64, [1]) is one and products._table(cpu, torch.int64, [2]) is not two


def test_tiles_are_large_where_there_are_enough() -> None:
    grid = itertools.product((1, 3), (64, 65, 1000, 5000), (64, 5000), (False, True), (False, True))
    for batch, m, n, triangle, wide in grid:
        if triangle and m != n:
            continue
        size, tiles = newton_schulz._tiling(batch, m, n, triangle, wide)
        rows, columns = -(-m // size["TILE"]), -(-n // size["TILE"])
        assert tiles == (rows * (rows + 1) // 2 if triangle else rows * columns)
        assert size["TILE"] == 64 or (batch * tiles >= 100 and min(m, n) > 64 and wide)
