"""Survival of a run: a process that is killed, files that fail and a disk that is full, at any file operation.

tests/helpers/faults.c counts what changes files, whichever library it comes from, and lets the n-th operation fail.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
# Operations of the three saves of a run: about 70 each, and as many to remove the checkpoint before.
MOST = 240
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="operations are counted by LD_PRELOAD")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    made = tmp_path_factory.mktemp("faults") / "faults.so"
    source = str(TESTS / "helpers/faults.c")
    line = ["gcc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(made), source, "-ldl"]
    subprocess.run(line, check=True)
    return made


def outcomes(faults: Path, folder: Path, cases: list[str]) -> list[dict[str, Any]]:
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"LD_PRELOAD": str(faults), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    line = [sys.executable, str(TESTS / "helpers/faulty.py"), str(folder), *cases]
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def survival_law(faults: Path, folder: Path, cases: list[str]) -> list[dict[str, Any]]:
    """Once a checkpoint was written there is a whole one, and a resumed run ends as one that never stopped."""
    usual, *found = outcomes(faults, folder, ["kill:0", *cases])
    assert usual["saved"] == [2, 4, 6] and usual["counted"] < MOST
    assert len(found) == len(cases)
    for outcome in found:
        assert outcome["after"] == 0 and outcome["resumed"] == usual["digest"], outcome
        assert set(outcome["left"]) - {"journal-before.jaguar"} == {"checkpoint-6", "journal.jaguar"}, outcome
        if outcome["saved"]:
            assert int(outcome["there"][-1].removeprefix("checkpoint-")) >= max(outcome["saved"]), outcome
        if outcome["what"] == "kill":
            assert (outcome["code"] == -9) == (outcome["n"] <= usual["counted"]), outcome
        elif outcome["what"] != "time" and outcome["said"]:
            said = outcome["said"]
            assert said.startswith("OSError: could not save to "), said
            assert "no space left on the disk; " in said or outcome["what"] == "EIO", said
            ends = ("is whole", "no checkpoint was written yet", "no step was taken", "and a run goes on after them")
            assert said.endswith(ends), said
    assert {bool(outcome["there"]) for outcome in found} == {True, False}  # before and after the first checkpoint
    return found


def test_some_kills_full_disks_and_errors(faults: Path, tmp_path: Path) -> None:
    kills = [1, 3, 5, 7, 8, 9, 30, 58, 61, 64, 70, 124, 130, 136, 150]
    cases = [f"kill:{n}" for n in kills] + ["ENOSPC:3", "ENOSPC:20", "ENOSPC:90", "EIO:20", "EIO:55", "EIO:88"]
    found = survival_law(faults, tmp_path, cases)
    assert all(outcome["said"] for outcome in found[len(kills) :])
    assert any("the checkpoint of step 2 is whole" in outcome.get("said", "") for outcome in found)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kill", "ENOSPC", "EIO"])
def test_every_operation(faults: Path, tmp_path: Path, what: str) -> None:
    found = survival_law(faults, tmp_path, [f"{what}:{n}" for n in range(1, MOST)])
    assert what == "kill" or sum(bool(outcome["said"]) for outcome in found) > MOST / 3


@pytest.mark.slow
def test_a_kill_at_any_time(faults: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    survival_law(faults, tmp_path, [f"time:{draw.randrange(5, 400)}" for _ in range(100)])
