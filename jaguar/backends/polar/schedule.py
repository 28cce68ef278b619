"""The schedule of Newton-Schulz in 16-bit kernels: which products, in which form, in whose memory.

Kernels supply three operations (`Products`); everything else is decided here, once for Triton and for csrc:

    standard   R = X X^T;  Z = b R + c R R;  X <- a X + Z X                  for nearly square matrices
    Gram       the iteration on R = X X^T alone, then one product Q X        for n x m with m clearly above n
    on chip    matrices with a short side up to `Products.small` (LoRA factors), all of them in one launch

Operands are fp16, sums fp32: normalised values fit fp16's range, where rounding is 8 times finer than bf16's. X and R
are kept times powers of two, so that their small entries stay clear of subnormal numbers. The Gram form needs results
that are symmetric to the last bit, which mirrored triangles of tiles are: rounded on their own, the two halves differ,
and the difference grows tenfold (Polar Express, 96 x 300: relative error 2.2e-2 instead of 2.2e-3). And it begins anew
(X <- Q X, R = X X^T) after `Scheme.longest` steps: rounding makes tiny eigenvalues of R negative, which the polynomials
then enlarge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from jaguar.method.schemes import Coefficients, Scheme

# Elements that a row of a workspace is padded to: 16-byte accesses, and what TMA asks for.
_PITCH = 8
# Batches are bounded by number and by size: results must not depend on how much memory happens to be free.
_BATCH, _BATCH_ELEMENTS = 8, 2**27
# The Gram form is taken where it needs less than this share of the operations: its products are more and smaller.
_GRAM_GAIN = 0.85
# Bytes that a tensor begins at a multiple of, in memory that several share.
_ALIGNED = 256
# Rows and columns of a tile, and the parts that the reductions of `prepare` cut a matrix into.
_TILE, _PARTS = 128, 64

# Shape and dtype of a tensor.
_Wanted: TypeAlias = tuple[Sequence[int], torch.dtype]


class Products(Protocol):
    """Three operations on contiguous fp32, bf16 or fp16 matrices and on fp16 workspaces."""

    small: int

    def prepare(self, matrices: Sequence[Tensor], out: Tensor, statistics: Tensor, scale: float) -> None:
        """out[k] = scale G_k / ||G_k||_F, of G_k^T where G_k is tall; zero stays zero, non-finite becomes NaN."""

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
        """out = alpha a b + beta c, batched; `triangle`: out is symmetric, half of its tiles are mirrored."""

    def small_(
        self, matrices: Sequence[Tensor], outs: Sequence[Tensor], coefficients: Sequence[Coefficients], scale: float
    ) -> None:
        """All of these matrices in one launch."""


@dataclass(frozen=True)
class Task:
    """Scheme, number of iterations, and the device to schedule for.

    Attributes:
        scheme: the coefficient set.
        steps: iterations.
        n_sms: multiprocessors of the device; half tiles pay where they save a wave of thread blocks.
    """

    scheme: Scheme
    steps: int
    n_sms: int

    @property
    def coefficients(self) -> list[Coefficients]:
        """(a, b, c) of every step."""
        return self.scheme.coefficients(self.steps)


def batches(matrices: Sequence[Tensor], small: int) -> list[list[int]]:
    """Positions of the matrices that are computed together: the small ones at once, others by shape and dtype."""
    few: dict[object, list[int]] = {}
    many: dict[object, list[int]] = {}
    for i, matrix in enumerate(matrices):
        where = matrix.device, matrix.dtype
        if _on_chip(matrix, small):
            few.setdefault(where, []).append(i)
        else:
            many.setdefault((*where, matrix.shape), []).append(i)
    found = list(few.values())
    for members in many.values():
        size = max(1, min(_BATCH, _BATCH_ELEMENTS // matrices[members[0]].numel()))
        found += [members[i : i + size] for i in range(0, len(members), size)]
    return found


def _on_chip(matrix: Tensor, small: int) -> bool:
    """Tells whether it goes into the launch of the small ones, whose offsets have 32 bits."""
    return min(matrix.shape) <= small and matrix.numel() < 2**31


class Space:
    """Memory on a device for the tensors of one batch, and then of the next.

    Args:
        size: bytes that are taken now, so that none are missing later; None: every tensor has memory of its own.
    """

    def __init__(self, device: torch.device, size: int | None = None) -> None:
        self._device, self._end = device, 0
        self._memory = None if size is None else torch.empty(size, dtype=torch.uint8, device=device)

    def tensors(self, wanted: Sequence[_Wanted]) -> list[Tensor]:
        """Those of a batch; what the last one had is theirs."""
        self._end = 0
        return [self._tensor(*one) for one in wanted]

    def _tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self._memory is None:
            return torch.empty(shape, dtype=dtype, device=self._device)
        begin, self._end = self._end, self._end + _bytes(shape, dtype)
        cells = self._memory[begin : begin + math.prod(shape) * dtype.itemsize]
        return cells.view(dtype).view(torch.Size(shape))


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNED) * _ALIGNED


@dataclass(frozen=True)
class Taken:
    """Batches and memory of `orthogonalise` for some matrices, known and taken before it begins.

    Attributes:
        batches: positions of the matrices of each batch, and what it needs memory for.
        spaces: the memory of the largest batch on each device.
    """

    batches: Sequence[tuple[list[int], list[_Wanted]]]
    spaces: Mapping[torch.device, Space]


def take(kernels: Products, matrices: Sequence[Tensor], task: Task) -> Taken:
    """Takes the memory that `orthogonalise` needs."""
    found = _scheduled(kernels, matrices, task)
    sizes: dict[torch.device, int] = {}
    for members, wanted in found:
        device = matrices[members[0]].device
        sizes[device] = max(sum(_bytes(*one) for one in wanted), sizes.get(device, 0))
    return Taken(found, {device: Space(device, size) for device, size in sizes.items()})


def _scheduled(kernels: Products, matrices: Sequence[Tensor], task: Task) -> list[tuple[list[int], list[_Wanted]]]:
    chosen = batches(matrices, kernels.small)
    return [(members, _wanted(kernels, [matrices[i] for i in members], task)) for members in chosen]


def orthogonalise(
    kernels: Products, matrices: Sequence[Tensor], task: Task, taken: Taken | None = None
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Positions and polar factors (bf16, contiguous), batch by batch: only one batch is in memory at a time.

    Args:
        matrices: 2-D, floating, not empty, on one kind of device.
        taken: for these matrices, where nothing may be missing half-way; the factors of a batch are then overwritten
            by the next one's.
    """
    for members, wanted in _scheduled(kernels, matrices, task) if taken is None else taken.batches:
        chosen = [matrices[i] for i in members]
        device = chosen[0].device
        space = Space(device) if taken is None else taken.spaces[device]
        yield members, _factors(kernels, chosen, task, iter(space.tensors(wanted)))


def _factors(kernels: Products, matrices: Sequence[Tensor], task: Task, tensors: Iterator[Tensor]) -> list[Tensor]:
    """The polar factors of one batch; `tensors` are what `_wanted` asks for."""
    chosen = [copied(matrix, next(tensors)) if _is_copied(matrix) else matrix for matrix in matrices]
    if _on_chip(chosen[0], kernels.small):
        outs = list(tensors)
        kernels.small_(chosen, outs, task.coefficients, 1.0 / task.scheme.margin)
        return outs
    between, statistics, padded, *compact = tensors
    found = padded[..., : chosen[0].shape[1]]
    _large(kernels, chosen, task, between, statistics, found)
    for out in compact:
        found = out.copy_(found)
    return list(found.unbind())


def _wanted(kernels: Products, matrices: Sequence[Tensor], task: Task) -> list[_Wanted]:
    """Tensors that `_factors` needs memory for: copies of operands, results and, for large matrices, all between."""
    copies: list[_Wanted] = [(matrix.shape, _operand_dtype(matrix)) for matrix in matrices if _is_copied(matrix)]
    if _on_chip(matrices[0], kernels.small):
        return [*copies, *((matrix.shape, torch.bfloat16) for matrix in matrices)]
    batch, (rows, columns) = len(matrices), matrices[0].shape
    n, m, pitch = min(rows, columns), max(rows, columns), _pitch(columns)
    between = [((batch * n * sum(_pitches(n, m, task).values()),), torch.float16), ((batch, 2, _PARTS), torch.float32)]
    results = [((batch, rows, width), torch.bfloat16) for width in dict.fromkeys((pitch, columns))]
    return [*copies, *between, *results]


def _operand_dtype(matrix: Tensor) -> torch.dtype:
    """Dtype in which kernels read a matrix: fp32, bf16 or fp16."""
    if matrix.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return matrix.dtype
    return torch.float32 if matrix.dtype == torch.float64 else torch.bfloat16  # float8 fits without rounding


def _is_copied(matrix: Tensor) -> bool:
    """Tells whether kernels cannot read a matrix as it is."""
    return _operand_dtype(matrix) != matrix.dtype or not matrix.is_contiguous()


def copied(matrix: Tensor, out: Tensor) -> Tensor:
    """`out`, into which a matrix was copied; one of fp64 over its largest entry, because only ratios count."""
    if matrix.dtype != torch.float64:
        return out.copy_(matrix)
    largest = torch.linalg.vector_norm(matrix, math.inf)
    return torch.div(matrix, torch.where((largest > 0) & largest.isfinite(), largest, 1.0), out=out)


def gram_segments(n: int, m: int, task: Task) -> list[list[Coefficients]]:
    """The runs of steps of the Gram form for n x m, n <= m; empty where the standard form needs fewer operations.

    Counted in products of n x n x m and n x n x n with half tiles where the result is symmetric.
    """
    every, longest = task.coefficients, task.scheme.longest
    segments = [every[i : i + longest] for i in range(0, len(every), longest)]
    full = sum(1.5 * m / n + (0.5 if c else 0.0) for _, _, c in every)
    gram = sum(
        1.5 * m / n + 0.5 * (sum(1 for _, _, c in segment if c) + 3 * (len(segment) - 1)) for segment in segments
    )
    return segments if gram < _GRAM_GAIN * full else []


def half_pays(batch: int, n: int, n_sms: int) -> bool:
    """Tells whether a triangle of tiles that is mirrored needs fewer waves of thread blocks than all tiles."""
    tiles = -(-n // _TILE)
    return math.ceil(batch * tiles * (tiles + 1) / 2 / n_sms) < math.ceil(batch * tiles * tiles / n_sms)


def _pitch(width: int) -> int:
    return -(-width // _PITCH) * _PITCH


@cache
def _pitches(n: int, m: int, task: Task) -> dict[str, int]:
    """The fp16 workspaces of n x m and n x n that a matrix needs, n <= m, and how far apart their rows are."""
    segments = gram_segments(n, m, task)
    quintic = "Z" if any(c for _, _, c in task.coefficients) else ""
    names = ["X", *("Y" if len(segments) > 1 else ""), *"RSTPQ", *quintic] if segments else [*"XYR", *quintic]
    return {name: _pitch(m if name in "XY" else n) for name in names}


def _large(
    kernels: Products, matrices: Sequence[Tensor], task: Task, between: Tensor, statistics: Tensor, out: Tensor
) -> None:
    """`out`, (b, rows, columns) in bf16: polar factors of matrices of one shape; `between` is for `_pitches`."""
    rows, columns = matrices[0].shape
    n, m, batch = min(rows, columns), max(rows, columns), len(matrices)
    of: dict[str, Tensor] = {}
    begin = 0
    for name, pitch in _pitches(n, m, task).items():
        size = batch * n * pitch
        of[name] = between[begin : begin + size].view(batch, n, pitch)[..., : m if name in "XY" else n]
        begin += size
    out = out.mT if rows > columns else out
    # The largest powers of two under which no entry can leave fp16's range.
    s_x = 2.0 ** min(12, math.floor(math.log2(math.sqrt(n * m))))
    s_r = 2.0 ** min(12, math.floor(math.log2(n)))
    kernels.prepare(matrices, of["X"], statistics, s_x / task.scheme.margin)
    if segments := gram_segments(n, m, task):
        _gram(kernels, of, segments, s_x, s_r, out)
    else:
        _standard(kernels, of, task.coefficients, s_x, s_r, half_pays(batch, n, task.n_sms), out)


def _standard(
    kernels: Products,
    of: dict[str, Tensor],
    coefficients: Sequence[Coefficients],
    s_x: float,
    s_r: float,
    triangle: bool,
    out: Tensor,
) -> None:
    """X <- a X + (b R + c R R) X with X stored times s_x and R stored times s_r."""
    X, Y, R = of["X"], of["Y"], of["R"]
    for k, (a, b, c) in enumerate(coefficients):
        last = k + 1 == len(coefficients)
        kernels.product(R, X, X.mT, alpha=s_r / s_x**2, triangle=triangle)
        Z, zeta = R, b / s_r
        if c:
            Z, zeta = of["Z"], 1.0
            kernels.product(Z, R, R.mT, alpha=c / s_r**2, beta=b / s_r, c=R, triangle=triangle)
        unscale = 1.0 / s_x if last else 1.0
        kernels.product(out if last else Y, Z, X, alpha=zeta * unscale, beta=a * unscale, c=X)
        X, Y = Y, X


def _gram(
    kernels: Products,
    of: dict[str, Tensor],
    segments: Sequence[Sequence[Coefficients]],
    s_x: float,
    s_r: float,
    out: Tensor,
) -> None:
    """Per segment R = X X^T and Q = I; Z = b R + c R R, Q <- a Q + Q Z, R <- (a + Z) R (a + Z); then X <- Q X.

    All of these are polynomials in R, so they commute and every product is symmetric.
    """
    X, Y = of["X"], of.get("Y")
    for number, segment in enumerate(segments):
        R, S, T, P, Q = (of[name] for name in "RSTPQ")
        kernels.product(R, X, X.mT, alpha=s_r / s_x**2, triangle=True)
        for k, (a, b, c) in enumerate(segment):
            Z, zeta = R, b / s_r
            if c:
                Z, zeta = of["Z"], 1.0
                kernels.product(Z, R, R.mT, alpha=c / s_r**2, beta=b / s_r, c=R, triangle=True)
            if k == 0:
                torch.mul(Z, zeta, out=Q)
                Q.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                kernels.product(P, Q, Z.mT, alpha=zeta, beta=a, c=Q, triangle=True)
                P, Q = Q, P
            if k + 1 < len(segment):
                kernels.product(T, R, Z.mT, alpha=zeta, beta=a, c=R, triangle=True)
                kernels.product(S, Z, T.mT, alpha=zeta, beta=a, c=T, triangle=True)
                R, S = S, R
        if number + 1 == len(segments):
            kernels.product(out, Q, X, alpha=1.0 / s_x)
        else:
            assert Y is not None
            kernels.product(Y, Q, X, alpha=1.0)
            X, Y = Y, X
