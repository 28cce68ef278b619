"""Stages of `make gpu`, and command lines of the GPU benchmark, on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))
from gpu import gpu, result, stages  # noqa: E402
from helpers.bench_samples import ns_sample, sample  # noqa: E402
from step import kernels  # noqa: E402


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    own = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode == 2 and done.stdout == ""
    assert own == ["error: no NVIDIA GPU: torch finds none on this machine"]


def test_both_programs_exit_with_2_where_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == kernels.main([]) == 2
    assert capsys.readouterr().err.count("error: no NVIDIA GPU") == 2


@pytest.mark.parametrize("words", [["--seconds", "-1"], ["--lists", "bert"], ["--into", "/nowhere/x.json"]], ids=str)
def test_wrong_arguments_are_named(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(result, "no_gpu", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        kernels.main(words)
    assert f"{words[0]} {words[1]}:" in capsys.readouterr().err


ENDS = [
    (0, "3 passed, 2 deselected in 9.1s", "passed"),
    (0, "3 skipped in 0.1s", "failed"),
    (1, "1 failed, 2 passed in 3.0s", "failed"),
    (5, "5 deselected in 0.1s", "failed"),
    (None, "", "failed"),
    (1, "========= Error: Device not supported", "skipped"),
    (stages._FOUND, "1 passed in 2s\n========= ERROR SUMMARY: 4 errors", "failed"),
]


@pytest.mark.parametrize("code, said, status", ENDS, ids=lambda v: repr(v)[:20])
def test_how_a_test_stage_ends(
    code: int | None, said: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], seconds: float, log: Path, **more: str) -> int | None:
        assert command[0] == "sanitize" and "-P" in command and str(tmp_path / "tests" / "test_a.py") in command
        log.write_text(said)
        return code

    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("@pytest.mark." + "gpu\ndef test_small(): pass\n")
    (tmp_path / "tests" / "test_b.py").write_text("def test_other(): pass\n")
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    monkeypatch.setattr(stages, "BUILD", tmp_path)
    monkeypatch.setattr(stages, "run", run)
    stage = stages.tests("memcheck", 1.0, tmp_path, ["sanitize"], "small")
    assert stage.status == status and stage.note


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    begin, log = time.monotonic(), tmp_path / "log"
    for limit in (1.0, 10.0, 100.0):  # on a busy machine the shell takes its time to begin
        assert stages.run(["sh", "-c", "echo begun; sleep 3600"], limit, log) is None
        if log.read_text():
            break
    assert time.monotonic() - begin < 1800 and log.read_text() == "begun\n"


def test_a_stage_that_is_cut_off_reports_its_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text(
        "import pytest, time\npytestmark = pytest.mark." + "gpu\ndef test_wrong(): assert 1 == 2\n"
        "def test_endless(): time.sleep(3600)\ndef test_last(): time.sleep(3600)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    for limit in (5.0, 20.0, 100.0):  # on a busy machine the processes take their time to begin
        stage = stages.tests("tests", limit, tmp_path)
        log = (tmp_path / "gpu-tests.log").read_text()
        if "FAILED" in log:
            break
    assert stage.status == "failed" and "1 failed" in stage.note and "assert 1 == 2" in log


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("jaguar/__init__.py", "jaguar/backends/ops.py", "triton_kernels/launch.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    monkeypatch.setattr(stages, "BUILD", tmp_path / "build")
    monkeypatch.setattr(stages, "TARGET", tmp_path / "build" / "gpu")
    yield tmp_path


@pytest.mark.parametrize("pip, status", [(1, "passed"), (0, "failed")], ids=["pip-cannot", "pip-forgets-modules"])
def test_where_pip_cannot_the_package_is_copied_together(
    pip: int, status: str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "run", lambda command, *_: pip if "pip" in command else 0)
    stage = stages.build(1.0, repository / "logs")
    assert stage.status == status and "cop" in stage.note
    built = {str(p.relative_to(stages.TARGET)): p.read_text() for p in stages.TARGET.rglob("*.py")}
    assert built == {
        "jaguar/__init__.py": "# jaguar/__init__.py\n",
        "jaguar/backends/ops.py": "# jaguar/backends/ops.py\n",
        "jaguar/triton_kernels/launch.py": "# triton_kernels/launch.py\n",
    }


class Runs:
    """Stands for stages.run; a benchmark adds rows to its result file."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.selected: list[str] = []

    def __call__(self, command: list[Any], seconds: float, log: Path | None = None, **more: str) -> int:
        words = [str(word) for word in command]
        name = words[2] if words[1] == str(ROOT / "bench") else "pytest"
        if name == "pytest":
            self.selected.append(words[-1])
        else:
            self.seconds[name] = seconds
            path = Path(words[words.index("--into") + 1])
            found = result.load(path)
            found["rows"] += ns_sample() if "--speed" in words else sample()["rows"]
            result.save(path, found)
        if log is not None:
            log.write_text("3 passed in 1s")
        return 0 if name == "pytest" else 1


def test_make_gpu_runs_all_stages_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs()
    monkeypatch.setattr(result, "no_gpu", lambda: None)
    monkeypatch.setattr(gpu, "machine", lambda *_, **given: sample()["machine"])
    monkeypatch.setattr(stages, "run", runs)
    monkeypatch.setattr(stages, "BUILD", tmp_path)
    monkeypatch.setattr(stages.shutil, "which", lambda name: name)
    monkeypatch.setattr(stages, "build", lambda seconds, logs: stages.Stage("build", "passed", 1.0, "built"))
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # main takes it out, and it comes back
    assert gpu.main(["--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.json")
    found = result.load(path)
    names = ["build", "tests", "memcheck", "racecheck", "kernels", "newton-schulz", "models"]
    assert [stage["name"] for stage in found["stages"]] == names
    assert {p.name for p in tmp_path.glob("*.log")} == {f"gpu-{n}.log" for n in ("tests", "memcheck", "racecheck")}
    assert sorted(runs.selected)[1:] == ["small", "small"], "all tests, and the small ones under each tool"
    notes = {stage["name"]: stage["note"] for stage in found["stages"]}
    # Each benchmark counts its own rows.
    assert notes["kernels"] == "3 measurements; 1 failures" and notes["newton-schulz"] == "4 measurements; 1 failures"
    caps = gpu.CAPS
    assert runs.seconds["newton-schulz"] == caps["newton-schulz"]
    # Nothing here takes time, so the benchmark gets all but what the last stages need.
    assert gpu.LIMIT - caps["newton-schulz"] - caps["models"] - 20 < runs.seconds["kernels"] < gpu.LIMIT
    assert sum(cap or 60.0 for cap in caps.values()) < gpu.LIMIT < 540


def test_stages_at_the_same_time_end_with_the_run(tmp_path: Path) -> None:
    def interrupted() -> stages.Stage:
        while not (tmp_path / "log").exists() or not stages._running:
            time.sleep(0.01)
        raise KeyboardInterrupt

    def sleeping() -> stages.Stage:
        code = stages.run(["sleep", "3600"], 3600.0, tmp_path / "log")
        return stages.Stage("sleep", "failed", 0.0, str(code))

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stages.together(interrupted, sleeping)
    assert time.monotonic() - begin < 1800 and not stages._running
    ends = stages.together(*(partial(stages.Stage, name, "passed", 0.0, "") for name in "ab"))
    assert [stage.name for stage in ends] == ["a", "b"]
