"""JAGUAR Muon against Algorithm 2 in numpy, its paths, its period, and the closed form of the released code."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import jaguar
from helpers.steps import skipping
from helpers.tensors import all_bits, bits, numpy_of, state_bits
from jaguar import JaguarMuon, JaguarSignSGD
from jaguar.backends import availability
from jaguar.backends.polar import run as polar_run
from jaguar.method.directions import ReleasedBlock
from jaguar.method.rng import Draw
from jaguar.method.schemes import SCHEMES

F64 = {"ns_dtype": torch.float64}


def newton_schulz_numpy(M: np.ndarray, steps: int = 10) -> np.ndarray:
    """The paper's iteration, without transposition: A <- 3/2 A - 1/2 A A^T A from A / ||A||_F."""
    norm = np.sqrt((M**2).sum())
    A = M / norm if norm else M
    for _ in range(steps):
        A = 1.5 * A - 0.5 * A @ A.T @ A
    return A


def model(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    shapes = {"a": (6, 4), "b": (3, 7), "c": (5,)}
    return {n: torch.randn(s, generator=gen, dtype=torch.float64).to(dtype).requires_grad_() for n, s in shapes.items()}


def groups(p: dict[str, Tensor], **more: Any) -> list[dict[str, Any]]:
    return [
        {"params": [(n, t) for n, t in p.items() if t.dim() >= 2], "ns": True} | more,
        {"params": [(n, t) for n, t in p.items() if t.dim() < 2], "ns": False} | more,
    ]


def loss_of(p: dict[str, Tensor]) -> Tensor:
    return (p["a"][:3] @ p["b"][:, :4].T).square().sum() + (p["c"] - 1).square().sum() + p["a"].sin().sum()


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
    ((index, _),) = ReleasedBlock().sample(Draw(3, 0, 0), opt._slots)
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


# -- options and refusals ----------------------------------------------------------------------------------------------


def matrix_group(**more: Any) -> list[dict[str, Any]]:
    return [{"params": [torch.ones(3, 4, requires_grad=True)], "ns": True} | more]


@pytest.mark.parametrize(
    ("params", "options", "match"),
    [
        ([torch.ones(3, 3, requires_grad=True)], {}, r"jaguar.param_groups\(model\)"),
        (matrix_group(ns="yes"), {}, "choose True, False, 'flatten'"),
        (matrix_group(), {"ns_period": 0}, "ns_period=0"),
        (matrix_group(), {"ns_period": True}, "ns_period=True"),
        (matrix_group(), {"ns_steps": 0}, "steps=0"),
        (matrix_group(), {"ns_coefficients": "septic"}, "'polar_express'"),
        (matrix_group(), {"ns_dtype": torch.float16}, "torch.bfloat16"),
        (matrix_group(), {"adjust_lr": "keller"}, "'match_rms_adamw'"),
        (matrix_group(), {"vector_lr": 1e-4, "lr": 0.0}, "give an lr above 0"),
        (matrix_group(), {"vector_lr": -1.0}, "vector_lr=-1.0 must be at least 0"),
        (matrix_group(vector_lr=-2.0), {}, "vector_lr=-2.0 must be at least 0"),
        (matrix_group(), {"vector_lr": "a"}, "vector_lr='a' is not a number"),
        (matrix_group(lr="x", vector_lr=1.0), {}, "lr='x' is not a number"),
        (matrix_group(ns="junk"), {"released": True}, "ns='junk'"),
        (matrix_group(), {"update": "some"}, "'sampled' or 'all'"),
        (matrix_group(momentum=0.5), {}, "may set lr, tau, beta, weight_decay, vector_lr, ns"),
        (matrix_group(), {"coordinates": 13}, "more than the 12"),
    ],
)
def test_bad_arguments_are_refused(params: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        JaguarMuon(params, **options)


@pytest.mark.parametrize("ns", [0, 1, np.bool_(False), np.bool_(True)])
def test_truths_of_other_types_are_the_same_truths(ns: Any, tmp_path: Any) -> None:
    x = torch.randn(3, 4, 5).requires_grad_()
    opt = JaguarMuon([{"params": [("x", x)], "ns": ns}], coordinates=0.5)
    assert opt.param_groups[0]["ns"] is bool(ns)
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=True)


@pytest.mark.parametrize(
    ("options", "match"), [({"ns_dtype": torch.float32}, "16 bits"), ({"ns_steps": 40}, "at most 32"), ({}, "on cpu")]
)
def test_kernels_that_cannot_do_it_are_refused_before_anything_moves(
    options: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(availability, "unavailable", dict)
    with pytest.raises(availability.Unavailable, match=f"backend='cuda' cannot orthogonalise this: .*{match}"):
        JaguarMuon(matrix_group(), backend="cuda", **options)


def test_one_batch_of_factors_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    p = {f"m{i}": torch.randn(4, 4 + i).requires_grad_() for i in range(4)}
    opt = JaguarMuon([{"params": p.items(), "ns": True}], coordinates=0.5)
    alive: list[Any] = []
    real = polar_run.reference.newton_schulz

    def watched(*arguments: Any) -> Tensor:
        assert all(ref() is None for ref in alive)
        out = real(*arguments)
        alive.append(weakref.ref(out))
        return out

    monkeypatch.setattr(polar_run.reference, "newton_schulz", watched)
    opt.step(lambda: sum(t.square().sum() for t in p.values()))
    assert len(alive) == 4


def test_vector_lr_is_a_ratio_that_schedulers_scale() -> None:
    x = torch.zeros(4, dtype=torch.float64).requires_grad_()
    opt = JaguarMuon([{"params": [("x", x)], "ns": False}], lr=0.1, vector_lr=0.02, coordinates=1.0, signs="ones")
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    opt.step(lambda: x.sum())
    assert (x + 0.02).abs().max() < 1e-15
    scheduler.step()
    opt.step(lambda: x.sum())
    assert (x + 0.03).abs().max() < 1e-15
    default = JaguarMuon([{"params": [("x", x)], "ns": False}], lr=0.5)
    assert default.param_groups[0]["vector_lr"] == 0.01
    own = JaguarMuon([{"params": [("x", x)], "ns": False, "vector_lr": 0.1, "lr": 0.4}])
    assert own.param_groups[0]["vector_lr"] == 0.25


@pytest.mark.parametrize("key", ["ns", "vector_lr"])
def test_only_lr_may_change_during_a_run(key: str) -> None:
    p = model()
    opt = JaguarMuon(groups(p), coordinates=0.5)
    opt.step(lambda: loss_of(p))
    opt.param_groups[0][key] = False if key == "ns" else 0.5
    with pytest.raises(RuntimeError, match=f"{key} of parameter group 0 changed"):
        opt.step(lambda: loss_of(p))


def test_a_state_dict_fits_only_the_same_newton_schulz() -> None:
    p = model()
    opt = JaguarMuon(groups(p), coordinates=0.5, ns_coefficients="quintic")
    opt.step(lambda: loss_of(p))
    with pytest.raises(ValueError, match=r"ns_coefficients='quintic', this optimizer has ns_coefficients='cubic'"):
        JaguarMuon(groups(model()), coordinates=0.5, ns_steps=5).load_state_dict(opt.state_dict())


def test_step_is_measure_and_apply_and_records_replay() -> None:
    runs, records = [], []
    for how in ("step", "two", "replay"):
        p = model(torch.float32)
        opt = JaguarMuon(groups(p), coordinates=0.3, lr=0.05)
        if how == "replay":
            for record in records:
                opt.apply_(record)
        else:
            records = []
            for _ in range(6):
                if how == "step":
                    opt.step(lambda p=p: loss_of(p))
                else:
                    before = all_bits(list(p.values()))
                    record = opt.measure(lambda p=p: loss_of(p))
                    assert all_bits(list(p.values())) == before
                    opt.apply_(record)
                records.append(opt.last_record)
        runs.append(all_bits(list(p.values())) + state_bits(opt, list(p.values())))
    assert runs[0] == runs[1] == runs[2]


def test_copies_and_pickles_go_on_alike() -> None:
    p = model()
    opt = JaguarMuon(groups(p), coordinates=0.3)
    opt.step(lambda: loss_of(p))
    again, own = copy.deepcopy((opt, p))
    third, theirs = pickle.loads(pickle.dumps((opt, p)))
    for one, q in ((opt, p), (again, own), (third, theirs)):
        one.step(lambda q=q: loss_of(q))
    assert all_bits(list(p.values())) == all_bits(list(own.values())) == all_bits(list(theirs.values()))


def test_a_skipped_step_moves_nothing() -> None:
    p = model()
    opt = JaguarMuon(groups(p, weight_decay=0.5), coordinates=0.3)
    before = all_bits(list(p.values()))
    with skipping():
        opt.step(lambda: loss_of(p) * math.inf)
    assert all_bits(list(p.values())) == before and opt.n_skipped == 1


def test_repr_says_which_tensor_took_which_path() -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(9, 4), "layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(12))})
    text = repr(JaguarMuon(jaguar.param_groups(net), ns_period=4, ns_coefficients="quintic"))
    assert "Newton-Schulz: quintic, 5 steps, torch.bfloat16, each in 1 of 4 steps, on reference" in text
    assert re.search(r"moves 12 of layers\.\*\.weight \(4 x 4\)\n", text)
    assert re.search(r"the sign rule moves embed\.weight \(9 x 4\); 12 of layers\.\*\.bias \(4\)\n", text)
    assert "ns=True" in text and "ns=False" in text


def test_cuda_is_refused_where_it_is_not_and_by_those_who_do_not_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if "cuda" not in availability.available():
        with pytest.raises(availability.Unavailable, match="backend='cuda' is not available"):
            JaguarMuon(matrix_group(), backend="cuda")
    monkeypatch.setattr(availability, "unavailable", dict)
    with pytest.raises(availability.Unavailable, match="has Newton-Schulz only"):
        JaguarSignSGD([torch.ones(3, requires_grad=True)], backend="cuda")


def test_it_works_without_triton_and_csrc_and_says_nothing_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "unavailable", lambda: {"cuda": "not built", "triton": "not installed"})
    p = model(torch.float32)
    before = {n: t.detach().clone() for n, t in p.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = JaguarMuon(groups(p), coordinates=1.0)
        opt.step(lambda: loss_of(p))
    assert all(not torch.equal(p[n], before[n]) for n in p)
    assert bits(p["a"]) and SCHEMES["cubic"].steps == opt.method.rule.steps
