"""`python bench NAME`: the list, wrong names, exit status, and where modules are looked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.compilers import load

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))
from registry import BENCHMARKS, Benchmark  # noqa: E402


def bench(*words: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "bench", *words]
    return subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.parametrize("words", [(), ("--help",)], ids=str)
def test_without_a_name_they_are_listed(words: tuple[str, ...]) -> None:
    done = bench(*words)
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ")]
    assert done.returncode == 0 and rows == [[name, entry.measures] for name, entry in BENCHMARKS.items()]
    assert "python bench NAME --help" in done.stdout and max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize("name", ["gpu", "learning"])
def test_each_says_what_its_options_are(name: str) -> None:
    done = bench(name, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: python bench {name} [-h]")


@pytest.mark.parametrize("name, said", [("teorems", "theorems"), ("step_size", "step-size"), ("xyz", "step, host")])
def test_a_wrong_name_is_answered_with_those_that_are_near(name: str, said: str) -> None:
    done = bench(name)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and f"no benchmark is called {name!r}; there is {said}" in line


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_benchmark_gets_its_options_and_its_status_is_passed_on(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BENCHMARKS, "planted", Benchmark("planted", ""))
    monkeypatch.setitem(sys.modules, "planted", SimpleNamespace(main=lambda: status))  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "argv", [])
    assert load(ROOT / "bench" / "__main__.py").main(["planted", "--seeds", "3"]) == status
    assert sys.argv == ["bench planted", "--seeds", "3"]


def test_modules_are_found_in_bench_then_on_the_path_and_not_in_the_checkout(tmp_path: Path) -> None:
    """`make gpu` puts the built package on the path, and the checkout's has no kernels."""
    (tmp_path / "bench").mkdir()
    shutil.copy(ROOT / "bench" / "__main__.py", tmp_path / "bench")
    (tmp_path / "bench" / "registry.py").write_text(
        "from types import SimpleNamespace\nBENCHMARKS = {'probe': SimpleNamespace(module='probe')}\nlisted = None\n"
    )
    (tmp_path / "bench" / "probe.py").write_text("import sys\ndef main():\n    print(sys.path)\n    return 0\n")
    done = bench("probe", folder=tmp_path, PYTHONPATH="/built")
    path = eval(done.stdout)
    assert path[:2] == [str(tmp_path / "bench"), "/built"] and not {str(tmp_path), ""} & set(path)
