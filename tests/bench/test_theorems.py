"""`make theorems`: left sides of the theorems have the slopes of their terms, and stay below their bounds."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from theorems import report, theorems
from theorems.quadratics import Setting, left_side
from theorems.sweeps import SWEEPS, Sweep, bound

QUIET = Setting("SignSGD", 2, 600, 1e-2, 0.01)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def measured(sweep: Sweep) -> dict:
    """What one seed shows."""
    found = report.row(sweep, [[left_side(sweep.setting(value), 0)] for value in sweep.values])
    # An upper bound: with constants 1 already, which is more than the theorems say.
    assert found["of_bound"] < 1
    return found


def test_slopes_are_those_of_the_terms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """0.1: without noise runs differ by 1 %, and other terms have at most a tenth of the bound at an end of a sweep."""
    far, kink = replace(QUIET, lr=1e-3, start=0.3), replace(QUIET, lr=2e-3, start=0.0, beta=0.5, kink=0.75, steps=300)
    chosen = [
        Sweep("descent", "far away", "T", (350, 550, 900), lambda v: replace(far, steps=int(v))),
        Sweep("smoothing", "kink", "tau", (0.1, 0.2, 0.4), lambda v: replace(kink, tau=v)),
        Sweep("smoothing", "kink", "tau", (0.1, 0.2, 0.4), lambda v: replace(kink, method="Muon", tau=v)),
    ]
    monkeypatch.setattr(theorems, "SWEEPS", chosen)
    monkeypatch.setattr(sys, "argv", ["bench theorems", "--seeds", "1", "--out", str(tmp_path)])
    assert theorems.main() == 0
    for row, slope in zip(json.loads((tmp_path / "theorems.json").read_text())["rows"], (-1, 1, 1), strict=True):
        assert row["term_slope"] == pytest.approx(slope)
        assert row["slope"] == pytest.approx(slope, abs=0.1), row["name"]
        assert row["attained"]
        assert row["of_bound"] < 1
    assert (tmp_path / "theorems.md").read_text().count("| the term |") == 3
    assert (tmp_path / "theorems.png").read_bytes().startswith(b"\x89PNG")


def test_longer_memory_costs_less_than_the_bound_says() -> None:
    """The term has -1, the calculation -1/2, 5 % of scatter in a run 0.05; flatter than -1/4 were no memory at all."""
    row = measured(Sweep("lag", "no noise", "1 - beta", (0.2, 0.05, 0.0125), lambda v: replace(QUIET, beta=1 - v)))
    assert row["term_slope"] == pytest.approx(-1)
    assert -0.65 < row["slope"] < -0.25


def test_longer_memory_swings_more_in_normal_noise() -> None:
    """The calculation has -1/4 where the term has 1/2; 15 % of scatter in a run is 0.08 in this slope."""
    of = next(sweep for sweep in SWEEPS if sweep.name == "SignSGD, normal noise: 1 - beta")
    row = measured(replace(of, values=(0.4, 0.1, 0.025), setting=lambda v: replace(of.setting(v), steps=700)))
    assert row["term_slope"] == pytest.approx(0.5)
    assert row["slope"] == pytest.approx(-0.25, abs=0.2)


def test_every_sweep_is_of_its_term() -> None:
    """The named term is more than half of the bound in the middle of each sweep."""
    for sweep in SWEEPS:
        middle = sweep.values[len(sweep.values) // 2]
        assert sweep.term_at(middle) > 0.5 * sum(bound(sweep.setting(middle)).values()), sweep.name
    assert len({sweep.name for sweep in SWEEPS}) == len(SWEEPS)
    assert {sweep.term for sweep in SWEEPS} == {"descent", "lag", "noise", "smoothing", "oracle", "all"}


def test_noise_has_the_variance_that_is_named() -> None:
    for noise in ("normal", "bursts"):
        setting = replace(QUIET, steps=200_000, sigma=3.0, beta=0.9, noise=noise)
        draws = setting.draws(torch.Generator().manual_seed(0))
        assert float((draws**2).sum(1).mean()) == pytest.approx(9.0, rel=0.05)
        assert float(draws.mean()) == pytest.approx(0.0, abs=0.03)


def test_the_interval_has_scatter_in_it() -> None:
    """Against the textbook's formula on five points, in logarithms of 10."""
    xs, ys = [10.0, 100.0, 1000.0, 10000.0, 100000.0], [10.0, 100.0, 10000.0, 10000.0, 100000.0]
    found, half = report.slope(xs, ys)
    fitted = [1.2 + found * (i - 2.0) + 2.0 for i in range(5)]
    residuals = [i + (i == 2) + 1 - f for i, f in zip(range(5), fitted, strict=True)]
    assert found == pytest.approx(1.0)
    assert half == pytest.approx(3.182 * (sum(r * r for r in residuals) / 3 / 10) ** 0.5)
    assert statistics.fmean(residuals) == pytest.approx(0.0)
