"""`jaguar.backends.polar.cuda` on bindings with a stub in place of the kernels; no CUDA."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import jaguar
from helpers.extension_stub import (
    STREAM,
    B,
    Cuda,
    Stub,
    half,
    on,
)
from jaguar.backends import uploads
from jaguar.backends.polar import cuda as extension
from jaguar.backends.polar import schedule as iteration
from jaguar.method.schemes import SCHEMES


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    extension._load.cache_clear()
    yield
    extension._load.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    monkeypatch.setitem(sys.modules, "jaguar._cuda", module)


def pretend(monkeypatch: pytest.MonkeyPatch, abi: int = extension.ABI, cuda: str = "13.0") -> None:
    """A module, and a GPU that can run it."""
    module = ModuleType("jaguar._cuda")
    module.__spec__ = importlib.machinery.ModuleSpec("jaguar._cuda", None)
    module.abi_version, module.cuda_version, module.driver_version = lambda: abi, lambda: cuda, lambda: 13000
    install(monkeypatch, module)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(7, 5), (9, 0)][i])


def test_with_a_gpu_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert extension.missing() is None


def test_without_a_build_the_note_of_the_installation_is_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(jaguar, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "jaguar._cuda", raising=False)
    monkeypatch.setattr(extension, "_NOTE", tmp_path / "note.txt")
    assert extension.missing() == (
        "the CUDA extension was not built: this copy of jaguar was not installed by pip, which builds the extension"
    )
    extension._load.cache_clear()
    (tmp_path / "note.txt").write_text("CUDA extension not built (no nvcc)\n")
    assert extension.note() == "CUDA extension not built (no nvcc)"
    assert extension.missing() == "the CUDA extension was not built: CUDA extension not built (no nvcc)"
    with pytest.raises(ImportError, match="was not built"):
        extension.CudaProducts()


def test_an_extension_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_cuda.so").write_text("no library")
    monkeypatch.setattr(jaguar, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "jaguar._cuda", raising=False)
    importlib.invalidate_caches()
    assert str(extension.missing()).startswith("the CUDA extension does not load: ")
    assert "_cuda.so" in str(extension.missing())


def test_an_extension_of_another_version_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, abi=extension.ABI + 1)
    assert "is of another version of jaguar" in str(extension.missing())


def test_gpus_that_cannot_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (7, 5))
    assert extension.missing() == "the CUDA extension needs compute capability 8.0, and the GPU here has 7.5"
    pretend(monkeypatch, cuda="14.1")
    extension._load.cache_clear()
    assert extension.missing() == "the CUDA extension was built with CUDA 14.1, and the driver here knows 13 at most"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert extension.missing() == "there is no NVIDIA GPU that this torch can use"
    pretend(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)  # torch for AMD: it too says that CUDA is available
    assert extension.missing() == "there is no NVIDIA GPU that this torch can use"


@pytest.fixture
def products(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> extension.CudaProducts:
    install(monkeypatch, stub.module)
    inside: list[torch.device] = []

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        inside.append(wanted)
        try:
            yield
        finally:
            inside.pop()

    def current_stream(wanted: torch.device) -> SimpleNamespace:
        assert inside == [wanted]
        return SimpleNamespace(cuda_stream=STREAM)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return extension.CudaProducts()


def test_products_go_to_the_current_stream_of_their_device(stub: Stub, products: extension.CudaProducts) -> None:
    a, b, c, out = (on("cuda:3", B, 16, 16) for _ in range(4))
    products.product(out, a, b, alpha=2.0)
    assert (stub.product.alpha, stub.product.beta, stub.product.c, stub.product.triangle) == (2.0, 0.0, 0, 0)
    products.product(out, a, b, alpha=2.0, beta=3.0, c=c, triangle=True)
    assert (stub.product.beta, stub.product.c, stub.product.triangle) == (3.0, c.data_ptr(), 1)
    products.prepare((on("cuda:3", 16, 16),) * 2, out, Cuda(torch.zeros(256), "cuda:3"), 0.5)
    assert (stub.prepare.batch, stub.prepare.scale) == (2, 0.5)
    assert stub.last.calls == 3 and stub.last.stream == STREAM


def test_matrices_that_begin_anywhere_are_copied(
    stub: Stub, products: extension.CudaProducts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "Tensor", Cuda)
    monkeypatch.setattr(Cuda, "clone", lambda self: Cuda(self.tensor.clone()), raising=False)
    good, odd = Cuda(torch.zeros(16, 16)), Cuda(torch.zeros(257)[1:].view(16, 16))
    products.prepare([good, odd], Cuda(half(2, 16, 16)), Cuda(torch.zeros(256)), 1.0)
    first, second = stub.prepare.g[:2]
    assert first == good.data_ptr() and second != odd.data_ptr() and second % 16 == 0


def test_small_matrices_become_a_table_that_is_copied_once(
    stub: Stub, products: extension.CudaProducts, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[list[tuple[int, ...]]] = []
    real = extension._uploaded

    def uploaded(items: tuple[tuple[int, ...], ...], device: torch.device) -> Cuda:
        copied.append(list(items))
        return Cuda(torch.tensor(items), str(device))

    monkeypatch.setattr(extension, "_uploaded", uploaded)
    shapes = [(8, 100), (100, 16), (1, 5), (5, 1), (1, 1), (12, 12)]
    matrices = [Cuda(torch.zeros(shape, dtype=torch.bfloat16)) for shape in shapes]
    matrices.append(Cuda(torch.zeros(70, 9, dtype=torch.bfloat16).mT))
    outs = [Cuda(torch.zeros_like(g.tensor, dtype=torch.float32)) for g in matrices]
    products.small_(matrices, outs, [(1.5, -0.5, 0.0)], 1.0)
    sizes = [(8, 100, 100, 1), (16, 100, 1, 16), (1, 5, 5, 1), (1, 5, 5, 1), (1, 1, 2, 1), (12, 12, 12, 1)]
    sizes.append((9, 70, 1, 9))
    rows = [(g.data_ptr(), o.data_ptr(), *s) for g, o, s in zip(matrices, outs, sizes, strict=True)]
    assert copied == [[rows[i] for i in (1, 0, 6, 5, 2, 3, 4)]]  # the largest first
    got = stub.small
    assert (got.count, got.largest, got.g_format, got.o_format, got.steps) == (7, 16, 1, 2, 1)
    products.small_(matrices, outs, [(2.0, 0.0, 0.0)] * 3, 1.0)
    assert len(copied) == 1 and stub.small.steps == 3 and stub.small.items == got.items
    products.small_(matrices[:2], outs[:2], [(2.0, 0.0, 0.0)], 1.0)
    assert len(copied) == 2 and stub.small.count == 2
    monkeypatch.setattr(extension, "_KEPT", 8)
    for i in range(20):
        products.small_([Cuda(half(8, 8 + i))], [Cuda(half(8, 8 + i))], [(2.0, 0.0, 0.0)], 1.0)
    assert len(products._tables) == extension._KEPT
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured"), monkeypatch.context() as patch:
        patch.setattr(extension, "_uploaded", real)
        products.small_(matrices, outs, [(2.0, 0.0, 0.0)], 1.0)
    monkeypatch.setattr(uploads, "_FOR_REPLAYS", {})
    last = [Cuda(half(8, 27))], [Cuda(half(8, 27))]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    products.small_(*last, [(2.0, 0.0, 0.0)], 1.0)
    assert not uploads._FOR_REPLAYS
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    products.small_(*last, [(2.0, 0.0, 0.0)], 1.0)
    (kept,) = uploads._FOR_REPLAYS.values()
    assert kept is next(reversed(products._tables.values()))


class OnGpu:
    """CudaProducts for CPU tensors."""

    small = extension.CudaProducts.small

    def __init__(self, products: extension.CudaProducts) -> None:
        self._products = products

    def __getattr__(self, name: str) -> Callable[..., None]:
        def wrapped(x: Any) -> Any:
            if isinstance(x, list | tuple):
                return [wrapped(item) for item in x]
            return Cuda(x) if isinstance(x, Tensor) else x

        def call(*words: Any, **more: Any) -> None:
            getattr(self._products, name)(*map(wrapped, words), **{key: wrapped(x) for key, x in more.items()})

        return call


@pytest.mark.parametrize("scheme", ["cubic", "quintic", "polar_express"])
@pytest.mark.parametrize("shape", [(65, 65), (80, 400), (401, 67), (130, 131), (64, 3), (1, 1)], ids=str)
def test_the_schedule_asks_only_for_what_the_bindings_take(
    stub: Stub,
    products: extension.CudaProducts,
    shape: tuple[int, int],
    scheme: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extension, "_uploaded", lambda items, device: Cuda(torch.tensor(items)))
    task = iteration.Task(SCHEMES[scheme], SCHEMES[scheme].steps, 132)
    matrices = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(3)]
    found = list(iteration.orthogonalise(OnGpu(products), matrices, task))
    assert sum(len(members) for members, _ in found) == 3
    assert stub.last.calls >= 1 if min(shape) <= 64 else stub.last.calls > task.steps


WRONG_LISTS = {
    "lengths": ([half(8, 8)], [], "1 matrices and 0 outs"),
    "none": ([], [], "0 matrices and 0 outs"),
    "large": ([half(65, 80)], [half(65, 80)], r"matrices\[0\] has shape \(65, 80\): the short side must be 1 to 64"),
    "empty": ([half(0, 8)], [half(0, 8)], "the short side must be 1 to 64"),
    "shapes": ([half(8, 9)], [half(9, 8)], r"matrices\[0\] and outs\[0\] must be matrices of one shape"),
    "sizes": ([half(8, 9)], [half(7, 9)], r"matrices\[0\] and outs\[0\] must be matrices of one shape"),
    "strides": ([half(8, 9)], [half(9, 8).mT], r"with the same strides, not \(8, 9\) with \(9, 1\)"),
    "dimensions": ([half(2, 8, 9)], [half(2, 8, 9)], "must be matrices"),
    "no stride 1": ([half(8, 9, 2)[..., 0]], [half(8, 9, 2)[..., 0]], "exactly one of them must be 1"),
    "dtypes": ([half(8, 9), half(8, 9).float()], [half(8, 9)] * 2, r"matrices\[1\] is torch.float32"),
    "fp64": ([half(8, 9)], [half(8, 9).double()], r"outs\[0\] is torch.float64: all must be one of fp16, bf16"),
    "device": ([half(8, 9)], [on("cuda:1", 8, 9)], r"outs\[0\] is on cuda:1: all must be on one CUDA device"),
}


@pytest.mark.parametrize("case", WRONG_LISTS)
def test_wrong_lists_of_small_matrices_are_refused(stub: Stub, products: extension.CudaProducts, case: str) -> None:
    matrices, outs, message = WRONG_LISTS[case]
    wrapped = [[x if isinstance(x, Cuda) else Cuda(x) for x in tensors] for tensors in (matrices, outs)]
    with pytest.raises(ValueError, match=message):
        products.small_(*wrapped, [(1.5, -0.5, 0.0)], 1.0)
    assert stub.last.calls == 0


def test_importing_it_loads_no_extension() -> None:
    code = "import sys, jaguar.backends.polar.cuda; sys.exit('jaguar._cuda' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0
