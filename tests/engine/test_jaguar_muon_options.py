"""JAGUAR Muon's options and refusals, copies, records and its repr."""

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
from helpers.muon import groups, loss_of, model
from helpers.steps import skipping
from helpers.tensors import all_bits, bits, state_bits
from jaguar import JaguarMuon, JaguarSignSGD
from jaguar.backends import availability
from jaguar.backends.polar import run as polar_run
from jaguar.method.schemes import SCHEMES


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
