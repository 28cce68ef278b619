"""torch.compile in steady state: nothing is compiled after the first step."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.changing import Changing, setter
from helpers.laws import make
from helpers.tensors import bits
from jaguar import JaguarSignSGD


@pytest.fixture
def frames() -> Iterator[Callable[[], int]]:
    """The number of frames that were compiled; nothing of this outlives the test."""
    torch._dynamo.reset()
    gc.collect()
    counter = itertools.count()
    compiled: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        compiled.append(next(counter))
        return graph.forward

    yield backend, compiled
    torch._dynamo.reset()


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.norm(self.first(x))))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, momentum=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).tanh()


COMPILED = ["a wrapper", "in place", "a layer", "the closure", "the forward"]


@pytest.mark.parametrize(("how", "config"), [(how, "fraction") for how in COMPILED] + [("a wrapper", "gaussian-copy")])
def test_nothing_is_compiled_after_the_first_step(how: str, config: str, frames: Any) -> None:
    backend, compiled = frames
    model, twin = Norm(), Norm()
    x = torch.randn(9, 4)

    def closure() -> Tensor:
        return call(x).square().mean()

    call: Any = model
    run = closure
    if how == "a wrapper":
        call = torch.compile(model, backend=backend)
    elif how == "in place":
        model.compile(backend=backend)
    elif how == "a layer":
        model.block.compile(backend=backend)
    elif how == "the forward":
        call = torch.compile(model.forward, backend=backend)
    else:
        run = torch.compile(closure, backend=backend)
    before = [bits(b) for b in model.buffers()]
    opt, other = make(config, model.named_parameters()), make(config, twin.named_parameters())
    opt.step(run)
    n = len(compiled)
    assert n > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(20):
            opt.step(run)
            assert [bits(b) for b in model.buffers()] == before
    assert len(compiled) == n
    for _ in range(21):
        other.step(lambda: twin(x).square().mean())
    assert [bits(p) for p in model.parameters()] == [bits(p) for p in twin.parameters()], "nor do the results differ"


def test_counters_of_compiled_modules(frames: Any) -> None:
    backend, compiled = frames
    model = Changing(setter(steps=torch.zeros((), dtype=torch.int64)), lambda m: 0.0)

    class Counts(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 1)
            self.calls, self.mean = 0, torch.zeros(1)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.mean = 0.9 * self.mean + x.mean()
            return super().forward(x) * self.calls + self.mean

    model = Counts()
    run = torch.compile(model, backend=backend)
    opt = JaguarSignSGD(model.parameters(), coordinates=0.5)
    opt.step(lambda: run(torch.ones(3, 4)).mean())
    n = len(compiled)
    for _ in range(9):
        opt.step(lambda: run(torch.ones(3, 4)).mean())
        assert model.calls == 0 and model.mean.tolist() == [0.0]
    assert len(compiled) == n
