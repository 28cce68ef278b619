"""Warm-started inverse roots instead of Newton-Schulz: how well they follow momentum that changes little per step.

M changes in 1 % of its entries per step, so P = (X X^T + d I)^(-1/2), X = M / ||M||_F, may be kept and corrected by one
Newton step P <- P (3 I - P A P) / 2 instead of being made anew; the step is then along P X. d = 3e-4 damps what ten
cubic steps damp too. Momentum is simulated: stratified coordinates, Rademacher signs, noise-dominated rho, beta 0.9.

    python bench warm-start [--out bench/results]
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from jaguar.backends.polar.reference import newton_schulz
from jaguar.method.schemes import SCHEMES
from machine import machine
from registry import RESULTS, parser_of

DAMPING, STEPS, LAST, FRACTION, BETA = 3e-4, 1200, 120, 100, 0.9
SHAPES, NEWTON, CONSOLE = ((96, 96), (64, 256)), (1, 2, 3), Console(stderr=True)


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def inverse_root(A: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(A)
    return vectors * values.rsqrt() @ vectors.mT


def followed(n: int, m: int, newton: int) -> tuple[float, float]:
    """Cosine of P X to the exact (X X^T + d I)^(-1/2) X, and to ten cubic steps, after LAST steps of following."""
    gen = torch.Generator().manual_seed(0)
    M, identity = torch.zeros(n, m, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    strata = torch.arange(0, n * m, FRACTION)
    P = None
    for step in track(range(STEPS), f"{n} x {m}, {newton} Newton steps", console=CONSOLE):
        place = (strata + torch.randint(0, FRACTION, strata.shape, generator=gen)).clamp(max=n * m - 1)
        signs = torch.randint(0, 2, strata.shape, generator=gen).double() * 2 - 1
        rho = torch.randn(1, generator=gen, dtype=torch.float64)
        M.view(-1)[place] = BETA * M.view(-1)[place] + (1 - BETA) * rho * signs
        if step < STEPS - LAST:
            continue
        X = M / M.norm()
        A = X @ X.mT + DAMPING * identity
        if P is None:
            P = inverse_root(A)
        for _ in range(newton):
            P = 1.5 * P - 0.5 * P @ A @ P @ P
            P = (P + P.mT) / 2
    cubic = newton_schulz(M, SCHEMES["cubic"].coefficients(), 1.0, torch.float64)
    return cosine(P @ X, inverse_root(A) @ X), cosine(P @ X, cubic)


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    about = machine()
    lines = [
        "# Warm-started inverse roots",
        "",
        f"`{about['command']}`, fp64, torch {about['torch']}, commit {about['commit']}. Cosines after {LAST} steps in "
        "which P was only corrected.",
        "",
        "| shape | Newton steps per step | to the exact inverse root | to ten cubic steps |",
        "|---|---|---|---|",
    ]
    for n, m in SHAPES:
        for newton in NEWTON:
            exact, cubic = followed(n, m, newton)
            lines.append(f"| {n} x {m} | {newton} | {exact:.4f} | {cubic:.4f} |")
    lines += [
        "",
        "Not kept. P costs n x n numbers per matrix, for square ones as much as another model, while `ns_period` costs",
        "no memory; for ill-conditioned (square) matrices P drifts, and more Newton steps make it worse, because P and",
        "X X^T no longer commute: the uncoupled iteration is unstable there.",
    ]
    text = "\n".join(lines) + "\n"
    CONSOLE.print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "ns-warm-start.md").write_text(text)
    return 0
