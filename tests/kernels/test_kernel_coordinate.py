"""JAGUAR's launches in kernels: the reference's bits in every tensor, and no byte changed outside of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from helpers.oracles import fraction_ints
from helpers.tensors import DTYPES

pytest.importorskip("triton")
import triton.language as tl

from helpers.covering import pairwise
from helpers.kernels import (
    DIRECTIONS,
    SEED,
    SHAPES,
    STEP,
    Form,
    Twins,
    coordinate_twins,
    crossed,
    drawn,
    forms_of,
    interpreted,
    row_id,
    same,
    step_law,
)
from helpers.launches import as_the_end, counted, edit_tables, jobs
from jaguar.backends import availability
from jaguar.backends.triton.plan import Plan, Table
from jaguar.method.directions import Coordinates
from jaguar.triton_kernels import coordinate
from jaguar.triton_kernels import tables as T

pytestmark = [interpreted, pytest.mark.usefixtures("poisoned")]

FACTORS: dict[str, list[Any]] = {
    "layout": ["fraction", "count", "block", "released"],
    "update": ["all", "sampled"],
    "momentum": ["own", "fp32", "bf16", "e5m2"],
    "stochastic": [True, False],
    "two_sided": [True, False],
    "n": [1, 3],
    "held": [True, False],
    "shapes": list(SHAPES),
    "turn": [0, 1, 2, 3],
}
# The optimizer has no such combination, and the kernels refuse the other.
NEVER = [{"layout": "released", "update": "all"}, {"layout": "released", "n": 3}]
COVER = pairwise(FACTORS, NEVER)
LAYOUTS = pairwise({name: FACTORS[name] for name in ("layout", "update")}, NEVER)
updates = pytest.mark.parametrize("update", ["sampled", "all"])


def product_law(*, shapes: str, turn: int, layout: str, held: bool, **options: Any) -> None:
    twins = coordinate_twins(forms_of(shapes, turn), DIRECTIONS[layout], **options)
    step_law(twins, held=held)


def test_the_cover_is_pairwise() -> None:
    for a, b in itertools.combinations(FACTORS, 2):
        missing = set(itertools.product(FACTORS[a], FACTORS[b])) - {(row[a], row[b]) for row in COVER}
        assert missing == {tuple(bad.values()) for bad in NEVER if tuple(bad) == (a, b)}


@pytest.mark.parametrize("row", COVER, ids=row_id)
def test_every_launch(row: dict[str, Any]) -> None:
    product_law(**row)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", FACTORS["momentum"])
@pytest.mark.parametrize(("layout", "update"), [(row["layout"], row["update"]) for row in LAYOUTS])
def test_every_launch_on_every_shape_and_dtype(layout: str, update: str, momentum: str) -> None:
    options = {name: FACTORS[name] for name in ("stochastic", "two_sided", "n", "held")}
    for row in crossed(options | {"n": [1, 1] if layout == "released" else [1, 3]}):
        product_law(layout=layout, update=update, momentum=momentum, **row)


@updates
@pytest.mark.parametrize("cut", [name for name in DIRECTIONS if name not in FACTORS["layout"]])
def test_other_strata(cut: str, update: str) -> None:
    """Strata of one element and strata longer than a program, one coordinate in all, signs that are all +1."""
    n = 1500 if "every" in cut or "half" in cut else 8192 + 300
    forms = [Form((n,), torch.bfloat16), Form((23, 41), torch.float32, 1)]
    step_law(coordinate_twins(forms, DIRECTIONS[cut], update=update))


@updates
def test_many_tensors_in_one_launch(update: str) -> None:
    shapes = SHAPES["thousand"] + SHAPES["odd"]
    forms = [Form(shape, torch.bfloat16, i % 3) for i, shape in enumerate(shapes)]
    twins = coordinate_twins(forms, DIRECTIONS["fraction"], update=update)
    with counted(run=True) as launched:
        step_law(twins)
    assert jobs(launched) == ["lost", "perturb", "flip", "fused" if update == "sampled" else "tiles"]


def test_released_blocks_of_several_directions_are_refused() -> None:
    """They overlap anywhere, so programs would meet in the same elements."""
    with pytest.raises(availability.Unavailable, match="released=True with several directions has no kernel"):
        coordinate_twins([Form((300,), torch.float32)], DIRECTIONS["released"], n=2)


@pytest.mark.parametrize("layout", ["fraction", "count", "block"])
def test_directions_that_meet_in_tensors_of_several_programs(layout: str) -> None:
    """What one direction entered the next one reads, and all were measured from the same parameters."""
    direction = Coordinates(600) if layout == "count" else DIRECTIONS[layout]
    form = Form((100, 60) if layout == "block" else (6000,), torch.float32)
    step_law(coordinate_twins([form], direction, n=3, two_sided=False))


NEAR = [0, 8192, 8, 5, 8192 + 700]


def shards(layout: str) -> tuple[Coordinates, list[Form]]:
    """Parts of tensors of 20,000 elements."""
    whole = {"fraction": (20_000,), "count": (40, 500), "block": (400, 50), "row": (3, 7000)}[layout]
    forms = [
        Form((8492 if start == 8192 else 700,), DTYPES[i % 4], i % 3, start, whole) for i, start in enumerate(NEAR)
    ]
    return DIRECTIONS["block-percent" if layout in ("block", "row") else layout], forms


def far_shards(layout: str, beyond: int) -> tuple[Coordinates, list[Form], dict[str, int]]:
    """Parts that begin past `beyond`, at a multiple of 8192 and where no stratum is cut, and hold drawn coordinates.

    With the first stratum of each whose coordinate it holds, where that is not the first one that meets it.
    """
    if layout == "fraction":  # strata of ten
        starts = [beyond // 40960 * 40960 + 40960 * (i + 1) for i in range(4)]
        forms = [Form((8492,), d, i % 3, starts[i], (2 * beyond,)) for i, d in enumerate(DTYPES)]
        return DIRECTIONS["fraction"], forms, {}
    k, total = 400, 8 * beyond
    whole, side = {40: ((1 << 21, 1 << 20), 1 << 17), 31: ((1 << 17, 1 << 15), 1 << 12)}[beyond.bit_length() - 1]
    across = whole[1] // side
    direction = Coordinates(k) if layout == "count" else Coordinates(1 / side**2, "block")
    forms = [Form((8492,), d, i % 3, whole=(2 * beyond,) if layout == "count" else whole) for i, d in enumerate(DTYPES)]
    first = {}
    for i, form in enumerate(forms):
        for place in drawn(direction, forms, i):
            start = (place - 100) // 8192 * 8192
            at = 2 * beyond * i + start  # on the line of all tensors
            if start > beyond and (layout == "block" or (at - 1) * k // total == (at + 8493) * k // total):
                forms[i] = Form((8492,), form.dtype, form.group, start, form.whole)
                first[f"p{i:02}"] = place // whole[1] // side * across + place % whole[1] // side
                break
    return direction, forms, first if layout == "block" else {}


@updates
@pytest.mark.parametrize("layout", ["fraction", "count", "block", "row"])
def test_shards(layout: str, update: str) -> None:
    direction, forms = shards(layout)
    step_law(coordinate_twins(forms, direction, update=update))


@updates
@pytest.mark.parametrize("layout", ["fraction", "count", "block"])
def test_shards_past_2_to_the_35(layout: str, update: str) -> None:
    direction, forms, _ = far_shards(layout, 1 << 40)
    forms[1] = replace(forms[1], start=forms[1].start + 5)  # where groups of words are cut
    assert all(form.start > 1 << 40 for form in forms)
    step_law(coordinate_twins(forms[:3] if layout == "fraction" else forms, direction, update=update))


@updates
@pytest.mark.parametrize("layout", ["fraction", "count", "block"])
def test_element_numbers_past_2_to_the_31(layout: str, update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels address elements 2^31 and on from the beginning of a tensor of which only the end is there."""
    direction, forms, first = far_shards(layout, 1 << 31)
    twins = coordinate_twins(forms, direction, update=update)
    edited = edit_tables(monkeypatch, partial(as_the_end, momentum="own", first=first))
    step_law(twins)
    assert all(changed(twins, i)[0] for i in range(4))
    assert edited and all(int(table.tensors[:, T.COUNT.value].min()) > 2**31 for table in edited)


def changed(twins: Twins, i: int) -> tuple[list[int], list[int]]:
    """Indices of the elements of parameter i and of its momentum that the kernels changed."""
    model, start = twins.models[1], twins.start
    pairs = (model.slots[i].tensor, start.slots[i].tensor), (model.momenta[i], start.momenta[i])
    return tuple((~same(a.view(-1), b.view(-1))).nonzero().flatten().tolist() for a, b in pairs)


@updates
@pytest.mark.parametrize("held", [True, False], ids=["held", "apart"])
def test_what_is_written(update: str, held: bool) -> None:
    """Every element with update="all", and else exactly the sampled ones, by the oracle in plain ints."""
    forms = [Form((n,), dtype) for n, dtype in zip((8192 + 300, 4099, 129, 1000), DTYPES, strict=True)]
    twins = coordinate_twins(forms, DIRECTIONS["fraction"], update=update, momentum="fp32", special=False)
    step_law(twins, held=held)
    for i, slot in enumerate(twins.slots):
        sampled = sorted(fraction_ints(SEED, STEP, slot.stream, slot.total, 10))
        x, m = changed(twins, i)
        assert x == (sampled if update == "sampled" else list(range(slot.total)))
        assert m == sampled


@pytest.mark.parametrize(("n", "held", "bad"), [(1, True, math.nan), (1, False, math.inf), (3, False, -math.inf)])
@updates
def test_nothing_moves_where_rho_is_not_finite(update: str, bad: float, n: int, held: bool) -> None:
    forms = [Form((300,), torch.bfloat16, 0), Form((40,), torch.float64, 1)]
    twins = coordinate_twins(forms, DIRECTIONS["fraction"], update=update, n=n)
    probe = None
    if held:
        probe = twins.probes(1)[-1]
        probe.to(1.0), probe.to(-1.0)
        assert twins.moved()
    twins.update_(1, [0.37, -1.9, bad][-n:], probe)
    assert not twins.moved()


def breakage(name: str) -> Any:
    """A fault in the tables, for `edit_tables`."""

    def edit(plan: Plan, table: Table, tiles: bool) -> None:
        rows, programs = table.tensors, table.programs
        if name in ("STREAM", "DRAW"):
            rows[:, getattr(T, name).value] += 1
        elif name in ("START", "ORIGIN"):
            rows[:, getattr(T, name).value] &= 0xFFFFFFFF
        elif name == "FIRST":
            programs[:, T.FIRST.value] &= 0xFFFFFFFF
        elif name in ("more", "less"):
            rows[:, T.COUNT.value] += 1 if name == "more" else -1
        elif name == "SCALARS":
            rows[:, T.SCALARS.value] = 0

    return edit


@pytest.mark.parametrize("name", ["STREAM", "DRAW", "START", "ORIGIN", "FIRST", "more", "less", "SCALARS", "none"])
def test_the_law_notices_a_broken_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    update = "sampled" if name == "FIRST" else "all"
    start = 2**40 + 8192
    forms = [Form((700,), torch.bfloat16, 1, start, (start + 700,)), Form((130,), torch.bfloat16, 2)]
    twins = coordinate_twins(forms, DIRECTIONS["fraction"], update=update)
    edit_tables(monkeypatch, breakage(name))
    if name == "none":
        step_law(twins)
    else:
        with pytest.raises(AssertionError, match="outside of all tensors" if name == "more" else "differ|no element"):
            step_law(twins)


def test_the_law_notices_a_missing_tail_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(p, j, rest, v, FULL):
        tl.store(p + j, v)

    twins = coordinate_twins([Form((700,), torch.bfloat16)], DIRECTIONS["fraction"], update="all")
    monkeypatch.setattr(coordinate, "store", type(coordinate.store)(unmasked))
    with pytest.raises(AssertionError, match=r"update: .* outside of all tensors"):
        step_law(twins)
