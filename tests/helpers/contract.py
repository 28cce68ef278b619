"""Every optimizer beside torch.optim.SGD, and a small network for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jaguar
from helpers.laws import CONFIGS, TAU, built
from helpers.tensors import weights

OURS: dict[str, Any] = {
    name: (lambda p, cls=cls, options=options, **o: built(cls, p, {"tau": TAU} | options | o))
    for name, (cls, options) in CONFIGS.items()
}
TORCH = {"torch": lambda p, **o: torch.optim.SGD(p, **({"lr": 1e-3, "momentum": 0.9} | o))}
everyone = pytest.mark.parametrize("make", [*TORCH.values(), *OURS.values()], ids=[*TORCH, *OURS])
ours = pytest.mark.parametrize("make", OURS.values(), ids=list(OURS))
Make = Callable[..., Any]


class Net(nn.Module):
    """restore="module" moves parameters in the forward of the module that has them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weights(torch.float32, 6, 8)), nn.Parameter(weights(torch.float32, 8))

    def forward(self) -> Tensor:
        return (torch.ones(2, 6) @ self.weight + self.bias - 1.0).square().mean()


def step(opt: Any, net: nn.Module) -> Any:
    """One step, as users of either take it."""
    if isinstance(opt, jaguar.ZerothOrder):
        return opt.step(net)
    opt.zero_grad()
    net().backward()
    return opt.step()


def pair(make: Make, **options: Any) -> tuple[Any, Net]:
    net = Net()
    return make(net.named_parameters(), **options), net
