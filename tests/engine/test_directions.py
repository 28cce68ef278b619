"""Sampled coordinates: exact sets against plain ints, probabilities, shards, refusals."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest
import torch

from helpers.oracles import (
    COLUMNS,
    COORDINATES,
    ROWS,
    fraction_ints,
    step_key_ints,
    stratum_ints,
    stream_ints,
    words_ints,
)
from jaguar import JaguarSignSGD
from jaguar.method import samples
from jaguar.method.directions import Coordinates, Gaussian, Rademacher, ReleasedBlock
from jaguar.method.params import Slot
from jaguar.method.rng import Draw, Elements


def slot(*shape: int, stream: int = 7, name: str = "w", start: int = 0, whole: torch.Size | None = None) -> Slot:
    return Slot(name, torch.empty(shape), stream, 0, whole or torch.Size(shape), start)


def piece(of: Slot, start: int, stop: int) -> Slot:
    return dataclasses.replace(of, tensor=torch.empty(stop - start), start=of.start + start)


def as_dict(sample: tuple[torch.Tensor, torch.Tensor], shift: int = 0) -> dict[int, float]:
    index, sign = sample
    assert index.dtype == torch.int64 and sign.dtype == torch.float32
    assert (index.diff() > 0).all(), "ascending, so none twice"
    return dict(zip((index + shift).tolist(), sign.tolist(), strict=True))


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.3, 0.1, 0.01, 1 / 37])
@pytest.mark.parametrize("size", [0, 1, 9, 10, 37, 1000, 1001])
def test_fraction_equals_plain_ints(size: int, fraction: float) -> None:
    direction, stratum = Coordinates(fraction), max(1, round(1 / fraction))
    slots = [slot(size, stream=3), slot(5, 7, stream=4), slot(size, stream=2**32 - 1)]
    for step, k in ((0, 0), (2**33 + 1, 2)):
        for s, sample in zip(slots, direction.sample(Draw(2**63 + 9, step, k), slots), strict=True):
            assert as_dict(sample) == fraction_ints(2**63 + 9, step, s.stream, s.total, stratum, k)


@pytest.mark.parametrize("k", [1, 2, 7, 50, 123])
def test_count_equals_plain_ints(k: int) -> None:
    slots = [slot(40, name="a"), slot(0, name="b"), slot(7, 11, name="c"), slot(6, name="d")]
    total = 123
    for step in range(5):
        want = {}
        for j in range(k):
            first, last = j * total // k, (j + 1) * total // k
            place, sign = stratum_ints(step_key_ints(5, step, 0, COORDINATES), j, 0, last - first)
            want[first + place] = 1.0 if k == 1 else sign
        got: dict[int, float] = {}
        for s, shift in zip(slots, (0, 40, 40, 117), strict=True):
            got |= as_dict(Coordinates(k).sample(Draw(5, step), slots)[slots.index(s)], shift)
        assert got == want and len(got) == k


def test_count_over_more_than_2_to_the_32() -> None:
    whole = torch.Size([2**34 + 3])
    big = slot(0, whole=whole)
    k, total, key = 5, 2**34 + 3, step_key_ints(1, 2, 0, COORDINATES)
    for j in range(k):
        first, last = j * total // k, (j + 1) * total // k
        place, sign = stratum_ints(key, j, 0, last - first)
        shard = dataclasses.replace(big, tensor=torch.empty(20), start=first + place - 11)
        assert as_dict(Coordinates(k).sample(Draw(1, 2), [shard])[0]) == {11: sign}


def chi2(counts: torch.Tensor, expected: float) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("stratum", [2, 10, 37])
def test_places_are_uniform_and_strata_independent(stratum: int) -> None:
    n = 40_000
    index, sign = Coordinates(1 / stratum).sample(Draw(1, 1), [slot(n * stratum)])[0]
    assert torch.equal(index // stratum, torch.arange(n)), "one of each stratum"
    place = index % stratum
    counts = torch.bincount(place, minlength=stratum)
    df = stratum - 1
    assert chi2(counts, n / stratum) < df + 5 * math.sqrt(2 * df)  # chi-square: mean df, variance 2 df; five sigma
    pairs = torch.bincount(place[:-1] * stratum + place[1:], minlength=stratum**2)
    df = stratum**2 - 1
    assert chi2(pairs, (n - 1) / stratum**2) < df + 5 * math.sqrt(2 * df)
    centred = place - (stratum - 1) / 2
    assert abs((sign * centred).sum()) < 5 * centred.square().sum().sqrt()  # signs are independent of places
    assert abs(sign.sum()) < 5 * math.sqrt(n)


@pytest.mark.parametrize(("coordinates", "layout", "probability"),
                         [(0.1, "uniform", 0.1), (12, "uniform", 12 / 95), (1 / 9, "block", 1 / 9)])  # fmt: skip
def test_every_coordinate_is_chosen_with_its_probability(coordinates: float, layout: str, probability: float) -> None:
    runs, direction = 2000, Coordinates(coordinates, layout)
    slots = [slot(7, 11), slot(18, stream=8)] if layout == "uniform" else [slot(7, 11)]
    total = torch.cat([torch.zeros(s.total) for s in slots])
    signed = total.clone()
    for step in range(runs):
        shift = 0
        for s, (index, sign) in zip(slots, direction.sample(Draw(0, step), slots), strict=True):
            total[index + shift] += 1
            signed[index + shift] += sign
            shift += s.total
    # each count is binomial; 5.5 sigma leaves room for the largest of ~95
    share = total / runs
    if isinstance(coordinates, int):  # strata floor(j d / k) have 7 or 8 places
        sizes = [(j + 1) * 95 // 12 - j * 95 // 12 for j in range(12)]
        expected = torch.tensor([1 / n for n in sizes for _ in range(n)])
    else:
        expected = torch.full_like(share, probability)
    assert ((share - expected).abs() < 5.5 * (expected * (1 - expected) / runs).sqrt()).all()
    assert (signed.abs() < 5.5 * (expected * runs).sqrt()).all()  # Rademacher signs have mean 0


def test_idle_tail_stratum() -> None:
    runs, hits = 3000, 0
    for step in range(runs):
        index = Coordinates(0.1).sample(Draw(2, step), [slot(33)])[0][0]
        assert (index < 33).all() and len(index) in (3, 4)
        hits += len(index) == 4
    assert abs(hits / runs - 0.3) < 5 * math.sqrt(0.3 * 0.7 / runs)  # 3 of the last 10 places exist


KINDS = {
    "fraction": Coordinates(0.1),
    "all": Coordinates(1.0),
    "third": Coordinates(1 / 3),
    "count": Coordinates(31),
    "block": Coordinates(1 / 9, "block"),
    "ones": Coordinates(0.1, signs="ones"),
    "released": ReleasedBlock(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_tensor_have_the_pieces_of_its_sample(kind: str) -> None:
    whole, direction = slot(67, 43), KINDS[kind]
    want = as_dict(direction.sample(Draw(3, 4), [whole])[0])
    assert len(want) > 10
    for seed in range(4):
        cuts = sorted([0, whole.total, *random.Random(seed).choices(range(whole.total), k=5)])
        got: dict[int, float] = {}
        for a, b in itertools.pairwise(cuts):
            got |= as_dict(direction.sample(Draw(3, 4), [piece(whole, a, b)])[0], a)
        assert got == want


@pytest.mark.parametrize("start", [2**31 - 40, 2**31 + 5, 2**32 - 17, 2**40 + 1])
def test_pieces_far_out(start: int) -> None:
    shape = torch.Size([2**41])
    whole = slot(1000, start=start, whole=shape)
    want = as_dict(Coordinates(0.1).sample(Draw(3, 4), [whole])[0])
    key = step_key_ints(3, 4, 0, COORDINATES)
    ints = {}
    for j in range(start // 10, (start + 999) // 10 + 1):
        place, sign = stratum_ints(key, j, 7, 10)
        ints[j * 10 + place - start] = sign
    assert want == {i: s for i, s in ints.items() if 0 <= i < 1000}
    got: dict[int, float] = {}
    for a, b in itertools.pairwise([0, 1, 333, 338, 800, 1000]):
        got |= as_dict(Coordinates(0.1).sample(Draw(3, 4), [piece(whole, a, b)])[0], a)
    assert got == want


def test_block_far_out() -> None:
    whole = slot(0, whole=torch.Size([2**18, 2**14]))  # 2^32 elements, 262 x 17 chosen ones
    direction = Coordinates(1e-6, "block")
    rows = axis_ints(ROWS, 2**18, 1000)
    columns = axis_ints(COLUMNS, 2**14, 1000)
    row = max(rows)
    assert row > 2**17, "past element 2^31"
    shard = dataclasses.replace(whole, tensor=torch.empty(2**14), start=row * 2**14)
    assert as_dict(direction.sample(Draw(3, 4), [shard])[0]) == {c: rows[row] * s for c, s in columns.items()}


def axis_ints(purpose: int, length: int, size: int, stream: int = 7) -> dict[int, float]:
    key = step_key_ints(3, 4, 0, purpose)
    drawn = ((j, *stratum_ints(key, j, stream, size, purpose)) for j in range(-(-length // size)))
    return {j * size + place: sign for j, place, sign in drawn if j * size + place < length}


@pytest.mark.parametrize("shape", [(13, 31), (3, 4, 5), (2, 3), (50,), (1,), (), (0, 6)], ids=str)
def test_block_is_rows_times_columns(shape: tuple[int, ...]) -> None:
    got = as_dict(Coordinates(1 / 9, "block").sample(Draw(3, 4), [slot(*shape)])[0])
    if len(shape) < 2:
        assert got == axis_ints(ROWS, math.prod(shape), 3)
    else:
        width = math.prod(shape[1:])
        rows, columns = axis_ints(ROWS, shape[0], 3), axis_ints(COLUMNS, width, 3)
        assert got == {r * width + c: a * b for r, a in rows.items() for c, b in columns.items()}


@pytest.mark.parametrize(("fraction", "g"), [(0.01, 10), (1 / 9, 3), (0.25, 2), (1.0, 1), (1e-4, 100)])
def test_block_stratum_is_the_square_root(fraction: float, g: int) -> None:
    direction = Coordinates(fraction, "block")
    assert direction.stratum == g and direction.fraction(1000) == pytest.approx(1 / g**2, rel=1e-15)


def released_ints(step: int, length: int, purpose: int, stream: int) -> list[int]:
    """The max(1, n // 10) places with the smallest 63-bit words."""
    key = step_key_ints(3, step, 0, purpose)
    words = [words_ints(key, i, stream, purpose) for i in range(length)]
    order = sorted(range(length), key=lambda i: (words[i][1] << 32 | words[i][0]) >> 1)
    return sorted(order[: max(1, length // 10)])


@pytest.mark.parametrize("shape", [(8,), (15,), (45,), (60, 40), (3, 4, 5), (1, 1), (9, 9), ()], ids=str)
def test_released_draws_a_tenth_of_each_axis(shape: tuple[int, ...]) -> None:
    for step in range(3):
        got = as_dict(ReleasedBlock().sample(Draw(3, step), [slot(*shape)])[0])
        rows, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        row, column = released_ints(step, rows, ROWS, 7), released_ints(step, width, COLUMNS, 7)
        assert got == {r * width + c: 1.0 for r in row for c in column}
        assert len(got) == max(1, rows // 10) * max(1, width // 10)


def test_released_rows_are_uniform() -> None:
    runs, counts = 4000, torch.zeros(15)
    for step in range(runs):
        counts[ReleasedBlock().sample(Draw(0, step), [slot(15)])[0][0]] += 1
    assert chi2(counts, runs / 15) < 14 + 5 * math.sqrt(28)  # chi-square with 14 degrees of freedom, five sigma


@pytest.mark.parametrize("coordinates", [0.2, 9, 1], ids=["fraction", "count", "one"])
def test_order_of_named_parameters_is_irrelevant(coordinates: float) -> None:
    names = ["b.weight", "a.weight", "module.c.bias", "d"]
    tensors = {name: torch.randn(n, requires_grad=True) for name, n in zip(names, (20, 30, 7, 11), strict=True)}
    seen = []
    for order in itertools.islice(itertools.permutations(names), 0, 24, 5):
        opt = JaguarSignSGD([(name, tensors[name]) for name in order], coordinates=coordinates, seed=4)
        draw = Draw(4, 0)
        seen.append(
            {s.name: as_dict(x) for s, x in zip(opt.slots, opt.method.direction.sample(draw, opt.slots), strict=True)}
        )
    assert all(s == seen[0] for s in seen)
    if coordinates == 0.2:
        assert seen[0]["c.bias"] == fraction_ints(4, 0, stream_ints("c.bias"), 7, 5)


def test_signs_ones_and_a_single_coordinate() -> None:
    assert (Coordinates(0.1, signs="ones").sample(Draw(0, 0), [slot(1000)])[0][1] == 1).all()
    steps = [Coordinates(1).sample(Draw(0, t), [slot(50)])[0] for t in range(40)]
    assert all(len(i) == 1 and s.item() == 1.0 for i, s in steps)
    two = torch.cat([Coordinates(2).sample(Draw(0, t), [slot(50)])[0][1] for t in range(40)])
    assert set(two.tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("kind", [Gaussian(), Rademacher()], ids=lambda k: k.name)
def test_dense_values_of_a_shard(kind: Gaussian | Rademacher) -> None:
    whole = kind.values_of(Draw(1, 2), Elements([(7, 2**31 - 50, 300)]))
    assert torch.equal(kind.values_of(Draw(1, 2), Elements([(7, 2**31 + 5, 100)])), whole[55:155])


REFUSALS = {
    "bool": (True, {}, "int.*or a float"),
    "text": ("1", {}, "int.*or a float"),
    "zero": (0, {}, "at least 1"),
    "negative": (-3, {}, "at least 1"),
    "zero-fraction": (0.0, {}, r"\(0, 1\]"),
    "too-much": (1.5, {}, r"\(0, 1\]"),
    "nan": (math.nan, {}, r"\(0, 1\]"),
    "between": (0.7, {}, r"0\.5 and 1\b"),
    "between-low": (0.4, {}, r"0\.333333 and 0\.5"),
    "block-between": (0.5, {"layout": "block"}, r"0\.25 and 1\b"),
    "block-count": (4, {"layout": "block"}, "fraction"),
    "layout": (0.1, {"layout": "rows"}, "'uniform' or 'block'"),
    "signs": (0.1, {"signs": "gauss"}, "'rademacher' or 'ones'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    coordinates, options, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        Coordinates(coordinates, **options)
    with pytest.raises(ValueError, match=message):
        JaguarSignSGD([torch.zeros(10, requires_grad=True)], coordinates=coordinates, **options)


@pytest.mark.parametrize("fraction", [1.0, 0.95, 0.5, 0.46, 0.1, 0.0123, 1e-6])
def test_reachable_fractions_show_what_they_are(fraction: float) -> None:
    direction = Coordinates(fraction)
    assert direction.stratum == max(1, round(1 / fraction))
    assert direction.fraction(123) == pytest.approx(1 / direction.stratum, rel=1e-15)
    assert abs(direction.stratum * fraction - 1) <= 0.1


def test_more_coordinates_than_there_are() -> None:
    with pytest.raises(ValueError, match="more than the 10"):
        JaguarSignSGD([torch.zeros(10, requires_grad=True)], coordinates=11)
    opt = JaguarSignSGD([torch.zeros(10, requires_grad=True)], coordinates=10)
    assert opt.fraction == 1.0


RELEASED = [{"coordinates": 0.1}, {"coordinates": 1}, {"layout": "block"}, {"signs": "ones"},
            {"update": "all"}, {"beta": 0.0}, {"beta": 0.5}]  # fmt: skip


@pytest.mark.parametrize("extra", RELEASED, ids=str)
def test_released_excludes_other_choices(extra: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"released=True.*{next(iter(extra))}"):
        JaguarSignSGD([torch.zeros(10, requires_grad=True)], released=True, **extra)


def test_the_laws_notice_a_wrong_stream_and_an_ignored_start(monkeypatch: pytest.MonkeyPatch) -> None:
    real = samples.listed
    with monkeypatch.context() as broken:
        ignorant = lambda slots, *rest: real([dataclasses.replace(s, start=0) for s in slots], *rest)  # noqa: E731
        broken.setattr("jaguar.method.samples.listed", ignorant)
        with pytest.raises(AssertionError):
            test_pieces_of_a_tensor_have_the_pieces_of_its_sample("fraction")
    with monkeypatch.context() as broken:
        broken.setattr("jaguar.method.params.stream_of", lambda name: len(name))
        with pytest.raises((AssertionError, ValueError)):
            test_order_of_named_parameters_is_irrelevant(0.2)
