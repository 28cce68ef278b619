"""Peers of Newton-Schulz: torch's products, eager, compiled, and matrix by matrix; torch.optim.Muon's.

All of them take a batch (b, n, m) in bf16 with n <= m and return polar factors in bf16. They iterate in bf16 as the
reference does, but normalise in one pass, without its care for extreme magnitudes.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jaguar.backends.polar import run as polar_run
from jaguar.method.schemes import SCHEMES, Coefficients
from step.compiled import TooSlow, time_limit

EAGER = "torch eager, baddbmm"
EACH = "torch eager, matrix by matrix"
COMPILED = "torch.compile"
MUON = "torch.optim.Muon's"
TORCH = (EAGER, EACH, COMPILED, MUON)
# Our kernels by backend.
OWN = {"cuda": "csrc", "triton": "Triton"}


class NotHere(Exception):
    """A competitor cannot run; the message says why."""


def iterate(X: Tensor, coefficients: Sequence[Coefficients]) -> Tensor:
    """The standard form on a batch."""
    for a, b, c in coefficients:
        R = torch.bmm(X, X.mT)
        Z = torch.baddbmm(R, R, R, beta=b, alpha=c) if c else R
        X = torch.baddbmm(X, Z, X, beta=a, alpha=1.0 if c else b)
    return X


def norms(G: Tensor) -> Tensor:
    """Of every matrix, in fp32."""
    return torch.linalg.vector_norm(G, dim=(-2, -1), keepdim=True, dtype=torch.float32)


def eager(G: Tensor, coefficients: Sequence[Coefficients]) -> Tensor:
    """A batch, or a matrix of any form."""
    batch = G if G.dim() == 3 else G.unsqueeze(0)
    tall = batch.shape[1] > batch.shape[2]
    X = torch.empty_like(batch, dtype=torch.bfloat16)
    torch.div(batch, norms(batch), out=X)  # rounded once
    O = iterate(X.mT if tall else X, coefficients)  # noqa: E741
    O = O.mT if tall else O  # noqa: E741
    return O if G.dim() == 3 else O.squeeze(0)


def each(G: Tensor, coefficients: Sequence[Coefficients]) -> list[Tensor]:
    """Matrix by matrix, with addmm."""
    outs = []
    for matrix in G.unbind():
        X = torch.empty_like(matrix, dtype=torch.bfloat16)
        torch.div(matrix, norms(matrix), out=X)
        for a, b, c in coefficients:
            R = X @ X.T
            Z = torch.addmm(R, R, R, beta=b, alpha=c) if c else R
            X = torch.addmm(X, Z, X, beta=a, alpha=1.0 if c else b)
        outs.append(X)
    return outs


# Looked up while it is traced: floats that are passed become symbols when they change.
_COEFFICIENTS = {name: scheme.coefficients() for name, scheme in SCHEMES.items()}


def _to_compile(G: Tensor, scheme: str) -> Tensor:
    return iterate((G / norms(G)).to(torch.bfloat16), _COEFFICIENTS[scheme])


class Compiled:
    """torch.compile of the eager code, for the schemes' own numbers of steps; `options` are torch.compile's.

    What failed is not tried again, and nothing new is compiled when that has taken `allowed` seconds in all.
    """

    allowed = 25.0

    def __init__(self, **options: Any) -> None:
        self._compiled = torch.compile(_to_compile, **options)
        self._reason: str | None = None

    def first(self, G: Tensor, scheme: str, seconds: float) -> Tensor:
        """Compiles for this input and runs.

        Raises:
            NotHere: the compiler failed or took longer than `seconds`, now or before.
        """
        begin = time.monotonic()
        if self._reason is None:
            try:
                with time_limit(max(1.0, min(seconds, self.allowed))):
                    return self(G, scheme)
            except TooSlow as error:
                self._reason = f"compilation {error}"
            except Exception as error:  # whatever a compiler raises, the others are still worth measuring
                self._reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            finally:
                self.allowed -= time.monotonic() - begin
                if self.allowed < 1.0 and self._reason is None:
                    self._reason = "compilation for other shapes took all the time that it has"
        raise NotHere(f"failed: {self._reason}")

    def __call__(self, G: Tensor, scheme: str) -> Tensor:
        """What was compiled before."""
        return self._compiled(G, scheme)


def muon(G: Tensor, steps: int) -> Callable[[], list[Tensor]]:
    """torch.optim.Muon's own orthogonalisation, by the quintic, matrix by matrix.

    Raises:
        NotHere: this torch has none, or another one.
    """
    try:
        from torch.optim._muon import _zeropower_via_newtonschulz as orthogonalise
    except ImportError as error:
        raise NotHere(f"not available: {error}") from error
    names = list(inspect.signature(orthogonalise).parameters)
    if names != ["grad", "ns_coefficients", "ns_steps", "eps"]:
        raise NotHere(f"not available: this torch's takes {', '.join(names)}")
    coefficients = SCHEMES["quintic"].table[0]
    # It normalises bf16 input in place; once normalised, the work of later calls is the same.
    copies = [matrix.clone() for matrix in G.unbind()]
    return lambda: [orthogonalise(matrix, coefficients, steps, 1e-7) for matrix in copies]


def own(backend: str, scheme: str, steps: int) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Our kernels on one backend: matrices -> polar factors in the same order."""
    run = polar_run.NewtonSchulz(backend, steps=steps, coefficients=scheme, dtype=torch.bfloat16)

    def call(matrices: Sequence[Tensor]) -> list[Tensor]:
        outs: list[Tensor] = [matrices[0]] * len(matrices)
        for where, factors in run(matrices):
            for i, factor in zip(where, factors, strict=True):
                outs[i] = factor
        return outs

    return call
