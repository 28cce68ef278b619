"""docs/algorithms.md is true: its numpy versions of Algorithms 1 and 2 take the steps of the optimizers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jaguar import JaguarMuon, JaguarSignSGD

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "algorithms.md").read_text("utf-8"), flags=re.S | re.M)
TARGET = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Places = list[tuple[int, ...]]


def loss(x: Tensor) -> Tensor:
    return (x.reshape(6, 4) - TARGET).square().sum().sin() + x.reshape(-1)[0] * x.reshape(-1)[5]


class Told:
    """A generator that draws the coordinates of a run that was."""

    def __init__(self, places: Places) -> None:
        self._numbers: Iterator[int] = iter([number for place in places for number in place])

    def integers(self, high: int) -> int:
        number = next(self._numbers)
        assert 0 <= number < high
        return number


def of_the_package(make: Callable[[Tensor], torch.optim.Optimizer], shape: tuple[int, ...], steps: int) -> Any:
    """Parameters, momentum and the perturbed coordinates of a run from zero."""
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimizer, places = make(x), []
    for _ in range(steps):
        before, seen = x.detach().clone(), []
        optimizer.step(lambda: (seen.append(x.detach().clone()), loss(x))[1])  # noqa: B023
        (place,) = (seen[0] != before).nonzero().tolist()
        places.append(tuple(place))
    return x.detach().numpy(), optimizer.state[x]["momentum"].numpy(), places


def of_the_page(name: str, blocks: list[str], shape: tuple[int, ...], places: Places, *numbers: float) -> Any:
    names: dict[str, Any] = {}
    for block in blocks:
        if "def " in block:
            exec(block, names)
    return names[name](
        lambda x: loss(torch.from_numpy(x)).item(), np.zeros(shape), len(places), *numbers, Told(places)
    )  # fmt: skip


def signsgd(blocks: list[str], beta: float) -> None:
    lr, tau = 1e-2, 3e-3
    x, m, places = of_the_package(
        lambda p: JaguarSignSGD([p], lr, beta, tau=tau, coordinates=1, update="all", backend="reference"), (24,), 300
    )
    page_x, page_m = of_the_page("jaguar_signsgd", blocks, (24,), places, lr, tau, beta)
    assert len(set(places)) == 24
    assert np.array_equal(page_x, x) and np.array_equal(page_m, m)


def muon(blocks: list[str], beta: float) -> None:
    """Products are those of another library, which rounds differently."""
    lr, tau = 1e-2, 3e-3
    make = {"coordinates": 1, "ns_dtype": torch.float64, "backend": "reference"}
    x, m, places = of_the_package(
        lambda p: JaguarMuon([{"params": [p], "ns": True}], lr, beta, tau=tau, **make), (6, 4), 300
    )
    page_x, page_m = of_the_page("jaguar_muon", blocks, (6, 4), places, lr, tau, beta)
    assert len(set(places)) == 24 and np.abs(x).max() > 0.1
    assert np.abs(page_x - x).max() < 1e-8 and np.abs(page_m - m).max() < 1e-8


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_algorithm_1_of_the_page_is_jaguar_signsgd(beta: float) -> None:
    signsgd(BLOCKS, beta)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_algorithm_2_of_the_page_is_jaguar_muon(beta: float) -> None:
    muon(BLOCKS, beta)


BROKEN = {
    "momentum begins anew": (signsgd, "m[i] = beta * m[i] +", "m = 0 * m; m[i] ="),
    "only the sampled coordinate moves": (signsgd, "lr * np.sign(m)", "lr * np.sign(m) * e"),
    "one-sided": (signsgd, "f(x - tau * e)) / (2 * tau)", "f(x)) / tau"),
    "eleven iterations": (muon, "range(steps):\n        A", "range(steps + 1):\n        A"),
    "no normalisation": (muon, "lr * newton_schulz(M)", "lr * M"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_page_with_another_algorithm_is_noticed(case: str) -> None:
    law, old, new = BROKEN[case]
    broken = [block.replace(old, new) for block in BLOCKS]
    assert broken != BLOCKS
    with pytest.raises(AssertionError):
        law(broken, 0.9)


@pytest.mark.parametrize("name", ["jaguar_signsgd", "jaguar_muon"])
def test_they_are_twenty_lines(name: str) -> None:
    (block,) = [block for block in BLOCKS if f"def {name}" in block]
    assert len(block.splitlines()) <= 20
