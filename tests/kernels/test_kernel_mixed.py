"""Directions that read momentum, in kernels: the reference's bits, and no byte changed outside of tensors."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.tensors import DTYPES

pytest.importorskip("triton")
from helpers.covering import pairwise
from helpers.kernels import MOVES, SHAPES, Form, Twins, forms_of, interpreted, method_of, row_id, same, step_law
from helpers.launches import counted, jobs
from jaguar.method.directions import Mixed
from jaguar.method.rules import AlongMomentum

pytestmark = [interpreted, pytest.mark.usefixtures("poisoned")]

# Steps of the schedule: its warm-up, where y counts for nothing, the middle, and its end.
STEPS = [1, 7, 30]
FACTORS: dict[str, list[Any]] = {
    "restore": ["copy", "walk"],
    "momentum": ["own", "fp32", "bf16", "e5m2"],
    "stochastic": [True, False],
    "two_sided": [True, False],
    "held": [True, False],
    "step": STEPS,
    "shapes": list(SHAPES),
    "turn": [0, 1, 2, 3],
}
COVER = pairwise(FACTORS)
restores = pytest.mark.parametrize("restore", ["copy", "walk"])


def twins_of(forms: list[Form], *, momentum: str = "own", restore: str = "copy", **options: Any) -> Twins:
    names = ("stochastic", "two_sided")
    decides = {name: options.pop(name) for name in names if name in options}
    method = method_of(Mixed(warmup=2, total=20), AlongMomentum(), walk=restore == "walk", **decides)
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16, "e5m2": torch.float8_e5m2}.get(momentum)
    return Twins(forms, replace(method, momentum_dtype=stored), momentum, restore=restore, **options)


def test_the_cover_is_pairwise() -> None:
    for a, b in itertools.combinations(FACTORS, 2):
        assert set(itertools.product(FACTORS[a], FACTORS[b])) == {(row[a], row[b]) for row in COVER}


@pytest.mark.parametrize("row", COVER, ids=row_id)
def test_every_launch(row: dict[str, Any]) -> None:
    options = dict(row)
    forms = forms_of(options.pop("shapes"), options.pop("turn"))
    held, step = options.pop("held"), options.pop("step")
    step_law(twins_of(forms, **options), held=held, step=step)


@restores
@pytest.mark.parametrize("momentum", [None, torch.float8_e5m2])
def test_moves_before_there_is_a_momentum(restore: str, momentum: torch.dtype | None) -> None:
    """m is 0 then, in the dtype that it will have."""
    forms = [Form((n,), d) for n, d in zip((300, 1100, 129, 500), DTYPES, strict=True)]
    method = method_of(Mixed(warmup=2, total=20), AlongMomentum(), walk=restore == "walk")
    twins = Twins(forms, replace(method, momentum_dtype=momentum), "none", restore=restore)
    pair = [twins.probes(k)[0] for k in range(2)]
    lost = [steps.launches.lost(twins.inputs(k)) for k, steps in enumerate(twins.steps)]
    assert lost[0] == lost[1]
    for move in ("plus", "minus", "abort"):
        for probe in pair:
            MOVES[move](probe)
        twins.check(move)
        assert twins.moved() or move != "plus"


@restores
def test_shards(restore: str) -> None:
    """Parts that begin at a multiple of 8192, in the middle of a group of words, and past what 32 bits can number."""
    starts = [0, 8192, 8, 5, 8192 + 700, 2**40 + 8192, 2**40 + 8197]
    forms = [Form((300,), DTYPES[i % 4], i % 3, s, (s + 1000,)) for i, s in enumerate(starts)]
    step_law(twins_of(forms, restore=restore))


def test_many_tensors_in_one_launch() -> None:
    forms = [Form(shape, torch.bfloat16, i % 3) for i, shape in enumerate(SHAPES["thousand"] + SHAPES["odd"])]
    with counted(run=True) as launched:
        step_law(twins_of(forms))
    assert jobs(launched) == ["lost", "save", "flip", "saved"]


@restores
def test_tensors_that_take_no_part(restore: str) -> None:
    """They are neither read nor written, and the others move as they do alone."""
    forms = [Form((300,), torch.bfloat16), Form((150,), torch.bfloat16, 1), Form((40,), torch.float32, 2)]
    twins = twins_of(forms, restore=restore, active=[True, False, True])
    step_law(twins)
    moved = [not bool(same(a.tensor, b.tensor).all()) for a, b in zip(twins.slots, twins.start.slots, strict=True)]
    assert moved == [True, False, True]


@restores
@pytest.mark.parametrize(("held", "bad"), [(True, math.nan), (False, math.inf)])
def test_nothing_moves_where_rho_is_not_finite(restore: str, bad: float, held: bool) -> None:
    """Saved values come back, a walk goes back as the reference does, and m stays."""
    twins = twins_of([Form((300,), torch.bfloat16, 0), Form((40,), torch.float64, 1)], restore=restore)
    pair = [twins.probes(k)[0] for k in range(2)] if held else [None, None]
    for move in ("plus", "minus") if held else ():
        for probe in pair:
            MOVES[move](probe)
    assert twins.moved() == held
    twins.update_(1, [bad], pair[1])
    if held:
        pair[0].abort()
    twins.check("back")
    assert twins.moved() == (held and restore == "walk")


def test_the_law_notices_another_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = twins_of([Form((700,), torch.bfloat16)])
    step_law(twins)
    monkeypatch.setattr(twins.steps[1].numbers, "_direction", Mixed(warmup=3, total=20))
    with pytest.raises(AssertionError, match="differ"):
        step_law(twins)
