"""Kernels compiled for GPUs that are not there: what the interpreter cannot see (spills, access widths, barriers)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = [
    "sparse perturb x=bf16 m=bf16 fraction",
    "sparse fused x=bf16 m=bf16 fraction",
    "sparse several x=bf16 m=bf16 fraction",
    "tiles x=bf16 m=bf16 fraction",
    "tiles x=bf16 m=fp32 fraction",
    "tiles x=fp16 m=bf16 fraction",
    "tiles x=bf16 m=bf16 fraction unaligned",
    "move save gaussian x=bf16",
    "move walk rademacher x=bf16",
    "step walked gaussian sgd x=bf16 m=none",
    "step plain rademacher sign x=bf16 m=bf16",
    "step saved rademacher sgd x=bf16 m=none",
    "product 128 d=fp16 B_TRANSPOSED TRIANGLE",
]


def clean() -> dict[str, str]:
    """The environment without the interpreter, whose kernels cannot be compiled."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict]:
    out = tmp_path_factory.mktemp("aot") / "table.json"
    words = [sys.executable, "bench", "aot", "--json", out, "--only", *CASES]
    done = subprocess.run(words, cwd=ROOT, env=clean(), capture_output=True, text=True, timeout=600)
    assert out.exists(), done.stderr
    return {(r["name"], r["sm"]): r for r in json.loads(out.read_text())}


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_nothing_spills_and_full_tiles_are_wide(table, name: str, sm: int) -> None:
    found = table[name, sm]
    assert found["faults"] == [] and found["stack"] == found["local"] == 0
    if name.startswith("tiles"):
        assert found["barriers"] >= 1


@pytest.mark.parametrize("sm", [80, 90])
def test_without_the_promise_of_alignment_no_access_is_wide(table, sm: int) -> None:
    assert table["tiles x=bf16 m=bf16 fraction unaligned", sm]["loads16"] == 0


def test_the_committed_table_is_of_these_kernels(table) -> None:
    """`make aot` was run after the last change of a kernel: the same registers and instructions."""
    committed = json.loads((ROOT / "bench" / "results" / "aot.json").read_text())
    if committed["triton"] != version("triton"):
        pytest.skip(f"the table is of triton {committed['triton']}")
    kept = {(r["name"], r["sm"]): r for r in committed["results"]}
    assert {key: kept[key] for key in table} == table


def test_the_check_notices() -> None:
    """A missing barrier, narrow accesses, spills and, of products, many registers are faults."""
    code = """
import sys
sys.path.insert(0, "bench")
from compile import aot
case = next(c for c in aot.cases() if c.name == "tiles x=bf16 m=bf16 fraction")
good = {"stack": 0, "local": 0, "loads16": 4, "stores16": 2}
right = ["STG.E.U16", "BAR.SYNC", "LDG.E.128", "LDG.E.128", "STG.E.128"]
assert aot.faults(case, good, right) == []
assert aot.faults(case, good, [op for op in right if op != "BAR.SYNC"])
assert aot.faults(case, good, ["BAR.SYNC", *right])
assert aot.faults(case, good, ["STG.E.U16", "LDG.E.128", *right[1:]])
for key in good:
    assert aot.faults(case, good | {key: {"stack": 8, "local": 1, "loads16": 3, "stores16": 1}[key]}, right), key
case = next(c for c in aot.cases() if c.name == "product 128 d=fp16")
good = {"stack": 0, "local": 0, "loads16": 99, "stores16": 99, "sm": 90, "registers": 128}
assert aot.faults(case, good, ["HGMMA"]) == [] == aot.faults(case, good | {"sm": 80, "registers": 170}, ["HMMA"])
assert aot.faults(case, good | {"registers": 129}, ["HGMMA"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
