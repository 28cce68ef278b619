"""The products of the Newton-Schulz iteration in Triton kernels, for machines without nvcc."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jaguar.backends.uploads import for_replays, uploaded
from jaguar.method.schemes import ridge
from jaguar.triton_kernels import newton_schulz as kernels
from jaguar.triton_kernels import tables as T
from jaguar.triton_kernels.launch import launch

# Elements per tile of `measure` (with 8 warps, so that 64 programs keep the memory busy), sides of a tile of `prepare`.
MEASURED = 8192
PREPARED = 64
DEPTH = 64
# Sides of the tiles of a product and what they are compiled with. Three stages of the large ones take 96 KiB.
LARGE = {"TILE": 128, "DEPTH": DEPTH, "num_warps": 8, "num_stages": 3}
LITTLE = {"TILE": 64, "DEPTH": DEPTH, "num_warps": 4, "num_stages": 3}
# Large tiles only where there are about as many as a GPU has multiprocessors, and accesses are wide: else they spill.
ENOUGH = 100
# Columns at a time of a matrix on chip, by the largest short side; with more stages, registers spill.
BLOCKS = {16: 256, 32: 128}
STAGES = 2
# Tables kept in device memory, those that a CUDA graph reads apart: room for those of a model's groups.
TABLES = 256


class TritonProducts:
    """The products of Newton-Schulz in Triton kernels; the schedule and the memory are the caller's.

    Nothing here waits for the device. Addresses and coefficients reach it in small tables, which are kept: launches
    that are captured in a graph must have run once before, with the same tensors, or RuntimeError says so.
    """

    small = max(BLOCKS)

    def __init__(self) -> None:
        self._tables: dict[Any, Tensor] = {}

    def prepare(self, matrices: Sequence[Tensor], out: Tensor, statistics: Tensor, scale: float) -> None:
        """X_k = fp16(scale G_k / ||G_k||_F): zeros of a zero matrix, NaN everywhere of one that is not finite.

        Args:
            matrices: contiguous, all (n, m) or all (m, n) with m > n, of which the transpose is taken; one dtype.
            out: (b, n, m), fp16, last stride 1, row stride a multiple of 8.
            statistics: fp32 (b, 2, 64), what the launches tell each other.
            scale: norm of what is written.
        """
        b, n, m = out.shape
        first = matrices[0]
        tall = first.shape != (n, m)
        n_rows, n_columns = first.shape
        addresses = [matrix.data_ptr() for matrix in matrices]
        table = self._table(first.device, torch.int64, addresses)
        aligned = _multiples(16, *addresses)
        wide = aligned and _multiples(16, out.data_ptr()) and _multiples(8, m, n_columns, *out.stride()[:2])
        count = n * m
        chunk = -(-count // (int(kernels.PARTS.value) * MEASURED)) * MEASURED
        parts = -(-count // chunk)
        what = {"FORMAT": T.FORMATS[first.dtype]}
        launch(kernels.measure, (parts, b), table, statistics, count, chunk, **what, HINT=aligned, TILE=MEASURED,
               num_warps=8)  # fmt: skip
        tiles = -(-n_rows // PREPARED) * -(-n_columns // PREPARED)
        launch(kernels.prepare, (tiles, b), table, statistics, out, parts, n_rows, n_columns, out.stride(0),
               out.stride(1), scale, **what, TALL=tall, HINT=wide, TILE=PREPARED)  # fmt: skip

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
        """out_k = alpha a_k b_k + beta c_k of fp16 matrices, added in fp32 and rounded once.

        Args:
            out: (B, M, N), fp16 or bf16, either of the last two strides 1; not `a` or `b`.
            a: (B, M, K), last stride 1.
            b: (B, K, N), either of the last two strides 1.
            alpha: factor of the product.
            beta: factor of `c`.
            c: (B, M, N), last stride 1; may be `out` itself.
            triangle: `out` is symmetric in exact arithmetic; one half is computed and mirrored.
        """
        batch, m, n = out.shape
        k = a.shape[2]
        (b_row, b_transposed), (d_row, d_transposed) = _layout(b), _layout(out)
        operands = (a, b, out if c is None else c, out)
        strides = (a.stride(0), a.stride(1), b.stride(0), b_row, operands[2].stride(0), operands[2].stride(1),
                   out.stride(0), d_row)  # fmt: skip
        if c is None:  # its strides are not looked at
            strides = (*strides[:4], *strides[6:], *strides[6:])
        hint = _multiples(16, *(x.data_ptr() for x in operands)) and _multiples(8, m, n, k, *strides)
        size, tiles = _tiling(batch, m, n, triangle, hint)
        launch(
            kernels.product,
            (tiles, batch),
            *(x.view(torch.uint16) if x.dtype == torch.bfloat16 else x for x in operands),
            *(m, n, k),
            *strides,
            alpha,
            beta,
            B_TRANSPOSED=b_transposed,
            D_TRANSPOSED=d_transposed and not triangle,
            ADD=c is not None,
            TRIANGLE=triangle,
            FORMAT=T.FORMATS[out.dtype],
            FULL=_multiples(size["TILE"], m, n) and _multiples(DEPTH, k),
            HINT=hint,
            **size,
        )

    def small_(
        self,
        matrices: Sequence[Tensor],
        outs: Sequence[Tensor],
        coefficients: Sequence[tuple[float, float, float]],
        scale: float,
    ) -> None:
        """O_k = Newton-Schulz of scale G_k / ||G_k||_F, for all matrices in one launch, one program each.

        Args:
            matrices: contiguous, any shapes whose shorter side is at most `small`; one dtype of fp32, bf16, fp16.
            outs: tensors of the same shapes and contiguous; one dtype. May be the matrices themselves.
            coefficients: (a, b, c) of p(s) = a s + b s^3 + c s^5, one per step.
            scale: norm that the matrices are given first.
        """
        pairs = sorted(zip(matrices, outs, strict=True), key=lambda pair: -pair[0].numel())  # long programs first
        items = [number for pair in pairs for number in _item(*pair)]
        sides = [side for matrix in matrices for side in matrix.shape]
        largest = max(min(matrix.shape) for matrix in matrices)
        size = min(n for n in BLOCKS if n >= largest)
        first, device = matrices[0], matrices[0].device
        launch(
            kernels.small,
            len(pairs),
            self._table(device, torch.int64, items),
            self._table(device, torch.float32, [number for step in coefficients for number in step]),
            len(coefficients),
            scale,
            ridge(coefficients),
            FORMAT=T.FORMATS[first.dtype],
            O_FORMAT=T.FORMATS[outs[0].dtype],
            HINT=_multiples(8, *sides) and _multiples(16, *(x.data_ptr() for pair in pairs for x in pair)),
            N=size,
            BLOCK=BLOCKS[size],
            num_stages=STAGES,
        )

    def _table(self, device: torch.device, dtype: torch.dtype, numbers: list[int] | list[float]) -> Tensor:
        """The numbers in device memory; copied once for every stream, which then reads them in order."""
        cuda = device.type == "cuda"
        stream = torch.cuda.current_stream(device).cuda_stream if cuda else 0
        key = (device, stream, dtype, tuple(numbers))
        table = self._tables.pop(key, None)
        if table is None:
            table = uploaded(torch.tensor(numbers, dtype=dtype), device)
            if len(self._tables) == TABLES:
                del self._tables[next(iter(self._tables))]
        self._tables[key] = table  # the last used is the last to go
        for_replays(device, table)
        return table


def _multiples(of: int, *numbers: int) -> bool:
    return all(number % of == 0 for number in numbers)


def _layout(x: Tensor) -> tuple[int, bool]:
    """Distance of the rows of a batch of matrices as stored, and whether these are the logical columns."""
    if x.stride(2) == 1:
        return x.stride(1), False
    if x.stride(1) == 1:
        return x.stride(2), True
    raise ValueError(f"a batch of shape {tuple(x.shape)} has strides {x.stride()}: one of the last two must be 1")


def _tiling(batch: int, m: int, n: int, triangle: bool, wide: bool) -> tuple[dict[str, int], int]:
    """Tile size and number of tiles of each matrix."""

    def tiles(side: int) -> int:
        down, across = -(-m // side), -(-n // side)
        return down * (down + 1) // 2 if triangle else down * across

    large = LARGE["TILE"]
    size = LARGE if wide and min(m, n) > large // 2 and batch * tiles(large) >= ENOUGH else LITTLE
    return size, tiles(size["TILE"])


def _item(matrix: Tensor, out: Tensor) -> list[int]:
    """A row of the table of `small`."""
    n_rows, n_columns = matrix.shape
    sides = [n_rows, n_columns, n_columns, 1] if n_rows <= n_columns else [n_columns, n_rows, 1, n_columns]
    return [matrix.data_ptr(), out.data_ptr(), *sides]
