"""Kernels on an NVIDIA GPU: the bits of the reference on the CPU. `make gpu`, or `pytest -m gpu`.

Tests whose names contain "small" launch every kernel on few elements; they run under compute-sanitizer too. What only
a GPU can answer, and what takes longest, comes first.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace

import pytest
import torch

from helpers.laws import CONFIGS, TAU, make
from helpers.tensors import weights

pytest.importorskip("triton")
from torch import Tensor

from helpers.kernels import (
    DIRECTIONS,
    GROUPS,
    MOVES,
    SEED,
    Form,
    Model,
    Twins,
    coordinate_twins,
    dense_twins,
    method_of,
    same,
    step_law,
    steps_of,
)
from helpers.launches import bag_of
from helpers.random_kernels import (  # noqa: F401  (collected here too, and then run on the GPU)
    test_every_pattern_widens_and_comes_back,
    test_mulhi64_equals_ints,
    test_nearest,
    test_nearest_from_fp64,
    test_noise,
    test_normals,
    test_philox_of_random_counters,
    test_random123_vectors,
    test_signs,
    test_stochastic,
    test_words_in_a_row_need_no_carry,
    test_words_use_both_halves_of_the_group,
)
from jaguar import ZOSGD, JaguarSignSGD
from jaguar.backends import availability
from jaguar.backends.launches import StepInputs
from jaguar.method.directions import DENSE, Coordinates
from jaguar.method.estimators import TwoSided
from jaguar.method.params import Slot
from jaguar.method.rng import Draw, Purpose
from jaguar.method.rule import rounded
from jaguar.method.rules import AveragedSign, Sign
from jaguar.triton_kernels import tables as T

# The interpreter would run the kernels on the CPU, and prove nothing here.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or availability.interpreted(), reason="needs a GPU, compiled kernels"
    ),
]

DEVICE = "cuda"
TYPES = [torch.float32, torch.bfloat16, torch.float16]
MILLIONS = 1 << 21
NO_KERNELS = {"zo-muon-4"}
updates = pytest.mark.parametrize("update", ["sampled", "all"])
distributions = pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])


def forms(*more: Form, types: list[torch.dtype] = TYPES) -> list[Form]:
    """Per dtype a tensor of full and partial programs, one that is misaligned and a shard that cuts groups of words."""
    found = []
    for i, dtype in enumerate(types):
        found += [Form((3 * 8192 + 77,), dtype, i % 3), Form((101, 97), dtype, (i + 1) % 3, skew=1)]
        found.append(Form((9000,), dtype, (i + 2) % 3, 2**40 + 8197, (2**41,)))
    return [*found, *more]


def small() -> list[Form]:
    return [Form((300,), torch.bfloat16), Form((11, 13), torch.float32, 1, skew=1), Form((), torch.float32, 2)]


@pytest.mark.parametrize(
    ("dtype", "stratum", "n"),
    [(torch.bfloat16, 2, 1), (torch.bfloat16, 100, 1), (torch.bfloat16, 2, 2), (torch.float32, 2, 1)],
)
def test_the_barrier_orders_momentum_and_tile(dtype: torch.dtype, stratum: int, n: int) -> None:
    """Ten steps on two million elements: a tile that reads a momentum before it was written differs somewhere."""
    twins = coordinate_twins(
        [Form((MILLIONS + 99,), dtype)], Coordinates(1 / stratum), update="all", n=n, device=DEVICE
    )
    for step in range(10):
        step_law(twins, step=step)


def test_the_barriers_between_directions() -> None:
    """The momentum that one direction enters is read by the next, in another thread of a program."""
    twins = coordinate_twins([Form((MILLIONS,), torch.bfloat16)], Coordinates(0.5), n=3, device=DEVICE)
    for step in range(5):
        step_law(twins, step=step)


@pytest.mark.parametrize("kind", ["sampled", "all", "rademacher"])
def test_a_tensor_of_more_than_2_to_the_31_elements(kind: str) -> None:
    """The reference moves parts of it, as shards: its beginning, the middle, and the end."""
    n, part = 2**31 + 1000, 9000
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    x = torch.empty(n, dtype=torch.bfloat16, device=DEVICE).normal_(0, 0.3)
    m = torch.empty(n, dtype=torch.bfloat16, device=DEVICE).normal_(0, 0.3)
    slot = Slot("p", x, 77, 0, x.shape)
    starts = [0, 2**30 - part // 2, n - part]
    parts = [Slot(f"p{s}", x[s : s + part].cpu(), 77, 0, x.shape, s) for s in starts]
    momenta = [m[s : s + part].cpu() for s in starts]

    if kind == "rademacher":
        method = method_of(DENSE[kind], Sign())
    else:
        method = method_of(Coordinates(0.01), AveragedSign(kind))
    both = [steps_of("triton", method, [slot]), steps_of("reference", method, parts)]
    states = [[(m,)], [(own,) for own in momenta]]

    def inputs(k: int, rho: list[float]) -> StepInputs:
        scalars = method.scalars(slot.kind, GROUPS[0], GROUPS[0]["lr"], GROUPS[0]["tau"], rho, 1)
        return StepInputs((Draw(SEED, 0, 0),), {slot.kind: scalars}, states[k])

    def check(what: str) -> None:
        for s, own, momentum in zip(starts, parts, momenta, strict=True):
            assert bool(same(x[s : s + part].cpu(), own.tensor).all()), (what, s)
            assert bool(same(m[s : s + part].cpu(), momentum).all()), (what, s)

    probes = []
    for k, steps in enumerate(both):
        steps.prepare(inputs(k, []))
        probes += steps.launches.probes(inputs(k, []))
    for move in ("plus", "minus"):
        for probe in probes:
            MOVES[move](probe)
        check(move)
    for k, (steps, probe) in enumerate(zip(both, probes, strict=True)):
        known = replace(inputs(k, [rounded(0.37)]), probe=probe)
        steps.prepare(known)
        steps.update_(known)
    check("update")


# Their products have an order of each device, or they have no kernels.
@pytest.mark.parametrize("config", sorted(set(CONFIGS) - {"muon", "zo-muon", *NO_KERNELS}))
def test_runs_on_the_gpu_replay_on_the_cpu(config: str) -> None:
    """Ten steps whose records the reference applies; restored after every measurement."""
    bag, twin = bag_of(*TYPES).to(DEVICE), bag_of(*TYPES)
    opt = make(config, bag.named_parameters())
    replay = make(config, twin.named_parameters(), backend="reference")
    assert "backend: triton," in repr(opt), "that is what auto picks"
    for step in range(10):
        if step % 2:
            opt.step(bag)
        else:
            before = [p.detach().clone() for p in bag.parameters()]
            record = opt.measure(bag)
            assert all(bool(same(p.detach(), b).all()) for p, b in zip(bag.parameters(), before, strict=True))
            opt.apply_(record)
        replay.apply_(opt.last_record)
        for p, q in zip(bag.parameters(), twin.parameters(), strict=True):
            assert bool(same(p.detach().cpu(), q.detach()).all()), step
            if "momentum" in opt.state[p]:
                assert bool(same(opt.state[p]["momentum"].cpu(), replay.state[q]["momentum"]).all()), step


def loss_of(model: Model) -> Tensor:
    return sum(((slot.tensor.float() - 0.1) ** 2).sum() for slot in model.slots)


@pytest.mark.parametrize("kind", ["sampled", "all", "rademacher"])
def test_a_whole_step_in_a_cuda_graph(kind: str) -> None:
    """Captured once and replayed with the keys of each step; the derivative never visits the host."""
    shapes = [Form((8492,), torch.bfloat16), Form((40, 30), torch.bfloat16), Form((500,), torch.float32)]

    def fresh() -> Twins:
        if kind == "rademacher":
            return dense_twins(shapes, kind, rule="sign", special=False, device=DEVICE)
        return coordinate_twins(shapes, DIRECTIONS["fraction"], update=kind, special=False, device=DEVICE)

    eager, graphed = fresh(), fresh()
    model, group = graphed.models[1], GROUPS[0]
    launches, numbers = graphed.steps[1].launches, graphed.steps[1].numbers
    device, tau = model.slots[0].tensor.device, group["tau"]
    # What a direction contributes: rho, or (1 - beta) rho.
    share = 1.0 if kind == "rademacher" else 1 - group["beta"]
    two_tau, gain = (torch.tensor(v, dtype=torch.float32, device=device) for v in (2 * tau, share))
    weight = T.OWN.value + sum(graphed.method.rule.widths)

    def on_the_device() -> None:
        launches.prepare(graphed.inputs(1, 0))
        (probe,) = launches.probes(graphed.inputs(1, 0))
        probe.to(1.0)
        plus = loss_of(model)
        probe.to(-1.0)
        rho = (plus - loss_of(model)) / two_tau
        numbers.scalars(device)[weight].copy_(gain * rho)
        launches.update_(graphed.inputs(1, 0, [0.0], probe))

    def on_the_host(step: int) -> None:
        copy = eager.models[1]
        (probe,) = eager.probes(1, step)
        probe.to(1.0)
        plus = loss_of(copy).item()
        probe.to(-1.0)
        eager.update_(1, TwoSided().rho([plus, loss_of(copy).item()], tau, double=False), probe, step)

    before = [buffer.clone() for buffer in model.buffers]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        numbers.fill(graphed.inputs(1, 0))  # tau, beta, decay and lr; from here on the device writes
        on_the_device()  # loads the kernels, which a capture cannot
    torch.cuda.current_stream().wait_stream(side)
    for buffer, values in zip(model.buffers, before, strict=True):
        buffer.copy_(values)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        on_the_device()
    assert not graphed.moved(), "a capture runs nothing"
    for step in range(5):
        words = [word for purpose in Purpose for word in Draw(SEED, step, 0).key(purpose)]
        numbers.keys(device)[: len(words)].copy_(torch.tensor(words))
        graph.replay()
        on_the_host(step)
        assert graphed.moved()
        for a, b in zip(eager.models[1].buffers, model.buffers, strict=True):
            assert bool(same(a.cpu(), b.cpu()).all()), step


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # "is a prototype feature"
# Blocks are drawn, and lengths of directions summed, with torch; derivatives are read from the device.
@pytest.mark.parametrize(
    "config", sorted(set(CONFIGS) - {"released", "muon-released", "two-places", "forward-grad", *NO_KERNELS})
)
def test_a_step_waits_for_its_losses_only(config: str) -> None:
    """torch raises where the host would wait for the device; these losses lie on the host already."""
    bag = bag_of(*TYPES).to(DEVICE)
    opt = make(config, bag.named_parameters())
    losses = itertools.cycle([torch.tensor(0.7), torch.tensor(0.6)])

    def closure() -> Tensor:
        bag()  # where modules are perturbed while they run
        return next(losses)

    for _ in range(4):  # kernels are loaded, tables and buffers made
        opt.step(closure)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            opt.step(closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cls", [JaguarSignSGD, ZOSGD])
def test_tensors_that_are_not_contiguous_go_to_the_reference(cls: type) -> None:
    values = weights(torch.float32, 40, 30), weights(torch.float32, 500, seed=1)
    strided = values[0].to(DEVICE).t().contiguous().t()
    params = [torch.nn.Parameter(strided), torch.nn.Parameter(values[1].to(DEVICE))]
    assert not params[0].is_contiguous()
    options = {"lr": 1e-2, "tau": TAU, "seed": 3} | ({"coordinates": 0.1} if cls is JaguarSignSGD else {})
    with pytest.raises(availability.Unavailable, match="cannot take #0: it is not contiguous"):
        cls(params, backend="triton", **options)
    opt = cls(params, **options)
    replay = cls([torch.nn.Parameter(v.clone()) for v in values], backend="reference", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            opt.step(lambda: sum((p * p).sum() for p in params))
            replay.apply_(opt.last_record)
    assert len(caught) == 1 and "the reference backend moves 1 of 2 tensors, slowly: #0" in str(caught[0].message)
    for p, q in zip(params, replay.param_groups[0]["params"], strict=True):
        assert bool(same(p.detach().cpu().contiguous(), q.detach()).all())


@pytest.mark.parametrize("kind", ["sampled", "all", "copy", "walk"])
def test_nothing_moves_where_rho_is_not_finite(kind: str) -> None:
    if kind in ("sampled", "all"):
        twins = coordinate_twins(forms(), DIRECTIONS["fraction"], update=kind, device=DEVICE)
    else:
        twins = dense_twins(forms(), "rademacher", restore=kind, device=DEVICE)
    probes = [twins.probes(k)[0] for k in range(2)]
    for probe in probes:
        probe.to(1.0), probe.to(-1.0)
    assert twins.moved()
    probes[0].abort()
    twins.update_(1, [float("nan")], probes[1])
    twins.check("back")


@pytest.mark.parametrize(
    ("layout", "update"),
    [(layout, update) for layout in ("fraction", "count", "block") for update in ("sampled", "all")]
    + [("released", "sampled")],
)
def test_coordinate_steps(layout: str, update: str, poisoned: None) -> None:
    whole = [form for form in forms() if form.whole is None] if layout in ("block", "released") else forms()
    if layout == "count":  # a shard of a tensor this long would hold none of 500 coordinates
        whole = [Form(f.shape, f.dtype, f.group, 0 if f.whole is None else 8197, f.whole and (30_000,)) for f in whole]
    step_law(coordinate_twins(whole, DIRECTIONS[layout], update=update, device=DEVICE))


@updates
@pytest.mark.parametrize("momentum", ["fp32", "e5m2"])
def test_coordinate_steps_with_other_momenta(momentum: str, update: str, poisoned: None) -> None:
    twins = coordinate_twins(
        forms(types=TYPES[:2]), DIRECTIONS["fraction"], update=update, momentum=momentum, device=DEVICE
    )
    step_law(twins, held=False)


@updates
def test_coordinate_steps_with_three_directions(update: str, poisoned: None) -> None:
    """In half of all coordinates, so that directions meet: what one wrote the next one reads."""
    twins = coordinate_twins(forms(types=TYPES[:2]), Coordinates(0.5), update=update, n=3, device=DEVICE)
    for step in range(3):
        step_law(twins, step=step)


@distributions
@pytest.mark.parametrize("rule", ["sgd", "sign"])
@pytest.mark.parametrize("momentum", ["none", "own"])
def test_dense_steps(momentum: str, rule: str, distribution: str, poisoned: None) -> None:
    step_law(dense_twins(forms(), distribution, rule=rule, momentum=momentum, device=DEVICE))


@distributions
@pytest.mark.parametrize("restore", ["copy", "walk"])
def test_dense_steps_with_three_directions(restore: str, distribution: str, poisoned: None) -> None:
    twins = dense_twins(forms(types=TYPES[:2]), distribution, restore=restore, momentum="e5m2", n=3, device=DEVICE)
    step_law(twins)


def test_steps_in_fp64(poisoned: None) -> None:
    double = [Form((8492,), torch.float64), Form((101, 37), torch.float64, 1, skew=1)]
    for update in ("sampled", "all"):
        step_law(coordinate_twins(double, DIRECTIONS["fraction"], update=update, n=3, device=DEVICE))
    step_law(dense_twins(double, "gaussian", n=3, device=DEVICE))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("held", [True, False], ids=["held", "apart"])
@updates
def test_small_coordinate(update: str, held: bool, n: int, poisoned: None) -> None:
    step_law(coordinate_twins(small(), DIRECTIONS["fraction"], update=update, n=n, device=DEVICE), held=held)


@pytest.mark.parametrize("layout", ["count", "block"])
@updates
def test_small_coordinate_layouts(update: str, layout: str, poisoned: None) -> None:
    direction = Coordinates(100) if layout == "count" else DIRECTIONS[layout]
    step_law(coordinate_twins(small(), direction, update=update, device=DEVICE))


def test_small_released(poisoned: None) -> None:
    step_law(coordinate_twins(small(), DIRECTIONS["released"], device=DEVICE))


@pytest.mark.parametrize("restore", ["copy", "walk"])
@pytest.mark.parametrize("held", [True, False], ids=["held", "apart"])
@distributions
def test_small_dense(distribution: str, held: bool, restore: str, poisoned: None) -> None:
    step_law(dense_twins(small(), distribution, restore=restore, device=DEVICE), held=held)
