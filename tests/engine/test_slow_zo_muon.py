"""A slow version of ZO-Muon, and the package against it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import jaguar
from helpers.oracles import DIRECTION
from helpers.slow import (
    SHAPES,
    Arrays,
    Dense,
    Var,
    loss_of,
    pair,
    same,
    side_by_side,
    signs,
    went_down,
)
from helpers.tensors import numpy_of


def newton_schulz(m: np.ndarray) -> np.ndarray:
    """Ten cubic steps, in fp64."""
    norm = math.sqrt(math.fsum(np.square(m).ravel()))
    a = m / norm if norm else m
    for _ in range(10):
        a = 1.5 * a - 0.5 * (a @ a.T @ a)
    return a


class SlowMuon(Dense):
    """Algorithm 3. Newton-Schulz is in fp64 whatever the dtype; everything else is as elsewhere."""

    defaults: ClassVar = {"momentum": 0.0, "vector_lr": None}

    def choose(self, g: Arrays) -> Any:
        def move() -> None:
            for v in self.variables:
                keep = self.own.momentum
                m = self.momentum(v, keep, g[v.name])
                if not keep:  # g is stored as momentum is, for the step
                    v.state.clear()
                if v.settings["ns"]:
                    lr = v.lr
                    step = newton_schulz(m.astype(np.float64).reshape(SHAPES[v.name])).reshape(-1).astype(self.num)
                else:
                    lr = 0.01 * v.lr if self.own.vector_lr is None else self.own.vector_lr
                    step = np.sign(m)
                v.x = self.store(v, v.x * self.num(1 - lr * v.weight_decay) - self.num(lr) * step)

        return move


# -- ZO-Muon -----------------------------------------------------------------------------------------------------------


# Powers of two, so that it is the same whether vector_lr is kept or its ratio to lr. ns=False: the sign rule.
MATRICES: dict[str, dict[str, Any]] = {
    "head": {"ns": True, "lr": 2.0, "tau": 2.0**-3, "weight_decay": 0.3},
    "layers.4": {"ns": False, "weight_decay": 0.2},
    "layers.2.b": {"ns": False, "weight_decay": 0.2},
    "embed": {"ns": False},
    "": {"ns": True},
}


def within(share: float) -> Callable[[np.ndarray, Var], None]:
    """The sign rule bit for bit; of matrices, an error of the whole of Newton-Schulz relative to its size."""

    def check(found: np.ndarray, v: Var) -> None:
        if not v.settings["ns"]:
            return same(found, v)
        size = v.lr * math.sqrt(min(SHAPES[v.name]))
        assert np.linalg.norm(found - v.x) <= share * size + 4 * 2.0**-53 * np.linalg.norm(v.x)
        return None

    return check


def within_a_spacing(found: np.ndarray, v: Var) -> None:
    """bf16 beside bf16: the noise picks the same neighbour but where Newton-Schulz differs by more than it leaves."""
    if v.settings["ns"]:
        apart = np.abs(found - v.x) / np.exp2(np.floor(np.log2(np.maximum(np.abs(v.x), 1e-30))) - 7)
        assert apart.max() <= 1 and np.mean(apart > 0) <= 0.02, (apart.max(), np.mean(apart > 0))
    else:
        same(found, v)


def muon(storage: str, options: dict[str, Any]) -> Any:
    options = {"lr": 2.0**-7, "momentum": 0.9} | options
    return pair(jaguar.ZOMuon, SlowMuon, storage, options, MATRICES, ns_dtype=torch.float64)


# fp32: ten steps multiply small singular values by 1.5^10 = 58, and with them the 2^-24 of each of the dozen roundings
# before they are large: below 1e-4. x itself is rounded to 2^-24, 2^-17 of a step of 2^-7.
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    ("storage", "check"), [("fp64", within(1e-11)), ("fp32", within(1e-4)), ("bf16", within_a_spacing)]
)
def test_zo_muon(storage: str, check: Any, momentum: float) -> None:
    opt, slow, params = muon(storage, {"momentum": momentum})
    went_down(side_by_side(opt, slow, params, falling=1.0, check=check))


def test_zo_muon_with_a_rate_for_vectors() -> None:
    opt, slow, params = muon("fp64", {"vector_lr": 2.0**-9})
    side_by_side(opt, slow, params, 60, falling=1.0, check=within(1e-11))


def test_zo_muon_algorithm_4() -> None:
    """What E has to be, from where the losses are taken and from the step: the definition leaves its numbers open.

    1e-5: E may be made in fp32 by an iteration of its own.
    """
    opt, slow, params = pair(jaguar.ZOMuon, Dense, "fp64", {"lr": 2.0**-4, "algorithm": 4}, MATRICES)
    seen: list[Arrays] = []
    before: list[Arrays] = []
    losses: list[float] = []
    directions: dict[str, list[np.ndarray]] = {n: [] for n in SHAPES}

    def closure() -> torch.Tensor:
        seen.append({n: numpy_of(p).reshape(-1) for n, p in params.items()})
        losses.append(loss_of(seen[-1]))
        return torch.tensor(losses[-1], dtype=torch.float64)

    for _ in range(25):
        seen.clear(), losses.clear()
        before.append({n: numpy_of(p).reshape(-1) for n, p in params.items()})
        opt.step(closure)
        assert len(losses) == 2
        for v in slow.variables:
            x, after = before[-1][v.name], numpy_of(params[v.name]).reshape(-1)
            up, down = ((point[v.name] - x) / v.tau for point in seen)
            sign = np.sign(losses[0] - losses[1])
            if not v.settings["ns"]:
                lr = 0.01 * v.lr
                e = signs(slow.key(DIRECTION), v.stream, x.size)
                assert np.allclose(up, e, rtol=0, atol=1e-12)
                assert np.array_equal(after, x * (1 - lr * v.weight_decay) - lr * (sign * e)), v.name
                continue
            E = (x * (1 - v.lr * v.weight_decay) - after) / v.lr * sign
            assert np.allclose(up, E, rtol=0, atol=1e-5) and np.allclose(down, -E, rtol=0, atol=1e-5)
            E = E.reshape(SHAPES[v.name])
            E = E if E.shape[0] <= E.shape[1] else E.T
            assert np.allclose(E @ E.T, np.eye(len(E)), rtol=0, atol=1e-5)
            directions[v.name].append(E)
        slow.step += 1
    assert loss_of({n: numpy_of(p).reshape(-1) for n, p in params.items()}) < loss_of(before[0])
    drawn = [E for name in ("layers.0.w", "layers.1.w", "layers.2.w", "layers.3.w") for E in directions[name]]
    assert len(drawn) == 100
    between = [np.abs(a - b).max() for i, a in enumerate(drawn) for b in drawn[:i]]
    assert min(between) > 1e-2  # neither the same in every step nor the same for all
    # No sign or place is preferred: entries of 36 have the variance 1/9, so their mean over 100 draws 1/30.
    assert np.abs(np.mean(drawn, 0)).max() < 5 / 30
