"""Tensors of every dtype and form, a module that holds them, and their bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def dtype_id(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor's values in logical order."""
    return tensor.detach().contiguous().clone().reshape(-1).view(torch.uint8).numpy().tobytes()


def all_bits(params: list[Tensor]) -> list[bytes]:
    return [bits(p) for p in params]


def state_bits(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> list[bytes]:
    return [bits(m) for p in params for _, m in sorted(optimizer.state.get(p, {}).items())]


class Log:
    """What a test writes down in an evaluation; the contents of plain lists would be put back."""

    def __init__(self) -> None:
        self.seen: list[Any] = []


class Bag(nn.Module):
    """Parameters of any form, a smooth loss that every one of their elements reaches, and what each evaluation saw."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.log = Log()
        for i, tensor in enumerate(tensors):
            self.register_parameter(f"p{i}", nn.Parameter(tensor))

    @property
    def seen(self) -> list[list[Tensor]]:
        return self.log.seen

    def forward(self) -> Tensor:
        wide = torch.float64 if any(p.dtype == torch.float64 for p in self.parameters()) else torch.float32
        self.log.seen.append([p.detach().clone() for p in self.parameters()])
        loss = torch.zeros((), dtype=wide)
        for p in self.parameters():
            x = p.to(wide).reshape(-1)
            loss = loss + ((x - torch.linspace(-1, 1, x.numel(), dtype=wide, device=x.device)) ** 2).sum()
        return loss


def weights(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """N(0, 0.3^2), rounded to dtype."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.3).to(dtype)


FORMS = {
    "contiguous": lambda d: weights(d, 12, 17),
    "transposed": lambda d: weights(d, 17, 12).t(),
    "slice": lambda d: weights(d, 9, 40)[2:7, 3:31],
    "one": lambda d: weights(d, 1),
    "empty": lambda d: weights(d, 0, 4),
    "cube": lambda d: weights(d, 3, 4, 5),
}


def every_form(dtype: torch.dtype) -> Bag:
    return Bag([make(dtype) for make in FORMS.values()])


def numpy_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).numpy().copy()


# Elements around whatever kernels write to in a test: a program that masks nothing writes less than 8192 too many.
BAND = 8192 + 64
