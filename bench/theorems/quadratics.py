"""Functions of which every constant of the theorems is known, and a run of JAGUAR SignSGD or JAGUAR Muon on one.

The function is (L/2) ||x||^2. With a kink, c_i of (L/2) sum of c_i x_i^2 is 1 on one side of zero and 1 - kink on the
other: still L-smooth, but a difference quotient of length tau is wrong by an amount of order L tau; on a quadratic it
is exact. Stochastic gradients add a vector of variance sigma^2, the same in both evaluations of a step; the oracle adds
an error of at most Delta to every value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import jaguar

BURSTS = 0.2  # of bursts in the memory of a coordinate's momentum, in the mean


@dataclass(frozen=True)
class Setting:
    """A function, its noise, and the optimizer's settings."""

    method: str  # "SignSGD", or "Muon" on a square matrix
    size: int  # d of SignSGD, side of Muon's matrix
    steps: int
    lr: float
    start: float  # every x_i of SignSGD, every singular value of Muon
    beta: float = 0.0
    tau: float = 1e-3
    smoothness: float = 1.0
    kink: float = 0.0
    sigma: float = 0.0
    noise: str = "normal"  # or "bursts": rare and of one sign, as skew as this beta leaves them
    delta: float = 0.0
    oracle: str = "independent"  # or "ripple": a function of x, and the worst for differences of length tau

    @cached_property
    def signs(self) -> Tensor:
        """A sign for each coordinate: ones, and in a matrix those of Hadamard, whose singular values are equal."""
        if self.method == "SignSGD":
            return torch.ones(self.size, dtype=torch.float64)
        signs = torch.ones(1, 1, dtype=torch.float64)
        while len(signs) < self.size:
            signs = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), signs)
        return signs

    def origin(self) -> Tensor:
        """x^0."""
        return self.start * self.signs / (1.0 if self.method == "SignSGD" else self.size**0.5)

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient of f, without noise, of a point or of points."""
        slopes = self.smoothness * x
        return torch.where(x * self.signs < 0, (1 - self.kink) * slopes, slopes) if self.kink else slopes

    def value(self, x: Tensor) -> float:
        """f(x), without noise."""
        return 0.5 * float((self.gradient(x) * x).sum())

    def norms(self, path: Tensor) -> Tensor:
        """The theorem's norm of the gradient along a path: l1 of a vector, nuclear of a matrix."""
        gradients = self.gradient(path)
        return gradients.abs().sum(1) if self.method == "SignSGD" else torch.linalg.svdvals(gradients).sum(1)

    def draws(self, generator: torch.Generator) -> Tensor:
        """The stochastic part of the gradient in each step."""
        shape, each = (self.steps, *self.signs.shape), self.sigma / self.signs.numel() ** 0.5
        if self.noise == "normal":
            return each * torch.randn(shape, generator=generator, dtype=torch.float64)
        rate = BURSTS * (1 - self.beta)
        burst = torch.rand(shape, generator=generator, dtype=torch.float64) < rate
        return each * (burst.double() - rate) / (rate * (1 - rate)) ** 0.5 * self.signs

    def errors(self, generator: torch.Generator) -> Iterator[float]:
        """The oracle's errors where they are independent: + Delta or - Delta, in every evaluation."""
        yield from (self.delta * (2.0 * torch.randint(2, (2 * self.steps,), generator=generator) - 1.0)).tolist()

    def ripple(self, x: Tensor) -> float:
        """The oracle's error where it depends on x: it can turn the difference of every coordinate by 2 Delta."""
        return -self.delta * math.sin(math.pi / (2 * self.tau) * float((self.signs * x).sum()))


def optimizer(setting: Setting, x: Tensor, seed: int) -> jaguar.JaguarSignSGD | jaguar.JaguarMuon:
    """Algorithm 1 or 2: one coordinate a step, and the whole momentum moves all of x."""
    options = {
        "lr": setting.lr,
        "beta": setting.beta,
        "tau": setting.tau,
        "coordinates": 1,
        "signs": "ones",
        "update": "all",
        "seed": seed,
        "backend": "reference",
    }
    if setting.method == "SignSGD":
        return jaguar.JaguarSignSGD([x], **options)
    return jaguar.JaguarMuon([{"params": [x], "ns": True}], ns_dtype=torch.float64, **options)


@torch.no_grad()
def left_side(setting: Setting, seed: int) -> float:
    """The mean over x^1, ..., x^T of the norm of the gradient, in one run."""
    generator = torch.Generator().manual_seed(seed)
    x = setting.origin().requires_grad_()
    draws, errors = setting.draws(generator), setting.errors(generator)
    path = torch.empty(setting.steps, *x.shape, dtype=torch.float64)
    method = optimizer(setting, x, seed)
    for step in range(setting.steps):

        def oracle(draw: Tensor = draws[step]) -> float:
            error = setting.ripple(x) if setting.oracle == "ripple" else next(errors)
            return setting.value(x) + float((draw * x).sum()) + error

        method.step(oracle)
        path[step] = x
    return float(setting.norms(path).mean())
