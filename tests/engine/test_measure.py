"""Measuring changes nothing, whatever the closure and the tensors."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from helpers.laws import CONFIGS, TAU, make
from helpers.measuring import Trouble, failing, no_hooks_left, restore_law
from helpers.oracles import fraction_ints, step_key_ints, stratum_ints
from helpers.tensors import DTYPES, FORMS, Bag, all_bits, bits, dtype_id, every_form, state_bits, weights
from jaguar import ZOSGD, JaguarSignSGD
from jaguar.backends.reference.coordinate import CoordinateProbe
from jaguar.backends.reference.probes import CopyProbe
from jaguar.method.params import Shard

configs = pytest.mark.parametrize("config", CONFIGS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


@configs
@dtypes
def test_measure_restores_every_form(config: str, dtype: torch.dtype) -> None:
    restore_law(config, [make_form(dtype) for make_form in FORMS.values()])


@configs
@dtypes
@pytest.mark.parametrize("form", ["contiguous", "transposed", "slice", "one"])
def test_measure_restores_one_tensor(config: str, dtype: torch.dtype, form: str) -> None:
    changes = {}
    if form == "one" and "coordinates" in CONFIGS[config][1]:
        changes["coordinates"] = 1 if config == "count" else 1.0  # so that there is something to move
    restore_law(config, [FORMS[form](dtype)], **changes)


FAILURES = ["raise-1", "raise-2", "inside-1", "inside-2", "interrupt-1", "interrupt-2", "nan-1", "nan-2"]


@configs
@dtypes
@pytest.mark.parametrize("how", FAILURES)
def test_a_failing_closure_leaves_no_trace(config: str, dtype: torch.dtype, how: str) -> None:
    bag, twin = every_form(dtype), every_form(dtype)
    opt, reference = make(config, bag.named_parameters()), make(config, twin.named_parameters())
    opt.step(bag), reference.step(twin)
    params = list(bag.parameters())
    before, generators = (all_bits(params), state_bits(opt, params)), torch.get_rng_state()
    bag.seen.clear()
    closure = failing(bag, how)
    if how.startswith("nan"):
        assert opt.measure(closure).skipped
    else:
        with pytest.raises(KeyboardInterrupt if how.startswith("interrupt") else Trouble):
            opt.step(closure)
        with pytest.raises(RuntimeError, match="nothing was measured"):
            opt.step()
    assert (all_bits(params), state_bits(opt, params)) == before and opt.steps_done == 1
    assert torch.equal(torch.get_rng_state(), generators) and no_hooks_left()
    bag._forward_hooks.clear()
    opt.step(bag), reference.step(twin)
    assert all_bits(params) == all_bits(list(twin.parameters())), "as if nothing had happened"


SLICES = {"rows": np.s_[3:6], "block": np.s_[2:7, 3:31], "every-other": np.s_[::2, 1::3], "column": np.s_[:, 5],
          "corner": np.s_[8:9, 39:]}  # fmt: skip


@configs
@pytest.mark.parametrize("cut", SLICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_id)
def test_nothing_outside_a_slice_is_touched(config: str, cut: str, dtype: torch.dtype) -> None:
    big = weights(dtype, 9, 40)
    outside = torch.ones(9, 40, dtype=torch.bool)
    outside[SLICES[cut]] = False
    bag = Bag([big[SLICES[cut]], weights(dtype, 50)])
    assert bag.p0.untyped_storage().data_ptr() == big.untyped_storage().data_ptr()
    around = bits(big[outside])
    opt = make(config, bag.named_parameters())
    for _ in range(3):
        opt.step(bag)
        assert bits(big[outside]) == around


def offset_law(config: str, dtype: torch.dtype) -> None:
    big = torch.empty(2**31 + 100, dtype=dtype)
    big[:100], big[2**31 - 20 :] = 1, 1  # what a 31- or 32-bit index would hit, and the end
    big[2**31 + 20 : 2**31 + 80] = weights(dtype, 60)
    bag = Bag([big[2**31 + 20 : 2**31 + 80]])
    assert bag.p0.storage_offset() > 2**31
    opt = make(config, bag.named_parameters())
    before = bits(bag.p0)
    opt.measure(bag)
    assert bits(bag.p0) == before
    assert (bits(bag.seen[-1][0]) != before) == bool(opt.method.estimator.points)
    opt.step()
    assert bits(bag.p0) != before
    for part in (big[:100], big[2**31 - 20 : 2**31 + 20], big[2**31 + 80 :]):
        assert (part == 1).all()


@configs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_storage_offset_past_2_to_the_31(config: str, dtype: torch.dtype) -> None:
    offset_law(config, dtype)


@pytest.mark.slow  # 9 and 17 GB of address space, which a small machine may refuse
@configs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_storage_offset_past_2_to_the_31_wide(config: str, dtype: torch.dtype) -> None:
    offset_law(config, dtype)


@pytest.mark.parametrize("config", ["fraction", "all", "gaussian-copy", "gaussian-module", "rademacher-copy", "count"])
@dtypes
def test_a_shard_past_2_to_the_31(config: str, dtype: torch.dtype) -> None:
    bag, start, total = Bag([weights(dtype, 200)]), 2**31 + 5, 2**32
    if config == "count":  # 7 coordinates of 2^32: start where one of them is
        first, last = 5 * total // 7, 6 * total // 7
        start = first + stratum_ints(step_key_ints(12345, 0, 0, 2), 5, 0, last - first)[0] - 100
    opt = make(config, bag.named_parameters(), shards={"p0": Shard((total,), start)})
    before = bits(bag.p0)
    opt.measure(bag)
    assert bits(bag.p0) == before
    moved = (bag.seen[0][0] != bag.p0).nonzero().flatten().tolist()
    if config == "count":
        assert moved == [100]
    elif config in ("fraction", "all"):
        key, stream = step_key_ints(12345, 0, 0, 2), opt.slots[0].stream
        places = [
            j * 10 + stratum_ints(key, j, stream, 10)[0] - start for j in range(start // 10, (start + 200) // 10 + 1)
        ]
        assert moved == [i for i in places if 0 <= i < 200]
    else:
        assert len(moved) > 190  # a few normals are too small for bf16
    opt.step()
    assert bits(bag.p0) != before


def global_state() -> list[object]:
    name, keys, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), *rest]


@configs
def test_global_generators_are_neither_read_nor_changed(config: str) -> None:
    bag = every_form(torch.float32)
    opt = make(config, bag.named_parameters())
    drawn: list[tuple[float, ...]] = []

    def closure() -> torch.Tensor:
        drawn.append(
            (
                torch.rand(()).item(),
                random.random(),
                np.random.random(),
                torch.dropout(torch.ones(64), 0.5, True).sum().item(),
            )
        )
        return bag()

    records = []
    for seed in (1, 2):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        before = global_state()
        records.append(opt.measure(closure))
        assert global_state() == before
    assert records[0] == records[1], "the caller's generators have no influence"
    before = global_state()
    opt.step(closure)
    assert global_state() == before
    with pytest.raises(ZeroDivisionError):
        opt.measure(lambda: (closure(), 1 / 0)[0])
    assert global_state() == before
    assert len(set(drawn[:-1])) == 1 and len(set(drawn)) == 2, "equal within a step, different between steps"


def test_dropout_masks_within_and_between_steps() -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.Dropout(0.5), nn.Linear(40, 1))
    masks: list[bytes] = []
    model[1].register_forward_hook(lambda m, i, out: masks.append(bits(out == 0)))
    x = torch.randn(8, 30)
    opt = ZOSGD(model.named_parameters(), tau=1e-3, n_directions=2)
    for _ in range(3):
        opt.step(lambda: model(x).square().mean())
    per_step = [set(masks[i : i + 4]) for i in (0, 4, 8)]
    assert all(len(s) == 1 for s in per_step) and len(set.union(*per_step)) == 3


@pytest.mark.parametrize("config", ["fraction", "gaussian-copy", "gaussian-module"])
@pytest.mark.parametrize("failing_too", [False, True], ids=["ok", "raises"])
def test_batch_norm_buffers_are_restored(config: str, failing_too: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
    model(torch.randn(16, 5))
    before = {name: bits(b) for name, b in model.named_buffers()}
    seen = []

    def closure() -> torch.Tensor:
        seen.append({name: bits(b) for name, b in model.named_buffers()})
        loss = model(torch.linspace(0, 1, 40).view(8, 5)).square().mean()
        if failing_too and len(seen) == 2:
            raise Trouble
        return loss

    opt = make(config, model.named_parameters())
    if failing_too:
        with pytest.raises(Trouble):
            opt.step(closure)
    else:
        opt.step(closure)
    assert {name: bits(b) for name, b in model.named_buffers()} == before
    assert len(seen) == 2 and all(s == before for s in seen), "both evaluations begin with the same buffers"


def autocast_law(config: str) -> None:
    """The losses under autocast are those of the perturbed weights, not of a cached low-precision copy."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    x, seen = torch.randn(4, 32), []
    for layer in (model[0], model[2]):
        layer.register_forward_pre_hook(
            lambda m, i: seen.append({n: p.detach().clone() for n, p in m.named_parameters()})
        )

    def loss_of() -> torch.Tensor:
        return model(x).float().square().mean()

    opt = make(config, model.named_parameters(), lr=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_cache_enabled()
        loss_of()  # a user's own evaluation fills the cache
        for _ in range(2):
            seen.clear()
            record = opt.measure(loss_of)
            manual = []
            for first, second in (seen[:2], seen[2:4]):
                twin = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
                twin[0].load_state_dict(first), twin[2].load_state_dict(second)
                with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), torch.no_grad():
                    manual.append(twin(x).float().square().mean().item())
            assert record.losses == tuple(manual) and manual[0] != manual[1]
            opt.apply_(record)
            after = loss_of().item()
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                torch.clear_autocast_cache()
                assert loss_of().item() == after, "nor does a stale copy outlive the step"


@pytest.mark.parametrize("config", ["fraction", "count", "gaussian-copy", "gaussian-module"])
def test_autocast_weight_cache(config: str) -> None:
    autocast_law(config)


@configs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_step_is_measure_and_apply(config: str, dtype: torch.dtype) -> None:
    bag, twin = every_form(dtype), every_form(dtype)
    opt, other = make(config, bag.named_parameters()), make(config, twin.named_parameters())
    for t in range(4):
        loss = opt.step(bag)
        record = other.measure(twin)
        assert record.step == t == other.steps_done
        other.apply_(record) if t % 2 else other.step()
        assert record == opt.last_record == other.last_record
        assert loss.shape == () and loss.dtype == torch.float32 and not loss.requires_grad
        assert loss.item() == torch.tensor(opt.loss(record)).item()
        assert opt.steps_done == other.steps_done == t + 1
    assert all_bits(list(bag.parameters())) == all_bits(list(twin.parameters()))
    with pytest.raises(RuntimeError, match="nothing was measured"):
        opt.step()


def test_latest_measure_wins() -> None:
    bag = every_form(torch.float32)
    opt = make("fraction", bag.named_parameters())
    first = opt.measure(bag)
    second = opt.measure(lambda: 2 * bag())
    assert second.losses == tuple(2 * v for v in first.losses)
    opt.step()
    assert opt.last_record is second
    with pytest.raises(ValueError, match="step 0"):
        opt.apply_(first)


def test_losses_and_loss_dtype_of_fp64_models() -> None:
    for dtypes_, exact in (([torch.float64], True), ([torch.float32], False), ([torch.float32, torch.float64], True)):
        bag = Bag([weights(d, 20) for d in dtypes_])
        opt = JaguarSignSGD(bag.named_parameters(), tau=TAU, coordinates=0.1)
        loss = opt.step(lambda: bag().double() / 3)  # noqa: B023
        assert loss.dtype == (torch.float64 if exact else torch.float32)
        rounded = [torch.tensor(v, dtype=torch.float32).item() for v in opt.last_record.losses]
        assert (tuple(rounded) == opt.last_record.losses) != exact


@pytest.mark.parametrize("config", CONFIGS)
def test_closure_runs_under_no_grad_on_the_callers_thread(config: str) -> None:
    bag = every_form(torch.float32)
    flags = []
    opt = make(config, bag.named_parameters())
    opt.step(lambda: (flags.append(torch.is_grad_enabled()), bag())[1])
    assert flags and not any(flags) and torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad and p.is_leaf for p in bag.parameters())
    versions = [p._version for p in bag.parameters() if p.numel() > 1]
    for _ in range(8):  # in each of which LeZO leaves some out
        opt.step(bag)
    assert all(p._version > v for p, v in zip((p for p in bag.parameters() if p.numel() > 1), versions, strict=True)), (
        "autograd notices"
    )


def test_fraction_of_the_evaluation_is_the_oracles() -> None:
    bag = Bag([weights(torch.float32, 12, 17)])
    opt = make("fraction", bag.named_parameters())
    for step in range(3):
        x = bag.p0.detach().clone().flatten()
        bag.seen.clear()
        opt.measure(bag)
        for seen, side in zip(bag.seen, (1, -1), strict=True):
            want = x.clone()
            for i, sign in fraction_ints(12345, step, opt.slots[0].stream, 204, 10).items():
                want[i] = x[i] + side * sign * TAU
            assert torch.equal(seen[0].flatten(), want)
        opt.step()


# -- the laws notice ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "probe"), [("fraction", CoordinateProbe), ("gaussian-copy", CopyProbe)])
def test_the_restore_law_notices_a_missing_restore(config: str, probe: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "finish", lambda self: None)
    with pytest.raises(AssertionError):
        restore_law(config, [weights(torch.float32, 50)])


def test_the_failure_law_notices_a_missing_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CoordinateProbe, "abort", lambda self: None)
    with pytest.raises(AssertionError):
        test_a_failing_closure_leaves_no_trace("fraction", torch.float32, "raise-1")


@pytest.mark.parametrize("config", ["fraction", "gaussian-copy"])
def test_the_autocast_law_notices_a_stale_cache(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: None)
    with pytest.raises(AssertionError):
        autocast_law(config)


@pytest.mark.usefixtures("apart")
def test_the_slice_law_notices_a_stride_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(tensor: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
        tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())[index] = values

    monkeypatch.setattr("jaguar.backends.reference.coordinate.scatter_", wrong)
    with pytest.raises(AssertionError):
        test_nothing_outside_a_slice_is_touched("fraction", "block", torch.float32)


def test_the_dropout_law_notices_unseeded_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaguar.optimizers.isolation.Isolation.evaluate", lambda self, closure, seed: closure())
    with pytest.raises(AssertionError):
        test_dropout_masks_within_and_between_steps()
