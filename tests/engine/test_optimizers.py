"""Whole steps: numpy's arithmetic, replays, shards, schedules, walks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

from helpers.laws import CONFIGS, ONE_DIRECTION, TAU, make
from helpers.oracles import ROUND, ROUND_STATE, fraction_ints, noise_at, step_key_ints, stream_ints
from helpers.rounding import law
from helpers.steps import skipping
from helpers.tensors import DTYPES, Bag, all_bits, bits, dtype_id, every_form, state_bits, weights
from jaguar import ZOSGD, JaguarSignSGD, Record
from jaguar.method.params import Shard

configs = pytest.mark.parametrize("config", CONFIGS)


def keep(
    value: np.floating, dtype: torch.dtype, key: tuple[int, int], stream: int, i: int, purpose: int
) -> np.floating:
    """An fp32 value as it is stored: unchanged, or rounded with the noise of element i."""
    if dtype in (torch.float32, torch.float64):
        return value
    down, up, count = law(float(value), dtype)
    return np.float32(up if noise_at(key, stream, i, purpose) >= 65536 - count else down)


class Oracle:
    """JAGUAR SignSGD with fractions, element by element in numpy: one operation at a time, one rounding at the end."""

    def __init__(
        self,
        values: dict[str, torch.Tensor],
        dtype: torch.dtype,
        momentum_dtype: torch.dtype,
        stratum: int,
        update: str,
    ) -> None:
        self.t = np.float64 if dtype == torch.float64 else np.float32
        self.x = {n: [self.t(v) for v in w.detach().double().flatten().tolist()] for n, w in values.items()}
        self.m = {n: [self.t(0)] * len(v) for n, v in self.x.items()}
        self.dtype, self.momentum_dtype, self.stratum, self.update = dtype, momentum_dtype, stratum, update

    def step(self, t: int, rhos: dict[str, list[np.floating]], groups: dict[str, dict[str, float]]) -> None:
        f = self.t
        for name, x in self.x.items():
            m, g, stream, touched = self.m[name], groups[name], stream_ints(name), set()
            a, b = f(1 - g["lr"] * g["weight_decay"]), f(g["lr"])
            for k, rho in enumerate(rhos[name]):
                key = step_key_ints(12345, t, k, ROUND_STATE)
                for i, sign in fraction_ints(12345, t, stream, len(x), self.stratum, k).items():
                    value = f(g["beta"]) * m[i] + (f(1 - g["beta"]) * rho) * f(sign)
                    m[i] = keep(value, self.momentum_dtype, key, stream, i, ROUND_STATE)
                    touched.add(i)
            key = step_key_ints(12345, t, 0, ROUND)
            for i in sorted(touched) if self.update == "sampled" else range(len(x)):
                x[i] = keep(x[i] * a - b * np.sign(m[i]), self.dtype, key, stream, i, ROUND)


GROUPS = {
    "a": {"lr": 2e-2, "tau": TAU, "beta": 0.9, "weight_decay": 13.3},
    "b": {"lr": 3e-3, "tau": TAU * 0.7, "beta": 0.3, "weight_decay": 0.0},
}
VARIANTS = {
    "plain": {},
    "all": {"update": "all"},
    "three-directions": {"n_directions": 3},
    "three-directions-all": {"n_directions": 3, "update": "all"},
    "one-sided": {"estimator": "one-sided", "n_directions": 2},
    "clipped": {"rho_clip": 0.05, "n_directions": 2},
    "clipped-one-sided": {"rho_clip": 0.05, "estimator": "one-sided", "update": "all"},
}


def arithmetic_law(variant: str, dtype: torch.dtype, momentum_dtype: torch.dtype | None = None, steps: int = 6) -> None:
    options = VARIANTS[variant]
    tensors = {"a": weights(dtype, 5, 9).requires_grad_(), "b": weights(dtype, 31, seed=1).requires_grad_()}
    opt = JaguarSignSGD([{"params": [(n, w)], **GROUPS[n]} for n, w in tensors.items()], coordinates=0.2, seed=12345,
                        momentum_dtype=momentum_dtype, **options)  # fmt: skip
    own = momentum_dtype or (torch.bfloat16 if dtype == torch.float16 else dtype)
    oracle = Oracle(tensors, dtype, own, 5, options.get("update", "sampled"))
    t, losses = oracle.t, []

    def closure() -> torch.Tensor:
        wide = [w.to(torch.float64 if dtype == torch.float64 else torch.float32) for w in tensors.values()]
        losses.append(sum((w * (w - 0.3)).sum() for w in wide))
        return losses[-1]

    for step in range(steps):
        losses.clear()
        opt.step(closure)
        f = [t(v.item()) for v in losses]
        rhos = {}
        for name in tensors:
            if options.get("estimator") == "one-sided":
                rho = [(v - f[0]) / t(GROUPS[name]["tau"]) for v in f[1:]]
            else:
                rho = [(p - q) / t(2 * GROUPS[name]["tau"]) for p, q in zip(f[::2], f[1::2], strict=True)]
            clip = t(options.get("rho_clip", math.inf))
            rhos[name] = [min(max(r, -clip), clip) for r in rho]
        oracle.step(step, rhos, GROUPS)
        for name, w in tensors.items():
            assert np.array_equal(w.detach().double().numpy().ravel(), np.array(oracle.x[name], dtype=np.float64))
            momentum = opt.state[w]["momentum"]
            assert momentum.dtype == own
            assert np.array_equal(momentum.double().numpy().ravel(), np.array(oracle.m[name], dtype=np.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_steps_equal_numpy(variant: str, dtype: torch.dtype) -> None:
    arithmetic_law(variant, dtype)


@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=dtype_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_momentum_storage_equals_numpy(dtype: torch.dtype, momentum_dtype: torch.dtype) -> None:
    arithmetic_law("three-directions-all", dtype, momentum_dtype)


@pytest.mark.parametrize("one_sided", [False, True], ids=["two-sided", "one-sided"])
def test_dense_directions_are_averaged_in_order(one_sided: bool) -> None:
    x, zero = weights(torch.float32, 30).requires_grad_(), torch.zeros(30, requires_grad=True)
    options = {"n_directions": 3, "seed": 5, "estimator": "one-sided" if one_sided else "two-sided"}
    opt, shadow = ZOSGD([x], lr=0.1, tau=0.01, **options), ZOSGD([zero], lr=0.0, tau=1.0, **options)
    f, z = [], []
    for _ in range(5):
        before = x.detach().numpy().copy()
        f.clear(), z.clear()
        shadow.step(lambda: (z.append(zero.detach().numpy().copy()), zero.sum())[1])
        opt.step(lambda: (f.append(np.float32((x * x).sum().item())), torch.tensor(f[-1]))[1])
        if one_sided:
            rho = [(v - f[0]) / np.float32(0.01) for v in f[1:]]
            directions = z[1:]
        else:
            rho = [(p - q) / np.float32(0.02) for p, q in zip(f[::2], f[1::2], strict=True)]
            directions = z[::2]
        g = ((directions[0] * rho[0] + directions[1] * rho[1]) + directions[2] * rho[2]) / np.float32(3)
        assert np.array_equal(x.detach().numpy(), before - np.float32(0.1) * g)


def run(config: str, bag: Bag, steps: int, scheduler: str = "none", **changes: object) -> tuple[object, list[Record]]:
    opt = make(config, bag.named_parameters(), **changes)
    schedule = {"none": None, "linear": lambda: torch.optim.lr_scheduler.LinearLR(opt, 0.1, 1.0, total_iters=steps),
                "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)}[scheduler]  # fmt: skip
    stepper = schedule() if schedule else None
    records = []
    for _ in range(steps):
        opt.step(bag)
        records.append(opt.last_record)
        if stepper:
            stepper.step()
    return opt, records


@configs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("scheduler", ["none", "linear", "cosine"])
def test_replay_gives_the_same_bits(config: str, dtype: torch.dtype, scheduler: str) -> None:
    bag, fresh = every_form(dtype), every_form(dtype)
    opt, records = run(config, bag, 8, scheduler)
    assert len({r.lrs for r in records}) == (1 if scheduler == "none" else 8)
    again = make(config, fresh.named_parameters(), lr=123.0)  # the record's rates count
    for record in records:
        again.apply_(Record.unpack(record.pack()))
    assert all_bits(list(bag.parameters())) == all_bits(list(fresh.parameters()))
    assert state_bits(opt, list(bag.parameters())) == state_bits(again, list(fresh.parameters()))
    assert again.steps_done == 8 and again.last_record == records[-1]
    assert not fresh.seen


@configs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_strides_and_order_of_parameters_are_irrelevant(config: str, dtype: torch.dtype) -> None:
    bag = every_form(dtype)
    plain = Bag([p.detach().clone(memory_format=torch.contiguous_format) for p in bag.parameters()])
    shuffled = every_form(dtype)
    one, _ = run(config, bag, 4)
    two, _ = run(config, plain, 4)
    three = make(config, list(reversed(list(shuffled.named_parameters()))))
    for _ in range(4):
        three.step(shuffled)
    assert plain.p1.is_contiguous() and not bag.p1.is_contiguous()
    for other, opt in ((plain, two), (shuffled, three)):
        assert all_bits(list(bag.parameters())) == all_bits(list(other.parameters()))
        assert state_bits(one, list(bag.parameters())) == state_bits(opt, list(other.parameters()))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(old)


SURROUNDINGS = {
    "float64-default": lambda: default_dtype(torch.float64),
    "bfloat16-default": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "enable-grad": torch.enable_grad,
    "inference-mode": torch.inference_mode,
}


@pytest.mark.parametrize("config", ["fraction", "count", "released", "all", "gaussian-copy", "gaussian-module"])
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_torchs_modes_are_irrelevant(config: str, surroundings: str) -> None:
    """Steps inside and then outside of a mode of torch are those of a run without it."""
    bag, twin = every_form(torch.bfloat16), every_form(torch.bfloat16)
    one, _ = run(config, bag, 4)
    two = make(config, twin.named_parameters())
    for t in range(4):
        with SURROUNDINGS[surroundings]() if t < 2 else nullcontext():
            two.step(twin)
    assert all_bits(list(bag.parameters())) == all_bits(list(twin.parameters()))
    assert state_bits(one, list(bag.parameters())) == state_bits(two, list(twin.parameters()))


def test_copy_and_module_restores_give_the_same_run() -> None:
    for distribution in ("gaussian", "rademacher"):
        bags = [every_form(torch.bfloat16), every_form(torch.bfloat16)]
        for bag, restore in zip(bags, ("copy", "module"), strict=True):
            run("gaussian-copy", bag, 4, restore=restore, distribution=distribution, n_directions=2)
        assert all_bits(list(bags[0].parameters())) == all_bits(list(bags[1].parameters()))


def shard_law(config: str, dtype: torch.dtype) -> None:
    """Records of a whole tensor, applied to its pieces, give its pieces."""
    start = weights(dtype, 700)
    whole = Bag([start.clone()])
    n = 1 if config in ONE_DIRECTION else 2
    opt, records = run(config, whole, 4, n_directions=n)
    for lo, hi in ((0, 1), (1, 300), (300, 437), (437, 700)):
        part = start[lo:hi].clone().requires_grad_()
        shard = make(config, [("p0", part)], n_directions=n, shards={"p0": Shard((700,), lo)})
        for record in records:
            shard.apply_(record)
        assert bits(part) == bits(whole.p0[lo:hi])
        if "momentum" in shard.state[part]:
            assert bits(shard.state[part]["momentum"]) == bits(opt.state[whole.p0]["momentum"][lo:hi])


@configs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_shards_take_the_steps_of_the_whole(config: str, dtype: torch.dtype) -> None:
    shard_law(config, dtype)


def test_the_shard_law_notices_an_ignored_start(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Shard
    monkeypatch.setattr("test_optimizers.Shard", lambda shape, start: real(shape, 0))
    for config in ("fraction", "count", "gaussian-copy"):
        with pytest.raises(AssertionError):
            shard_law(config, torch.bfloat16)


def test_the_arithmetic_law_notices_a_fused_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "jaguar.rules.sign_step", lambda x, m, decay, lr: (x.double() * decay - m.sign().double() * lr).to(x.dtype)
    )
    with pytest.raises(AssertionError):
        arithmetic_law("plain", torch.float32, steps=20)


def test_weight_decay_acts_on_what_the_update_moves() -> None:
    for update in ("sampled", "all"):
        x = torch.ones(100, requires_grad=True)
        opt = JaguarSignSGD([x], lr=0.5, weight_decay=0.5, coordinates=0.1, update=update)
        opt.step(lambda: torch.zeros(()))
        assert int((x == 0.75).sum()) == (10 if update == "sampled" else 100), (
            "the derivative is 0, so only decay is left"
        )


def test_an_empty_sample_still_updates() -> None:
    x, seeds = torch.full((3,), 2.0, requires_grad=True), range(1000)
    seed = next(s for s in seeds if not any(fraction_ints(s, t, stream_ints("x"), 3, 100) for t in range(5)))
    opt = JaguarSignSGD([("x", x)], lr=0.5, weight_decay=0.5, coordinates=0.01, update="all", seed=seed)
    for t in range(5):
        opt.step(lambda: x.sum())
        assert torch.equal(x, torch.full((3,), 2.0 * 0.75 ** (t + 1)))
        assert len(set(opt.last_record.losses)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2], ids=dtype_id)
def test_stochastic_momentum_does_not_stall(dtype: torch.dtype) -> None:
    """At beta .99 the mean of a half precision momentum reaches the derivative; rounded to nearest it stalls."""
    means = {}
    for rounding in ("stochastic", "nearest"):
        x = torch.zeros(4000, requires_grad=True)
        opt = JaguarSignSGD(
            [x], lr=0.0, beta=0.99, coordinates=1.0, signs="ones", momentum_dtype=dtype, rounding=rounding, tau=0.5
        )
        for _ in range(700):
            opt.step(lambda: x[0] * 1.0)  # noqa: B023
        means[rounding] = opt.state[x]["momentum"].float().mean().item()
    target = 1 - 0.99**700
    # an AR(1) whose innovations are below one spacing (at 1: 2**-8 in bf16, 0.25 in e5m2), so with half of it as sd
    sd = {torch.bfloat16: 2.0**-8, torch.float8_e5m2: 0.25}[dtype] / math.sqrt(1 - 0.99**2) / 2
    assert abs(means["stochastic"] - target) < 5 * sd / math.sqrt(4000)
    assert means["nearest"] < 0.9 * target


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_finite_losses_never_give_nan_weights(rounding: str) -> None:
    """A derivative beyond float8's 57344 must not become an infinite momentum, which beta = 0 would turn into NaN."""
    x = torch.full((4,), 0.5, requires_grad=True)
    opt = JaguarSignSGD(
        [x], lr=1e-2, beta=0.0, coordinates=1.0, momentum_dtype=torch.float8_e5m2, rounding=rounding, tau=1e-3
    )
    for _ in range(3):
        opt.step(lambda: (x * torch.tensor([1.0, 2.0, 4.0, 8.0])).sum() * 1e6)
        assert torch.isfinite(opt.state[x]["momentum"].float()).all()
        assert torch.isfinite(x).all()


def walk(dtype: torch.dtype, **changes: object) -> tuple[Bag, ZOSGD]:
    bag = every_form(dtype)
    return bag, ZOSGD(bag.named_parameters(), lr=1e-3, tau=TAU * 0.7, momentum=0.5, restore="walk", seed=2, **changes)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "changes",
    [{}, {"n_directions": 3}, {"estimator": "one-sided", "n_directions": 2}],
    ids=["one", "three", "one-sided"],
)
def test_a_walk_replays_bit_for_bit(dtype: torch.dtype, changes: dict[str, object]) -> None:
    bag, opt = walk(dtype, **changes)
    records, bad = [], 0
    for t in range(6):
        before = all_bits(list(bag.parameters()))
        records.append(opt.measure((lambda: bag() * math.nan) if t == 3 else bag))
        assert all_bits(list(bag.parameters())) == all_bits(bag.seen[-1]) != before
        with pytest.raises(RuntimeError, match=r"apply_\(record\) or discard_\(\)"):
            opt.measure(bag)
        with pytest.raises(RuntimeError, match="before saving"):
            opt.state_dict()
        with skipping() if t == 3 else contextlib.nullcontext():
            opt.apply_(records[-1]) if t % 2 else opt.step()
        bad += records[-1].skipped
    fresh, again = walk(dtype, **changes)
    with skipping():
        for record in records:
            again.apply_(record)
    assert bad == 1 and not fresh.seen
    assert all_bits(list(bag.parameters())) == all_bits(list(fresh.parameters()))
    assert state_bits(opt, list(bag.parameters())) == state_bits(again, list(fresh.parameters()))


def test_a_walk_drifts_and_a_copy_does_not() -> None:
    bag, opt = walk(torch.float32, n_directions=3)
    before = bag.p0.detach().clone()
    opt.measure(bag)
    opt.discard_()
    assert opt.steps_done == 0 and (bag.p0 != before).any()
    assert torch.allclose(bag.p0, before, atol=9 * 2.0**-24, rtol=0), "three roundings of numbers below 2 per direction"


def test_a_walk_goes_back_when_the_closure_fails() -> None:
    bag, opt = walk(torch.float64)
    before = bag.p0.detach().clone()
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: (bag(), 1 / 0)[0])
    assert torch.allclose(bag.p0, before, atol=1e-14, rtol=0)  # two roundings of numbers below 2
    opt.step(bag)
    assert opt.steps_done == 1


def test_rho_is_in_the_losses_precision_from_the_start() -> None:
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    opt, record = ZOSGD([x], tau=2.0**-10), Record(0, (1e-3,), (2.0**-20 + 2.0**-50, 0.0))
    assert opt.rho(record) == [2.0**-11 + 2.0**-41]
