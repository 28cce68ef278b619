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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from jaguar.schemes import Coefficients, Scheme

# Elements that a row of a workspace is padded to: 16-byte accesses, and what TMA asks for.
_PITCH = 8
# Batches are bounded by number and by size: results must not depend on how much memory happens to be free.
_BATCH, _BATCH_ELEMENTS = 8, 2**27
# The Gram form is taken where it needs less than this share of the operations: its products are more and smaller.
_GRAM_GAIN = 0.85
# Rows and columns of a tile, and the parts that the reductions of `prepare` cut a matrix into.
_TILE, _PARTS = 128, 64


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
    """What to compute, and where.

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
    """Whether it goes into the launch of the small ones, whose offsets have 32 bits."""
    return min(matrix.shape) <= small and matrix.numel() < 2**31


def orthogonalise(
    kernels: Products, matrices: Sequence[Tensor], task: Task
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Positions and polar factors (bf16, contiguous), batch by batch: only one batch is in memory at a time.

    `matrices` are 2-D, floating, not empty, on one kind of device.
    """
    for members in batches(matrices, kernels.small):
        chosen = [operand(matrices[i]) for i in members]  # copies, if any, of one batch only
        if _on_chip(chosen[0], kernels.small):
            outs = [torch.empty(G.shape, dtype=torch.bfloat16, device=G.device) for G in chosen]
            kernels.small_(chosen, outs, task.coefficients, 1.0 / task.scheme.margin)
        else:
            outs = list(_large(kernels, chosen, task).contiguous().unbind())
        yield members, outs
        del chosen, outs


def operand(matrix: Tensor) -> Tensor:
    """What kernels read: contiguous fp32, bf16 or fp16."""
    if matrix.dtype == torch.float64:  # of any magnitude: only ratios count
        largest = matrix.abs().amax()
        matrix = (matrix / torch.where((largest > 0) & largest.isfinite(), largest, 1.0)).to(torch.float32)
    elif matrix.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        matrix = matrix.to(torch.bfloat16)  # float8 fits without rounding
    return matrix.contiguous()


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
    """Whether computing a triangle of tiles and mirroring it needs fewer waves of thread blocks than all tiles."""
    tiles = -(-n // _TILE)
    return math.ceil(batch * tiles * (tiles + 1) / 2 / n_sms) < math.ceil(batch * tiles * tiles / n_sms)


class _Workspace:
    """Every buffer of one batch, in one allocation."""

    def __init__(self, batch: int, n: int, m: int, names: Sequence[str], device: torch.device) -> None:
        widths = {name: m if name in "XY" else n for name in names}
        pitches = {name: -(-width // _PITCH) * _PITCH for name, width in widths.items()}
        memory = torch.empty(batch * n * sum(pitches.values()), dtype=torch.float16, device=device)
        self.statistics = torch.empty((batch, 2, _PARTS), dtype=torch.float32, device=device)
        self.of: dict[str, Tensor] = {}
        begin = 0
        for name, pitch in pitches.items():
            size = batch * n * pitch
            self.of[name] = memory[begin : begin + size].view(batch, n, pitch)[..., : widths[name]]
            begin += size


def _large(kernels: Products, matrices: Sequence[Tensor], task: Task) -> Tensor:
    """(b, rows, columns), bf16: matrices of one shape."""
    rows, columns = matrices[0].shape
    n, m = min(rows, columns), max(rows, columns)
    device, batch = matrices[0].device, len(matrices)
    segments = gram_segments(n, m, task)
    quintic = any(c for _, _, c in task.coefficients)
    if segments:
        names = ["X", *("Y" if len(segments) > 1 else ""), *"RSTPQ", *("Z" if quintic else "")]
    else:
        names = [*"XYR", *("Z" if quintic else "")]
    space = _Workspace(batch, n, m, names, device)
    pitch = -(-columns // _PITCH) * _PITCH
    O = torch.empty((batch, rows, pitch), dtype=torch.bfloat16, device=device)[..., :columns]  # noqa: E741
    out = O.mT if rows > columns else O
    # The largest powers of two under which no entry can leave fp16's range.
    s_x = 2.0 ** min(12, math.floor(math.log2(math.sqrt(n * m))))
    s_r = 2.0 ** min(12, math.floor(math.log2(n)))
    kernels.prepare(matrices, space.of["X"], space.statistics, s_x / task.scheme.margin)
    if segments:
        _gram(kernels, space.of, segments, s_x, s_r, out)
    else:
        _standard(kernels, space.of, task.coefficients, s_x, s_r, half_pays(batch, n, task.n_sms), out)
    return O


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
