"""Steps that need no search: the estimates, what is done with them, and that records still say all of a step."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jaguar
from jaguar import Record
from jaguar.method.estimators import OneSided, TwoSided
from jaguar.method.rule import Seen
from jaguar.method.step_size import Estimates, differences, standard_errors
from jaguar.optimizers.names import METHODS
from jaguar.trainer.model_card import card_arguments

DIM, ROWS = 400, 16
AUTO: dict[str, Any] = {"lr": "auto", "tau": "auto"}
CASES = {
    "sgd": (jaguar.ZOSGD, {}),
    "sgd-momentum": (jaguar.ZOSGD, {"momentum": 0.9}),
    "sgd-one-sided": (jaguar.ZOSGD, {"estimator": "one-sided", "n_directions": 4}),
    "sign": (jaguar.ZOSignSGD, {"distribution": "rademacher"}),
    "jaguar": (jaguar.JaguarSignSGD, {"coordinates": 0.25}),
    "jaguar-all": (jaguar.JaguarSignSGD, {"coordinates": 0.25, "update": "all"}),
    "jaguar-one-sided": (jaguar.JaguarSignSGD, {"coordinates": 1.0, "estimator": "one-sided", "n_directions": 4}),
    "lezo": (jaguar.LeZO, {"keep": 0.5, "layers": ["a", "b"]}),
}


class Noisy:
    """Rows of 1/2 x'Hx + n_i'x, n_i of variance `noise` in every coordinate: g = Hx, F = noise I."""

    def __init__(self, dtype: torch.dtype = torch.float32, noise: float = 0.25, dim: int = DIM) -> None:
        generator = torch.Generator().manual_seed(0)
        self.h = 2.0 * torch.rand(dim, generator=generator, dtype=torch.float64)
        self.start = torch.randn(dim, generator=generator, dtype=torch.float64).to(dtype)
        self.noise = noise

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        halves = self.start.clone().chunk(2)
        return [(name, torch.nn.Parameter(half)) for name, half in zip(("a", "b"), halves, strict=True)]

    def rows(self, named: Sequence[tuple[str, Tensor]], step: int, rows: int = ROWS) -> Callable[[], Tensor]:
        n = torch.randn(rows, len(self.h), generator=torch.Generator().manual_seed(step), dtype=torch.float64)

        def closure() -> Tensor:
            x = torch.cat([tensor for _, tensor in named]).double()
            return 0.5 * (self.h * x * x).sum() + self.noise**0.5 * (n @ x)

        return closure

    def loss(self, named: Sequence[tuple[str, Tensor]]) -> float:
        x = torch.cat([tensor.detach() for _, tensor in named]).double()
        return float(0.5 * (self.h * x * x).sum())


def run(
    case: str, steps: int, seed: int = 0, dtype: torch.dtype = torch.float32, **more: Any
) -> tuple[Noisy, list[tuple[str, torch.nn.Parameter]], Any, list[Record]]:
    kind, options = CASES[case]
    problem = Noisy(dtype)
    named = problem.parameters()
    optimizer = kind(named, seed=seed, **{**AUTO, **options, **more})
    records = []
    for step in range(steps):
        optimizer.step(problem.rows(named, step))
        records.append(optimizer.last_record)
    return problem, named, optimizer, records


def bits(named: Sequence[tuple[str, Tensor]]) -> bytes:
    return b"".join(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for _, tensor in named)


# -- a vector of losses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [jaguar.ZOSGD, jaguar.ZOAdaMM], ids=lambda kind: kind.__name__)
def test_the_losses_of_rows_are_their_mean(kind: Any) -> None:
    problem, found = Noisy(torch.float64), []
    for of in (lambda rows: rows, torch.mean):
        named = problem.parameters()
        optimizer = kind(named, lr=1e-3)
        for step in range(3):
            closure = problem.rows(named, step)
            optimizer.step(lambda closure=closure, of=of: of(closure()))
        found.append((optimizer.last_record, bits(named)))
    assert found[0] == found[1]


# -- estimates ---------------------------------------------------------------------------------------------------------


def test_signal_is_the_mean_over_pairs_of_different_rows() -> None:
    rows = [torch.randn(5, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    estimator, found = TwoSided(2), Estimates()
    firsts, _ = differences(estimator, rows)
    errors = standard_errors(estimator, rows)
    found.add([float(first.double().mean()) for first in firsts], errors, 5)
    pairs = [float(a[i]) * float(a[j]) for a in firsts for i, j in itertools.permutations(range(5), 2)]
    assert found.signal == pytest.approx(math.fsum(pairs) / len(pairs), rel=1e-5)
    assert found.weight == 1.0 and found.share == found.signal / found.square


@pytest.mark.parametrize("estimator", [TwoSided(), OneSided(3)], ids=lambda e: e.name)
def test_second_difference_is_that_of_a_parabola(estimator: Any) -> None:
    tau, slopes = 0.1, [1.0, -2.0, 0.5][: estimator.n_directions]
    f = [lambda h, a=a: 3.0 + a * h + 2.0 * h * h for a in slopes]
    looked = [f[0](0.01), f[0](-0.01)]
    own = [f[0](tau), f[0](-tau)] if estimator.two_sided else [3.0, *(one(tau) for one in f)]
    losses = [*looked, 3.0 if estimator.two_sided else f[0](-tau), *own]
    firsts, seconds = differences(estimator, losses)
    assert seconds == pytest.approx([4.0 * 0.01**2, 4.0 * tau**2])
    width = tau * (2.0 if estimator.two_sided else 1.0)
    bias = 0.0 if estimator.two_sided else 2.0 * tau
    assert [d / width for d in firsts] == pytest.approx([a + bias for a in slopes])
    assert differences(estimator, losses[2:]) == (firsts, seconds[1:]) and differences(estimator, own)[1] == []


@pytest.mark.parametrize("case", ["sgd", "sgd-one-sided", "sign", "jaguar"])
def test_estimates_of_a_known_quadratic_after_200_steps(case: str) -> None:
    """lr* within 20 %: the relative standard error of g'Cg is about sqrt(2 / 200) here, of tr(CH) 2 %.

    The parameters stay where g is known: the group's factor is 0.
    """
    problem, named, optimizer, _ = run(case, 0)
    optimizer.param_groups[0]["lr"] = 0.0
    for step in range(200):
        optimizer.step(problem.rows(named, step))
    found, fraction = optimizer.estimates, optimizer.fraction
    x = torch.cat([tensor.detach() for _, tensor in named]).double()
    signal, noise = float((problem.h * x).square().sum()), problem.noise * DIM / ROWS
    square = fraction * (signal + noise)
    curvature = fraction * float(problem.h.sum())
    assert found.curvature == pytest.approx(curvature, rel=0.05)
    assert found.square == pytest.approx(square, rel=0.25)
    n = optimizer.method.estimator.n_directions
    group, rule = optimizer.param_groups[0], optimizer.method.rule
    best = rule.best_lr(Seen(signal / (signal + noise), square, curvature), group, n, fraction)
    seen = rule.best_lr(Seen(found.share, found.square, found.curvature), group, n, fraction)
    assert seen == pytest.approx(best, rel=0.2)
    assert optimizer.method.step_size.lr_of(found, rule, group, n, fraction) == pytest.approx(best, rel=0.2)


def test_one_look_near_zero_is_not_trusted_beyond_its_rows() -> None:
    """A second difference that is small by chance would make a step as long as it is small."""
    found, tau = Estimates(), 5e-3
    found.add_curvature(second=-4.3 * tau**2, error=(600.0 * tau**2) ** 2, tau=tau)
    assert found.sure_curvature >= 600.0
    for value in (610.0, 640.0, 590.0, 655.0):
        found.add_curvature(second=value * tau**2, error=(600.0 * tau**2) ** 2, tau=tau)
    assert found.curvature < found.sure_curvature < found.curvature + 600.0


def test_what_was_seen_along_a_shorter_tau_counts_less() -> None:
    """The resolution of the loss makes 1,000 of a curvature at tau 1e-3, and 1 at the tau that follows."""
    found = Estimates(tau=1e-3, grain=1e-6)
    found.add([1.0], [0.9], 16)
    found.add_curvature(1000.0 * 1e-6, 0.0, 1e-3)
    found.fit_tau(OneSided(1))
    assert found.tau == pytest.approx(5e-3)  # five resolutions over |rho|
    found.add([0.1], [0.0], 16)
    found.add_curvature(1.0 * found.tau**2, 0.0, found.tau)
    assert found.curvature < 5.0 and found.square < 0.1


def test_a_lucky_step_does_not_make_a_share_sure() -> None:
    found = Estimates()
    for _ in range(6):
        found.add([3.6], [12.0], 16)
    found.add([17.4], [43.0], 16)
    assert found.share > 0.65 and found.sure_share < 0.35
    for _ in range(300):
        found.add([3.0], [1.0], 16)
    assert found.sure_share == pytest.approx(found.share, rel=0.02)


SEEN = Seen(0.5, 9.0, 2.0)


def test_best_steps_by_hand() -> None:
    group: dict[str, Any] = {"momentum": 0.0, "beta": 0.0}
    sgd, sign, averaged = jaguar.rules.SGD(), jaguar.rules.Sign(), jaguar.rules.AveragedSign()
    assert sgd.best_lr(SEEN, group, 4, 1.0) == 1.0  # 4 * 0.5 / 2
    assert sgd.best_lr(SEEN, {"momentum": 0.75}, 4, 1.0) == 0.25
    plain = math.sqrt(2.0 / math.pi) * 0.5 * 3.0 / 2.0
    assert sign.best_lr(SEEN, group, 1, 1.0) == pytest.approx(plain)
    assert sign.best_lr(SEEN, group, 4, 1.0) == pytest.approx(2.0 * plain)
    assert averaged.best_lr(SEEN, group, 1, 0.25) == pytest.approx(plain)
    everywhere = jaguar.rules.AveragedSign("all")
    assert everywhere.best_lr(SEEN, group, 1, 0.25) == pytest.approx(0.25 * plain)


def test_signs_of_a_mean_agree_as_expected() -> None:
    """Variance of a sum of 2,000 signs over 2,000 runs: 3 % of standard error, and edges of 1 %."""
    beta, generator = 0.8, torch.Generator().manual_seed(0)
    m, total = torch.zeros(2000, dtype=torch.float64), torch.zeros(2000, dtype=torch.float64)
    for _ in range(2000):
        m = beta * m + torch.randn(2000, generator=generator, dtype=torch.float64)
        total += m.sign()
    together = float(total.square().mean()) / 2000
    right = math.sqrt(2.0 / math.pi * (1.0 + beta) / (1.0 - beta))
    assert right / Seen(1.0, 1.0, 1.0).along_signs(beta, beta) == pytest.approx(together, rel=0.1)


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_loss_falls_without_a_number(case: str, dtype: torch.dtype) -> None:
    problem, named, optimizer, records = run(case, 300, dtype=dtype)
    assert records[0].lrs == (0.0,) and all(record.lrs[0] > 0.0 for record in records[5:])
    assert problem.loss(named) < 0.75 * problem.loss(problem.parameters())
    own = optimizer.method.estimator.n_losses
    looks = [len(record.losses) - own for record in records]
    assert looks == [3] + [int(step < 6 or step % (20 // own) == 0) for step in range(1, 300)]


@pytest.mark.parametrize("case", CASES)
def test_records_say_all_of_it(case: str) -> None:
    _, named, optimizer, records = run(case, 60, dtype=torch.bfloat16)
    _, again, replayed, _ = run(case, 0, dtype=torch.bfloat16)
    for record in records:
        replayed.apply_(Record.unpack(record.pack()))
    assert bits(again) == bits(named) and replayed.estimates == optimizer.estimates
    assert all(record.rows == ROWS for record in records)


@pytest.mark.parametrize("case", ["sgd-one-sided", "jaguar"])
def test_a_run_goes_on_from_its_state(case: str) -> None:
    _, named, _, records = run(case, 40)
    problem, again, first, _ = run(case, 25)
    state = copy.deepcopy(first.state_dict())
    assert all(type(value) is float for value in state["jaguar"]["estimates"].values())
    kind, options = CASES[case]
    second = kind(again, seed=9, **AUTO, **options)
    second.load_state_dict(state)
    for step in range(25, 40):
        second.step(problem.rows(again, step))
        assert second.last_record == records[step]
    assert bits(again) == bits(named)
    with pytest.raises(ValueError, match="auto='lr, tau', this optimizer has auto=None"):
        kind(problem.parameters(), lr=1e-3, **options).load_state_dict(state)


def test_measure_and_apply_are_step_and_kernels_are_the_reference() -> None:
    _, named, _, records = run("jaguar", 15)
    problem, others, optimizer, _ = run("jaguar", 0)
    kernels, fused = problem.parameters(), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        fused = jaguar.JaguarSignSGD(kernels, coordinates=0.25, backend="triton", **AUTO)
        for step in range(15):
            optimizer.apply_(optimizer.measure(problem.rows(others, step)))
            fused.step(problem.rows(kernels, step))
            assert optimizer.last_record == fused.last_record == records[step]
    assert bits(named) == bits(others) == bits(kernels)


def test_a_schedule_is_a_factor() -> None:
    problem, named, optimizer, _ = run("sgd", 0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(8):
        group, found = optimizer.param_groups[0], copy.copy(optimizer.estimates)
        optimizer.step(problem.rows(named, step))
        whole = optimizer.method.step_size.lr_of(found, optimizer.method.rule, group, 1, 1.0)
        assert optimizer.last_record.lrs == (0.5**step * whole,)
        schedule.step()


def test_one_of_them_may_be_a_number() -> None:
    _, _, optimizer, records = run("sgd", 12, tau=1e-2)
    assert {record.taus for record in records} == {(1e-2,)} and len({record.lrs for record in records}) > 5
    assert optimizer.method.options()["auto"] == "lr"
    _, _, optimizer, records = run("sgd", 12, lr=1e-4)
    assert {record.lrs for record in records} == {(1e-4,)} and len({record.taus for record in records}) > 1


def test_tau_grows_where_the_loss_has_no_more_digits() -> None:
    """A loss in steps of 2^-10: below a tau of 1e-2 the second difference, 400 tau^2 = 0.04, is lost in them."""
    problem = Noisy()
    named = problem.parameters()
    optimizer = jaguar.ZOSGD(named, distribution="rademacher", **AUTO)
    for step in range(40):
        closure = problem.rows(named, step)
        optimizer.step(lambda closure=closure: (closure() * 1024).round() / 1024)
    assert optimizer.estimates.tau > 4e-3
    assert optimizer.estimates.curvature == pytest.approx(float(problem.h.sum()), rel=0.25)


def test_the_larger_loss_is_looked_for() -> None:
    problem = Noisy()
    named = problem.parameters()
    optimizer = jaguar.ZOSGD(named, maximize=True, **AUTO)
    before = problem.loss(named)
    for step in range(200):
        closure = problem.rows(named, step)
        optimizer.step(lambda closure=closure: -closure())
    assert problem.loss(named) < 0.8 * before and optimizer.estimates.curvature > 0.0


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: jaguar.ZOAdaMM(p, lr="auto"), "the best step along AdaMM.* is not known; give a number"),
        (lambda p: jaguar.ZOSignSGD(p, lr="auto", scalar_sign=True), "the best step along ScalarSign"),
        (lambda p: jaguar.FZOO(p, tau="auto"), "tau='auto': takes a two-sided or a one-sided estimator"),
        (lambda p: jaguar.ZOSGD(p, lr="auto", restore="walk"), "restore='walk' leaves"),
        (lambda p: jaguar.ZOSGD(p, lr="fast"), "lr='fast' of the optimizer is not a number"),
        (lambda p: jaguar.ZOSGD([{"params": p, "lr": "auto"}]), "lr='auto' of parameter group 0 is not a number"),
        (lambda p: jaguar.StepSize(False, False), "choose lr=True, tau=True or both"),
    ],
)
def test_what_has_no_automatic_step(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(Noisy().parameters())


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.cls])
def test_the_table_of_names_says_which_methods_have_one(name: str) -> None:
    row = METHODS[name]
    kind = getattr(jaguar, row.cls or "")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    params = jaguar.param_groups(model) if kind.by_role else list(model.named_parameters())
    more: dict[str, Any] = {"forward-grad": {"model": model}, "dizo": {"project": ["weight"]}}.get(name, {})
    try:
        kind(params, lr="auto", **more)
    except ValueError as refusal:
        assert not row.automatic and "give a number" in str(refusal)
    else:
        assert row.automatic


def test_the_repr_and_the_model_card_say_that_lr_is_chosen(tmp_path: Path) -> None:
    _, _, optimizer, _ = run("sgd", 0)
    assert "lr and tau from the losses; the groups have factors" in repr(optimizer)
    arguments = jaguar.ZOTrainingArguments(str(tmp_path), optim_zo="zo-sgd", learning_rate="auto", use_cpu=True)
    assert card_arguments(arguments, optimizer).learning_rate == "auto"
    _, _, optimizer, _ = run("sgd", 0, lr=1e-4)
    assert card_arguments(arguments, optimizer).learning_rate == 1e-4


def test_nothing_to_move_is_no_failure() -> None:
    problem, named, optimizer, _ = run("sgd", 3)
    before = bits(named)
    for _, tensor in named:
        tensor.requires_grad_(False)
    with pytest.warns(UserWarning):
        optimizer.step(problem.rows(named, 3))
    assert bits(named) == before and optimizer.steps_done == 4


def test_rows_are_needed() -> None:
    problem, named, optimizer, _ = run("sgd", 0)
    before = bits(named)
    with pytest.raises(ValueError, match="the closure must return the loss of each row"):
        optimizer.step(lambda: problem.rows(named, 0)().mean())
    counts = itertools.cycle((4, 5))
    with pytest.raises(ValueError, match="the losses of 4 and 5 rows"):
        optimizer.step(lambda: problem.rows(named, 0, next(counts))())
    assert bits(named) == before and optimizer.steps_done == 0


def test_records_of_other_optimizers_are_refused() -> None:
    _, _, _, (automatic, *_) = run("sgd", 2)
    _, _, plain, _ = run("sgd", 0, lr=1e-3, tau=1e-3)
    with pytest.raises(ValueError, match="3 standard errors"):
        plain.apply_(Record(0, (1e-3,), automatic.losses[:2], taus=automatic.taus, errors=automatic.errors))
    _, _, other, _ = run("sgd", 0)
    with pytest.raises(ValueError, match="0 standard errors"):
        other.apply_(Record(0, (1e-3,), automatic.losses))


def test_a_step_without_a_finite_loss_teaches_nothing() -> None:
    problem, named, optimizer, _ = run("sgd", 5)
    found = copy.copy(optimizer.estimates)
    with pytest.warns(UserWarning, match="was skipped"):
        optimizer.step(lambda: problem.rows(named, 5)() * math.nan)
    assert optimizer.estimates == found and optimizer.last_record.skipped
    assert Record.unpack(optimizer.last_record.pack()).rows == ROWS
