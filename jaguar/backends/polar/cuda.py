"""The CUDA extension: whether it can be used here, and its launches for tensors.

`jaguar._cuda` is built with the package where nvcc is (JAGUAR_CUDA in setup.py) and imported at the first question.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor

from jaguar.backends.uploads import for_replays, uploaded
from jaguar.method.schemes import ridge

ABI = 2  # JAGUAR_ABI_VERSION of csrc/newton_schulz.h
_NAME = "jaguar._cuda"
_NOTE = Path(__file__).with_name("_cuda_build.txt")
_FORMATS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# Tables of addresses that stay on the device, those that a CUDA graph reads apart: room for those of a model's groups.
_KEPT = 256

Item: TypeAlias = tuple[int, int, int, int, int, int]


def note() -> str:
    """Note of the installation about the extension: the tools it was built with, or the reason why it was not."""
    try:
        return _NOTE.read_text().strip()
    except OSError:
        return "this copy of jaguar was not installed by pip, which builds the extension"


@functools.cache
def _load() -> ModuleType | str:
    """The extension module, or why there is none; decided once."""
    if importlib.util.find_spec(_NAME) is None:
        return f"the CUDA extension was not built: {note()}"
    try:
        module = importlib.import_module(_NAME)
    except ImportError as error:
        return f"the CUDA extension does not load: {error}"
    version = module.abi_version()
    if version != ABI:
        return (
            f"the CUDA extension is of another version of jaguar (ABI {version} instead of {ABI}): install jaguar again"
        )
    return module


def missing() -> str | None:
    """The reason that the extension cannot be used here, in one line; None if it can."""
    module = _load()
    if isinstance(module, str):
        return module
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "there is no NVIDIA GPU that this torch can use"
    best = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if best < (8, 0):
        return f"the CUDA extension needs compute capability 8.0, and the GPU here has {best[0]}.{best[1]}"
    # A driver runs what later minor versions of its CUDA compiled, but nothing of a later major one.
    driver, built = int(module.driver_version()), str(module.cuda_version())
    if built.split(".")[0].isdigit() and int(built.split(".")[0]) > driver // 1000:
        return f"the CUDA extension was built with CUDA {built}, and the driver here knows {driver // 1000} at most"
    return None


def _steps(matrix: Tensor) -> list[int]:
    """The strides that mean something: those of sizes above 1."""
    return [stride for size, stride in zip(matrix.shape, matrix.stride(), strict=True) if size > 1]


def _item(i: int, matrix: Tensor, out: Tensor) -> Item:
    """One row of the table of `small`: {in, out, n, m, stride_n, stride_m}, n the short side."""
    if matrix.dim() != 2 or matrix.shape != out.shape or _steps(matrix) != _steps(out):
        raise ValueError(
            f"matrices[{i}] and outs[{i}] must be matrices of one shape and with the same strides, not "
            f"{tuple(matrix.shape)} with {matrix.stride()} and {tuple(out.shape)} with {out.stride()}"
        )
    (n, stride_n), (m, stride_m) = sorted(zip(matrix.shape, matrix.stride(), strict=True), key=lambda side: side[0])
    if not 1 <= n <= CudaProducts.small:
        raise ValueError(
            f"matrices[{i}] has shape {tuple(matrix.shape)}: the short side must be 1 to {CudaProducts.small}"
        )
    if n == 1:  # the stride of a size of 1 says nothing, and the kernels want exactly one stride to be 1
        stride_n, stride_m = (max(m, 2), 1) if m == 1 or stride_m == 1 else (1, stride_m)
    if (stride_n == 1) == (stride_m == 1):
        raise ValueError(f"matrices[{i}] has strides {matrix.stride()}: exactly one of them must be 1")
    return matrix.data_ptr(), out.data_ptr(), n, m, stride_n, stride_m


def _uploaded(items: Sequence[Item], device: torch.device) -> Tensor:
    """The table as an int64 tensor (count, 6) on the current stream of `device`; the host does not wait."""
    return uploaded(torch.tensor(items, dtype=torch.int64), device)


class CudaProducts:
    """The matrix products of the Newton-Schulz iteration in CUDA kernels, on the current stream of the tensors' device.

    Raises:
        ImportError: the extension is not there; `missing` says so too.
    """

    small = 64  # matrices whose short side is at most this go to `small_`

    def __init__(self) -> None:
        module = _load()
        if isinstance(module, str):
            raise ImportError(module)
        self._module = module
        self._tables: OrderedDict[tuple[torch.device, int, tuple[Item, ...]], Tensor] = OrderedDict()

    def prepare(self, matrices: Sequence[Tensor], out: Tensor, statistics: Tensor, scale: float) -> None:
        """out[k] = fp16(scale G_k / ||G_k||_F), of G_k^T where `out` has the transposed shape.

        Args:
            matrices: 1 to 64, contiguous, of one shape (rows, cols) or (cols, rows); fp16, bf16 or fp32.
            out: fp16 (len(matrices), rows, cols), rows a multiple of 8 elements apart.
            statistics: fp32 with at least 128 elements per matrix; overwritten.
            scale: factor after the division by the norm.

        Raises:
            TypeError: an argument is no tensor.
            ValueError: a tensor is not like this; the message says which.
            RuntimeError: the launch failed.
        """
        with torch.cuda.device(out.device):
            # Views may begin anywhere, and the kernels read pieces of 16 bytes.
            aligned = [G.clone() if isinstance(G, Tensor) and G.data_ptr() % 16 else G for G in matrices]
            self._module.prepare(aligned, out, statistics, scale, _stream(out.device))

    def product(
        self,
        out: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        alpha: float,
        beta: float = 0.0,
        c: Tensor | None = None,
        triangle: bool = False,
    ) -> None:
        """out[k] = alpha a[k] @ b[k] + beta c[k], accumulated in fp32 and rounded once.

        Args:
            out: fp16 or bf16 (B, M, N), last stride 1 or a transposed view.
            a: fp16 (B, M, K), last stride 1.
            b: fp16 (B, K, N), last stride 1 or a transposed view.
            alpha: factor of the product.
            beta: factor of `c`, which is not read where it is 0.
            c: fp16 (B, M, N), last stride 1; may be `out`.
            triangle: the result is symmetric, and half of it is computed.

        Raises:
            TypeError: an argument is no tensor.
            ValueError: a tensor is not like this; the message says which.
            RuntimeError: the launch failed.
        """
        with torch.cuda.device(out.device):
            self._module.product(out, a, b, alpha, beta, c, triangle, _stream(out.device))

    def small_(
        self,
        matrices: Sequence[Tensor],
        outs: Sequence[Tensor],
        coefficients: Sequence[tuple[float, float, float]],
        scale: float,
    ) -> None:
        """Newton-Schulz of every matrix into its `outs`, in one launch.

        Args:
            matrices: two-dimensional, short side at most `small`, one stride 1; all fp16, bf16 or fp32.
            outs: tensors of the same shapes and strides; all fp16, bf16 or fp32.
            coefficients: (a, b, c) of each step, 1 to 32 of them.
            scale: factor after the division by the norm.

        Raises:
            ValueError: a tensor is not like this; the message says which.
            RuntimeError: the launch failed, or a CUDA graph is captured and these tensors were never here before.
        """
        if len(matrices) != len(outs) or not matrices:
            raise ValueError(f"{len(matrices)} matrices and {len(outs)} outs: both must be one for each matrix")
        for name, tensors in (("matrices", matrices), ("outs", outs)):
            for i, tensor in enumerate(tensors):
                if tensor.dtype not in _FORMATS or tensor.dtype != tensors[0].dtype:
                    raise ValueError(f"{name}[{i}] is {tensor.dtype}: all must be one of fp16, bf16 and fp32")
                if not tensor.is_cuda or tensor.device != matrices[0].device:
                    raise ValueError(f"{name}[{i}] is on {tensor.device}: all must be on one CUDA device")
        rows = [_item(i, g, o) for i, (g, o) in enumerate(zip(matrices, outs, strict=True))]
        items = tuple(sorted(rows, key=lambda item: -item[2] * item[3]))  # those that take long begin first
        device = matrices[0].device
        with torch.cuda.device(device):
            stream = _stream(device)
            self._module.small(
                self._table(items, device, stream),
                max(item[2] for item in items),
                _FORMATS[matrices[0].dtype],
                _FORMATS[outs[0].dtype],
                list(coefficients),
                scale,
                ridge(coefficients),
                stream,
            )

    def _table(self, items: tuple[Item, ...], device: torch.device, stream: int) -> Tensor:
        """The table on the device: copied once for these addresses and this stream, which orders copy and reads."""
        key = (device, stream, items)
        if key not in self._tables:
            self._tables[key] = _uploaded(items, device)
            if len(self._tables) > _KEPT:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        for_replays(device, self._tables[key])
        return self._tables[key]


def _stream(device: torch.device) -> int:
    """The current stream's handle."""
    return int(torch.cuda.current_stream(device).cuda_stream)
