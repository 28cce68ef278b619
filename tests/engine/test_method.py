"""Methods are values: any composition of parts runs and replays, and what it decides is what is compared."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch

import jaguar
from helpers.laws import TAU
from helpers.tensors import Bag, all_bits, bits, weights
from jaguar import Method, ZerothOrder
from jaguar.method import directions, estimators, orthogonal, rules
from jaguar.method.directions import Coordinates, Gaussian, Rademacher, ReleasedBlock
from jaguar.method.estimators import OneSided, TwoSided
from jaguar.method.rule import Rule
from jaguar.method.rules import SGD, AveragedSign, Buffer, Sign

# Parts with their group values; new parts of the package join by themselves where they need no arguments.
DIRECTIONS = {
    "gaussian": Gaussian(),
    "rademacher": Rademacher(),
    "tenth": Coordinates(0.1),
    "seven": Coordinates(7, signs="ones"),
    "block": Coordinates(1 / 9, "block"),
    "released": ReleasedBlock(),
}
NUMBERS: dict[str, dict[str, float]] = {
    "momentum": {"momentum": 0.9},
    "beta": {"beta": 0.7},
    "beta1": {"beta1": 0.9, "beta2": 0.99, "eps": 1e-6},
}
RULES: dict[str, tuple[Rule, dict[str, float]]] = {
    "sgd": (SGD(), {"momentum": 0.0}),
    "momentum": (SGD(), {"momentum": 0.9}),
    "sign": (Sign(), {"momentum": 0.0}),
    "averaged": (AveragedSign(), {"beta": 0.7}),
    "averaged-all": (AveragedSign("all"), {"beta": 0.7}),
}
if adamm := getattr(rules, "AdaMM", None):
    RULES["adamm"] = (adamm(), NUMBERS["beta1"])
ESTIMATORS = {
    "two": TwoSided(),
    "one": OneSided(2),
    **{
        kind.__name__: kind()
        for kind in vars(estimators).values()
        if kind in estimators.Estimator.__subclasses__() and kind.points
    },
}


def bag_of(dtype: torch.dtype) -> Bag:
    return Bag([weights(dtype, 12, 17), weights(dtype, 40), weights(dtype, 3, 4, 5)])


def made(bag: Bag, method: Method, values: dict[str, float], **more: Any) -> ZerothOrder:
    return ZerothOrder(bag.named_parameters(), method, lr=1e-3, tau=TAU, seed=12345, **values, **more)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_any_composition_runs_restores_and_replays(direction: str, rule: str, estimator: str) -> None:
    bags = [bag_of(torch.bfloat16) for _ in range(3)]
    part, values = RULES[rule]
    method = Method(DIRECTIONS[direction], part, ESTIMATORS[estimator])
    opts = [made(bag, method, values) for bag in bags]
    for _ in range(3):
        opts[0].step(bags[0])
        before = all_bits(list(bags[1].parameters()))
        record = opts[1].measure(bags[1])
        assert all_bits(list(bags[1].parameters())) == before
        opts[1].apply_(record)
        opts[2].apply_(jaguar.Record.unpack(record.pack()))
    states = [
        [bits(m) for p in bag.parameters() for m in opt.state[p].values()] for bag, opt in zip(bags, opts, strict=True)
    ]
    assert len({tuple(all_bits(list(bag.parameters()))) for bag in bags}) == 1 and states[0] == states[1] == states[2]
    assert all_bits(list(bags[0].parameters())) != all_bits(list(bag_of(torch.bfloat16).parameters()))
    again = made(bag_of(torch.bfloat16), method, values)
    again.load_state_dict(opts[0].state_dict())
    assert again.steps_done == 3


# The kernels of coordinate directions hold one state buffer; blocks of several directions overlap.
KERNELS = [
    (direction, rule)
    for direction in DIRECTIONS
    for rule in RULES
    if direction in ("gaussian", "rademacher") or rule in ("momentum", "averaged", "averaged-all")
]


@pytest.mark.parametrize(("direction", "rule"), KERNELS)
def test_compositions_that_kernels_have_are_the_same_there(direction: str, rule: str) -> None:
    pytest.importorskip("triton")
    bags = [bag_of(torch.bfloat16) for _ in range(2)]
    part, values = RULES[rule]
    for bag, backend in zip(bags, ("reference", "triton"), strict=True):
        opt = made(bag, Method(DIRECTIONS[direction], part), values, backend=backend)
        for _ in range(2):
            opt.step(bag)
    assert all_bits(list(bags[0].parameters())) == all_bits(list(bags[1].parameters()))


def test_what_kernels_do_not_have_is_refused_and_left_to_the_reference() -> None:
    pytest.importorskip("triton")
    bag = bag_of(torch.float32)
    method = Method(Coordinates(0.1), SGD())
    with pytest.raises(RuntimeError, match=r"one state buffer.*backend='auto' uses the reference"):
        made(bag, method, {"momentum": 0.0}, backend="triton")
    assert "backend: reference" in repr(made(bag, method, {"momentum": 0.0}))


PAIRS = {
    "orthogonal-dense": (lambda: Method(Gaussian(), orthogonal.Orthogonal()), "coordinate directions"),
    "released-elsewhere": (lambda: Method(Coordinates(), orthogonal.ReleasedOrthogonal()), r"ReleasedBlock\(\)"),
    "walk": (lambda: Method(Coordinates(), AveragedSign(), walk=True), "walk=True is for dense directions"),
    "rounding": (lambda: Method(Gaussian(), SGD(), rounding="up"), "rounding='up': choose"),
    "dtype": (lambda: Method(Gaussian(), SGD(), momentum_dtype=torch.float16), "momentum_dtype=torch.float16: choose"),
    "maximize": (lambda: Method(Gaussian(), SGD(), maximize=1), "maximize=1: choose"),  # type: ignore[arg-type]
    "direction": (lambda: Method("gaussian", SGD()), "direction='gaussian' is no Direction"),  # type: ignore[arg-type]
    "rule": (lambda: Method(Gaussian(), SGD), "is no Rule"),  # type: ignore[arg-type]
    "count": (lambda: Method(Gaussian(), SGD(), TwoSided(0)), "n_directions=0: give an int"),
    "clip": (lambda: Method(Gaussian(), SGD(), TwoSided(1, -1.0)), "rho_clip=-1.0: give a positive bound"),
}


@pytest.mark.parametrize("case", PAIRS)
def test_parts_that_do_not_fit_are_refused(case: str) -> None:
    make, message = PAIRS[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_missing_and_unknown_group_values_are_named() -> None:
    x = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="parameter group 0 has no momentum: pass momentum="):
        ZerothOrder([x], Method(Gaussian(), SGD()), lr=1.0)
    with pytest.raises(ValueError, match=r"the optimizer has the option 'beta'; .* may set lr, tau, momentum"):
        ZerothOrder([x], Method(Gaussian(), SGD()), lr=1.0, momentum=0.0, beta=0.9)
    with pytest.raises(TypeError, match=r"method must be a jaguar\.Method, got str"):
        ZerothOrder([x], "sgd", lr=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="restore='walk': choose 'copy' or 'module', or None"):
        ZerothOrder([x], Method(Gaussian(), SGD()), lr=1.0, momentum=0.0, restore="walk")
    opt = ZerothOrder([{"params": [x], "lr": 0.5, "momentum": 0.25}], Method(Gaussian(), SGD()))
    assert opt.param_groups[0]["tau"] == 1e-3 and opt.param_groups[0]["weight_decay"] == 0.0


class Miscounted(SGD):
    """Declares one number for its entry and gives two."""

    def entry_numbers(self, group: Any, t: int) -> tuple[float, ...]:
        return (0.5, 0.5)


def test_a_rule_gives_the_numbers_that_it_declares() -> None:
    x = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"Miscounted declares widths=\(1, 0\), and .* give \(2, 0\) numbers"):
        ZerothOrder([x], Method(Gaussian(), Miscounted()), lr=1.0, momentum=0.0)


class Four(Rule):
    """A rule with more state than there is noise for."""

    def state(self, group: Any) -> tuple[Buffer, ...]:
        return tuple(map(Buffer, "abcd"))


def test_a_rule_with_too_much_state_is_refused() -> None:
    x = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="Four has 4 state buffers; there is rounding noise for 3"):
        ZerothOrder([x], Method(Gaussian(), Four()), lr=1.0)


class Stateless(Rule):
    """A rule that keeps no state in these groups, and whose entry no kernel has."""

    entry, step = staticmethod(lambda m, g: m + g), staticmethod(rules.sgd_step)


def test_an_entry_that_is_not_called_needs_no_kernel() -> None:
    pytest.importorskip("triton")
    bags = [bag_of(torch.bfloat16) for _ in range(2)]
    for bag, backend in zip(bags, ("reference", "triton"), strict=True):
        made(bag, Method(Gaussian(), Stateless()), {}, backend=backend).step(bag)
    assert all_bits(list(bags[0].parameters())) == all_bits(list(bags[1].parameters()))


@pytest.mark.parametrize("name", ["rounding", "optimizer", "n_directions"])
def test_a_field_that_another_part_has_is_refused(name: str) -> None:
    """A checkpoint has one value for a name, and would not compare the other one."""
    kind: Any = dataclasses.make_dataclass("Own", [(name, str, "x")], bases=(Rule,), frozen=True)
    with pytest.raises(ValueError, match=f"has a field '{name}', and so has another part"):
        Method(Gaussian(), kind())


def test_a_rule_of_the_users_has_its_own_name_in_checkpoints() -> None:
    class Mine(SGD):
        pass

    assert Method(Gaussian(), Mine()).options()["optimizer"] == "Mine"
    assert Method(Gaussian(), SGD()).options()["optimizer"] == "ZOSGD"


NAMED: dict[str, tuple[Any, Method, dict[str, float]]] = {
    "JaguarSignSGD": (
        lambda p: jaguar.JaguarSignSGD(p, lr=1e-3, tau=TAU, seed=12345, coordinates=0.1, beta=0.7),
        Method(Coordinates(0.1), AveragedSign()),
        {"beta": 0.7},
    ),
    "ZOSGD": (
        lambda p: jaguar.ZOSGD(p, lr=1e-3, tau=TAU, seed=12345, momentum=0.5),
        Method(Gaussian(), SGD()),
        {"momentum": 0.5},
    ),
    "ZOSignSGD": (
        lambda p: jaguar.ZOSignSGD(p, lr=1e-3, tau=TAU, seed=12345, rounding="nearest", restore="walk"),
        Method(Gaussian(), Sign(), rounding="nearest", walk=True),
        {"momentum": 0.0},
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_the_named_classes_are_doors_to_methods(name: str) -> None:
    """The same method, the same bits, and each loads what the other saved."""
    make, method, values = NAMED[name]
    bags = [bag_of(torch.bfloat16) for _ in range(2)]
    named, bare = make(bags[0].named_parameters()), made(bags[1], method, values)
    assert named.method == method and hash(named.method) == hash(method)
    for _ in range(3):
        named.step(bags[0]), bare.step(bags[1])
    assert all_bits(list(bags[0].parameters())) == all_bits(list(bags[1].parameters()))
    bare.load_state_dict(named.state_dict()), named.load_state_dict(bare.state_dict())


def test_a_method_tells_itself() -> None:
    method = Method(Coordinates(0.1), AveragedSign("all"), OneSided(3, 1.5), rounding="nearest")
    assert eval(repr(method), vars(rules) | vars(directions) | vars(estimators) | {"Method": Method}) == method
    plain = method.options()
    assert plain["coordinates"] == 0.1 and plain["update"] == "all" and plain["n_directions"] == 3
    assert all(v is None or isinstance(v, (str, int, float, bool, list)) for v in plain.values())


USUAL = {
    "rng": "philox4x32-10/2",
    "estimator": "two-sided",
    "n_directions": 1,
    "rho_clip": None,
    "rounding": "stochastic",
    "momentum_dtype": None,
    "maximize": False,
}
SAMPLING = {"coordinates": 0.01, "layout": "uniform", "signs": "rademacher", "update": "sampled", "released": False}
NEWTON = {"ns_steps": 10, "ns_coefficients": "cubic", "ns_dtype": "torch.bfloat16", "ns_period": 1, "adjust_lr": None}
# What 0.2.0 wrote into checkpoints: class, arguments, options.
WRITTEN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "signsgd": ("JaguarSignSGD", {}, {"optimizer": "JaguarSignSGD"} | SAMPLING | USUAL),
    "more": (
        "JaguarSignSGD",
        {"coordinates": 3, "signs": "ones", "update": "all", "estimator": "one-sided", "n_directions": 2}
        | {"rho_clip": 2.0, "rounding": "nearest", "momentum_dtype": torch.bfloat16, "maximize": True},
        {"optimizer": "JaguarSignSGD", "layout": "uniform", "released": False, "rng": "philox4x32-10/2"}
        | {"coordinates": 3, "signs": "ones", "update": "all", "estimator": "one-sided", "n_directions": 2}
        | {"rho_clip": 2.0, "rounding": "nearest", "momentum_dtype": "torch.bfloat16", "maximize": True},
    ),
    "released": (
        "JaguarSignSGD",
        {"released": True},
        {"optimizer": "JaguarSignSGD"} | SAMPLING | USUAL | {"released": True},
    ),
    "muon": (
        "JaguarMuon",
        {
            "ns_steps": 3,
            "ns_coefficients": "quintic",
            "ns_dtype": torch.float32,
            "ns_period": 2,
            "adjust_lr": "original",
        },
        {"optimizer": "JaguarMuon", "ns_steps": 3, "ns_coefficients": "quintic", "ns_dtype": "torch.float32"}
        | {"ns_period": 2, "adjust_lr": "original"}
        | SAMPLING
        | USUAL,
    ),
    "muon-released": (
        "JaguarMuon",
        {"released": True},
        {"optimizer": "JaguarMuon"} | NEWTON | SAMPLING | USUAL | {"released": True},
    ),
    "sgd": (
        "ZOSGD",
        {"momentum": 0.9, "restore": "copy"},
        {"optimizer": "ZOSGD", "distribution": "gaussian", "restore": None} | USUAL,
    ),
    "walk": (
        "ZOSignSGD",
        {"distribution": "rademacher", "restore": "walk", "n_directions": 3},
        {"optimizer": "ZOSignSGD", "distribution": "rademacher", "restore": "walk"} | USUAL | {"n_directions": 3},
    ),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_checkpoints_say_what_those_of_0_2_0_said(case: str) -> None:
    name, arguments, options = WRITTEN[case]
    ns = {"ns": True} if name == "JaguarMuon" else {}
    opt = getattr(jaguar, name)([{"params": list(bag_of(torch.float32).parameters())} | ns], **arguments)
    saved = opt.state_dict()["jaguar"]
    assert saved["options"] == options
    assert list(saved) == ["step", "seed", "skipped", "skipped_in_a_row", "last_finite", "options"]


def concrete(module: Any, base: type) -> list[Any]:
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, base)]
    return [kind for kind in kinds if kind.__module__ == module.__name__ and kind is not base]


# The launches of AlongMomentum are the reference's only.
KERNELS = [kind for kind in concrete(rules, Rule) + concrete(orthogonal, Rule) if kind is not rules.AlongMomentum]


@pytest.mark.parametrize("kind", KERNELS, ids=lambda kind: kind.__name__)
def test_rules_have_kernels_of_the_same_names_and_arguments(kind: Any) -> None:
    pytest.importorskip("triton")
    from jaguar.triton_kernels import rules as kernels

    rule, group = kind(), {"lr": 1.0, "tau": 1.0, "weight_decay": 0.0}
    group |= {key: 0.5 for key in rule.keys}
    buffers, (n_entry, n_step) = rule.state(group), rule.widths
    for function, own, before in ((rule.entry, n_entry, 1), (rule.step, n_step, 3)):
        if function is rule.entry and not buffers:
            continue
        arguments = list(inspect.signature(function).parameters)
        assert list(inspect.signature(getattr(kernels, function.__name__).fn).parameters) == arguments
        assert len(arguments) == max(len(buffers), int(function is rule.step)) + before + own  # g in state's place
        assert getattr(rules, function.__name__) is function and function.__doc__
    assert len(rule.entry_numbers(group, 1)) == n_entry and len(rule.step_numbers(group, 1)) == n_step
    assert dataclasses.is_dataclass(rule) and rule == kind() and hash(rule) == hash(kind())
