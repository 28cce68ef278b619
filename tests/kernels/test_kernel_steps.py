"""Whole steps on the Triton backend: the reference's bits, and launches counted."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from helpers.laws import CONFIGS, TAU, make
from helpers.measuring import Trouble, failing, restore_law
from helpers.steps import skipping
from helpers.tensors import Bag, dtype_id, weights

pytest.importorskip("triton")
from helpers.kernels import interpreted
from helpers.launches import bag_of, counted, everything, jobs
from jaguar import ZOSGD, JaguarSignSGD
from jaguar.backends import availability, bind, ops
from jaguar.backends.polar import run as polar_run
from jaguar.method.directions import Coordinates, ReleasedBlock
from jaguar.method.estimators import TwoSided
from jaguar.method.method import Method
from jaguar.method.rules import AveragedSign

pytestmark = [interpreted, pytest.mark.usefixtures("poisoned")]

configs = pytest.mark.parametrize("config", CONFIGS)

SIX = ("embed_tokens.weight", "0.self_attn.q_proj.weight", "1.self_attn.v_proj.weight", "0.input_layernorm.weight",
       "1.post_attention_layernorm.weight", "model.norm.weight")  # fmt: skip


@pytest.fixture
def launches() -> Iterator[list[dict[str, Any]]]:
    with counted(run=True) as seen:
        yield seen


@pytest.fixture
def planned() -> Iterator[list[dict[str, Any]]]:
    with counted(run=False) as seen:
        yield seen


def transformer(folder: Path, dtype: torch.dtype, trained: tuple[str, ...]) -> nn.Module:
    from transformers import AutoModelForCausalLM

    from helpers.tiny import causal_lm

    model = AutoModelForCausalLM.from_pretrained(causal_lm(folder), dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(trained))
    return model


def many_steps(folder: Path, steps: int, dtype: torch.dtype, trained: tuple[str, ...], **options: Any) -> None:
    """The same parameters, momenta and records on both backends after every step."""
    model = transformer(folder, dtype, trained)
    runs = []
    for backend in ("reference", "triton"):
        own = copy.deepcopy(model)
        opt = JaguarSignSGD(own.named_parameters(), coordinates=0.02, seed=3, backend=backend, **options)
        runs.append((own, opt))
    generator = torch.Generator().manual_seed(1)
    start = everything(*runs[0])
    for step in range(steps):
        ids = torch.randint(0, 64, (2, 12), generator=generator)
        for own, opt in runs:
            opt.step(lambda own=own, ids=ids: own(input_ids=ids, labels=ids).loss)
        assert runs[0][1].last_record == runs[1][1].last_record, step
        assert everything(*runs[0]) == everything(*runs[1]), step
    trains = [p.requires_grad for p in model.parameters()]
    assert [a != b for a, b in zip(start[0], everything(*runs[0])[0], strict=True)] == trains


def test_thirty_steps_in_fp32(tmp_path: Path) -> None:
    many_steps(tmp_path, 30, torch.float32, SIX, lr=1e-3)


def test_twelve_steps_in_bf16(tmp_path: Path) -> None:
    many_steps(tmp_path, 12, torch.bfloat16, SIX, lr=1e-4, tau=2.0**-5, update="all", weight_decay=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("update", ["sampled", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_two_hundred_steps(dtype: torch.dtype, update: str, tmp_path: Path) -> None:
    many_steps(tmp_path, 200, dtype, ("weight",), lr=1e-4, tau=2.0**-5, update=update)


MODELS: dict[str, Callable[[], Bag]] = {
    "one": lambda: Bag([weights(torch.float32, 5)]),
    "many": lambda: Bag([weights(torch.float32, n + 1) for n in range(300)]),
    "mixed": lambda: Bag([weights(d, n) for d in (torch.float32, torch.bfloat16) for n in (5, 60)]),
    "misaligned": lambda: Bag([weights(torch.float32, 40), weights(torch.float32, 41)[1:], weights(torch.float32, 7)]),
}
COUNTED = [
    ("one", "sampled", {}, ["perturb", "flip", "fused"]),
    ("many", "sampled", {}, ["perturb", "flip", "fused"]),
    ("many", "all", {}, ["perturb", "flip", "tiles"]),
    ("mixed", "sampled", {}, ["perturb"] * 2 + ["flip"] * 2 + ["fused"] * 2),
    ("misaligned", "sampled", {}, ["perturb", "flip", "fused"]),
    ("misaligned", "all", {}, ["perturb", "flip", "tiles", "tiles"]),
    ("many", "sampled", {"estimator": "one-sided"}, ["perturb", "fused"]),
    ("many", "sampled", {"n_directions": 2}, ["perturb", "flip", "restore"] * 2 + ["several"]),
    ("many", "all", {"n_directions": 2}, ["perturb", "flip", "restore"] * 2 + ["tiles"]),
]


@pytest.mark.parametrize(("model", "update", "options", "expected"), COUNTED)
def test_launches_of_a_jaguar_step(
    model: str, update: str, options: dict[str, Any], expected: list[str], planned: list[dict[str, Any]]
) -> None:
    bag = MODELS[model]()
    opt = JaguarSignSGD(bag.parameters(), coordinates=0.5, update=update, tau=TAU, backend="triton", **options)
    opt.step(bag)
    assert set(jobs(planned)) == {"lost", *expected}  # the first step also counts lost perturbations
    opt.step(bag)
    assert jobs(planned) == expected
    record = opt.measure(bag)
    there = [job for job in expected if job in ("perturb", "flip")]
    assert sorted(jobs(planned)) == sorted(there + ["restore"] * there.count("perturb"))
    opt.apply_(record)
    moving = [job.replace("fused", "update") for job in expected if job in ("fused", "tiles", "several")]
    assert jobs(planned) == moving


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"restore": "copy"}, ["save", "flip", "saved"]),
        ({"restore": "walk"}, ["walk", "walk", "walked"]),
        ({"restore": "copy", "estimator": "one-sided"}, ["save", "saved"]),
        ({"restore": "copy", "n_directions": 2}, ["save", "flip", "restore", "save", "flip", "saved"]),
    ],
)
def test_launches_of_a_dense_step(options: dict, expected: list[str], planned: list[dict[str, Any]]) -> None:
    bag = MODELS["many"]()
    opt = ZOSGD(bag.parameters(), lr=1e-3, tau=TAU, momentum=0.9, backend="triton", **options)
    opt.step(bag), planned.clear()
    opt.step(bag)
    assert jobs(planned) == expected


@configs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_step_is_measure_and_apply_on_both_backends(
    config: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polar_run, "assigned", lambda *_: "reference")  # sums of Newton-Schulz have an order
    runs = []
    opt = make(config, bag_of(dtype).named_parameters())
    if reason := availability.undrawable(opt.method, opt.param_groups):
        with pytest.raises(availability.Unavailable, match=re.escape(reason)):
            make(config, bag_of(dtype).named_parameters(), backend="triton")
        return
    for backend in ("triton", "triton", "reference"):
        bag = bag_of(dtype)
        runs.append((bag, make(config, bag.named_parameters(), backend=backend)))
    for _ in range(2):
        runs[0][1].step(runs[0][0])
        for bag, opt in runs[1:]:
            opt.apply_(opt.measure(bag))
        assert runs[0][1].last_record == runs[1][1].last_record == runs[2][1].last_record
        assert everything(*runs[0]) == everything(*runs[1]) == everything(*runs[2])


@pytest.mark.parametrize("config", ["block", "all", "gaussian-copy", "rademacher-module"])
def test_measure_restores(config: str) -> None:
    restore_law(config, [p.detach() for p in bag_of(torch.bfloat16).parameters()], backend="triton")


@pytest.mark.parametrize("how", ["raise-1", "raise-2", "interrupt-2", "nan-1"])
@pytest.mark.parametrize("config", ["fraction", "rademacher-copy"])
def test_a_failing_closure_leaves_no_trace(config: str, how: str) -> None:
    bag, twin = bag_of(torch.bfloat16), bag_of(torch.bfloat16)
    opt, reference = (
        make(config, b.named_parameters(), backend=name) for b, name in ((bag, "triton"), (twin, "reference"))
    )
    opt.step(bag), reference.step(twin)
    before = everything(bag, opt)
    bag.seen.clear()
    closure = failing(bag, how)
    if how.startswith("nan"):
        with skipping():
            assert opt.step(closure).isnan() and reference.step(lambda: twin() * float("nan")).isnan()
        assert opt.n_skipped == 1
    else:
        with pytest.raises(KeyboardInterrupt if how.startswith("interrupt") else Trouble):
            opt.step(closure)
    assert everything(bag, opt) == before
    bag._forward_hooks.clear()
    opt.step(bag), reference.step(twin)
    assert everything(bag, opt) == everything(twin, reference)


@pytest.mark.parametrize("config", ["fraction", "all", "released", "rademacher-copy"])
@pytest.mark.parametrize("measured_on", ["reference", "triton"])
def test_records_replay_on_the_other_backend(config: str, measured_on: str) -> None:
    applied_on = {"reference": "triton", "triton": "reference"}[measured_on]
    bag, twin = bag_of(torch.bfloat16), bag_of(torch.bfloat16)
    opt = make(config, bag.named_parameters(), backend=measured_on)
    replay = make(config, twin.named_parameters(), backend=applied_on)
    for _ in range(2):
        opt.step(bag)
        replay.apply_(opt.last_record)
        assert everything(bag, opt) == everything(twin, replay)


def test_a_replayed_walk_walks(launches: list[dict[str, Any]]) -> None:
    bag, twin = bag_of(torch.bfloat16), bag_of(torch.bfloat16)
    opt = ZOSGD(bag.parameters(), lr=1e-3, tau=TAU, restore="walk", backend="reference")
    replay = ZOSGD(twin.parameters(), lr=1e-3, tau=TAU, restore="walk", backend="triton")
    for _ in range(2):
        opt.step(bag)
        replay.apply_(opt.last_record)
        assert jobs(launches) == ["walk", "walk", "walked"]
        assert everything(bag, opt) == everything(twin, replay)


@pytest.mark.parametrize("first", ["reference", "triton"])
@pytest.mark.parametrize("config", ["fraction", "gaussian-copy"])
def test_a_run_goes_on_with_the_other_backend(config: str, first: str) -> None:
    bag = bag_of(torch.bfloat16)
    opt = make(config, bag.named_parameters(), backend=first)
    opt.step(bag), opt.step(bag)
    twin = copy.deepcopy(bag)
    other = make(config, twin.named_parameters(), backend={"reference": "triton", "triton": "reference"}[first])
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(2):
        opt.step(bag), other.step(twin)
    assert everything(bag, opt) == everything(twin, other) and opt.steps_done == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("config", ["fraction", "all", "gaussian-copy", "muon", "adamm"])
def test_copies_and_pickles_go_on_alike(config: str, copied: Any) -> None:
    bag = bag_of(torch.bfloat16)
    opt = make(config, bag.named_parameters(), backend="triton")
    opt.step(bag), opt.measure(bag)
    twin, other = copied((bag, opt))
    opt.step(), other.step()
    opt.step(bag), other.step(twin)
    assert everything(bag, opt) == everything(twin, other) and opt.steps_done == 3


@pytest.mark.parametrize("config", ["fraction", "block", "gaussian-copy"])
def test_lost_shares_are_equal(config: str) -> None:
    shares = []
    for backend in ("reference", "triton"):
        bag = Bag([1 + weights(torch.bfloat16, 40, 30) / 8, weights(torch.bfloat16, 300)])
        opt = make(config, bag.named_parameters(), tau=1e-3, backend=backend)
        with pytest.warns(UserWarning, match="tau is too small"):
            opt.measure(bag)
        shares.append(opt.lost_share)
    assert shares[0] == shares[1] and shares[0]["p0"] > 0.5


@pytest.mark.parametrize("config", ["fraction", "all", "gaussian-copy", "gaussian-module"])
def test_tensors_of_one_optimizer_on_two_backends(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What "auto" does with tensors that kernels cannot take; here every other one."""
    bag, twin = bag_of(torch.float32, torch.bfloat16), bag_of(torch.float32, torch.bfloat16)
    reference = make(config, twin.named_parameters(), backend="reference")
    reference.step(twin), reference.step(twin)
    monkeypatch.setattr(
        ops, "assign", lambda _, __, slots, *___: [("reference", "triton")[i % 2] for i in range(len(slots))]
    )
    opt = make(config, bag.named_parameters())
    opt.step(bag)
    opt.apply_(opt.measure(bag))
    assert everything(bag, opt) == everything(twin, reference)
    assert opt.lost_share == reference.lost_share


def test_auto_gives_gpus_to_triton_and_says_what_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def slot(name: str, contiguous: bool) -> Any:
        where = {"is_cuda": True, "device": torch.device("cuda"), "shape": (2, 3), "stride": lambda: (1, 2)}
        return SimpleNamespace(
            name=name, kept=None, width=None, tensor=SimpleNamespace(is_contiguous=lambda: contiguous, **where)
        )

    monkeypatch.setattr(availability, "unavailable", dict)
    monkeypatch.setattr(availability, "interpreted", lambda: False)
    slots = [slot("whole", True), slot("turned", False)]
    method, several = Method(Coordinates(0.1), AveragedSign()), TwoSided(2)
    assert ops.assign("auto", method, slots, [{}]) == ["triton", "reference"]
    assert ops.summary("auto", method, slots, [{}]) == "triton (1 tensors) and reference (1 tensors)"
    across = replace(method, direction=Coordinates(5))
    assert ops.assign("auto", across, slots, [{}]) == ["reference", "reference"]  # its strata run across tensors
    assert ops.assign("auto", across, slots[:1], [{}]) == ["triton"]
    assert ops.assign("auto", replace(method, direction=ReleasedBlock(), estimator=several), slots[:1], [{}]) == [
        "reference"
    ]
    with pytest.warns(UserWarning, match=r"moves 1 of 2 tensors, slowly: turned is not contiguous"):
        bind._say_slow("auto", method, slots, [{}], ["triton", "reference"])
    with pytest.raises(availability.Unavailable, match="turned: it is not contiguous"):
        ops.require("triton", method, slots, [{}])
