"""Dense launches in kernels: the reference's bits in every tensor, and no byte changed outside of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from helpers.tensors import DTYPES

pytest.importorskip("triton")
import triton.language as tl
from torch import Tensor, nn

from helpers.covering import pairwise
from helpers.kernels import (
    MOVES,
    RHO,
    SHAPES,
    Form,
    crossed,
    dense_twins,
    forms_of,
    interpreted,
    row_id,
    same,
    step_law,
)
from helpers.launches import as_the_end, counted, edit_tables, jobs
from jaguar import ZOSGD
from jaguar.backends.triton.plan import Plan, Table
from jaguar.triton_kernels import dense
from jaguar.triton_kernels import tables as T

pytestmark = [interpreted, pytest.mark.usefixtures("poisoned")]

FACTORS: dict[str, list[Any]] = {
    "distribution": ["rademacher", "gaussian"],
    "restore": ["copy", "walk"],
    "rule": ["sgd", "sign"],
    "momentum": ["none", "own", "fp32", "bf16", "e5m2"],
    "stochastic": [True, False],
    "two_sided": [True, False],
    "n": [1, 3],
    "held": [True, False],
    "shapes": list(SHAPES),
    "turn": [0, 1, 2, 3],
}
SLOW = [{"distribution": "gaussian", "n": 3, "shapes": shapes} for shapes in SHAPES if shapes != "thousand"]
COVER = pairwise(FACTORS, SLOW)
distributions = pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
restores = pytest.mark.parametrize("restore", ["copy", "walk"])


def product_law(*, shapes: str, turn: int, distribution: str, held: bool, **options: Any) -> None:
    twins = dense_twins(forms_of(shapes, turn), distribution, **options)
    step_law(twins, held=held)


def test_the_cover_is_pairwise() -> None:
    for a, b in itertools.combinations(FACTORS, 2):
        assert set(itertools.product(FACTORS[a], FACTORS[b])) == {(row[a], row[b]) for row in COVER}


@pytest.mark.parametrize("row", COVER, ids=row_id)
def test_every_launch(row: dict[str, Any]) -> None:
    product_law(**row)


@pytest.mark.slow
@restores
@pytest.mark.parametrize("momentum", FACTORS["momentum"])
@distributions
def test_every_launch_on_every_shape_and_dtype(distribution: str, momentum: str, restore: str) -> None:
    for row in crossed({name: FACTORS[name] for name in ("rule", "stochastic", "two_sided", "n", "held")}):
        product_law(distribution=distribution, momentum=momentum, restore=restore, **row)


def test_many_tensors_in_one_launch() -> None:
    forms = [Form(shape, torch.bfloat16, i % 3) for i, shape in enumerate(SHAPES["thousand"] + SHAPES["odd"])]
    twins = dense_twins(forms, "rademacher")
    with counted(run=True) as launched:
        step_law(twins)
    assert jobs(launched) == ["lost", "save", "flip", "saved"]


@distributions
@restores
def test_shards(distribution: str, restore: str) -> None:
    """Parts that begin at a multiple of 8192, in the middle of a group of words, and past what 32 bits can number."""
    starts = [0, 8192, 8, 5, 8192 + 700, 2**40 + 8192, 2**40 + 8197]
    forms = [Form((300,), DTYPES[i % 4], i % 3, s, (s + 1000,)) for i, s in enumerate(starts)]
    step_law(dense_twins(forms, distribution, restore=restore, rule="sign"))


@distributions
@restores
def test_element_numbers_past_2_to_the_31(distribution: str, restore: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels address elements 2^31 and on from the beginning of a tensor of which only the end is there."""
    start = 2**31 + 8192
    sizes = [300, 8492 if distribution == "rademacher" else 1100, 400, 500]
    forms = [Form((n,), d, n % 3, start, (start + n,)) for n, d in zip(sizes, DTYPES, strict=True)]
    twins = dense_twins(forms, distribution, restore=restore)
    edited = edit_tables(monkeypatch, partial(as_the_end, momentum="own", dense=True))
    step_law(twins)
    assert edited and all(int(table.tensors[:, T.COUNT.value].min()) > 2**31 for table in edited)


@distributions
@pytest.mark.parametrize("held", [True, False], ids=["held", "apart"])
def test_every_element_is_written(distribution: str, held: bool) -> None:
    forms = [Form((n,), dtype) for n, dtype in zip((300, 1100, 129, 500), DTYPES, strict=True)]
    twins = dense_twins(forms, distribution, rule="sign", momentum="fp32", special=False)
    step_law(twins, held=held)
    model, start = twins.models[1], twins.start
    for i in range(4):
        for a, b in ((model.slots[i].tensor, start.slots[i].tensor), (model.momenta[i], start.momenta[i])):
            assert not bool(same(a, b).any())


@pytest.mark.parametrize("restore", ["copy", "walk"])
@pytest.mark.parametrize(("n", "held", "bad"), [(1, True, math.nan), (1, False, math.inf), (3, True, -math.inf)])
def test_nothing_moves_where_rho_is_not_finite(restore: str, bad: float, n: int, held: bool) -> None:
    """Saved values come back; a walk goes back as the reference does."""
    forms = [Form((300,), torch.bfloat16, 0), Form((40,), torch.float64, 1)]
    twins = dense_twins(forms, "gaussian", restore=restore, n=n)
    probes = [twins.probes(k) if held else [] for k in range(2)]
    for pair in zip(*probes, strict=True):
        for move in ("plus", "minus", "finish"):
            if pair[0] is not probes[0][-1] or move != "finish":
                for probe in pair:
                    MOVES[move](probe)
    assert twins.moved() == held
    twins.update_(1, [*RHO[: n - 1], bad], probes[1][-1] if held else None)
    if held:
        probes[0][-1].abort()
    twins.check("back")
    assert twins.moved() == (held and restore == "walk")


def breakage(name: str) -> Any:
    """A fault in the tables, for `edit_tables`."""

    def edit(plan: Plan, table: Table, tiles: bool) -> None:
        rows = table.tensors
        if name == "STREAM":
            rows[:, T.STREAM.value] += 1
        elif name == "START":
            rows[:, T.START.value] &= 0xFFFFFFFF
        elif name in ("more", "less"):
            rows[:, T.COUNT.value] += 1 if name == "more" else -1
        elif name == "SAVED":
            rows[-1, T.SAVED.value] -= 16
        elif name == "SCALARS":
            rows[:, T.SCALARS.value] = 0

    return edit


@pytest.mark.parametrize("name", ["STREAM", "START", "more", "less", "SAVED", "SCALARS", "none"])
def test_the_law_notices_a_broken_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = 2**40 + 8192
    forms = [Form((160,), torch.bfloat16, 1, start, (start + 160,)), Form((130,), torch.bfloat16, 2)]
    twins = dense_twins(forms, "rademacher")
    edit_tables(monkeypatch, breakage(name))
    if name == "none":
        step_law(twins)
    else:
        with pytest.raises(AssertionError, match="outside of all tensors" if name == "more" else "differ"):
            step_law(twins)


@pytest.mark.parametrize("what", ["tail", "half"])
def test_the_law_notices_a_broken_store(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(p, j, rest, v, FULL):
        tl.store(p + j, v)

    def halved(p, j, rest, v, FULL):
        tl.store(p + j, v, mask=j < rest // 2)

    twins = dense_twins([Form((700,), torch.bfloat16)], "rademacher", restore="walk")
    monkeypatch.setattr(dense, "store", type(dense.store)(unmasked if what == "tail" else halved))
    with pytest.raises(AssertionError, match="outside of all tensors" if what == "tail" else "plus 0: .* p00"):
        step_law(twins)


class Looked(list[Any]):
    """A list that counts how often it was looked through."""

    times = 0

    def __iter__(self) -> Iterator[Any]:
        type(self).times += 1
        return super().__iter__()

    index = __contains__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("n", [2, 20])
def test_modules_that_are_moved_one_by_one_share_the_numbers(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host copies two times a step, before and after the losses, and looks through all tensors a few times,
    however many there are: their parts of the tables are found by name."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(n)))
    opt = ZOSGD(model.named_parameters(), lr=1e-3, restore="module", distribution="rademacher", backend="triton")

    def closure() -> Tensor:
        return model(torch.ones(3)).sum()

    with counted(run=False):
        opt.step(closure)
    ((_, launches),) = opt._trained.bound.parts
    copies: list[Tensor] = []
    monkeypatch.setattr(
        "jaguar.backends.triton.device_scalars.staged", lambda host, device: copies.append(host) or host
    )
    monkeypatch.setattr(Plan, "launch", None)  # tables are those of the first step
    monkeypatch.setattr(launches, "_slots", Looked(launches._slots))
    monkeypatch.setattr(Looked, "times", 0)
    with counted(run=False) as seen:
        opt.step(closure)
    assert jobs(seen) == ["walk"] * (2 * 2 * n) + ["plain"], "there for each evaluation; torch copies back"
    assert len(copies) == 2 and Looked.times <= 3
