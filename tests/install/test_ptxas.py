"""`make ptxas`: what nvcc says is read, tabulated and judged."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from helpers.compilers import NVCC, ROOT, tool

NAMES = ("_ZN12_GLOBAL__N_14tileILi128ELb1EEEvPKfi", "_Z5helpedi")
PTXAS = f"""
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{NAMES[0]}' for 'sm_80'
ptxas info    : Function properties for {NAMES[0]}
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem, 364 bytes cmem[0]
ptxas info    : Function properties for {NAMES[1]}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to a call
"""


@pytest.fixture
def ptxas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With csrc of two files, results in another folder, and no nvcc yet."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from compile import ptxas as module

    build = module.build_script()
    build.CSRC, build.USUAL = tmp_path / "csrc", tmp_path / "usual"
    build.CSRC.mkdir()
    for name in ("one.cu", "two_sm90a.cu"):
        (build.CSRC / name).write_text("")
    monkeypatch.setattr(module, "build_script", lambda: build)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["bench ptxas"])
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return module


def fake_ptxas(tmp_path: Path, said: str) -> Path:
    (tmp_path / "said").write_text(said)
    return tool(
        tmp_path / "usual" / "bin" / "nvcc",
        NVCC.replace("while", f'case "$*" in *-c*) cat {tmp_path}/said;; esac\nwhile'),
    )


def test_what_ptxas_says_is_read(ptxas: ModuleType) -> None:
    functions, warnings = ptxas.parse(PTXAS)
    spilling = {"registers": 96, "shared": 1024, "stack": 16, "spill_stores": 4, "spill_loads": 8}
    called = {"registers": None, "shared": 0, "stack": 0, "spill_stores": 0, "spill_loads": 0}
    assert functions == [{"mangled": NAMES[0], **spilling}, {"mangled": NAMES[1], **called}]
    assert len(warnings) == 1 and "serialized" in warnings[0]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("void (anonymous namespace)::tile<128, true>(float const*, int)", "tile<128, true>"),
        ("void jaguar::product<(int)64, (bool)1, a::b<(int)2> >(args)", "jaguar::product<64, 1, a::b<2> >"),
        ("void jaguar::small<(jaguar_format)1, 64>(args)", "jaguar::small<(jaguar_format)1, 64>"),
        ("plain", "plain"),
    ],
)
def test_names_are_short(ptxas: ModuleType, name: str, expected: str) -> None:
    assert ptxas.short(name) == expected


def test_a_table_of_kernels_that_spill_is_a_failure(
    ptxas: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fake_ptxas(tmp_path, PTXAS)
    assert ptxas.main() == 1
    result = json.loads((tmp_path / "results" / "ptxas.json").read_text())
    assert {(row["file"], row["sm"]) for row in result["results"]} == {
        ("one.cu", "sm_80"),
        ("one.cu", "sm_90"),
        ("two_sm90a.cu", "sm_90a"),
    }
    assert result["nvcc"] == "99.1" and "-Xptxas=-v -I csrc -c csrc/FILE.cu" in result["command"]
    page = (tmp_path / "results" / "ptxas.md").read_text()
    name = "tile<128, true>" if shutil.which("c++filt") else NAMES[0]
    assert f"| {name} | one.cu | sm_80 | 96 | 4 | 8 | 16 | 1024 | 0 |" in page and "serialized" in page
    assert "4 bytes of spill stores, 8 of spill loads" in capsys.readouterr().err


def test_a_table_without_spills_is_a_success(ptxas: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    nvcc = fake_ptxas(tmp_path, PTXAS.replace("4 bytes spill stores, 8", "0 bytes spill stores, 0"))
    sys.argv += ["--json", str(tmp_path / "out.json")]
    assert ptxas.main() == 0
    assert len(json.loads((tmp_path / "out.json").read_text())["results"]) == 6
    assert not (tmp_path / "results").exists() and "nothing spills" in capsys.readouterr().err
    asked = [line for line in nvcc.with_name("nvcc.log").read_text().splitlines() if " -c " in line]
    assert len(asked) == 3 and all(line.count("-gencode") == 1 for line in asked)


def test_a_file_that_does_not_compile_is_named(
    ptxas: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fake_ptxas(tmp_path, PTXAS)
    monkeypatch.setenv("NVCC_FAILS", "1")
    assert ptxas.main() == 1
    assert "error: one.cu does not compile for sm_80:" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_the_table_needs_nvcc(
    ptxas: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    assert ptxas.main() == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: no nvcc found in CUDA_HOME (not set)")
