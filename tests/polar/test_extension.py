"""The bindings of the CUDA extension, compiled with a stub for the kernels, and `backends.polar.cuda`; no CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.extension_stub import (
    CSRC,
    STREAM,
    B,
    Cuda,
    K,
    M,
    N,
    Stub,
    half,
    on,
)
from jaguar.backends.polar import cuda as extension

# -- product -----------------------------------------------------------------------------------------------------------


def call_product(stub: Stub, **changes: Any) -> Any:
    """A call with good arguments, but for the changes."""
    words = {"out": half(B, M, N), "a": half(B, M, K), "b": half(B, K, N), "alpha": 1.5, "beta": 0.0, "c": None}
    words |= {"triangle": False, "stream": STREAM} | changes
    words = {name: Cuda(x) if isinstance(x, Tensor) else x for name, x in words.items()}
    stub.module.product(**words)
    assert stub.last.calls == 1
    return stub.product, SimpleNamespace(**words)


def test_a_product_arrives(stub: Stub) -> None:
    c = half(B, M, 32)[..., :N]
    got, given = call_product(stub, a=half(B, M, 48)[..., :K], c=c, beta=-0.25)
    assert (got.batch, got.m, got.n, got.k) == (B, M, N, K)
    assert (got.a, got.a_batch, got.a_row) == (given.a.data_ptr(), 16 * 48, 48)
    assert (got.b, got.b_batch, got.b_row, got.b_transposed) == (given.b.data_ptr(), K * N, N, 0)
    assert (got.c, got.c_batch, got.c_row) == (c.data_ptr(), 16 * 32, 32)
    assert (got.d, got.d_batch, got.d_row, got.d_transposed) == (given.out.data_ptr(), M * N, N, 0)
    assert (got.alpha, got.beta, got.triangle, got.d_format) == (1.5, -0.25, 0, 0)
    assert stub.last.stream == STREAM and stub.last.gil == 0


def test_transposed_views_arrive_as_what_is_stored(stub: Stub) -> None:
    out = torch.zeros((B, N, M), dtype=torch.bfloat16).mT
    got, _ = call_product(stub, b=half(B, N, K).mT, out=out)
    assert (got.b_row, got.b_batch, got.b_transposed) == (K, N * K, 1)
    assert (got.d_row, got.d_batch, got.d_transposed, got.d_format) == (M, N * M, 1, 1)


def test_a_size_of_1_is_read_in_the_way_that_has_padded_rows(stub: Stub) -> None:
    got, _ = call_product(stub, b=half(B, K, 1), out=half(B, M, 1))  # one row each, if transposed
    assert (got.n, got.b_transposed, got.b_row, got.d_transposed, got.d_row) == (1, 1, K, 1, M)
    stub.last.calls = 0
    got, _ = call_product(stub, b=half(B, K, 8)[..., :1], out=half(B, M, 8)[..., :1])
    assert (got.n, got.b_transposed, got.b_row, got.d_transposed, got.d_row) == (1, 0, 8, 0, 8)
    stub.last.calls = 0
    odd = half(B * M * 8).as_strided((B, M, 1), (M * 8, 8, 3))  # the stride of a size of 1 means nothing
    got, _ = call_product(stub, a=odd, b=half(B, 1, N))
    assert (got.k, got.a_row, got.b_row) == (1, 8, N)
    stub.last.calls = 0
    got, _ = call_product(stub, a=half(B, 1, K), out=half(B, N, 1).mT)
    assert (got.m, got.a_row, got.d_transposed, got.d_row) == (1, K, 0, N)
    stub.last.calls = 0
    got, _ = call_product(stub, a=half(1, M, 8)[..., :1], b=half(1, N, 1).mT, out=half(1, M, N))
    assert (got.k, got.a_row, got.b_transposed, got.b_row, got.a_batch, got.b_batch) == (1, 8, 0, N, 8 * M, N)


def test_a_triangle_and_a_sum_in_place_arrive(stub: Stub) -> None:
    out = half(B, M, M)
    got, _ = call_product(stub, b=half(B, M, K).mT, out=out, c=out, beta=1.0, triangle=True)
    assert got.triangle == 1 and got.c == got.d == out.data_ptr() and got.c_row == got.d_row == M


def test_with_beta_0_nothing_of_c_is_read(stub: Stub) -> None:
    assert call_product(stub, c=half(B, M, N))[0].c == 0


both = half(2 * B, M, K)
square = half(B, M, M)
WRONG_PRODUCTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"a": 3}, TypeError, r"a must be a torch.Tensor, not int"),
    "a list": ({"b": [[1.0]]}, TypeError, r"b must be a torch.Tensor, not list"),
    "numpy": ({"c": half(B, M, N).numpy()}, TypeError, r"c must be a torch.Tensor, not numpy.ndarray"),
    "fp32": (
        {"a": torch.zeros(B, M, K)},
        ValueError,
        r"a must be torch.float16; it has shape \(2, 16, 40\), strides \(640, 40, 1\) and dtype torch.float32 on cuda",
    ),
    "bf16 b": ({"b": torch.zeros(B, K, N, dtype=torch.bfloat16)}, ValueError, "b must be torch.float16; .*bfloat16"),
    "integers": ({"b": torch.zeros(B, K, N, dtype=torch.int16)}, ValueError, "b must be torch.float16; .*torch.int16"),
    "fp32 out": ({"out": torch.zeros(B, M, N)}, ValueError, "out must be torch.float16 or torch.bfloat16; .*float32"),
    "bf16 c": ({"c": torch.zeros(B, M, N, dtype=torch.bfloat16)}, ValueError, "c must be torch.float16; .*bfloat16"),
    "on the CPU": ({"a": on("cpu", B, M, K)}, ValueError, "a must be on a CUDA device; .* on cpu"),
    "two devices": ({"b": on("cuda:1", B, K, N)}, ValueError, "b must be on cuda:0, where out is; .* on cuda:1"),
    "a elsewhere": ({"a": on("cuda:1", B, M, K)}, ValueError, "a must be on cuda:0, where out is; .* on cuda:1"),
    "c elsewhere": ({"c": on("cuda:1", B, M, N)}, ValueError, "c must be on cuda:0, where out is; .* on cuda:1"),
    "two dimensions": ({"a": half(M, K)}, ValueError, r"a must have three dimensions, .*; it has shape \(16, 40\)"),
    "empty": ({"a": half(B, 0, K)}, ValueError, "a must not be empty"),
    "inner size": ({"b": half(B, 48, N)}, ValueError, r"b must have shape \(2, 40, 24\) \(a has shape \(2, 16, 40\)\)"),
    "batch": ({"b": half(3, K, N)}, ValueError, r"b must have shape \(2, 40, 24\)"),
    "out size": ({"out": half(B, M, 32)}, ValueError, r"out must have shape \(2, 16, 24\) \(that of a @ b\)"),
    "c size": ({"c": half(B, M, 32)}, ValueError, r"c must have shape \(2, 16, 24\) \(that of out\)"),
    "a transposed": ({"a": half(B, K, M).mT}, ValueError, "a must have stride 1 along its last dimension; "),
    "no stride 1": ({"b": half(B, K, N, 2)[..., 0]}, ValueError, r"b must have stride 1 .*or the one before it"),
    "rows": ({"a": half(B, M, 44)[..., :K]}, ValueError, "a must have rows a multiple of 8 elements apart"),
    "turned rows": ({"b": half(B, N, 44)[..., :K].mT}, ValueError, "b must have rows a multiple of 8 elements apart"),
    "one column": ({"a": half(B, M, 1), "b": half(B, 1, N)}, ValueError, "a must have rows a multiple of 8"),
    "matrices": (
        {"a": torch.as_strided(half(4000), (B, M, K), (M * K + 4, K, 1))},
        ValueError,
        "a must have matrices a multiple of 8 elements apart",
    ),
    "address": ({"a": half(B * M * K + 4)[4:].view(B, M, K)}, ValueError, "a must begin at a multiple of 16 bytes"),
    "expanded": ({"b": half(1, K, N).expand(B, K, N)}, ValueError, "b must not have several elements at one address"),
    "same rows": ({"out": half(B, 1, N).expand(B, M, N)}, ValueError, "out must not have several elements"),
    "a is out": ({"out": square, "a": square, "b": half(B, M, M)}, ValueError, "a lies in the memory of out"),
    "b is out": ({"out": square, "b": square, "a": half(B, M, M)}, ValueError, "b lies in the memory of out"),
    "a in out": ({"out": both[1:3], "a": both[:2], "b": half(B, K, K)}, ValueError, "a lies in the memory of out"),
    "c turned in out": (
        {"out": square.mT, "c": square, "a": half(B, M, K), "b": half(B, K, M)},
        ValueError,
        "c lies in the memory of out",
    ),
    "c shifted in out": (
        {"out": both[1:3], "c": both[:2], "a": half(B, M, M), "b": half(B, M, K), "beta": 1.0},
        ValueError,
        "c lies in the memory of out",
    ),
    "triangle": ({"triangle": True}, ValueError, "out must be square where triangle=True"),
    "turned triangle": (
        {"triangle": True, "out": half(B, M, M + 8).mT[:, :M], "b": half(B, K, M)},
        ValueError,
        "out must have stride 1 along its last dimension where triangle=True",
    ),
    "beta without c": ({"beta": 1.0}, ValueError, "beta=1.0+ needs c, and c is None"),
    "alpha": ({"alpha": float("nan")}, ValueError, "alpha=nan must be a finite fp32 number"),
    "beta": ({"beta": 1e39, "c": half(B, M, N)}, ValueError, "beta=.* must be a finite fp32 number"),
    "stream": ({"stream": "default"}, TypeError, "incompatible function arguments"),
}


@pytest.mark.parametrize("case", WRONG_PRODUCTS)
def test_wrong_arguments_of_a_product_are_named(stub: Stub, case: str) -> None:
    changes, kind, message = WRONG_PRODUCTS[case]
    with pytest.raises(kind, match=message):
        call_product(stub, **changes)
    assert stub.last.calls == 0


# -- prepare -----------------------------------------------------------------------------------------------------------


def call_prepare(stub: Stub, **changes: Any) -> tuple[Any, SimpleNamespace]:
    words: dict[str, Any] = {"matrices": [torch.zeros(M, K), torch.zeros(M, K)], "out": half(B, M, K)}
    words |= {"statistics": torch.zeros(B, 2, 64), "scale": 0.5, "stream": STREAM} | changes
    words = {name: Cuda(x) if isinstance(x, Tensor) else x for name, x in words.items()}
    if isinstance(words["matrices"], list):
        words["matrices"] = [Cuda(x) if isinstance(x, Tensor) else x for x in words["matrices"]]
    stub.module.prepare(**words)
    assert stub.last.calls == 1
    return stub.prepare, SimpleNamespace(**words)


def test_matrices_to_prepare_arrive(stub: Stub) -> None:
    got, given = call_prepare(stub, out=half(B, M, 48)[..., :K])
    assert (got.batch, got.rows, got.cols, got.transposed, got.g_format) == (B, M, K, 0, 2)
    assert list(got.g[:3]) == [given.matrices[0].data_ptr(), given.matrices[1].data_ptr(), 0]
    assert (got.x, got.x_batch, got.x_row) == (given.out.data_ptr(), M * 48, 48)
    assert got.statistics == given.statistics.data_ptr() and got.scale == 0.5
    assert stub.last.stream == STREAM and stub.last.gil == 0


@pytest.mark.parametrize("dtype, code", [(torch.float16, 0), (torch.bfloat16, 1)])
def test_transposed_matrices_to_prepare_arrive(stub: Stub, dtype: torch.dtype, code: int) -> None:
    got, _ = call_prepare(stub, matrices=[torch.zeros(K, M, dtype=dtype), torch.zeros(K, M, dtype=dtype)])
    assert (got.rows, got.cols, got.transposed, got.g_format) == (M, K, 1, code)


def test_as_many_matrices_as_the_abi_holds(stub: Stub) -> None:
    words = {"matrices": [half(8, 8)] * 64, "out": half(64, 8, 8), "statistics": torch.zeros(64, 2, 64)}
    assert list(call_prepare(stub, **words)[0].g) == [words["matrices"][0].data_ptr()] * 64


pair, base = torch.zeros(M, K), torch.zeros(1024)
WRONG_PREPARES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no list": ({"matrices": pair}, TypeError, "incompatible function arguments"),
    "no tensor": ({"matrices": [pair, None]}, TypeError, r"matrices\[1\] must be a torch.Tensor, not NoneType"),
    "none": ({"matrices": []}, ValueError, "matrices: 1 to 64 go into one call, not 0"),
    "65": ({"matrices": [half(8, 8)] * 65, "out": half(65, 8, 8)}, ValueError, "1 to 64 go into one call, not 65"),
    "count": ({"matrices": [pair]}, ValueError, r"out must have shape \(1, 16, 40\) \(one matrix for each"),
    "fp64": ({"matrices": [pair.double()] * 2}, ValueError, r"matrices\[0\] must be .*float32; .*torch.float64"),
    "dtypes": ({"matrices": [pair, pair.half()]}, ValueError, r"matrices\[1\] must be torch.float32, as matrices\[0\]"),
    "shapes": ({"matrices": [pair, pair.mT]}, ValueError, r"matrices\[1\] must have shape \(16, 40\)"),
    "shape": ({"matrices": [torch.zeros(M, 8)] * 2}, ValueError, r"must have shape \(16, 40\) or \(40, 16\)"),
    "strided": ({"matrices": [torch.zeros(K, M).mT] * 2}, ValueError, r"matrices\[0\] must be contiguous"),
    "on the CPU": ({"matrices": [Cuda(pair, "cpu")] * 2}, ValueError, r"matrices\[0\] must be on a CUDA device"),
    "two devices": ({"matrices": [pair, Cuda(pair, "cuda:1")]}, ValueError, r"matrices\[1\] must be on cuda:0"),
    "bf16 out": ({"out": torch.zeros(B, M, K).bfloat16()}, ValueError, "out must be torch.float16"),
    "turned out": ({"out": half(B, K, M).mT}, ValueError, "out must have stride 1 along its last dimension; "),
    "rows of out": ({"out": half(B, M, 44)[..., :K]}, ValueError, "out must have rows a multiple of 8"),
    "statistics": ({"statistics": torch.zeros(255)}, ValueError, r"statistics must be contiguous, .*\(2, 2, 64\)"),
    "half statistics": ({"statistics": half(B, 2, 64)}, ValueError, "statistics must be torch.float32"),
    "statistics elsewhere": (
        {"statistics": Cuda(torch.zeros(256), "cuda:1")},
        ValueError,
        "statistics must be on cuda:0, where out is",
    ),
    "unaligned statistics": ({"statistics": torch.zeros(300)[1:]}, ValueError, "statistics must begin at a multiple"),
    "in place": (
        {"matrices": [both[0], both[1]], "out": both[:2]},
        ValueError,
        r"matrices\[0\] lies in the memory of out",
    ),
    "address": (
        {"matrices": [pair, torch.zeros(1 + M * K)[1:].view(M, K)]},
        ValueError,
        r"matrices\[1\] must begin at a multiple of 16 bytes",
    ),
    "statistics in out": (
        {"out": base.view(torch.float16)[: B * M * K].view(B, M, K), "statistics": base[512:]},
        ValueError,
        "statistics lies in the memory of out",
    ),
    "statistics in a matrix": (
        {"matrices": [pair, base[: M * K].view(M, K)], "statistics": base[512:]},
        ValueError,
        r"matrices\[1\] lies in the memory of statistics",
    ),
    "scale": ({"scale": float("inf")}, ValueError, "scale=inf must be a finite"),
}


@pytest.mark.parametrize("case", WRONG_PREPARES)
def test_wrong_arguments_of_prepare_are_named(stub: Stub, case: str) -> None:
    changes, kind, message = WRONG_PREPARES[case]
    with pytest.raises(kind, match=message):
        call_prepare(stub, **changes)
    assert stub.last.calls == 0


# -- small -------------------------------------------------------------------------------------------------------------


def call_small(stub: Stub, **changes: Any) -> tuple[Any, Cuda]:
    words: dict[str, Any] = {"items": torch.zeros((3, 6), dtype=torch.int64), "largest": 64, "g_format": "bf16"}
    words |= {"o_format": "fp32", "coefficients": [(1.5, -0.5, 0.0), (2.0, -1.5, 0.5)], "scale": 2.0, "stream": STREAM}
    words |= {"ridge": 0.25} | changes
    words = {name: Cuda(x) if isinstance(x, Tensor) else x for name, x in words.items()}
    stub.module.small(**words)
    assert stub.last.calls == 1
    return stub.small, words["items"]


def test_a_table_of_small_matrices_arrives(stub: Stub) -> None:
    got, items = call_small(stub)
    assert (got.items, got.count, got.largest) == (items.data_ptr(), 3, 64)
    assert (got.g_format, got.o_format, got.steps, got.scale, got.ridge) == (1, 2, 2, 2.0, 0.25)
    assert (list(got.a[:3]), list(got.b[:3]), list(got.c[:3])) == ([1.5, 2, 0], [-0.5, -1.5, 0], [0, 0.5, 0])
    assert stub.last.stream == STREAM and stub.last.gil == 0


WRONG_SMALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"items": [(1, 2, 3, 4, 5, 6)]}, TypeError, "items must be a torch.Tensor, not list"),
    "int32": ({"items": torch.zeros(3, 6, dtype=torch.int32)}, ValueError, "items must be torch.int64"),
    "columns": ({"items": torch.zeros(3, 5, dtype=torch.int64)}, ValueError, r"must be .*shape \(count, 6\)"),
    "strided": ({"items": torch.zeros(6, 3, dtype=torch.int64).mT}, ValueError, "items must be contiguous"),
    "empty": ({"items": torch.zeros(0, 6, dtype=torch.int64)}, ValueError, "items must not be empty"),
    "on the CPU": ({"items": Cuda(torch.zeros(3, 6).long(), "cpu")}, ValueError, "items must be on a CUDA device"),
    "address": ({"items": torch.zeros(19).long()[1:].view(3, 6)}, ValueError, "items must begin at a multiple of 16"),
    "65": ({"largest": 65}, ValueError, "largest=65 must be 1 to 64"),
    "0": ({"largest": 0}, ValueError, "largest=0 must be 1 to 64"),
    "g_format": ({"g_format": "fp64"}, ValueError, "g_format='fp64' must be 'fp16', 'bf16' or 'fp32'"),
    "o_format": ({"o_format": ""}, ValueError, "o_format='' must be"),
    "no steps": ({"coefficients": []}, ValueError, "coefficients: 1 to 32 steps are possible, not 0"),
    "33 steps": ({"coefficients": [(1.0, 0.0, 0.0)] * 33}, ValueError, "1 to 32 steps are possible, not 33"),
    "pairs": ({"coefficients": [(1.0, 2.0)]}, TypeError, "incompatible function arguments"),
    "nan": ({"coefficients": [(1.0, float("nan"), 0.0)]}, ValueError, "coefficients=nan must be"),
    "scale": ({"scale": float("inf")}, ValueError, "scale=inf must be"),
    "ridge": ({"ridge": float("nan")}, ValueError, "ridge=nan must be"),
}


@pytest.mark.parametrize("case", WRONG_SMALLS)
def test_wrong_arguments_of_small_are_named(stub: Stub, case: str) -> None:
    changes, kind, message = WRONG_SMALLS[case]
    with pytest.raises(kind, match=message):
        call_small(stub, **changes)
    assert stub.last.calls == 0


@pytest.mark.parametrize("call", [call_product, call_prepare, call_small], ids=lambda call: call.__name__)
def test_a_launch_that_fails_raises_with_the_reason(stub: Stub, call: Callable[..., Any]) -> None:
    stub.last.code = -3
    with pytest.raises(RuntimeError, match=rf"^{call.__name__.removeprefix('call_')}: no kernel for this \(-3\)$"):
        call(stub)


def test_versions(stub: Stub) -> None:
    assert stub.module.abi_version() == extension.ABI
    assert f"JAGUAR_ABI_VERSION {extension.ABI}\n" in (CSRC / "newton_schulz.h").read_text()
    assert stub.module.cuda_version() == "unknown" and stub.module.driver_version() == 13010


# -- jaguar.backends.polar.cuda ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    extension._load.cache_clear()
    yield
    extension._load.cache_clear()
