"""JAGUAR Muon against Algorithm 2 in numpy, its paths, its period, and the closed form of the released code."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import jaguar
from helpers.muon import groups, loss_of, model
from helpers.tensors import all_bits, numpy_of, state_bits
from jaguar import JaguarMuon, JaguarSignSGD
from jaguar.backends.polar import run as polar_run
from jaguar.method.directions import ReleasedBlock
from jaguar.method.rng import Draw

F64 = {"ns_dtype": torch.float64}


def newton_schulz_numpy(M: np.ndarray, steps: int = 10) -> np.ndarray:
    """The paper's iteration, without transposition: A <- 3/2 A - 1/2 A A^T A from A / ||A||_F."""
    norm = np.sqrt((M**2).sum())
    A = M / norm if norm else M
    for _ in range(steps):
        A = 1.5 * A - 0.5 * A @ A.T @ A
    return A


@pytest.mark.parametrize(("weight_decay", "update"), [(0.0, "sampled"), (0.3, "all")])
def test_algorithm_2(weight_decay: float, update: str) -> None:
    """500 steps with one coordinate: parameters to 1e-9 (BLAS rounds differently), momentum bit for bit."""
    p = model()
    lr, tau, beta, vector_lr = 3e-2, 1e-3, 0.9, 7e-3
    opt = JaguarMuon(groups(p), lr=lr, tau=tau, beta=beta, weight_decay=weight_decay, coordinates=1, update=update,
                     vector_lr=vector_lr, seed=5, **F64)  # fmt: skip
    x = {n: numpy_of(t.detach()).copy() for n, t in p.items()}
    m = {n: np.zeros_like(v) for n, v in x.items()}
    seen: list[dict[str, np.ndarray]] = []
    losses: list[float] = []

    def closure() -> Tensor:
        seen.append({n: numpy_of(t.detach()).copy() for n, t in p.items()})
        losses.append(float(loss_of(p)))
        return loss_of(p)

    touched = set()
    for _ in range(500):
        seen.clear(), losses.clear()
        before = {n: numpy_of(t.detach()).copy() for n, t in p.items()}
        opt.step(closure)
        ((name, place),) = [(n, i) for n in x for i in zip(*np.nonzero(seen[0][n] != before[n]), strict=True)]
        touched.add((name, place))
        sign = np.sign(seen[0][name][place] - before[name][place])
        rho = (losses[0] - losses[1]) / (2 * tau)
        m[name][place] = beta * m[name][place] + (1 - beta) * rho * sign
        for n in x:
            if x[n].ndim == 2:
                x[n] = (1 - lr * weight_decay) * x[n] - lr * newton_schulz_numpy(m[n])
            else:
                # The ratio to lr is what is kept: 7e-3 / 3e-2 * 3e-2 may differ from 7e-3 in the last bit.
                rate = lr * (vector_lr / lr)
                moving = np.ones(x[n].shape, bool) if update == "all" else np.zeros(x[n].shape, bool)
                if n == name:
                    moving[place] = True
                stepped = (1 - rate * weight_decay) * x[n] - rate * np.sign(m[n])
                x[n] = np.where(moving, stepped, x[n])
            assert np.array_equal(numpy_of(opt.state[p[n]]["momentum"]), m[n])
            assert np.abs(numpy_of(p[n].detach()) - x[n]).max() < 1e-9 * max(1.0, np.abs(x[n]).max())
    assert len(touched) == 24 + 21 + 5


def test_a_step_lowers_the_loss_of_a_matrix_problem() -> None:
    p = {"a": torch.randn(8, 8).requires_grad_()}
    target = torch.randn(8, 8)
    opt = JaguarMuon([{"params": p.items(), "ns": True}], lr=0.05, coordinates=1.0, beta=0.0)
    losses = [float(opt.step(lambda: (p["a"] - target).square().mean())) for _ in range(300)]
    assert losses[-1] < 0.7 * losses[0]


def test_one_newton_schulz_per_matrix_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = polar_run.reference.newton_schulz
    monkeypatch.setattr(
        polar_run.reference, "newton_schulz", lambda G, *rest: (seen.append(tuple(G.shape)), real(G, *rest))[1]
    )
    p = model(torch.float32)
    opt = JaguarMuon(groups(p), coordinates=0.5)
    opt.step(lambda: loss_of(p))
    assert sorted(seen) == [(1, 3, 7), (1, 6, 4)]


def test_momentum_is_that_of_jaguar_signsgd_for_the_same_records() -> None:
    p, q = model(torch.bfloat16), model(torch.bfloat16)
    one = JaguarMuon(groups(p), coordinates=0.3, lr=0.0, tau=2.0**-5)
    other = JaguarSignSGD(q.items(), coordinates=0.3, lr=0.0, tau=2.0**-5)
    for _ in range(5):
        one.step(lambda: loss_of(p).float())
        other.step(lambda: loss_of(q).float())
    assert one.last_record.losses == other.last_record.losses
    assert state_bits(one, list(p.values())) == state_bits(other, list(q.values()))


# -- periods -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [1, 2, 3, 5])
def test_every_matrix_has_its_turn_and_moves_so_many_lr(period: int) -> None:
    p = {f"m{i}": torch.randn(4, 6, dtype=torch.float64).requires_grad_() for i in range(4)}
    lr, wd = 0.01, 0.5
    opt = JaguarMuon(
        [{"params": p.items(), "ns": True}], lr=lr, weight_decay=wd, coordinates=0.5, ns_period=period, **F64
    )
    moved: dict[str, list[int]] = {n: [] for n in p}
    for step in range(2 * period):
        before = {n: t.detach().clone() for n, t in p.items()}
        opt.step(lambda: sum(t.square().sum() * (1 + i) for i, t in enumerate(p.values())))
        for n, t in p.items():
            if not torch.equal(t, before[n]):
                moved[n].append(step)
                O = jaguar.newton_schulz(opt.state[t]["momentum"], dtype=torch.float64)  # noqa: E741
                expected = before[n] * (1 - period * lr * wd) - period * lr * O
                assert (t - expected).abs().max() < 1e-14
    assert moved == {f"m{i}": [i % period, i % period + period] for i in range(4)}


def test_the_rotation_goes_on_after_loading() -> None:
    p = {f"m{i}": torch.randn(4, 6).requires_grad_() for i in range(3)}
    q = {n: t.detach().clone().requires_grad_() for n, t in p.items()}
    runs = [
        JaguarMuon([{"params": x.items(), "ns": True}], coordinates=0.5, ns_period=3, vector_lr=1e-4) for x in (p, q)
    ]
    closures = [lambda x=x: sum(t.square().sum() for t in x.values()) for x in (p, q)]
    for _ in range(4):
        runs[0].step(closures[0])
    for _ in range(2):
        runs[1].step(closures[1])
    again = JaguarMuon([{"params": q.items(), "ns": True}], coordinates=0.5, ns_period=3)
    again.load_state_dict(runs[1].state_dict())
    for _ in range(2):
        again.step(closures[1])
    assert all_bits(list(p.values())) == all_bits(list(q.values()))
    assert again.param_groups[0]["vector_lr"] == pytest.approx(0.1)


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "ns", "view"),
    [
        ((4, 6), True, lambda m: m),
        ((4, 6), "flatten", lambda m: m),
        ((1, 6), True, lambda m: m),
        ((6, 1), True, lambda m: m),
        ((3, 4, 5), True, lambda m: m),  # a batch
        ((3, 4, 5), "flatten", lambda m: m.view(3, 20)),
        ((3, 2, 2, 5), "flatten", lambda m: m.view(3, 20)),
        ((3, 2, 2, 5), True, lambda m: m.view(3, 20)),
    ],
)
@pytest.mark.parametrize("contiguous", [True, False])
def test_what_newton_schulz_sees(shape: tuple[int, ...], ns: Any, view: Any, contiguous: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    x = x if contiguous else x.transpose(0, 1).contiguous().transpose(0, 1)
    x.requires_grad_()
    before = x.detach().clone()
    opt = JaguarMuon([{"params": [("x", x)], "ns": ns}], lr=0.1, coordinates=1.0, **F64)
    opt.step(lambda: x.square().sum() + x.sum())
    m = opt.state[x]["momentum"]
    O = jaguar.newton_schulz(view(m), dtype=torch.float64).view(shape)  # noqa: E741
    assert (x - (before - 0.1 * O)).abs().max() < 1e-15


@pytest.mark.parametrize(
    ("adjust", "expected"),
    [(None, 1.0), ("original", 2.0), ("match_rms_adamw", 0.2 * math.sqrt(8))],
)
def test_adjusted_learning_rates(adjust: str | None, expected: float) -> None:
    x = torch.randn(8, 2, dtype=torch.float64).requires_grad_()
    before = x.detach().clone()
    opt = JaguarMuon(
        [{"params": [("x", x)], "ns": True}], lr=0.1, weight_decay=0.5, coordinates=1.0, adjust_lr=adjust, **F64
    )
    opt.step(lambda: x.square().sum())
    O = jaguar.newton_schulz(opt.state[x]["momentum"], dtype=torch.float64)  # noqa: E741
    assert (x - (before * 0.95 - 0.1 * expected * O)).abs().max() < 1e-15


@pytest.mark.parametrize("momentum_dtype", [None, torch.float32, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_storage(dtype: torch.dtype, momentum_dtype: torch.dtype | None) -> None:
    x = torch.randn(12, 20).to(dtype).requires_grad_()
    before = x.detach().clone().float()
    opt = JaguarMuon([{"params": [("x", x)], "ns": True}], lr=0.25, tau=2.0**-4, coordinates=1.0,
                     momentum_dtype=momentum_dtype)  # fmt: skip
    opt.step(lambda: x.float().square().sum())
    m = opt.state[x]["momentum"]
    assert m.dtype == (momentum_dtype or (torch.bfloat16 if dtype == torch.float16 else dtype))
    O = jaguar.newton_schulz(m.float())  # noqa: E741
    step = torch.finfo(dtype).eps * 4  # |x| stays below 4, and one rounding is up to a unit of it
    assert ((before - x.detach().float()) - 0.25 * O).abs().max() < step


def test_an_empty_matrix_is_left_alone() -> None:
    p = {"a": torch.empty(0, 5).requires_grad_(), "b": torch.randn(3, 5).requires_grad_()}
    opt = JaguarMuon([{"params": p.items(), "ns": True}], coordinates=0.5)
    opt.step(lambda: p["b"].square().sum())
    assert p["a"].shape == (0, 5)


# -- the released code -------------------------------------------------------------------------------------------------


def quintic_bf16(G: Tensor, steps: int = 10) -> Tensor:
    """What the released code calls, in fp64 and without the 1e-7 that it adds to the norm."""
    X = G / G.norm()
    X = X.T if G.size(0) > G.size(1) else X
    for _ in range(steps):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T if G.size(0) > G.size(1) else X


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (8, 45), (45, 8), (15, 15), (3, 4), (20, 3, 5)])
def test_released_is_the_closed_form_of_ten_quintic_steps(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    before = x.detach().clone()
    opt = JaguarMuon([{"params": [("x", x)]}], lr=0.01, released=True, seed=3)
    opt.step(lambda: (x * torch.arange(x.numel()).view(shape)).sum())
    ((index, _),) = ReleasedBlock().sample(Draw(3, 0, 0), opt.slots)
    rho = opt.last_record.losses[0] - opt.last_record.losses[1]
    G = torch.zeros(x.numel(), dtype=torch.float64)
    G[index] = 0.1 * rho
    O = quintic_bf16(G.view(shape[0], -1)).view(shape)  # noqa: E741
    # Ten quintic steps enlarge roundings in empty directions 2 * 10^5 times.
    assert ((before - x) - 0.01 * O).abs().max() < 1e-11
    rows, columns = shape[0], x.numel() // shape[0]
    block = max(1, rows // 10) * max(1, columns // 10)
    moved = (before - x.detach())[before != x].abs()
    # 1.125 is what the authors' own function makes of 1 in ten steps.
    assert moved.numel() == block and moved[0].item() * math.sqrt(block) / 0.01 == pytest.approx(1.125, abs=5e-4)


def test_released_vectors_move_along_their_normalised_block() -> None:
    x = torch.randn(45, dtype=torch.float64).requires_grad_()
    before = x.detach().clone()
    opt = JaguarMuon([{"params": [("x", x)]}], lr=0.01, released=True)
    opt.step(lambda: x.sum())
    moved = (before - x)[before != x]
    assert moved.numel() == 4 and (moved - 0.01 / math.sqrt(4)).abs().max() < 1e-15
    assert torch.equal(opt.state[x]["momentum"][before == x], torch.zeros(41, dtype=torch.float64))


def test_released_takes_the_groups_of_param_groups_and_moves_embeddings() -> None:
    net = nn.Sequential(nn.Embedding(20, 10), nn.Linear(10, 10))
    before = net[0].weight.detach().clone()
    opt = JaguarMuon(jaguar.param_groups(net), released=True)
    opt.step(lambda: net(torch.arange(20)).square().sum())
    assert (net[0].weight != before).sum() == 2  # a tenth of 20 rows and of 10 columns
    assert "closed form" in repr(opt)


@pytest.mark.parametrize(
    "given",
    [{"beta": 0.5}, {"coordinates": 0.1}, {"ns_steps": 5}, {"ns_period": 2}, {"vector_lr": 1e-4}, {"update": "all"}],
)
def test_released_excludes_what_it_fixes(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"released=True fixes .*{next(iter(given))}="):
        JaguarMuon([{"params": [torch.ones(3, 3, requires_grad=True)]}], released=True, **given)
