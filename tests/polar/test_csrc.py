"""The CUDA sources of csrc/ on an emulated GPU, against numpy in float64; and what nvcc makes of them."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from helpers.csrc_emulator.calls import check_prepared, check_small, newton_schulz, prepare, product, small
from helpers.csrc_emulator.harness import (
    AMPERE,
    BAD_ALIGNMENT,
    BAD_SHAPE,
    BF16,
    FORMATS,
    FP16,
    FP32,
    HOPPER,
    LATE_COPIES,
    LATE_PRODUCTS,
    NO_KERNEL,
    ONE_SM,
    ROOT,
    TURING,
    Operand,
    Padded,
    PrepareArgs,
    ProductArgs,
    SmallArgs,
    build,
    encode,
)

CUBIC = [(1.5, -0.5, 0.0)] * 10
QUINTIC = [(3.4445, -4.775, 2.0315)] * 5
DEVICES = pytest.mark.parametrize("device", [AMPERE, HOPPER, ONE_SM], ids=["sm_80", "sm_90", "sm_90 wide"])
ORDERS = pytest.mark.parametrize("order", [LATE_PRODUCTS, LATE_COPIES], ids=["late products", "late copies"])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("skipped: no g++ to compile the kernels for the emulator")
    return build(tmp_path_factory.mktemp("emulator"))


# ---- tiles -----------------------------------------------------------------------------------------------------------


def tiles(library: ctypes.CDLL, first: int, count: int, rows: int, columns: int, triangle: bool) -> np.ndarray:
    out = np.empty((count, 3), np.int32)
    library.tiles_list(first, count, rows, columns, triangle, out.ctypes.data)
    return out


@pytest.mark.parametrize("triangle", [True, False])
def test_every_tile_comes_exactly_once(library: ctypes.CDLL, triangle: bool) -> None:
    for rows in range(1, 65):
        for batch, columns in ((1, rows), (3, rows), (2, rows if triangle else 65 - rows)):
            count = library.tiles_count(batch, rows, columns, triangle)
            found = tiles(library, 0, count, rows, columns, triangle)
            every = [
                (b, i, j) for b in range(batch) for i in range(rows) for j in range(i + 1 if triangle else columns)
            ]
            assert sorted(map(tuple, found.tolist())) == every


def test_the_last_tiles_of_the_largest_grids(library: ctypes.CDLL) -> None:
    rows = 65535
    count = library.tiles_count(1, rows, rows, True)
    assert count == rows * (rows + 1) // 2 < 2**31
    assert tiles(library, count - 1, 1, rows, rows, True).tolist() == [[0, rows - 1, rows - 1]]
    assert tiles(library, 2**31 - 2, 1, 1, 2**23, False).tolist() == [[255, 0, 2**23 - 2]]
    assert library.tiles_count(2**30, 2**23, 2**23, False) > 2**31  # too many for 64 bits: still too many


def test_wide_tiles_where_they_fill_the_waves(library: ctypes.CDLL) -> None:
    assert library.tiles_wide(1, 8192, 8192, 132)
    assert not library.tiles_wide(1, 4096, 128, 132)


# ---- product ---------------------------------------------------------------------------------------------------------


@DEVICES
@ORDERS
@pytest.mark.parametrize("b_transposed", [True, False])
def test_product_in_every_mode(library: ctypes.CDLL, device: int, order: int, b_transposed: bool) -> None:
    library.emulator_use(device, order)
    n, batch = (200, 2) if device == ONE_SM else (72, 1)
    assert device != ONE_SM or library.tiles_wide(batch, 65, n, 1)
    for c in ("none", "given", "alias"):
        for d_format in (FP16,) if c == "alias" else (FP16, BF16):
            for d_transposed in (False,) if c == "alias" else (False, True):
                product(
                    library,
                    *(65, n, 40),
                    batch=batch,
                    b_transposed=b_transposed,
                    c=c,
                    d_transposed=d_transposed,
                    d_format=d_format,
                )


SIZES = [
    (1, 1, 1),
    (7, 8, 65),
    (8, 257, 7),
    (130, 1, 200),
    (1, 130, 8),
    (200, 65, 130),
    (64, 128, 64),
    (129, 257, 70),
    (65, 190, 100),
    (257, 8, 40),
    (130, 72, 24),
    (70, 200, 190),
]


@DEVICES
@pytest.mark.parametrize("b_transposed", [True, False])
def test_product_at_ragged_sizes(library: ctypes.CDLL, device: int, b_transposed: bool) -> None:
    for i, (m, n, k) in enumerate(SIZES):
        library.emulator_use(device, i % 2)
        batch = 3 if m * n * k < 100_000 else 1
        product(library, m, n, k, batch=batch, b_transposed=b_transposed, c="given")
        product(library, m, n, k, batch=batch, b_transposed=b_transposed, d_transposed=True)


@DEVICES
@ORDERS
def test_product_of_a_triangle_is_symmetric(library: ctypes.CDLL, device: int, order: int) -> None:
    library.emulator_use(device, order)
    for n, k, batch, c in ((1, 3, 3, "given"), (65, 40, 2, "alias"), (130, 72, 1, "given"), (200, 33, 1, "none")):
        for b_transposed in (True, False):
            d = product(library, n, n, k, batch=batch, triangle=True, c=c, b_transposed=b_transposed)
            assert (d.view(np.uint16) == d.view(np.uint16).transpose(0, 2, 1)).all()


@DEVICES
def test_product_goes_round_its_ring_of_stages(library: ctypes.CDLL, device: int) -> None:
    for order in (LATE_PRODUCTS, LATE_COPIES):
        library.emulator_use(device, order)
        for b_transposed in (True, False):
            product(library, 16, 16, 600, batch=5, b_transposed=b_transposed)


@pytest.mark.slow
@DEVICES
@ORDERS
@pytest.mark.parametrize("b_transposed", [True, False])
def test_larger_products(library: ctypes.CDLL, device: int, order: int, b_transposed: bool) -> None:
    library.emulator_use(device, order)
    product(library, 300, 700, 520, batch=2, b_transposed=b_transposed, c="alias")
    product(library, 1100, 1100, 130, b_transposed=b_transposed, c="given", triangle=True)


def test_one_operand_for_the_whole_batch(library: ctypes.CDLL) -> None:
    rng = np.random.default_rng(0)
    a, b = encode(rng.standard_normal((3, 24, 40)), FP16), encode(rng.standard_normal((1, 16, 40)), FP16)
    for device in (AMPERE, HOPPER):
        library.emulator_use(device, LATE_COPIES)
        stored_a, stored_b, d = Operand(a), Operand(b), Padded(3, 24, 16, np.float16)
        args = ProductArgs(3, 24, 16, 40, stored_a.address, stored_a.batch, stored_a.row, stored_b.address, 0, 48, 1)
        args.d, args.d_batch, args.d_row, args.alpha = d.address, d.batch, d.row, 1.0
        assert library.jaguar_product(args, 0) == 0
        np.testing.assert_allclose(d.view, a.astype(np.float64) @ b[0].T.astype(np.float64), rtol=1e-3, atol=1e-4)


def test_c_times_zero_is_not_read(library: ctypes.CDLL) -> None:
    for device in (AMPERE, HOPPER):
        library.emulator_use(device, LATE_PRODUCTS)
        a, c = Operand(np.ones((1, 8, 8), np.float16)), Operand(np.full((1, 8, 8), np.nan, np.float16))
        d = Padded(1, 8, 8, np.float16)
        args = ProductArgs(1, 8, 8, 8, a.address, a.batch, a.row, a.address, a.batch, a.row, 1, c.address, 0, c.row)
        args.d, args.d_row, args.alpha, args.beta = d.address, d.row, 1.0, 0.0
        assert library.jaguar_product(args, 0) == 0
        assert (d.view == 8).all()


def test_product_refusals(library: ctypes.CDLL) -> None:
    library.emulator_use(AMPERE, LATE_PRODUCTS)
    memory = np.zeros(4096, np.uint16)
    base = memory.ctypes.data + -memory.ctypes.data % 16

    def code(**changes: object) -> int:
        args = ProductArgs(
            1, 8, 8, 8, base, 64, 8, base, 64, 8, 1, base + 512, 64, 8, base + 1024, 64, 8, 0, FP16, 1, 1
        )
        for name, value in changes.items():
            setattr(args, name, value)
        return library.jaguar_product(args, 0)

    assert code() == 0
    for changes in ({"m": 0}, {"k": -1}, {"d": 0}, {"d_format": FP32}, {"triangle": 1, "m": 7}, {"n": 2**30 + 1}):
        assert code(**changes) == BAD_SHAPE
    assert code(triangle=1, d_transposed=1) == BAD_SHAPE
    assert code(d_transposed=1, c=base + 1024) == BAD_SHAPE
    for changes in ({"a": base + 2}, {"b_row": 12}, {"c": base + 8}, {"d_batch": 4}):
        assert code(**changes) == BAD_ALIGNMENT
    library.emulator_use(TURING, LATE_PRODUCTS)
    assert code() == NO_KERNEL
    for refused in (BAD_SHAPE, BAD_ALIGNMENT, NO_KERNEL):
        assert b"must" in library.jaguar_error(refused)


# ---- prepare ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", list(FORMATS.values()), ids=list(FORMATS))
def test_prepare_scales_and_converts(library: ctypes.CDLL, kind: int, transposed: bool) -> None:
    rng = np.random.default_rng(kind)
    library.emulator_use(AMPERE, LATE_PRODUCTS)
    for shape, batch in (((1, 1), 2), ((7, 65), 2), ((65, 130), 1), ((64, 72), 3), ((3, 1000), 1)):
        matrices = [rng.standard_normal(shape) for _ in range(batch)]
        x = prepare(library, matrices, kind, transposed, 0.98)
        for found, g in zip(x, matrices, strict=True):
            check_prepared(found, g, kind, transposed, 0.98)


@pytest.mark.parametrize("kind", list(FORMATS.values()), ids=list(FORMATS))
def test_prepare_takes_each_matrix_as_it_is(library: ctypes.CDLL, kind: int) -> None:
    rng = np.random.default_rng(7)
    library.emulator_use(AMPERE, LATE_PRODUCTS)
    tiny, huge = (1e-6, 1e4) if kind == FP16 else (1e-30, 1e30)
    normal = rng.standard_normal((9, 70))
    matrices = [normal, normal * 0, normal * tiny, normal * huge, normal.copy(), normal.copy(), normal.copy()]
    if kind == FP32:
        matrices += [normal * 1e-42, np.full((9, 70), 1e-45), np.full((9, 70), 3.4e38)]
    matrices[4][8, 69], matrices[5][0, 0], matrices[6][4, 33] = np.nan, np.inf, -np.inf
    x = prepare(library, matrices, kind, False, 1.0)
    assert (x[1] == 0).all()
    for found, g in zip(x, matrices, strict=True):
        check_prepared(found, g, kind, False, 1.0)


def test_prepare_is_deterministic_and_refuses(library: ctypes.CDLL) -> None:
    g = np.random.default_rng(3).standard_normal((33, 47))
    results = []
    for order in (LATE_PRODUCTS, LATE_COPIES):
        library.emulator_use(HOPPER, order)
        results.append(prepare(library, [g], FP32, True, 1.0).tobytes())
    assert results[0] == results[1]
    args = PrepareArgs(0, 8, 8, 0, FP32)
    assert library.jaguar_prepare(args, 0) == BAD_SHAPE
    args.batch, args.x, args.x_row, args.statistics = 1, 64, 8, 64
    args.g[0] = 8
    assert library.jaguar_prepare(args, 0) == BAD_ALIGNMENT


# ---- small -----------------------------------------------------------------------------------------------------------


SHORT = [1, 2, 8, 16, 17, 33, 64]


@pytest.mark.parametrize("coefficients", [CUBIC, QUINTIC], ids=["cubic", "quintic"])
@pytest.mark.parametrize("flipped", [False, True], ids=["m contiguous", "n contiguous"])
def test_small_against_float64(library: ctypes.CDLL, coefficients: list, flipped: bool) -> None:
    library.emulator_use(AMPERE, LATE_PRODUCTS)
    rng = np.random.default_rng(5)
    for i, n in enumerate(SHORT):
        g = rng.standard_normal((n, [70, 129, 300][i % 3]))
        kind, o_kind = i % 3, (i + 1) % 3
        (o,) = small(library, [g], coefficients, kind, o_kind, [flipped])
        check_small(o, g, coefficients, kind, o_kind)


@pytest.mark.parametrize("kind", list(FORMATS.values()), ids=list(FORMATS))
def test_small_takes_each_matrix_of_a_table_as_it_is(library: ctypes.CDLL, kind: int) -> None:
    rng = np.random.default_rng(6)
    library.emulator_use(HOPPER, LATE_COPIES)
    tiny, huge = (1e-6, 1e4) if kind == FP16 else (1e-30, 1e30)
    matrices = [rng.standard_normal(shape) for shape in ((4, 40), (13, 13), (1, 1), (5, 9), (7, 30), (16, 21), (2, 50))]
    matrices[1] *= tiny
    matrices[3] *= 0
    matrices[4][6, 29] = np.nan
    matrices[5][0, 0] = np.inf
    matrices[6] *= huge
    flips = [i % 2 == 1 for i in range(len(matrices))]
    for o_kind in FORMATS.values():
        results = small(library, matrices, CUBIC, kind, o_kind, flips)
        assert (results[3] == 0).all()
        assert np.isnan(results[4]).all()
        assert np.isnan(results[5]).all()
        for i in (0, 1, 2, 6):
            check_small(results[i], matrices[i], CUBIC, kind, o_kind)


@pytest.mark.parametrize("flipped", [False, True], ids=["m contiguous", "n contiguous"])
def test_small_streams_long_matrices(library: ctypes.CDLL, flipped: bool) -> None:
    rng = np.random.default_rng(8)
    library.emulator_use(HOPPER, LATE_PRODUCTS)
    for n, m in ((3, 2500), (20, 1030), (64, 520)):
        g = rng.standard_normal((n, m))
        (o,) = small(library, [g], CUBIC[:3], BF16, FP32, [flipped])
        check_small(o, g, CUBIC[:3], BF16, FP32)


@pytest.mark.parametrize("flipped", [False, True], ids=["m contiguous", "n contiguous"])
def test_small_takes_any_address_and_stride(library: ctypes.CDLL, flipped: bool) -> None:
    rng = np.random.default_rng(10)
    library.emulator_use(AMPERE, LATE_PRODUCTS)
    for kind in FORMATS.values():
        matrices = [rng.standard_normal(shape) for shape in ((5, 33), (13, 21), (1, 9))]
        results = small(library, matrices, CUBIC[:4], kind, kind, [flipped] * 3, dense=True)
        for o, g in zip(results, matrices, strict=True):
            check_small(o, g, CUBIC[:4], kind, kind)


def test_small_keeps_the_precision_of_q_beside_padding(library: ctypes.CDLL) -> None:
    """Ten quintic steps: Q's padded diagonal would be 2.4e5, and fp16 ends at 65504."""
    library.emulator_use(AMPERE, LATE_PRODUCTS)
    g = np.random.default_rng(9).standard_normal((3, 200))
    (o,) = small(library, [g], QUINTIC * 2, FP32, FP32, [False])
    check_small(o, g, QUINTIC * 2, FP32, FP32)


@pytest.mark.parametrize("rank", [1, 3])
def test_eigenvalues_of_zero_do_not_run_away(library: ctypes.CDLL, rank: int) -> None:
    """Rounding puts them below 0, where ten quintic steps blow them up: 1e2 without the ridge."""
    library.emulator_use(AMPERE, LATE_PRODUCTS)
    generator = np.random.default_rng(0)
    g = generator.integers(-4, 5, (16, rank)) @ generator.integers(-4, 5, (rank, 70)).astype(np.float64)
    (o,) = small(library, [g], QUINTIC * 2, FP32, FP32, [False])
    left, s, right = np.linalg.svd(g, full_matrices=False)
    kept = left[:, :rank] @ np.diag(s[:rank]) @ right[:rank]
    assert np.linalg.norm(o - newton_schulz(kept, QUINTIC * 2), 2) < 0.02


def test_small_refusals(library: ctypes.CDLL) -> None:
    library.emulator_use(AMPERE, LATE_PRODUCTS)
    for changes, code in (
        ({"count": 0}, BAD_SHAPE),
        ({"steps": 33}, BAD_SHAPE),
        ({"o_format": 3}, BAD_SHAPE),
        ({"largest": 65}, NO_KERNEL),
    ):
        args = SmallArgs(64, 1, 8, FP32, FP32, 5)
        for name, value in changes.items():
            setattr(args, name, value)
        assert library.jaguar_small(args, 0) == code


# ---- nvcc ------------------------------------------------------------------------------------------------------------


def compile_with_nvcc(source: Path, folder: Path) -> str:
    hopper = ["-gencode", "arch=compute_90a,code=sm_90a"]
    both = ["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=sm_90"]
    arch = hopper if source.stem.endswith("_sm90a") else both
    words = [
        "nvcc",
        "-O3",
        "-std=c++17",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        "-Xptxas=-v",
        *arch,
        "-c",
        str(source),
    ]
    done = subprocess.run([*words, "-o", str(folder / f"{source.stem}.o")], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_nvcc_compiles_without_spills(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("skipped: no nvcc to compile the kernels for sm_80 and sm_90a")
    sources = sorted((ROOT / "csrc").glob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        logs = list(pool.map(lambda source: compile_with_nvcc(source, tmp_path), sources))
    spills = [int(number) for log in logs for number in re.findall(r"(\d+) bytes spill", log)]
    assert len(spills) >= 2 * 20  # stores and loads of every kernel and architecture
    assert not any(spills)
    assert not any("warning" in log.lower() or "C7510" in log for log in logs)
    words = ["nvcc", "-shared", "-cudart", "static", "-o", str(tmp_path / "libjaguar.so")]
    subprocess.run([*words, *map(str, tmp_path.glob("*.o"))], check=True, timeout=600)
    linked = ctypes.CDLL(str(tmp_path / "libjaguar.so"))
    assert linked.jaguar_abi_version() == 2
    assert linked.jaguar_driver_version() >= 0
    for name in ("product", "prepare", "small", "error"):
        assert hasattr(linked, f"jaguar_{name}")
