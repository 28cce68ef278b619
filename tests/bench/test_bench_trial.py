"""The GPU benchmark's code paths in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))
from gpu import report  # noqa: E402
from helpers.bench_samples import sample  # noqa: E402
from step import kernels  # noqa: E402

TRIAL = """
import json, sys
sys.path.insert(0, "bench")
import torch
from step import compiled, peers, shapes, suite
from gpu.clock import CpuClock
from jaguar.method import rules

torch.set_num_threads(1)
CpuClock.copy_bytes = 4096
tiny = shapes.ParameterList("tiny", "one tensor", (("a.weight", (3, 71)),))
two = shapes.ParameterList("two", "a matrix and a vector", (("a.weight", (40, 70)), ("b.bias", (33,))))
clock = CpuClock(torch.device("cpu"), 0.0, least=1, warm_up=0)
rademacher = next(m for m in suite.MORE if m.name == "ZO-SGD rademacher, copy")
good = list(suite.run([(tiny, [suite.METHODS[0], rademacher]), (two, peers.PEERS)], clock, lambda: 1e3))
late = list(suite.run([(tiny, [suite.METHODS[0]])], clock, lambda: 0.0))
slow = list(suite.run([(tiny, [compiled.CompiledSign])], clock, lambda: 30.0))
def sign_step(x, m, decay, lr):
    return x + m.sign() * lr
rules.sign_step = sign_step
peers.MezoLoop._z = lambda self, p: torch.full_like(p, float("nan"))
bad = list(suite.run([(tiny, [suite.METHODS[0], peers.MezoLoop])], clock, lambda: 1e3))
print(json.dumps([good, late, slow, bad]))
"""


@pytest.fixture(scope="module")
def trial() -> list[list[dict[str, Any]]]:
    """Rows of a run on tiny lists, without time, with too little for a compiler, and with parity broken."""
    pytest.importorskip("triton")
    before = sorted((ROOT / "bench" / "results").iterdir())
    done = subprocess.run(
        [sys.executable, "-P", "-c", TRIAL],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert sorted((ROOT / "bench" / "results").iterdir()) == before
    rows: list[list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def test_the_benchmark_measures_every_kernel_step_and_peer(trial: list[list[dict[str, Any]]]) -> None:
    good = trial[0]
    assert not [row for row in good if row["kind"] in ("failure", "dropped")]
    kernels = {(row["method"], row["kernel"]): row for row in good if row["kind"] == "kernel"}
    zo = "ZO-SGD rademacher, copy"
    assert set(kernels) == {
        *((report.ALL, job) for job in ("perturb", "flip", "restore")),
        *((report.ALL, f"tiles {job}, m bf16") for job in ("restore + step", "step")),
        *((zo, f"{job}, rademacher") for job in ("save", "flip", "restore")),
        *((zo, f"step {job}, sgd, rademacher") for job in ("plain", "saved")),
    }
    assert all(row["ms"]["n"] == 1 and row["gb_s"] > 0 for row in kernels.values())
    assert kernels[report.ALL, "tiles restore + step, m bf16"]["bytes"] == pytest.approx(6.34 * 213)
    steps = {(row["method"], row["what"]): row for row in good if row["kind"] == "step"}
    assert steps[report.ALL, "step"]["launches"] == 3 and steps[report.ALL, "apply_"]["launches"] == 1
    assert (report.MEZO, "step") in steps and ("JAGUAR as released", "step") in steps and len(steps) == 4 + 5


def test_every_row_can_be_printed_and_reported(trial: list[list[dict[str, Any]]]) -> None:
    for rows in trial:
        assert all(kernels.said(row) for row in rows)
        assert report.markdown(sample() | {"rows": rows})


def test_what_there_is_no_time_for_is_dropped(trial: list[list[dict[str, Any]]]) -> None:
    assert [(row["kind"], row["reason"]) for row in trial[1]] == [("dropped", "no time was left")]
    assert [row["kind"] for row in trial[2]] == ["copy", "dropped"]


def test_a_failing_parity_prints_no_speed(trial: list[list[dict[str, Any]]]) -> None:
    bad = trial[3]
    assert [row["kind"] for row in bad] == ["copy", "failure", "failure"]
    for row in bad[1:]:
        assert row["reason"].startswith("parity: ") and not {"ms", "wall_ms", "host_ms", "gb_s"} & set(row)
        assert "FAILURE, no speed" in kernels.said(row) and " ms" not in kernels.said(row)
    assert len(report.failures(sample() | {"stages": [], "rows": bad})) == 2
    assert "GB/s |" not in report.markdown(sample() | {"rows": bad})
