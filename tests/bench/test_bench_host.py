"""The benchmark of host time: what it silences, what it takes off, and that it compares what is equal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.kernels import interpreted
from helpers.tensors import all_bits

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from step import host  # noqa: E402

NAME = "JAGUAR SignSGD"


def trained(method: str) -> tuple[Any, list[torch.Tensor]]:
    params = host.named(host.SMALL, torch.float32)
    return host.made(method, params), [p for _, p in params]


@interpreted
@pytest.mark.parametrize("method", host.METHODS)
def test_silent_launches_are_seen_and_nothing_moves(method: str) -> None:
    optimizer, tensors = trained(method)
    before = all_bits(tensors)
    with host.silent() as launched, host.without_newton_schulz() as asked:
        optimizer.step(host.Losses())
    assert len(launched) >= 4  # what rounding loses is counted once, then there, back, and the step
    assert asked == ([1] if "Muon" in method else [])
    assert all_bits(tensors) == before
    optimizer.step(host.Losses())
    assert all_bits(tensors) != before  # launches and Newton-Schulz run again


@interpreted
def test_a_fingerprint_tells_one_direction_from_another(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed in (0, 1):
        monkeypatch.setitem(host.METHODS, NAME, ("JaguarSignSGD", {"seed": seed}))
        found.append(host.fingerprint(NAME))
    assert found[0] != found[1]


def test_a_turn_of_which_no_launch_is_seen_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*_: Any) -> Any:
        return SimpleNamespace(step=lambda closure: (closure(), closure()))

    monkeypatch.setattr(host, "made", made)
    with pytest.raises(AssertionError, match="launched \\[\\]"):
        host.Bench().turn(NAME, host.SMALL, 1)


def test_the_closures_time_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(host, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def passes(seconds: float) -> None:
        now[0] += seconds

    class Slow(host.Losses):
        @property
        def _ready(self) -> tuple[float, float]:  # asked in the middle of a call
            passes(10.0)
            return 0.5, 0.25

        @_ready.setter
        def _ready(self, value: Any) -> None:
            pass

    losses = []

    def step(closure: Callable[[], Any]) -> None:
        for seconds in (1.0, 2.0):
            passes(seconds)
            losses.append(closure())
        passes(4.0)

    for _ in range(2):  # nothing is left of the step before
        parts = host.timed(step, Slow())
        assert dict(zip(host.PARTS, parts, strict=True)) == {
            "before": 1.0,
            "between": 2.0,
            "after": 4.0,
            "closure": 20.0,
        }
        assert host.outside(parts) == 7.0
    assert losses == [0.5, 0.25] * 2


def test_ratios_are_of_rounds_and_outside_leaves_the_closure_out() -> None:
    turns = {"before": [[[1, 1, 2, 6]] * 3, [[2, 2, 4, 2]] * 3], "after": [[[1, 0, 1, 6]] * 3, [[1, 1, 2, 6]] * 3]}
    found = host.judged(turns)
    assert found["before"] == {"step": 10, "outside": 6.0, "before": 1.5, "between": 1.5, "after": 3, "closure": 4}
    assert found["after"]["outside"] == 3
    assert found["outside ratio"] == [0.5, 0.5, 0.5]
    assert found["step ratio"] == pytest.approx([0.85, 0.9, 0.95])


@interpreted
def test_both_sides_are_measured_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(host, "METHODS", {NAME: host.METHODS[NAME]})
    rows = host.compare({"before": ROOT, "after": ROOT}, {"3": host.SMALL}, 2)
    host.report(rows, {"before": "one", "after": "other"}, tmp_path)
    written = json.loads((tmp_path / "host-step.json").read_text())
    assert written["machine"] == {"before": "one", "after": "other"}
    (row,) = written["rows"]
    assert (row["method"], row["tensors"]) == (NAME, 3)
    assert row["launched"]["before"] == row["launched"]["after"] != []
    for side in ("before", "after"):
        assert 0 < row[side]["closure"] < row[side]["outside"] < row[side]["step"] < 1
    assert NAME in capsys.readouterr().out


def test_what_differs_is_no_comparison() -> None:
    host.expect_equal("bits", {"before": 1, "after": 1})
    with pytest.raises(AssertionError, match="bits before and after differ: 1 and 2"):
        host.expect_equal("bits", {"before": 1, "after": 2})


@interpreted
def test_a_worker_measures_its_own_tree_or_nothing(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    with host.Worker(tmp_path) as worker, pytest.raises(RuntimeError, match="the worker ended"):
        worker.ask("fingerprint", NAME)
    assert f"is not of {tmp_path}" in capfd.readouterr().err


def test_a_commit_that_cannot_be_compared_with_is_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert (ROOT / host.SCHEDULE).is_file()
    monkeypatch.setattr(sys, "argv", ["bench host", "--baseline", "0" * 40])
    assert host.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"no commit with {host.SCHEDULE}; {host.OLDEST} is the oldest that" in line
    if (ROOT / ".git").exists():
        assert host.has("HEAD", host.SCHEDULE) and not host.has("HEAD", "jaguar/iteration.py")
