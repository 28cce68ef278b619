"""Whole steps on the Triton backend: the reference's bits, launches counted, faults that leave no trace."""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.laws import CONFIGS, TAU, make
from helpers.measuring import Trouble, failing, restore_law
from helpers.steps import skipping
from helpers.tensors import FORMS, Bag, all_bits, bits, dtype_id, weights

pytest.importorskip("triton")
from helpers.kernels import bag_of, counted, everything, interpreted, jobs, parameters
from jaguar import ZOSGD, JaguarSignSGD
from jaguar.backends import availability, bind, ops
from jaguar.backends.polar import run as polar_run
from jaguar.method.directions import Coordinates, ReleasedBlock
from jaguar.method.estimators import TwoSided
from jaguar.method.method import Method
from jaguar.method.rules import AveragedSign
from jaguar.triton_kernels.launch import around

pytestmark = [interpreted, pytest.mark.usefixtures("poisoned")]

configs = pytest.mark.parametrize("config", CONFIGS)
some_configs = pytest.mark.parametrize("config", ["fraction", "all", "gaussian-copy", "rademacher-copy"])
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


@pytest.mark.parametrize("change", [lambda t: t.bfloat16(), lambda t: torch.zeros(30_000)])
@pytest.mark.parametrize("config", ["fraction", "rademacher-copy"])
def test_a_tensor_that_became_another_is_refused(config: str, change: Callable[[Tensor], Tensor]) -> None:
    """The tables' offsets were made for the old one; nothing may be written by them."""
    bag = Bag([weights(torch.float32, 700), weights(torch.bfloat16, 40)])
    opt = make(config, bag.named_parameters(), backend="triton", momentum_dtype=torch.float32)
    opt.step(bag)
    bag.p0.data = change(bag.p0.data)
    before = all_bits(parameters(bag))
    with pytest.raises(RuntimeError, match="p0"):
        opt.measure(bag)
    assert all_bits(parameters(bag)) == before


@pytest.mark.parametrize("config", ["fraction", "all", "rademacher-copy"])
def test_a_launch_that_fails_leaves_no_trace(config: str) -> None:
    """A kernel that does not compile or has no memory wrote nothing: the step never was."""
    bag = Bag([weights(torch.float32, 700)])
    opt = make(config, bag.named_parameters(), backend="triton")
    opt.step(bag)
    before = everything(bag, opt)

    def failing_launch(name: str, programs: Any, constants: dict[str, Any], run: Callable[[], None]) -> None:
        if constants.get("JOB") in ("fused", "saved", "plain") or name == "tiles":
            raise RuntimeError("out of resource")
        run()

    with around(failing_launch), pytest.raises(RuntimeError, match="out of resource"):
        opt.step(bag)
    assert everything(bag, opt) == before
    opt.step(bag)  # not broken
    assert opt.steps_done == 2


def test_a_first_step_in_inference_mode_spoils_no_later_one() -> None:
    bag = Bag([weights(torch.float32, 700)])
    opt = make("fraction", bag.named_parameters(), backend="triton")
    with torch.inference_mode():
        opt.step(bag)
    opt.step(bag)
    assert opt.steps_done == 2


def test_a_replaced_momentum_is_the_one_that_counts() -> None:
    bag = Bag([weights(torch.float32, 700)])
    opt = make("all", bag.named_parameters(), backend="triton", weight_decay=0.0)
    opt.step(bag)
    opt.state[bag.p0] = {"momentum": torch.full((700,), -1e6)}
    before = bag.p0.detach().clone()
    opt.step(bag)
    assert bool((bag.p0 > before).all())


@some_configs
def test_versions_tell_autograd(config: str) -> None:
    bag = Bag([weights(torch.float32, 40, 3), weights(torch.float32, 11)])
    opt = make(config, bag.named_parameters(), backend="triton")
    opt.step(bag)
    tensors = parameters(bag) + [s["momentum"] for s in opt.state.values() if "momentum" in s]
    versions = [t._version for t in tensors]
    loss = sum((p * p).sum() for p in bag.parameters())
    opt.measure(bag)
    measured = [t._version for t in tensors]
    assert all(b > a for a, b in zip(versions[:2], measured, strict=False))
    opt.step()
    assert all(t._version > v for t, v in zip(tensors, measured, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@some_configs
def test_addresses_that_change_are_followed(config: str, launches: list[dict[str, Any]]) -> None:
    bag, twin = bag_of(torch.float32), bag_of(torch.float32)
    opt = make(config, bag.named_parameters(), backend="triton")
    reference = make(config, twin.named_parameters(), backend="reference")
    left = []
    for step in range(4):
        opt.step(bag), reference.step(twin)
        assert everything(bag, opt) == everything(twin, reference), step
        assert all(bits(old) == was for old, was in left), "what was left behind is not written to"
        for p in bag.parameters():
            flat = torch.zeros(p.numel() + 8)
            moved = flat[step : step + p.numel()].view_as(p)  # aligned at first, then not
            left.append((p.data, bits(p)))
            p.data = moved.copy_(p.data)
            if "momentum" in opt.state[p]:
                momentum = opt.state[p]["momentum"]
                left.append((momentum, bits(momentum)))
                if step % 2:
                    opt.state[p] = {"momentum": momentum.clone()}
                else:
                    opt.state[p]["momentum"] = momentum.clone()
    hints = [launch["HINT"] for launch in launches if launch["name"] in ("tiles", "step")]
    assert config == "fraction" or set(hints) == {True, False}


def another(make_other: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Bag, Any], None]:
    """Replaces the momentum of the first parameter by `make_other(parameter, momentum)`."""

    def spoil(bag: Bag, opt: Any) -> None:
        state = opt.state[bag.p0]
        state["momentum"] = make_other(bag.p0.detach(), state["momentum"])

    return spoil


def same_as_the_second(bag: Bag, opt: Any) -> None:
    shared = torch.zeros(100)
    opt.state[bag.p0]["momentum"] = shared[:64].view(8, 8)
    opt.state[bag.p1]["momentum"] = shared[36:100].view(8, 8)


FAULTS: dict[str, tuple[Callable[[Bag, Any], None], str]] = {
    "shape": (another(lambda x, m: torch.zeros(4, 16)), "momentum of p0"),
    "device": (another(lambda x, m: m.to("meta")), "momentum of p0 is .* on meta"),
    "integers": (another(lambda x, m: m.to(torch.int32)), "momentum of p0 has dtype torch.int32"),
    "float8_e4m3": (another(lambda x, m: m.to(torch.float8_e4m3fn)), "momentum of p0 has dtype torch.float8_e4m3fn"),
    "strides": (another(lambda x, m: m.t().contiguous().t()), "momentum of p0 has shape .* contiguous"),
    "parameter itself": (another(lambda x, m: x), "overlap"),
    "overlap": (same_as_the_second, "momentum of p0 and the momentum of p1 overlap"),
    "freed momentum": (another(lambda x, m: (m.untyped_storage().resize_(0), m)[1]), "momentum of p0 was freed"),
    "freed": (lambda bag, opt: bag.p0.untyped_storage().resize_(0), "storage of p0 was freed"),
    "shrunk": (lambda bag, opt: bag.p0.untyped_storage().resize_(80), "storage of p0 was freed"),
    # At the address where a good tensor was:
    "transposed": (lambda bag, opt: setattr(bag.p1, "data", bag.p1.data.t()), "p1 has shape .* contiguous"),
    "shorter": (another(lambda x, m: m[:3]), "momentum of p0"),
    "reinterpreted": (another(lambda x, m: m.view(torch.int32)), "momentum of p0 has dtype torch.int32"),
}
BAD = [(fault, "step", "fraction") for fault in FAULTS]
BAD += [(fault, "apply_", "fraction") for fault in ("integers", "overlap", "freed")]
BAD += [(fault, "step", config) for fault in ("integers", "freed") for config in ("all", "gaussian-copy")]


@pytest.mark.parametrize(("fault", "call", "config"), BAD)
def test_bad_tensors_are_refused_before_any_launch(
    fault: str, call: str, config: str, launches: list[dict[str, Any]]
) -> None:
    bag, twin = (Bag([weights(torch.float32, 8, 8, seed=i) for i in range(2)]) for _ in range(2))
    opt = make(config, bag.named_parameters(), backend="triton")
    reference = make(config, twin.named_parameters(), backend="reference")
    opt.step(bag), reference.step(twin)
    record = opt.measure(bag)
    good = [p.data for p in bag.parameters()], [opt.state[p]["momentum"] for p in bag.parameters()]
    values = [[t.clone() for t in tensors] for tensors in good]
    spoil, message = FAULTS[fault]
    spoil(bag, opt), launches.clear()
    with pytest.raises(RuntimeError, match=message):
        opt.step(bag) if call == "step" else opt.apply_(record)
    assert jobs(launches) == [] and opt.steps_done == 1
    for tensors, before in zip(good, values, strict=True):
        for t, v in zip(tensors, before, strict=True):
            if fault in ("freed", "shrunk", "freed momentum") and t.untyped_storage().nbytes() < v.nbytes:
                t.untyped_storage().resize_(v.nbytes)
                t.copy_(v)
            assert bits(t) == bits(v)
    for p, data, momentum in zip(bag.parameters(), *good, strict=True):
        p.data, opt.state[p]["momentum"] = data, momentum
    opt.step(bag), reference.step(twin)
    assert everything(bag, opt) == everything(twin, reference), "still usable"


def test_half_precision_momentum_that_somebody_put_there() -> None:
    """No option gives fp16 momentum, but it can be stored; both backends round it alike."""
    runs = []
    for backend in ("reference", "triton"):
        bag = bag_of(torch.float32)
        opt = make("all", bag.parameters(), backend=backend)
        opt.step(bag)
        for state in opt.state.values():
            state["momentum"] = state["momentum"].half()
        opt.step(bag)
        runs.append(everything(bag, opt))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("form", ["transposed", "slice"])
def test_tensors_that_are_not_contiguous_are_named(form: str) -> None:
    bag = Bag([weights(torch.float32, 5), FORMS[form](torch.float32)])
    with pytest.raises(availability.Unavailable, match=r"cannot take p1: it is not contiguous.*backend='auto'"):
        JaguarSignSGD(bag.named_parameters(), backend="triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        JaguarSignSGD(bag.named_parameters(), coordinates=0.5, tau=TAU, backend="auto").step(bag)


def test_cpu_tensors_without_the_interpreter() -> None:
    code = """
import torch, jaguar
try:
    jaguar.JaguarSignSGD([torch.nn.Parameter(torch.zeros(3))], backend="triton")
except RuntimeError as error:
    print(type(error).__name__, error)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.stderr == ""
    assert done.stdout.startswith("Unavailable backend='triton' is not available: there is no NVIDIA GPU")
    assert done.stdout.rstrip().endswith("available: reference")
