"""A slow version of ForwardGrad, by backward passes and in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import jaguar
from helpers.oracles import stream_ints
from helpers.slow import (
    DTYPES,
    SEED,
    STEPS,
    Dense,
    Var,
    same,
)
from helpers.steps import skipping
from helpers.tensors import numpy_of


class Net(nn.Module):
    """A loss whose parameters are used in the forwards of their own modules; one of them twice."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 8, bias=False)
        gen = torch.Generator().manual_seed(4)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=gen) * 0.4
        self.register_buffer("x", torch.randn(6, 5, generator=gen))
        self.register_buffer("y", torch.randn(6, 8, generator=gen))
        self.to(dtype)

    def forward(self) -> torch.Tensor:
        hidden = torch.tanh(self.last(torch.tanh(self.norm(self.first(self.x)))))
        return ((self.last(hidden) - self.y).square().mean()).to(torch.promote_types(self.x.dtype, torch.float32))


class Quadratic(nn.Module):
    """c (x - 1/4)^2 of every element: what the derivative is can be written down."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Part(dtype, size) for size in (7, 36, 3))

    def forward(self) -> torch.Tensor:
        return sum(part() for part in self.parts)  # type: ignore[return-value]


class Part(nn.Module):
    def __init__(self, dtype: torch.dtype, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 2, size, dtype=torch.float64).to(dtype))
        self.register_buffer("c", torch.linspace(0.5, 2, size, dtype=dtype))

    def forward(self) -> torch.Tensor:
        wide = torch.promote_types(self.w.dtype, torch.float32)
        return (self.c * (self.w - 0.25).square()).to(wide).sum()


def odd(name: str) -> bool:
    return sum(map(ord, name)) % 2 == 1


def forward_grad(model: nn.Module, storage: str) -> tuple[Any, Dense]:
    """The optimizer with two groups, by a property of the names, and what draws z and steps beside it."""
    named = dict(model.named_parameters())
    lots = [
        {"params": [(n, p) for n, p in named.items() if odd(n)], "lr": 2e-2, "weight_decay": 0.3},
        {"params": [(n, p) for n, p in named.items() if not odd(n)], "weight_decay": 0.1},
    ]
    assert all(lot["params"] for lot in lots)
    opt = jaguar.ForwardGrad(lots, 1e-2, model=model, seed=SEED)
    num = np.float64 if storage == "fp64" else np.float32
    variables = []
    for n, p in named.items():
        lr, decay = (2e-2, 0.3) if odd(n) else (1e-2, 0.1)
        variables.append(Var(n, stream_ints(n), numpy_of(p).reshape(-1).astype(num), lr, math.nan, decay, {}))
    return opt, Dense(variables, storage, seed=SEED)


def step_from(rho: float, slow: Dense, model: nn.Module) -> None:
    """x <- (1 - lr wd) x - lr (rho z), bit for bit, with the rho that was recorded."""
    z, named = slow.draw(), dict(model.named_parameters())
    for v in slow.variables:
        slow.sgd(v, slow.num(rho) * z[v.name])
        same(numpy_of(named[v.name]).reshape(-1), v)
    slow.step += 1


# What rho may differ by, in units of the sum of |grad z|, beside 1e-5 of rho itself: terms of both signs may all but
# cancel, and what was rounded in the forward pass stays; in bf16 that is 2^-9 for every one of some ten operations.
SLACK = {"fp64": 0.0, "fp32": 1e-6, "bf16": 2.0**-5}


@pytest.mark.parametrize("make", [Net, Quadratic])
@pytest.mark.parametrize("storage", ["fp64", "fp32", "bf16"])
def test_forward_grad(storage: str, make: Any) -> None:
    """rho is grad . z by autograd, and the step follows from rho."""
    model = make(DTYPES[storage])
    opt, slow = forward_grad(model, storage)
    named = dict(model.named_parameters())
    first = model().item()
    for step in range(STEPS):
        loss = model()
        grads = torch.autograd.grad(loss, list(named.values()))
        z = slow.draw()
        terms = np.concatenate([numpy_of(g).reshape(-1) * z[n] for n, g in zip(named, grads, strict=True)])
        opt.step(lambda: model())
        value, rho = opt.last_record.losses
        expected, slack = math.fsum(terms), SLACK[storage] * np.abs(terms).sum()
        assert abs(rho - expected) <= 1e-5 * abs(expected) + slack, (step, rho, expected)
        assert value == pytest.approx(loss.item(), rel=1e-2 if storage == "bf16" else 1e-6)
        step_from(rho, slow, model)
        assert not any(p.grad is not None for p in named.values())
    assert model().item() < 0.9 * first


def test_forward_grad_of_a_quadratic_in_closed_form() -> None:
    """grad = 2 c (x - 1/4), without autograd on either side; fp64, so 1e-9."""
    model = Quadratic(torch.float64)
    opt, slow = forward_grad(model, "fp64")
    for _ in range(30):
        z = slow.draw()
        terms = [2 * np.linspace(0.5, 2, v.x.size) * (v.x - 0.25) * z[v.name] for v in slow.variables]
        opt.step(lambda: model())
        _, rho = opt.last_record.losses
        assert rho == pytest.approx(math.fsum(np.concatenate(terms)), rel=1e-9)
        step_from(rho, slow, model)


def test_forward_grad_skips_a_loss_that_is_not_finite() -> None:
    """Nothing moves, and the step is counted: the next one has z of its own number."""
    model = Quadratic(torch.float32)
    opt, slow = forward_grad(model, "fp32")
    curvature = model.parts[0].c
    model.parts[0].c = curvature * math.nan
    with skipping():
        opt.step(lambda: model())
    named = dict(model.named_parameters())
    for v in slow.variables:
        same(numpy_of(named[v.name]), v)
    model.parts[0].c = curvature
    opt.step(lambda: model())
    slow.step += 1
    step_from(opt.last_record.losses[1], slow, model)
