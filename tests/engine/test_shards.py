"""Parts of tensors: each, with a `Shard` that says which, takes the steps of the whole, to the bit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.laws import CONFIGS, TAU, built
from helpers.tensors import DTYPES, Bag, bits, dtype_id, weights
from jaguar import ZOSGD, JaguarMuon, JaguarSignSGD, Shard
from jaguar.method import params
from jaguar.method.params import Slot

pytestmark = pytest.mark.filterwarnings("ignore:tau is too small")  # of the few elements of a part

METHODS = CONFIGS | {
    "ones": (JaguarSignSGD, {"coordinates": 0.2, "signs": "ones", "estimator": "one-sided"}),
    "count-float8": (JaguarSignSGD, {"coordinates": 40, "momentum_dtype": torch.float8_e5m2}),
    "muon-adjusted": (JaguarMuon, {"coordinates": 0.2, "ns_period": 2, "adjust_lr": "original", "vector_lr": 1e-2}),
    "walk": (ZOSGD, {"restore": "walk"}),
}
SHAPES = [(23,), (7, 10), (3, 5, 4), (2, 3, 4, 3)]


def part_of(shape: Sequence[int], dim: int, begin: int, end: int) -> Shard:
    """Elements begin .. end along a dimension."""
    row = torch.Size(shape[dim + 1 :]).numel()  # elements per step along it
    if begin == end:
        return Shard(tuple(shape))
    return Shard(tuple(shape), begin * row, (end - begin) * row, shape[dim] * row)


def cuts(shape: Sequence[int], dim: int) -> list[tuple[int, int]]:
    """Four parts of different sizes, one of them empty; short dimensions have more empty ones."""
    n = shape[dim]
    return list(pairwise([0, n // 3, n // 3, n - 1, n]))


def made(config: str, bag: Bag, ns: Any, **more: Any) -> Any:
    cls, options = METHODS[config]
    groups = [{"params": [entry]} for entry in bag.named_parameters()]  # each may have values of its own
    if cls.by_role:
        groups = [group | {"ns": ns} for group in groups]
    return built(cls, groups, {"lr": 1e-2, "tau": TAU, "seed": 7, "backend": "reference"} | options | more)


def shard_law(
    config: str, along: int, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES, ns: Any = False
) -> None:
    """Both points of every direction, the parameters and the state of parts are parts of the whole's.

    Args:
        along: the dimension that is cut, from the end where it is negative; tensors that have fewer are cut along
            their last one.
        ns: of JAGUAR Muon's groups.
    """
    starts = [weights(dtype, *shape, seed=i) for i, shape in enumerate(shapes)]
    whole = Bag([start.clone() for start in starts])
    opt = made(config, whole, ns)
    dims = [min(along % x.dim() if along < 0 else along, x.dim() - 1) for x in starts]
    parts = []
    for k in range(4):
        where = [cuts(x.shape, dim)[k] for x, dim in zip(starts, dims, strict=True)]
        slices = [(slice(None),) * dim + (slice(*ends),) for dim, ends in zip(dims, where, strict=True)]
        shards = {f"p{i}": part_of(x.shape, dims[i], *where[i]) for i, x in enumerate(starts)}
        bag = Bag([x[cut].clone() for x, cut in zip(starts, slices, strict=True)])
        parts.append((bag, slices, made(config, bag, ns, shards=shards)))

    def expect_parts(got: Sequence[Tensor], wanted: Sequence[Tensor], slices: Sequence[Any]) -> None:
        assert [bits(x) for x in got] == [bits(x[cut]) for x, cut in zip(wanted, slices, strict=True)]

    for _ in range(3):
        whole.seen.clear()
        opt.step(whole)
        for bag, slices, shard in parts:
            bag.seen.clear()
            losses = iter(opt.last_record.losses)

            def closure(bag: Bag = bag, losses: Iterator[float] = losses) -> Tensor:
                bag()
                return torch.tensor(next(losses), dtype=torch.float64)

            if opt.method.estimator.points:
                shard.step(closure)
            else:  # derivatives do not come from losses
                shard.apply_(opt.last_record)
            assert shard.last_record == opt.last_record
            for got, wanted in zip(bag.seen, whole.seen, strict=bool(opt.method.estimator.points)):
                expect_parts(got, wanted, slices)
            expect_parts(list(bag.parameters()), list(whole.parameters()), slices)
            for p, x, cut in zip(bag.parameters(), whole.parameters(), slices, strict=True):
                ours, theirs = shard.state.get(p, {}), opt.state.get(x, {})
                assert list(ours) == list(theirs)
                expect_parts(list(ours.values()), list(theirs.values()), [cut] * len(theirs))
    assert any(bits(x) != bits(start) for x, start in zip(whole.parameters(), starts, strict=True))


@pytest.fixture(params=["together", "apart"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors together, as they are; or one by one and piece by piece, as large ones are."""
    if request.param == "apart":
        monkeypatch.setattr("jaguar.backends.reference.pieces._SMALL", -1)
        monkeypatch.setattr("jaguar.backends.reference.indexing.CHUNK", 8)
        monkeypatch.setattr("jaguar.backends.reference.dense.CHUNK", 8)
        monkeypatch.setattr("jaguar.method.samples.PART", 8)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("along", [0, 1, -1], ids=["rows", "middle", "columns"])
@pytest.mark.parametrize("config", METHODS)
def test_parts_take_the_steps_of_the_whole(config: str, along: int) -> None:
    shard_law(config, along, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("config", METHODS)
def test_in_every_dtype(config: str, dtype: torch.dtype) -> None:
    shard_law(config, 1, dtype)


@pytest.mark.parametrize("config", ["fraction", "all", "block", "released", "count", "gaussian-copy", "walk"])
@pytest.mark.parametrize("breakage", ["start", "pitch", "width"])
def test_the_law_notices_what_is_ignored(breakage: str, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = params._part

    def broken(slot: Slot, shard: Shard | None) -> Slot:
        made = real(slot, shard)
        if made.width is None:
            return made
        changes = {"start": {"start": 0}, "pitch": {"width": None, "pitch": None}, "width": {"width": made.width + 1}}
        return dataclasses.replace(made, **changes[breakage])

    monkeypatch.setattr(params, "_part", broken)
    with pytest.raises(AssertionError):
        shard_law(config, 1, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_parts_of_a_batch_of_matrices_have_their_polar_factors(dtype: torch.dtype) -> None:
    shard_law("muon-adjusted", 0, dtype, [(2, 5, 2), (7, 4, 6), (5, 3, 3), (9,)], ns=True)


@pytest.mark.parametrize(
    ("shape", "dim", "ns"), [((6, 8), 0, True), ((6, 8), 1, True), ((4, 6, 8), 1, True), ((4, 6, 8), 0, "flatten")]
)
def test_a_part_of_a_matrix_has_no_polar_factor(shape: tuple[int, ...], dim: int, ns: Any) -> None:
    part = torch.zeros(shape).narrow(dim, 1, 2).contiguous().requires_grad_()
    shards = {"w": part_of(shape, dim, 1, 3)}
    with pytest.raises(ValueError, match="w is a part of a matrix, and Newton-Schulz needs all of it"):
        JaguarMuon([{"params": [("w", part)], "ns": ns}], shards=shards)
    JaguarMuon([{"params": [("w", part)], "ns": False}], shards=shards)


def one(**more: Any) -> ZOSGD:
    return ZOSGD([("w", torch.zeros(3, 4, requires_grad=True))], **more)


@pytest.mark.parametrize(
    ("shards", "match"),
    [
        ({"w": Shard((11,))}, "w holds 12 elements, and .* has no room for them"),
        ({"w": Shard((6, 4), 13)}, "w holds 12 elements, and .* has no room for them"),
        ({"w": Shard((3, 10), 7, 4, 10)}, "w holds 12 elements, and .* has no room for them"),
        ({"v": Shard((20,))}, "shards names 'v', and no parameter has this name"),
        ({"#0": Shard((20,))}, "shards names '#0', and no parameter has this name"),
        ({"w": Shard((20,)), "a": Shard((3,)), "b": Shard((3,))}, "'a', 'b'"),
    ],
)
def test_parts_that_cannot_be_are_refused(shards: dict[str, Shard], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        one(shards=shards)


@pytest.mark.parametrize(
    ("numbers", "match"),
    [
        ((0, 4), "give width and pitch, or neither"),
        ((0, None, 4), "give width and pitch, or neither"),
        ((-1,), "start must be at least 0"),
        ((0, 0, 4), "0 < width <= pitch"),
        ((0, 5, 4), "0 < width <= pitch"),
    ],
)
def test_rows_that_cannot_be_are_refused(numbers: tuple[Any, ...], match: str) -> None:
    with pytest.raises(ValueError, match=re.escape(match)):
        Shard((3, 4), *numbers)


def test_whatever_is_named_is_found() -> None:
    """Wrappers' names, and positions where there are no names; the last element may be the tensor's last."""
    tensor = torch.zeros(3, 4, requires_grad=True)
    for named, name in (("w", "module.w"), ("module.w", "w"), (None, "#0")):
        entry = tensor if named is None else (named, tensor)
        (slot,) = ZOSGD([entry], shards={name: Shard((3, 10), 6, 4, 10)}).slots
        assert (slot.shape, slot.start, slot.width, slot.pitch, slot.end) == ((3, 10), 6, 4, 10, 30)
