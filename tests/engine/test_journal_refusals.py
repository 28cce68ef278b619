"""Replay of files that do not fit: other runs and hostile values are refused, and the model stays as it is."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jaguar
from helpers import journals
from jaguar import Journal, Method, ZerothOrder, directions, rules
from jaguar.optimizers.replay import mark_of
from jaguar.record import Record

ROWS = torch.linspace(-1.0, 1.0, 20).reshape(5, 4)


def model(width: int = 3, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    generator = torch.Generator().manual_seed(3)
    made = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=generator).to(dtype)
    made[0].bias.requires_grad_(False)
    return made


def loss_of(of: nn.Module) -> Tensor:
    return of(ROWS).square().mean(1)


def make(of: nn.Module, cls: Any = jaguar.JaguarSignSGD, **options: Any) -> ZerothOrder:
    optimizer: ZerothOrder = cls(of.named_parameters(), **{"lr": 1e-3} | options)
    return optimizer


def run(path: Path, of: nn.Module, optimizer: ZerothOrder, steps: int = 3) -> None:
    with Journal.follow(optimizer, path) as journal:
        for _ in range(steps):
            optimizer.step(lambda: loss_of(of) if optimizer.estimates is not None else loss_of(of).mean())
        if steps:
            mark = mark_of(optimizer)
            assert mark is not None
            journal.mark(mark)


# -- headers of other runs ---------------------------------------------------------------------------------------------


def renamed(of: nn.Module) -> nn.Module:
    return nn.ModuleDict({"a": of[0], "b": of[1]})  # type: ignore[index]


def thawed(of: nn.Module) -> nn.Module:
    return of.requires_grad_()


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 4}, "seed is 0 there, 4 here"),
    "beta": ({"beta": 0.5}, r"groups\[0\]\.beta is 0\.\d+ there, 0\.5 here"),
    "tau": ({"tau": 0.25}, r"groups\[0\]\.tau is 0\.001 there, 0\.25 here"),
    "decay": ({"weight_decay": 0.1}, r"weight_decay is 0\.0 there, 0\.1 here"),
    "directions": ({"n_directions": 2}, r"n_directions is 1 there, 2 here"),
    "coordinates": ({"coordinates": 1.0}, r"method\.direction\.coordinates is 0\.01 there, 1\.0 here"),
    "count": ({"coordinates": 1}, r"method\.direction\.coordinates is 0\.01 there, 1 here"),
    "update": ({"update": "all"}, "update is 'sampled' there, 'all' here"),
    "maximize": ({"maximize": True}, "maximize is False there, True here"),
    "momentum": ({"momentum_dtype": torch.bfloat16}, r"method\.momentum_dtype is None there, nothing here"),
    "automatic": ({"tau": "auto"}, r"entry is \d+ there, \d+ here.*step_size"),
    "class": ({"cls": jaguar.ZOSignSGD}, "direction.coordinates is 0.01 there, nothing here"),
    "dtype": ({"dtype": torch.bfloat16}, r"parameters\[0\]\.dtype is 'float32' there, 'bfloat16' here"),
    "shape": ({"width": 5}, r"parameters\[0\]\.shape\[0\] is 3 there, 5 here"),
    "names": ({"change": renamed}, r"parameters\[0\]\.name is '0\.weight' there, 'a\.weight' here"),
    "frozen": ({"change": thawed}, r"parameters\[\d\]\.\w+.* there, .* here"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_run_is_refused_with_what_differs(case: str, tmp_path: Path) -> None:
    options, message = dict(OTHERS[case][0]), OTHERS[case][1]
    of = model()
    run(tmp_path / "j", of, make(of), steps=0)
    before = (tmp_path / "j").read_bytes()
    other = model(options.pop("width", 3), options.pop("dtype", torch.float32))
    other = options.pop("change", lambda m: m)(other)
    optimizer = make(other, **options)
    for attempt in (Journal.follow, jaguar.replay):
        with pytest.raises(ValueError, match="is the journal of another run: .*(" + message + ")"):
            attempt(optimizer, tmp_path / "j")
    assert (tmp_path / "j").read_bytes() == before and not optimizer._record_hooks


def test_equal_numbers_are_the_same_run(tmp_path: Path) -> None:
    of = model()
    run(tmp_path / "j", of, make(of, coordinates=1, weight_decay=0), steps=0)
    with Journal.follow(make(of, coordinates=1, weight_decay=0.0), tmp_path / "j"):
        pass


def test_a_journal_goes_on_with_the_weights_that_it_noted(tmp_path: Path) -> None:
    path, of = tmp_path / "j", model()
    run(path, of, make(of), steps=0)
    with torch.no_grad():
        of[1].weight[0, 0] += 1.0
    with pytest.raises(ValueError, match=r"not those that the run of .* had after 0 steps: fingerprint"):
        Journal.follow(make(of), path)
    of = model()
    optimizer = make(of)
    run(path, of, optimizer)
    run(path, of, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        of[1].weight[0, 0] += 1.0
    again = make(of)
    again.load_state_dict(saved)
    with pytest.raises(ValueError, match="had after 6 steps"):
        Journal.follow(again, path)
    with pytest.raises(ValueError, match=r"has finished 0 steps, and .* ends with 6: jaguar\.replay"):
        Journal.follow(make(model()), path)
    with Journal.resume(path):  # whoever was refused holds nothing
        pass


# -- hostile headers ---------------------------------------------------------------------------------------------------

MISSING = object()
VALUES: list[Any] = [
    MISSING,
    *(None, True, -1, 0, 7, 2**31, 2**64, 1e308, 5e-324, "", "os.system", "float32"),
    *([], [[1]], [2**40, 2**40], {}, {"kind": "os"}, {"kind": ["a"]}, {"kind": "Method"}, {"kind": "Sphere"}),
    *({"dtype": "load"}, {"dtype": ["a"]}, {"dtype": "float32"}, {"kind": "OneSided", "n_directions": 1000}),
    {"kind": "SGD", "momentum": {"kind": "SGD", "momentum": {"kind": "Gaussian"}}},
]


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value can be put in nested values, as keys from outside in."""
    if above:
        yield above
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, deeper in inner:
        yield from places(deeper, (*above, key))


def changed(header: Any, place: tuple[Any, ...], value: Any) -> Any:
    found = copy.deepcopy(header)
    inner = found
    for key in place[:-1]:
        inner = inner[key]
    if value is MISSING:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return found


def state_of(of: nn.Module) -> list[Any]:
    return [(name, p.requires_grad, p.detach().clone()) for name, p in of.named_parameters()]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(x[:2] == y[:2] and torch.equal(x[2], y[2]) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Record]]:
    """Header and records of a run."""
    path, of = tmp_path_factory.mktemp("run") / "j", model()
    run(path, of, make(of))
    with Journal.read(path) as journal:
        return journal.header, list(journal)


def refused(header: Any, records: list[Record], path: Path) -> str:
    """Message of the refusal of a file with this header; "": it was replayed."""
    size = header.get("entry")
    fits = isinstance(size, int) and 64 <= size <= 2**16
    path.write_bytes(journals.file(header, records, size if fits else 64))
    of = model()
    for p in of.parameters():
        p.requires_grad_(False)  # a replay sets it where it trains
    before = state_of(of)
    try:
        jaguar.replay(of, path)
    except ValueError as error:
        assert same(before, state_of(of))
        return str(error)
    return ""


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_every_value_of_a_header_may_be_hostile(
    every: int, written: tuple[dict[str, Any], list[Record]], tmp_path: Path
) -> None:
    """Refused with a ValueError, and the model is as before; what is accepted are numbers that a run may have."""
    header, records = written
    assert refused(header, records, tmp_path / "j") == ""
    modules = {*sys.modules}
    told = 0
    for n, place in enumerate(places(header)):
        for value in VALUES[n % every :: every]:
            told += bool(refused(changed(header, place, value), records, tmp_path / "j"))
    assert told > 600 / every and {*sys.modules} == modules


GIANT: dict[str, Any] = {
    "groups": [{"tau": 0.1}] * 5000,
    "groups of lists": [[1]] * 5000,
    "parameters": [{"name": "0.weight", "shape": [3, 4], "dtype": "float32", "group": 0, "kept": None}] * 20_000,
    "initial_lr": [0.1] * 50_000,
    "seed": 2**64,
    "optimizer": "x" * 10**6,
}


@pytest.mark.parametrize("case", GIANT)
def test_giant_values(case: str, written: tuple[dict[str, Any], list[Record]], tmp_path: Path) -> None:
    header, records = written
    assert refused(header | {case.split()[0]: GIANT[case]}, records, tmp_path / "j")


def test_a_quantised_tensor_is_none_that_trains(written: tuple[dict[str, Any], list[Record]], tmp_path: Path) -> None:
    header, records = written
    (tmp_path / "j").write_bytes(journals.file(header, records, header["entry"]))
    of = model()
    of[1].weight = nn.Parameter(torch.ones(2, 3, dtype=torch.int8), requires_grad=False)
    before = state_of(of)
    with pytest.raises(ValueError, match="can require gradients"):
        jaguar.replay(of, tmp_path / "j")
    assert same(before, state_of(of))


def test_names_are_those_of_the_table_only(written: tuple[dict[str, Any], list[Record]], tmp_path: Path) -> None:
    header, records = written
    for kind in ("Adam", "Optimizer", "__class__", "base", "os", "METHODS", "param_groups"):
        assert "no class of jaguar" in refused(header | {"optimizer": kind}, records, tmp_path / "j")
        assert refused(changed(header, ("method", "rule", "kind"), kind), records, tmp_path / "j")


def test_every_group_has_a_learning_rate(written: tuple[dict[str, Any], list[Record]], tmp_path: Path) -> None:
    header, records = written
    message = refused(header | {"initial_lr": [0.1, 0.1]}, records, tmp_path / "j")
    assert "has 1 parameter groups, and 2 learning rates" in message


def test_a_run_with_other_tensors_than_it_noted_is_refused(
    written: tuple[dict[str, Any], list[Record]], tmp_path: Path
) -> None:
    header, records = written
    base = header["base"] | {"fingerprint": "00" * 16}
    assert "had when it began: fingerprint" in refused(header | {"base": base}, records, tmp_path / "j")
    for nothing in ({}, {"fingerprint": None}):
        assert refused(header | {"base": nothing}, records, tmp_path / "j") == ""


# -- hostile records ---------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("automatic", [False, True], ids=["numbers", "auto"])
def test_hostile_records(automatic: bool, tmp_path: Path) -> None:
    """The record of a step that cannot have been: refused, and the model is where the step before left it."""
    path, of = tmp_path / "j", model()
    auto = {"lr": "auto", "tau": "auto"} if automatic else {}
    run(path, of, make(of, **auto))
    with Journal.read(path) as journal:
        header, records = journal.header, list(journal)
    last = records[2]
    fields: dict[str, list[Any]] = {
        "lrs": [(), (-1.0,), (NAN,), (INF,), (0.1, 0.1)],
        "losses": [
            (),
            (1.0,),
            last.losses * 2,
            (NAN, *last.losses[1:]),
            (INF, *last.losses[1:]),
            (1e300,) * len(last.losses),
        ],
        "taus": [(), (0.0,), (-1.0,), (NAN,), (INF,), (5e-324,), (1e-300,), (1e300,)],
        "errors": [
            (),
            (1e300,) * len(last.errors),
            (-1.0,) * len(last.errors),
            (NAN,) * len(last.errors),
            (INF,) * len(last.errors),
        ],
        "frozen": [1],
        "rows": [0],
    }
    if not automatic:
        del fields["rows"], fields["errors"]
        fields["taus"] = fields["taus"][1:]
    middle = model()
    path.write_bytes(journals.file(header, records[:2], header["entry"]))
    jaguar.replay(middle, path)
    for name, values in fields.items():
        for value in values:
            values_of = {slot: getattr(last, slot) for slot in Record.__slots__} | {name: value}
            path.write_bytes(journals.file(header, [*records[:2], Record(**values_of)], header["entry"]))
            again = model()
            try:
                jaguar.replay(again, path)
            except ValueError:
                assert same(state_of(again), state_of(middle)), (name, value)


def test_compositions_replay_by_their_parts(tmp_path: Path) -> None:
    """A method of no class of its own, and one with a part from elsewhere, which a file cannot name."""

    class Own(rules.SGD):
        pass

    of = model()
    for rule, message in ((rules.Sign(), ""), (Own(), "'Own' is no class of jaguar")):
        path = tmp_path / type(rule).__name__
        optimizer = ZerothOrder(of.named_parameters(), Method(directions.Gaussian(), rule), lr=1e-3, momentum=0.5)
        base = copy.deepcopy(of)
        run(path, of, optimizer)
        if message:
            with pytest.raises(ValueError, match=message):
                jaguar.replay(base, path)
        else:
            jaguar.replay(base, path)
            assert same(state_of(base), state_of(of))
