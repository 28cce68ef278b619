"""Silent failures made loud, transactions that hold, and checks that the checks would notice."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import jaguar.method.params
from helpers.laws import CONFIGS, make
from helpers.steps import skipping, warned
from helpers.tensors import Bag, all_bits, bits, dtype_id, every_form, state_bits, weights
from jaguar import ZOSGD, JaguarSignSGD
from jaguar.method import rules
from jaguar.method.orthogonal import Orthogonal

configs = pytest.mark.parametrize("config", CONFIGS)


def step_rule(config: str) -> str:
    """The name of the function that moves matrices."""
    rule = make(config, [torch.zeros(20, 20, requires_grad=True)]).method.rule
    return f"jaguar.rules.{'sgd_step' if isinstance(rule, Orthogonal) else rule.step.__name__}"


# -- lost perturbations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["sampled", "all"])
@pytest.mark.parametrize("estimator", ["two-sided", "one-sided"])
def test_lost_perturbations_are_reported_and_not_trained(update: str, estimator: str) -> None:
    lost = torch.full((400,), 1.0, dtype=torch.bfloat16, requires_grad=True)
    fine = torch.full((400,), 0.01, dtype=torch.bfloat16, requires_grad=True)
    opt = JaguarSignSGD(
        [("lost", lost), ("fine", fine)], tau=1e-3, lr=0.1, coordinates=0.5, update=update, estimator=estimator
    )
    messages = warned(opt, lambda: (lost.float() ** 2).sum() + (fine.float() ** 2).sum(), 5)
    assert len(messages) == 1 and "lost 100%" in messages[0] and "tau is too small" in messages[0]
    assert "1 of 2 tensors" in messages[0] and opt.lost_share == {"lost": 1.0, "fine": 0.0}
    assert (lost == 1).all() and not opt.state[lost]["momentum"].any(), "the coordinate counts as unsampled"
    assert (fine != 0.01).sum() > 150 and opt.state[fine]["momentum"].any()


def test_lost_coordinates_only() -> None:
    x = torch.where(torch.arange(200) % 2 == 0, 1.0, 0.01).to(torch.bfloat16).requires_grad_()
    before = x.detach().clone()
    opt = JaguarSignSGD([x], tau=1e-3, lr=0.1, coordinates=1.0)
    with pytest.warns(UserWarning, match="50%"):
        opt.step(lambda: x.float().sum())
    assert torch.equal(x[::2], before[::2]) and (x[1::2] != before[1::2]).all()


def test_lost_means_equal_to_the_point_it_is_compared_with() -> None:
    """1 + 0.003 rounds to 1 in bf16 and 1 - 0.003 does not: lost against f(x), not against f(x - tau)."""
    for estimator, moves in (("one-sided", 0), ("two-sided", 200)):
        x = torch.full((200,), 1.0, dtype=torch.bfloat16, requires_grad=True)
        opt = JaguarSignSGD([x], tau=3e-3, lr=0.1, coordinates=1.0, signs="ones", estimator=estimator)
        assert len(warned(opt, lambda: x.float().sum(), 1)) == (moves == 0)  # noqa: B023
        assert int((x != 1).sum()) == moves


def test_lost_share_of_dense_directions() -> None:
    x = torch.full((400,), 1.0, dtype=torch.bfloat16, requires_grad=True)
    with pytest.warns(UserWarning, match="tau is too small"):
        ZOSGD([x], tau=1e-4).step(lambda: x.float().sum())
    opt = ZOSGD([torch.full((400,), 1.0, requires_grad=True)], tau=1e-3)
    assert not warned(opt, lambda: torch.rand(()), 1) and opt.lost_share == {"#0": 0.0}


def test_a_fraction_of_too_few_parameters_is_told() -> None:
    """One stratum of 1,000 elements, of which 15 are there: nothing would ever move, and nothing would say so."""
    model = nn.Linear(4, 3)
    opt = JaguarSignSGD(model.named_parameters(), coordinates=0.001)
    x = torch.ones(2, 4)
    before = all_bits(list(model.parameters()))
    for _ in range(9):
        opt.step(lambda: model(x).square().mean())
    with pytest.warns(UserWarning, match="no coordinate was sampled in 10 steps in a row"):
        opt.step(lambda: model(x).square().mean())
    assert all_bits(list(model.parameters())) == before
    opt.step(lambda: model(x).square().mean())  # said once


def test_no_warning_below_five_percent() -> None:
    x = torch.where(torch.arange(1000) < 40, 1.0, 0.01).to(torch.bfloat16).requires_grad_()
    opt = JaguarSignSGD([x], tau=1e-3, coordinates=1.0)
    assert not warned(opt, lambda: x.float().sum(), 2) and opt.lost_share == {"#0": 0.04}


# -- skipped steps -----------------------------------------------------------------------------------------------------


@configs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_skips_the_step(config: str, bad: float, dtype: torch.dtype) -> None:
    bag = every_form(dtype)
    opt = make(config, bag.named_parameters(), weight_decay=0.5)
    opt.step(bag)
    params = list(bag.parameters())
    before, calls = (all_bits(params), state_bits(opt, params)), []
    with skipping():
        loss = opt.step(lambda: (calls.append(1), bag() * (bad if len(calls) == 2 else 1.0))[1])
    assert math.isnan(loss.item()) and opt.last_record.skipped
    assert not all(map(math.isfinite, opt.last_record.losses))
    assert (all_bits(params), state_bits(opt, params)) == before, "no decay, no momentum"
    assert opt.steps_done == 2 and opt.n_skipped == 1 and "skipped: 1" in repr(opt)
    bag.seen.clear()
    opt.step(bag)
    assert opt.last_record.step == 2 and all_bits(params) != before[0]


def test_too_many_skipped_steps_in_a_row_raise() -> None:
    bag = Bag([weights(torch.float32, 30)])
    opt = make("fraction", bag.named_parameters())
    opt.max_skipped = 4
    nan = bag.p0.detach().new_tensor(math.nan)
    with skipping() as told:
        for finite in (True, True, False, False, False, True, False, False, False):
            opt.step(bag if finite else lambda: nan)
    assert [str(w.message)[:6] for w in told] == ["step 2", "step 3", "step 6"]  # the first, second and fourth
    assert "4 of 7 steps were skipped so far" in str(told[-1].message)
    before = bits(bag.p0)
    with pytest.raises(RuntimeError, match=r"4 steps in a row.*last finite step: 5"):
        opt.step(lambda: nan)
    assert bits(bag.p0) == before and opt.steps_done == 9
    opt.step(bag)
    assert opt.steps_done == 10 and opt.n_skipped == 6


def test_default_of_max_skipped_and_no_finite_step_at_all() -> None:
    opt = JaguarSignSGD([torch.zeros(3, requires_grad=True)], coordinates=1.0)
    with skipping() as told:
        for _ in range(24):
            opt.step(lambda: torch.tensor(math.nan))
    assert len(told) == 5  # 1, 2, 4, 8, 16
    with pytest.raises(RuntimeError, match=r"25 steps in a row.*last finite step: none"):
        opt.step(lambda: torch.tensor(math.nan))


def test_skipped_steps_move_on_to_new_directions() -> None:
    bag = Bag([weights(torch.float32, 300)])
    opt = make("fraction", bag.named_parameters())
    with skipping():
        for _ in range(2):
            opt.step(lambda: bag() * math.nan)
    assert bits(bag.seen[0][0]) != bits(bag.seen[2][0])


# -- transactions ------------------------------------------------------------------------------------------------------


@configs
@pytest.mark.usefixtures("apart")
def test_a_failure_in_mid_write_breaks_the_optimizer(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bag = every_form(torch.float32)
    opt = make(config, bag.named_parameters())
    opt.step(bag), opt.step(bag)
    record, calls = opt.measure(bag), []
    real = getattr(rules, step_rule(config).rsplit(".", 1)[1])

    def failing(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(step_rule(config), failing)
        with pytest.raises(MemoryError):
            opt.apply_(record)
    for call in (lambda: opt.step(bag), lambda: opt.apply_(record), lambda: opt.measure(bag), opt.step):
        with pytest.raises(RuntimeError, match="reload: last finished step 1"):
            call()
    assert opt.steps_done == 2


def test_a_failure_in_the_first_step_has_no_finished_step(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = JaguarSignSGD([weights(torch.float32, 300).requires_grad_()])
    monkeypatch.setattr("jaguar.rules.sign_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: torch.ones(()))
    with pytest.raises(RuntimeError, match="last finished step none"):
        opt.step(lambda: torch.ones(()))


@configs
@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
def test_a_failing_perturbation_is_taken_back(config: str, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not together:
        monkeypatch.setattr("jaguar.backends.reference.pieces._SMALL", -1)
    bag = every_form(torch.bfloat16)
    params = list(bag.parameters())
    real, failed = rules.perturbed, 0
    for fatal in range(1, 20):
        opt, calls, before = make(config, bag.named_parameters()), [], all_bits(params)
        opt.lost_share = {}  # the report of lost perturbations moves nothing

        def failing(x: torch.Tensor, e: torch.Tensor, scale: float) -> torch.Tensor:
            calls.append(1)  # noqa: B023
            if len(calls) == fatal:  # noqa: B023
                raise MemoryError
            return real(x, e, scale)

        with monkeypatch.context() as patch:
            patch.setattr("jaguar.rules.perturbed", failing)
            try:
                opt.measure(bag)
            except MemoryError:
                failed += 1
        assert all_bits(params) == before
        opt.measure(bag)
        assert all_bits(params) == before
        if failed < fatal:  # there were fewer perturbations than that
            break
    if not opt.method.estimator.points:
        assert not failed, "it perturbs nothing"
        return
    one_sided = not opt.method.estimator.two_sided
    assert failed >= (1 if together else 4) * (1 if one_sided else 2)


@configs
@pytest.mark.usefixtures("apart")
def test_ctrl_c_waits_until_the_parameters_are_whole(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bag, twin = every_form(torch.float32), every_form(torch.float32)
    opt, other = make(config, bag.named_parameters()), make(config, twin.named_parameters())
    real, finished = getattr(rules, step_rule(config).rsplit(".", 1)[1]), []

    def interrupted(*args: object) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        finished.append(sum(i * i for i in range(2000)))  # bytecode in which a handler would run
        return real(*args)

    handler = signal.getsignal(signal.SIGINT)
    record = opt.measure(bag)
    with monkeypatch.context() as patch:
        patch.setattr(step_rule(config), interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.apply_(record)
    other.step(twin)
    assert len(finished) >= 2 and opt.steps_done == 1 and signal.getsignal(signal.SIGINT) is handler
    assert all_bits(list(bag.parameters())) == all_bits(list(twin.parameters()))
    opt.step(bag), other.step(twin)
    assert all_bits(list(bag.parameters())) == all_bits(list(twin.parameters()))


@configs
def test_ctrl_c_while_perturbing_or_evaluating(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bag = every_form(torch.float32)
    opt, params, handler = make(config, bag.named_parameters()), list(bag.parameters()), signal.getsignal(signal.SIGINT)
    opt.lost_share = {}
    before, real = all_bits(params), rules.perturbed

    def interrupted(*args: object) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr("jaguar.rules.perturbed", interrupted)
        with pytest.raises(KeyboardInterrupt) if opt.method.estimator.points else nullcontext():
            opt.measure(bag)
    assert all_bits(params) == before and signal.getsignal(signal.SIGINT) is handler
    started = time.monotonic()

    def closure() -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(600)
        return bag()

    with pytest.raises(KeyboardInterrupt):
        opt.measure(closure)
    assert time.monotonic() - started < 300, "at once in the caller's own code"
    assert all_bits(params) == before and signal.getsignal(signal.SIGINT) is handler
    opt.step(bag)


def test_steps_in_another_thread_leave_signals_alone() -> None:
    bag, errors = every_form(torch.float32), []
    opt = make("fraction", bag.named_parameters())

    def work() -> None:
        try:
            opt.step(bag)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start(), thread.join()
    assert not errors and opt.steps_done == 1


# -- restore="module" --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["two-sided", "one-sided"])
def test_module_restore_names_an_unused_parameter(estimator: str) -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3, bias=False)})
    opt = ZOSGD(model.named_parameters(), restore="module", estimator=estimator)
    before = all_bits(list(model.parameters()))
    with pytest.raises(RuntimeError, match=r"idle\.weight.*restore='copy'"):
        opt.step(lambda: model["used"](torch.ones(1, 3)).sum())
    assert all_bits(list(model.parameters())) == before and opt.steps_done == 0
    opt.step(lambda: model["idle"](model["used"](torch.ones(1, 3))).sum())
    assert not torch.nn.modules.module._global_forward_hooks


def test_module_restore_perturbs_shared_and_nested_modules_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
            self.tied = self.inner.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.inner(x) * self.scale) @ self.tied

    runs = []
    for restore in ("copy", "module"):
        torch.manual_seed(0)
        model = Twice()
        opt = ZOSGD(model.named_parameters(), lr=1e-2, tau=1e-2, restore=restore)
        for _ in range(4):
            opt.step(lambda: model(torch.ones(2, 4)).square().mean())  # noqa: B023
        runs.append((all_bits(list(model.parameters())), opt.last_record))
    assert runs[0] == runs[1]


def test_without_a_choice_memory_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    x = [("x", torch.zeros(1000, requires_grad=True))]
    for free, restore in ((1e12, "copy"), (39_999, "module"), (40_001, "copy")):
        monkeypatch.setattr("jaguar.method.probe.free_bytes", lambda device: free)  # noqa: B023
        assert ZOSGD(x)._launches().parts[0][1].restore == restore


# -- the guards have teeth ---------------------------------------------------------------------------------------------


def test_streams_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tensors with one stream move alike; the collision check is what keeps that from happening."""
    monkeypatch.setattr(jaguar.method.params, "stream_of", lambda name: 3)
    with pytest.raises(ValueError, match="stream"):
        JaguarSignSGD(
            [("a", weights(torch.float32, 5).requires_grad_()), ("b", weights(torch.float32, 6).requires_grad_())]
        )


def test_a_derivative_that_overflows_skips_the_step():
    x = torch.ones(200, requires_grad=True)
    optimizer = JaguarSignSGD([x], coordinates=1.0, tau=1e-3)
    calls = iter([1e37, -1e37, 1.0, 0.5])
    with pytest.warns(UserWarning, match="too far apart for a finite derivative"):
        optimizer.step(lambda: torch.tensor(next(calls)))
    assert optimizer.n_skipped == 1 and torch.equal(x.detach(), torch.ones(200))
    optimizer.step(lambda: torch.tensor(next(calls)))
    assert optimizer.n_skipped == 1 and bool((x != 1).all())


def test_a_named_group_of_frozen_tensors_is_left_out():
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = JaguarSignSGD([{"params": [("a", a)]}, {"params": [("b", b)], "lr": 1.0}], coordinates=1.0)
    optimizer.step(lambda: (a**2).sum())
    assert "1 frozen" in repr(optimizer)


def test_applying_a_record_counts_as_a_step_for_schedulers():
    x = torch.ones(3, requires_grad=True)
    optimizer = JaguarSignSGD([x], coordinates=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    optimizer.apply_(optimizer.measure(lambda: (x**2).sum()))
    schedule.step()  # warns, which is an error here, if it thinks that no step was taken


@pytest.mark.parametrize("config", ["fraction", "gaussian-copy", "gaussian-walk"])
def test_a_warning_that_is_an_error_leaves_no_trace(config: str) -> None:
    """It comes after the last evaluation, when the parameters of a fused step are still moved."""
    walk = config == "gaussian-walk"
    more = {"restore": "walk"} if walk else {"coordinates": 1.0} if config == "fraction" else {}
    bag = every_form(torch.float32)
    opt = make("gaussian-copy" if walk else config, bag.named_parameters(), **more)
    for _ in range(9):
        opt.step(lambda: torch.tensor(1.0))
    before = [p.detach().clone() for p in bag.parameters()]
    with pytest.raises(UserWarning, match="all losses of a step were bit-equal"):
        opt.step(lambda: torch.tensor(1.0))
    for p, x in zip(bag.parameters(), before, strict=True):
        assert torch.allclose(p, x, rtol=0.0, atol=1e-5 if walk else 0.0)
    assert opt.steps_done == 9
    opt.step(lambda: torch.tensor(1.0))
