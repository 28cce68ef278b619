"""Changes that an evaluation makes in modules are put back, all of them."""

from __future__ import annotations

import collections
import random
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.changing import Changing, FrozenRecord, Record, SlottedRecord, counted, everything, plain, setter
from jaguar import ZOSGD


def rebound_mean(m: Any) -> Any:
    m.mean = 0.9 * m.mean + 1.0
    return m.mean.sum()


def rebound_buffer(m: Any) -> Any:
    m.steps = m.steps + 1
    return m.steps.sum()


def in_place(m: Any) -> Any:
    return m.mean.add_(1.0).sum()


def lazy(m: Any) -> Any:
    if not hasattr(m, "cache"):
        m.cache = torch.zeros(2)
    m.cache += 1
    return m.cache.sum()


def lazy_buffer(m: Any) -> Any:
    if not hasattr(m, "cache"):
        m.register_buffer("cache", torch.zeros(2), persistent=False)
    return m.cache.add_(1).sum()


def lazy_module(m: Any) -> Any:
    if not hasattr(m, "inner"):
        m.inner = nn.BatchNorm1d(2)
    m.inner(torch.arange(6.0).view(3, 2))
    return m.inner.running_mean.sum()


def deleted(m: Any) -> Any:
    if hasattr(m, "first"):
        del m.first
        return 1.0
    return 2.0


def deleted_buffer(m: Any) -> Any:
    if m._buffers.pop("first", None) is not None:
        return 1.0
    return 2.0


def appended(m: Any) -> Any:
    m.rows.append(torch.ones(1))
    return len(m.rows)


def nested(m: Any) -> Any:
    m.load["experts"][1] += 1
    m.load.setdefault("seen", []).append(3)
    m.load["counts"].add_(1)
    return m.load["experts"][1] + m.load["counts"].sum() + len(m.load["seen"])


def popped(m: Any) -> Any:
    return m.queue.popleft()


def in_array(m: Any) -> Any:
    m.counts[0] += 1
    return m.counts[0]


def added(m: Any) -> Any:
    m.lengths.add(len(m.lengths))
    return len(m.lengths)


def in_tuple(m: Any) -> Any:
    return m.state[0].mul_(2).sum()


def grown(m: Any) -> Any:
    m.cache.resize_(m.cache.numel() + 1).fill_(1.0)
    return m.cache.sum()


def in_record(m: Any, direct: bool = False) -> Any:
    record = m if direct else m.record
    record.calls += 1
    record.seen[0] += 1
    record.cache = torch.zeros(2) if record.cache is None else record.cache + 1
    return record.calls + record.seen[0] + record.cache.sum()


def trained(m: Any) -> Any:
    was = m.training
    m.train(not was)
    return float(was)


def cyclic(m: Any) -> Any:
    m.knot[0][1].append(1)
    return len(m.knot[0][1])


def tie(m: Any) -> None:
    m.knot = [[None, []]]
    m.knot[0][0] = m.knot


STATES = {
    "a counter": (setter(calls=0), counted),
    "a running mean, bound anew": (setter(mean=torch.zeros(2)), rebound_mean),
    "a buffer, bound anew": (setter(steps=torch.zeros((), dtype=torch.int64)), rebound_buffer),
    "a plain tensor, in place": (setter(mean=torch.zeros(2)), in_place),
    "a plain tensor, resized": (setter(cache=torch.ones(2)), grown),
    "a lazy attribute": (setter(), lazy),
    "a lazy buffer": (setter(), lazy_buffer),
    "a lazy submodule": (setter(), lazy_module),
    "an attribute deleted": (setter(first=1), deleted),
    "a buffer deleted": (lambda m: m.register_buffer("first", torch.ones(2)), deleted_buffer),
    "a list": (setter(rows=[torch.ones(1)]), appended),
    "a dict of lists and tensors": (setter(load={"experts": [0, 0], "counts": torch.zeros(2)}), nested),
    "a queue": (setter(queue=collections.deque(range(100))), popped),
    "an array": (setter(counts=np.zeros(3)), in_array),
    "a set": (setter(lengths={0}), added),
    "a tuple of tensors": (setter(state=(torch.ones(3), 1)), in_tuple),
    "fields of a dataclass, bound in place": (setter(record=Record()), in_record),
    "fields of a dataclass with slots, bound in place": (setter(record=SlottedRecord()), in_record),
    "a namespace, bound in place": (setter(record=types.SimpleNamespace(calls=0, seen=[0], cache=None)), in_record),
    "a dict of dataclasses": (setter(load={"a": Record()}), lambda m: in_record(m.load["a"], direct=True)),
    "a frozen dataclass, in place": (setter(record=FrozenRecord()), lambda m: m.record.counts.add_(1).sum()),
    "the mode": (setter(), trained),
    "a list that holds itself": (tie, cyclic),
}
# What only a comparison of values shows; later on that happens in every 64th step.
IN_PLACE = {name for name in STATES if any(w in name for w in ("place", "resized", "a list", "dict", "queue"))}
IN_PLACE |= {"an array", "a set", "a tuple of tensors"}


@pytest.mark.parametrize(
    ("name", "since"),
    [*((name, 0) for name in STATES), *((name, 11) for name in STATES if name not in IN_PLACE)],
    ids=lambda value: {0: "at once", 11: "later"}.get(value, value),
)
def test_what_an_evaluation_changes_is_put_back(name: str, since: int) -> None:
    """Each evaluation begins with the same state, its neighbour's loss differs by the perturbation only."""
    model = Changing(*STATES[name], since=since)
    before = everything(model)
    opt = ZOSGD(model.parameters(), lr=0.0, tau=1e-3)
    met = []

    def closure() -> Tensor:
        met.append(everything(model))
        return model()

    for _ in range(12):
        record = opt.measure(closure)
        # The state adds at least 1 to a loss; the perturbation, less than 0.1. One call may begin to change it.
        assert abs(record.losses[0] - record.losses[1]) < 0.1 or len(model.log.seen) - 1 == since
        assert everything(model) == before
        opt.apply_(record)
    assert all(state == before for state in met)


@pytest.mark.parametrize("name", sorted(IN_PLACE))
def test_what_begins_to_change_in_place_later_is_found_by_a_look(name: str) -> None:
    model = Changing(*STATES[name], since=12)  # from step 6 on
    opt = ZOSGD(model.parameters(), lr=0.0, tau=1e-3)
    for step in range(12):
        before = everything(model)
        record = opt.measure(model)
        if step >= 8:
            assert everything(model) == before and abs(record.losses[0] - record.losses[1]) < 0.1
        opt.apply_(record)


GENERATORS = {
    "torch": (lambda: torch.Generator().manual_seed(3), lambda g: torch.randn((), generator=g).item()),
    "python": (lambda: random.Random(3), lambda g: g.gauss(0.0, 1.0)),
    "numpy": (lambda: np.random.default_rng(3), lambda g: g.normal()),
    "numpy, old": (lambda: np.random.RandomState(3), lambda g: g.normal()),
}


@pytest.mark.parametrize("inside", [False, True], ids=["attribute", "in a list"])
@pytest.mark.parametrize("name", GENERATORS)
def test_generators_of_modules_draw_the_same_within_a_step_only(name: str, inside: bool) -> None:
    begin, draw = GENERATORS[name]
    generator, drawn = begin(), []

    def change(m: Any) -> Any:
        drawn.append(draw(generator))
        return drawn[-1]

    model = Changing(lambda m: setattr(m, "generator", [generator] if inside else generator), change)
    before = plain(generator)
    opt = ZOSGD(model.parameters(), lr=0.0)
    for _ in range(8):
        opt.step(model)
        assert plain(generator) == before
    assert drawn[0::2] == drawn[1::2] and len(set(drawn)) == 8
