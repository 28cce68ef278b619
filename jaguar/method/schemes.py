"""Coefficients of Newton-Schulz: the polynomial of a singular value at each step.

    X <- a X + (b R + c R R) X,  R = X X^T:      s <- a s + b s^3 + c s^5

    cubic            (3/2, -1/2, 0), 10 steps: the JAGUAR paper's. Monotone: singular values stay below 1.
    quintic          (3.4445, -4.7750, 2.0315), 5 steps: Muon's. Fast; ends in a band from 0.68 to 1.13.
    polar_express    the best polynomial for each step, 8 steps (arXiv 2505.16932, with its factor of safety 1.01).

The paper's own loop counts from 0 to 10, which is eleven updates; ten steps are ten updates here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

# (a, b, c) of one step.
Coefficients: TypeAlias = tuple[float, float, float]

_SAFETY = 1.01


@dataclass(frozen=True)
class Scheme:
    """A coefficient set.

    Attributes:
        steps: iterations that it is made for.
        margin: factor by which the norm is enlarged, so that rounding leaves no singular value above 1.
        longest: iterations of the Gram form in a row that half precision bears before X X^T has to be made anew.
        table: (a, b, c) of each step; the last one repeats.
    """

    steps: int
    margin: float
    longest: int
    table: tuple[Coefficients, ...]

    def coefficients(self, steps: int | None = None) -> list[Coefficients]:
        """(a, b, c) of every step."""
        n = self.steps if steps is None else steps
        return [self.table[min(k, len(self.table) - 1)] for k in range(n)]


_MINIMAX = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)

SCHEMES = {
    "cubic": Scheme(10, 1.0, 10, ((1.5, -0.5, 0.0),)),
    "quintic": Scheme(5, 1.0, 3, ((3.4445, -4.7750, 2.0315),)),
    "polar_express": Scheme(
        8, _SAFETY, 2, (*((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _MINIMAX), (1.875, -1.25, 0.375))
    ),
}

# Precisions of the iteration; kernels have the first.
DTYPES = (torch.bfloat16, torch.float32, torch.float64)


# What fp32 makes of an eigenvalue 0 of R = X X^T, ||X|| = 1, may lie below 0 and grows with the square of the slope of
# the scheme at 0. Past 2^10 (10 quintic steps; not 5, and not the cubic's 10) eigenvalues are raised.
_STEEP = 2.0**10
_RIDGE = 2.0**-22


def ridge(coefficients: Sequence[Coefficients]) -> float:
    """Diagonal shift for a Gram iteration without restarts: 2^-22 if the slopes multiply to more than 2^10, else 0.

    Singular values below 2^-11 of the norm are then driven up as if they were that large.
    """
    return _RIDGE if math.prod(a for a, _, _ in coefficients) > _STEEP else 0.0


def validate_scheme(steps: int | None, coefficients: str, dtype: torch.dtype) -> int:
    """The number of iterations.

    Raises:
        ValueError: an option is out of range; the message names what would be right.
    """
    if not isinstance(coefficients, str) or coefficients not in SCHEMES:
        raise ValueError(f"coefficients={coefficients!r}: choose one of {', '.join(map(repr, SCHEMES))}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: iterate in {', '.join(map(str, DTYPES[:-1]))} or {DTYPES[-1]}")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps={steps!r}: give an int of at least 1, or None for the scheme's own number")
    return SCHEMES[coefficients].steps if steps is None else steps


def scalar_iterate(s: float, coefficients: list[Coefficients]) -> float:
    """Value that the iteration makes of a singular value `s` of X_0.

    A matrix of rank one has the singular value 1 / margin and no other, so this is its closed form:
    O = scalar_iterate(1 / margin) u v^T with unit vectors u and v.

    Equivalent to: `for a, b, c in coefficients: s = a * s + b * s**3 + c * s**5`.
    """
    for a, b, c in coefficients:
        s = s * (a + s * s * (b + c * s * s))
    return s
