"""numpy's global generator: equal in every evaluation of a step, and afterwards what it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import jaguar
from jaguar.optimizers import isolation


@pytest.fixture
def _generator():
    bits, state = np.random.get_bit_generator(), np.random.get_state()
    yield
    np.random.set_bit_generator(bits)
    np.random.set_state(state)


def evaluations() -> list[np.ndarray]:
    """What the closure of a step draws."""
    x, seen = torch.zeros(3, requires_grad=True), []

    def closure() -> Tensor:
        seen.append(np.random.standard_normal(3))
        return x.detach().sum()

    jaguar.ZOSGD([x]).step(closure)
    return seen


def plain(state: Any) -> Any:
    return [state[key] if key != "state" else [bytes(state[key]["key"]), state[key]["pos"]] for key in sorted(state)]


@pytest.mark.usefixtures("_generator")
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("drawn", [0, 1, 2])
def test_numpys_generator_is_untouched(drawn: int, old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a normal number in reserve, too, which an odd number of draws leaves; `old`: of numpy before 1.24."""
    if old:
        numpy = isolation._numpy_random()
        without = {n: getattr(numpy, n) for n in ("get_state", "set_state", "seed")}
        monkeypatch.setattr(isolation, "_numpy_random", lambda: type("numpy", (), without))
    np.random.seed(5)
    np.random.standard_normal(drawn)
    before, bits = plain(np.random.get_state(legacy=False)), np.random.get_bit_generator()
    first, second = evaluations()
    assert (first == second).all()
    assert plain(np.random.get_state(legacy=False)) == before and np.random.get_bit_generator() is bits


@pytest.mark.usefixtures("_generator")
def test_another_bit_generator_of_the_user_is_put_back() -> None:
    np.random.set_bit_generator(np.random.PCG64(7))
    before, bits = str(np.random.get_state(legacy=False)), np.random.get_bit_generator()
    first, second = evaluations()
    assert (first == second).all()
    assert str(np.random.get_state(legacy=False)) == before and np.random.get_bit_generator() is bits
