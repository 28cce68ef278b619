"""The build stage of `make gpu`."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.compilers import ROOT, tool


class Pip:
    """Stands for stages.run: pip with JAGUAR_CUDA=1 and =0 end with these exit statuses."""

    def __init__(self, stages: ModuleType, with_cuda: int | None, without: int = 0) -> None:
        self._stages, self._ends, self.calls = stages, {"JAGUAR_CUDA=1": with_cuda, "JAGUAR_CUDA=0": without}, []

    def __call__(self, command: list[Any], seconds: float, log: Path) -> int | None:
        log.write_text("  error: the CUDA extension was not built (JAGUAR_CUDA=1): nvcc failed on csrc/a.cu\n  more\n")
        if "pip" not in command:
            self.calls.append(command[-1])
            return 0
        self.calls.append(command[1])
        code = self._ends[command[1]]
        if code == 0:
            for name, source in self._stages._sources().items():
                (self._stages.TARGET / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, self._stages.TARGET / name)
        return code


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from gpu import stages

    (tmp_path / "jaguar").mkdir()
    (tmp_path / "jaguar" / "__init__.py").write_text("")
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    monkeypatch.setattr(stages, "BUILD", tmp_path / "build")
    monkeypatch.setattr(stages, "TARGET", tmp_path / "build" / "gpu")
    return stages


STAGES = [
    ("/cuda/nvcc", 0, "passed", "CUDA extension built with /cuda/nvcc", ["JAGUAR_CUDA=1"]),
    ("/cuda/nvcc", 1, "failed", "JAGUAR_CUDA=1): nvcc failed on csrc/a.cu; see", ["JAGUAR_CUDA=1", "JAGUAR_CUDA=0"]),
    ("/cuda/nvcc", None, "failed", "was not built (ended after 0 s", ["JAGUAR_CUDA=1", "JAGUAR_CUDA=0"]),
    (None, 0, "passed", "no CUDA extension: nvcc was not found", ["JAGUAR_CUDA=0"]),
]


@pytest.mark.parametrize("nvcc, code, status, note, pips", STAGES, ids=["built", "fails", "slow", "no-nvcc"])
def test_the_build_stage_builds_the_extension_where_nvcc_is(
    nvcc: str | None,
    code: int | None,
    status: str,
    note: str,
    pips: list[str],
    stages: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pip = Pip(stages, code)
    monkeypatch.setattr(stages, "run", pip)
    monkeypatch.setattr(stages, "_nvcc", lambda: nvcc)
    stage = stages.build(30.0, stages.BUILD)
    assert stage.status == status and note in stage.note and "pip put 1 files" in stage.note
    assert pip.calls[:-1] == pips
    assert ("jaguar._cuda" in pip.calls[-1]) == (status == "passed" and nvcc is not None)


def test_the_build_stage_finds_the_nvcc_of_setup(stages: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stages._nvcc() is None  # no setup.py
    nvcc = tool(stages.ROOT / "home" / "bin" / "nvcc")
    shutil.copy(ROOT / "setup.py", stages.ROOT)
    monkeypatch.setenv("CUDA_HOME", str(stages.ROOT / "home"))
    assert stages._nvcc() == str(nvcc)
