"""Measurements of Newton-Schulz, most important first, and their targets. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

Shape: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """A batch of matrices of one shape, orthogonalised.

    Attributes:
        batch, n, m: number of matrices and their shape.
        scheme: name of the coefficient set.
        steps: iterations.
        least: how many times faster than the best of torch's it should be; None: nothing is asked.
        seconds: without which it is not begun.
    """

    batch: int
    n: int
    m: int
    scheme: str = "cubic"
    steps: int = 10
    least: float | None = None
    seconds: float = 5.0

    @property
    def name(self) -> str:
        """What it is called in results."""
        return f"{self.batch} x {self.n} x {self.m}, {self.scheme} {self.steps}"

    @property
    def flops(self) -> float:
        """Operations of the standard form with dense products, whatever is in fact computed."""
        n, m = min(self.n, self.m), max(self.n, self.m)
        return self.batch * standard_flops(n, m, self.scheme, self.steps)

    @property
    def bytes(self) -> int:
        """Memory that the inputs, a competitor's temporaries, the results and the comparison may take."""
        return 18 * self.batch * self.n * self.m + 40 * self.n * self.m + 24 * self.batch * min(self.n, self.m) ** 2


def standard_flops(n: int, m: int, scheme: str, steps: int) -> float:
    """Operations of one n x m matrix, n <= m: X X^T and Z X, and R R where the scheme is not cubic."""
    return float(steps * (4 * n * n * m + (0 if scheme == "cubic" else 2 * n**3)))


# The rectangles first: the Gram form is what the time of whole models depends on.
CASES = (
    Case(8, 2048, 8192, least=2.2),
    Case(8, 5120, 20480, least=2.5, seconds=15.0),
    Case(8, 2048, 2048, least=1.0),
    Case(8, 4096, 4096, least=1.1),
)
MORE = (
    Case(1, 2048, 2048),
    Case(1, 1024, 1024),
    Case(8, 2048, 8192, "quintic", 5),
    Case(8, 4096, 4096, "quintic", 5),
)
# Factors of rank 8 on the query and value projections of OPT-1.3B: 24 layers, two of A and two of B each.
LORA: tuple[Shape, ...] = ((8, 2048), (2048, 8)) * 48
LORA_NAME = f"{len(LORA)} LoRA factors of OPT-1.3B, cubic 10"
LORA_MOST = 1 / 20
# One product each: (batch, n) of X X^T of n x n matrices.
PRODUCTS = tuple((batch, n) for batch in (8, 1) for n in (2048, 4096, 1024, 3072))
# What a GPU can do: sides of a bf16 product by cuBLAS.
CEILING = 8192
