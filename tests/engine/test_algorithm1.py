"""Algorithm 1, MeZO's ZO-SGD and the released code's step against ten-line numpy versions, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from helpers.tensors import dtype_id, numpy_of
from jaguar import ZOSGD, JaguarSignSGD
from jaguar.method import rules
from jaguar.method.method import Method

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)


def algorithm1(x: list[np.ndarray], m: list[np.ndarray], at: tuple[int, int], losses: list[float], lrs: list[float],
               taus: list[float], beta: float) -> None:  # fmt: skip
    """arXiv 2506.04430, Algorithm 1, with one coordinate i of tensor k; every operation rounds to the dtype of x."""
    (k, i), t = at, x[0].dtype.type
    rho = (t(losses[0]) - t(losses[1])) / t(2 * taus[k])
    m[k][i] = t(beta) * m[k][i] + t(1 - beta) * rho
    for x_k, m_k, lr in zip(x, m, lrs, strict=True):
        x_k -= t(lr) * np.sign(m_k)


def moved_coordinate(x: list[np.ndarray], seen: list[np.ndarray]) -> tuple[int, int]:
    places = [(k, int(i)) for k, (a, b) in enumerate(zip(x, seen, strict=True)) for i in np.flatnonzero(a != b)]
    assert len(places) == 1
    return places[0]


def algorithm1_law(dtype: torch.dtype, beta: float, steps: int = 500) -> None:
    gen = torch.Generator().manual_seed(1)
    u, v = (torch.randn(n, generator=gen, dtype=torch.float64).to(dtype).requires_grad_() for n in (13, 9))
    target = torch.randn(22, generator=gen, dtype=torch.float64).to(dtype)
    lrs, taus = [1e-2, 3e-3], [1e-2, 7e-3]
    groups = [{"params": [p], "lr": lr, "tau": tau} for p, lr, tau in zip((("u", u), ("v", v)), lrs, taus, strict=True)]
    opt = JaguarSignSGD(groups, beta=beta, coordinates=1, update="all", seed=6)
    x, m = [numpy_of(p).astype(str(dtype)[6:]) for p in (u, v)], [np.zeros(n, dtype=str(dtype)[6:]) for n in (13, 9)]
    seen: list[list[np.ndarray]] = []
    losses: list[float] = []

    def closure() -> torch.Tensor:
        seen.append([p.detach().numpy().copy() for p in (u, v)])
        loss = (torch.cat([u, v]) - target).square().sum().sin() + u[0] * v[0]
        losses.append(loss.item())
        return loss

    counts = np.zeros(22)
    for _ in range(steps):
        seen.clear(), losses.clear()
        opt.step(closure)
        k, i = moved_coordinate(x, seen[0])
        counts[13 * k + i] += 1
        t = x[0].dtype.type
        assert seen[0][k][i] == x[k][i] + t(taus[k]) and seen[1][k][i] == x[k][i] - t(taus[k])
        algorithm1(x, m, (k, i), losses, lrs, taus, beta)
        for p, x_k, m_k in zip((u, v), x, m, strict=True):
            assert np.array_equal(p.detach().numpy(), x_k)
            assert np.array_equal(opt.state[p]["momentum"].numpy(), m_k)
    assert (counts > 0).all() and counts.sum() == steps
    # multinomial with p = 1/22: five standard deviations
    assert np.abs(counts - steps / 22).max() < 5 * np.sqrt(steps / 22)


@dtypes
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_algorithm_1(dtype: torch.dtype, beta: float) -> None:
    algorithm1_law(dtype, beta)


def zo_sgd_law(dtype: torch.dtype, distribution: str, momentum: float, weight_decay: float, steps: int = 60) -> None:
    """A shadow optimizer over zeros with lr 0 and tau a power of two shows z; numpy does the rest."""
    name = str(dtype)[6:]
    shapes = {"a": (7, 5), "b": (11,)}
    weights = {n: torch.randn(s, dtype=dtype).requires_grad_() for n, s in shapes.items()}
    zeros = {n: torch.zeros(s, dtype=dtype).requires_grad_() for n, s in shapes.items()}
    lr, tau = 0.013, 0.011
    opt = ZOSGD(
        weights.items(), lr=lr, momentum=momentum, weight_decay=weight_decay, tau=tau, distribution=distribution, seed=3
    )
    shadow = ZOSGD(zeros.items(), lr=0.0, tau=2.0**-6, distribution=distribution, seed=3)
    x = {n: w.detach().numpy().copy() for n, w in weights.items()}
    m = {n: np.zeros_like(v) for n, v in x.items()}
    t = np.dtype(name).type

    for _ in range(steps):
        z: dict[str, np.ndarray] = {}
        losses: list[float] = []

        def look() -> torch.Tensor:
            for n, w in zeros.items():
                z.setdefault(n, w.detach().numpy() * 64)  # noqa: B023
            return sum(w.sum() for w in zeros.values())

        def closure() -> torch.Tensor:
            side = t(tau) if not losses else -t(tau)  # noqa: B023
            for n, w in weights.items():
                assert np.array_equal(w.detach().numpy(), x[n] + z[n] * side)  # noqa: B023
            loss = sum((w * (1 + w)).sum() for w in weights.values())
            losses.append(loss.item())  # noqa: B023
            return loss

        shadow.step(look)
        opt.step(closure)
        rho = (t(losses[0]) - t(losses[1])) / t(2 * tau)
        for n, w in weights.items():
            m[n] = t(momentum) * m[n] + rho * z[n]
            x[n] = x[n] * t(1 - lr * weight_decay) - t(lr) * m[n]
            assert np.array_equal(w.detach().numpy(), x[n])
            if momentum:
                assert np.array_equal(opt.state[w]["momentum"].numpy(), m[n])
    assert momentum or not any(opt.state.values()), "no momentum, no memory"


@dtypes
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.3)])
def test_zo_sgd(dtype: torch.dtype, distribution: str, momentum: float, weight_decay: float) -> None:
    zo_sgd_law(dtype, distribution, momentum, weight_decay)


def released_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(60, 40), nn.Linear(40, 20))


TOUCHED = {"0.weight": (24, 4, 6), "0.bias": (4, 4, 1), "1.weight": (8, 2, 4), "1.bias": (2, 2, 1)}


def test_released_oracle_values() -> None:
    """zo_methods.md 6.2: entries touched per step, each by exactly lr, all with one common sign; one joint block."""
    model, lr = released_model(), 3e-3
    opt = JaguarSignSGD(model.named_parameters(), lr=lr, tau=1e-3, released=True)
    assert repr(opt).count("beta=") == 0
    signs = set()
    for _ in range(20):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        opt.step(lambda: (model(torch.ones(2, 60)) - 1).square().mean())
        steps = set()
        for name, p in model.named_parameters():
            moved = (p != before[name]).reshape(p.shape[0], -1)
            assert (int(moved.sum()), int(moved.any(1).sum()), int(moved.any(0).sum())) == TOUCHED[name]
            mask = moved.reshape(p.shape)
            for sign in (1, -1):
                if torch.equal(p[mask], before[name][mask] + sign * torch.tensor(lr, dtype=torch.float32)):
                    steps.add(sign)
        assert len(steps) == 1
        signs |= steps
    assert signs == {1, -1}


@pytest.mark.parametrize("filling", [0.5, -1e6])
def test_released_forgets_momentum(filling: float) -> None:
    model, other = released_model(), released_model()
    other.load_state_dict(model.state_dict())
    opts = [JaguarSignSGD(net.named_parameters(), lr=1e-2, released=True) for net in (model, other)]
    for net, opt in zip((model, other), opts, strict=True):
        for _ in range(5):
            opt.step(lambda: (net(torch.ones(2, 60)) - 1).square().mean())  # noqa: B023
            if net is other:
                for state in opt.state.values():
                    state["momentum"].fill_(filling)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(8,), (15,), (45,), (60, 40), (6, 5, 3), (20, 2, 2, 3), (1, 1)], ids=str)
def test_released_touches_a_tenth_per_axis(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    opt = JaguarSignSGD([x], lr=1.0, released=True)
    opt.step(lambda: x.sum())
    rows, columns = shape[0], int(np.prod(shape[1:], dtype=int))
    assert int((x != 0).sum()) == max(1, rows // 10) * max(1, columns // 10)
    assert set(x.detach().unique().tolist()) <= {0.0, -1.0}, "the loss grows with the block, so every entry goes down"


@pytest.mark.parametrize("breakage", ["flipped-sign", "forgotten-half", "fused"])
def test_the_laws_notice_broken_arithmetic(breakage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm1_law(torch.float32, 0.9, steps=200)
    real_step, real_entry, real_scalars = rules.sign_step, rules.heavy_ball, Method.scalars
    if breakage == "flipped-sign":
        monkeypatch.setattr(rules, "sign_step", lambda x, m, decay, lr: real_step(x, -m, decay, lr))
    elif breakage == "forgotten-half":
        monkeypatch.setattr(
            Method,
            "scalars",
            lambda self, kind, group, lr, tau, rho, *more: real_scalars(
                self, kind, group, lr, tau, [2 * r for r in rho], *more
            ),
        )
    else:
        monkeypatch.setattr(
            rules, "heavy_ball", lambda m, g, beta: real_entry(m.double(), g.double(), beta).to(m.dtype)
        )
    with pytest.raises(AssertionError):
        algorithm1_law(torch.float32, 0.9, steps=200)
