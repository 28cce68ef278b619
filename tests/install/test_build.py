"""Decisions and messages of setup.py, with compilers that only pretend."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.compilers import NVCC, ROOT, load, said, tool

NOTE = "backends/polar/_cuda_build.txt"

SOURCES = ("jaguar", "triton_kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "LICENSE")
# As setup.py, but a toolkit in its usual place on this machine is not seen.
DRIVER = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("jaguar_setup", "setup.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.USUAL = pathlib.Path("/nowhere/cuda")
sys.argv[0] = "setup.py"
module.main()
"""

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def torch_in(folder: Path, cuda: str | None, version: str = "9.9.0") -> Path:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(
        f"from typing import Optional\n\n__all__ = ['cuda']\n__version__ = {version!r}\ndebug = False\n"
        f"cuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\nraise SystemExit('this file is not to be run')\n"
    )
    return folder


class Project:
    """A copy of what is built, in an environment of its own: compilers, torch and pybind11 are added to it."""

    def __init__(self, folder: Path) -> None:
        self.root, self._bin, self._path = folder / "project", folder / "bin", folder / "path"
        self.root.mkdir()
        for name in SOURCES:
            source = ROOT / name
            copy: Callable[..., Any] = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, self.root / name)
        for old in (*self.root.rglob("__pycache__"), *self.root.glob("jaguar/_cuda*")):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        (self.root / "csrc" / "a.cu").write_text("// stands for the kernels\n")
        (self.root / "driver.py").write_text(DRIVER)
        self.log = self._bin / "nvcc.log"
        self._bin.mkdir()
        self._path.mkdir()

    def with_(self, *, nvcc: bool = True, cuda: str | None = "13.0", pybind11: bool = True) -> Project:
        if nvcc:
            tool(self._bin / "nvcc")
            tool(self._bin / "g++", NVCC.replace("$NVCC_FAILS", "$GCC_FAILS"))
        torch_in(self._path, cuda)
        text = "def get_include(): return 'include'\n" if pybind11 else "raise ImportError('not here')\n"
        (self._path / "pybind11.py").write_text(text)
        return self

    def run(self, *words: str, mode: str | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAGUAR_", "CUDA_"))}
        environment = kept | {"PATH": str(self._bin), "PYTHONPATH": str(self._path)} | more
        if mode is not None:
            environment["JAGUAR_CUDA"] = mode
        return subprocess.run(
            [sys.executable, *words], cwd=self.root, env=environment, capture_output=True, text=True, timeout=600
        )

    def build(self, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return self.run("-W", "ignore", "driver.py", "-q", *(words or ("build",)), **more)

    def built(self) -> list[str]:
        """The extension modules of the build."""
        return sorted(path.name for path in self.root.glob("build/lib*/jaguar/_cuda.*"))

    def note(self) -> str:
        (path,) = self.root.glob("build/lib*/jaguar/backends/polar/_cuda_build.txt")
        return path.read_text()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


# -- the three modes ---------------------------------------------------------------------------------------------------


def test_0_never_builds_and_needs_nothing(project: Project) -> None:
    done = project.with_(pybind11=False).build(mode="0")
    assert done.returncode == 0, done.stderr
    assert said(done) == ["jaguar: CUDA extension not built (JAGUAR_CUDA=0)"]
    assert project.built() == [] and project.note() == "CUDA extension not built (JAGUAR_CUDA=0)\n"
    assert not project.log.exists()
    assert (project.root / "build" / "lib" / "jaguar").is_dir()  # where packages without compiled code are built


@pytest.mark.parametrize("mode", [None, "", "auto"])
def test_auto_builds_where_nvcc_and_a_cuda_build_of_torch_are(project: Project, mode: str | None) -> None:
    done = project.with_().build(mode=mode)
    assert done.returncode == 0, done.stderr
    line = "CUDA extension built with nvcc 99.1 for sm_80, sm_90 (sm_90a where it helps) and PTX "
    line += "(JAGUAR_CUDA=auto: torch 9.9.0 has CUDA 13.0)"
    assert said(done) == [f"jaguar: {line}"] and project.note() == line + "\n"
    assert project.built() == [f"_cuda{SUFFIX}"]


WITHOUT = {
    "nvcc": ({"nvcc": False}, "no nvcc found in CUDA_HOME (not set), CUDA_PATH (/none), PATH or /nowhere/cuda"),
    "cuda": ({"cuda": None}, "torch 9.9.0 has no CUDA; JAGUAR_CUDA=1 builds all the same"),
}


@pytest.mark.parametrize("case", WITHOUT)
def test_auto_without_it_is_pure_python_and_says_why(project: Project, case: str) -> None:
    there, why = WITHOUT[case]
    done = project.with_(**there, pybind11=False).build(CUDA_PATH="/none")
    assert done.returncode == 0, done.stderr
    assert said(done) == [f"jaguar: CUDA extension not built (JAGUAR_CUDA=auto: {why})"]
    assert project.built() == [] and why in project.note()


def test_auto_survives_a_compiler_that_fails(project: Project) -> None:
    assert project.with_().build().returncode == 0
    assert project.built()
    done = project.build(NVCC_FAILS="1")
    assert done.returncode == 0, done.stderr
    assert said(done) == [
        "jaguar: warning: CUDA extension not built (JAGUAR_CUDA=auto: torch 9.9.0 has CUDA 13.0): "
        "nvcc failed on csrc/a.cu with exit status 2: csrc/a.cu(3): error: no such thing"
    ]
    assert project.built() == []  # the one before is gone


def test_auto_survives_a_missing_pybind11(project: Project) -> None:
    done = project.with_(pybind11=False).build()
    assert done.returncode == 0 and len(said(done)) == 1
    assert said(done)[0].endswith("): pybind11 is not installed (pip install pybind11)")


def test_1_builds_for_any_torch(project: Project) -> None:
    done = project.with_(cuda=None).build(mode="1")
    assert done.returncode == 0, done.stderr
    assert said(done)[0].endswith("(JAGUAR_CUDA=1)") and project.built()
    calls = project.log.read_text().splitlines()
    # The files are compiled at the same time, in any order; others' names end like this one's.
    (compiled,) = [line for line in calls if " csrc/a.cu " in line.replace(f"{project.root}/", "")]
    assert "fast" not in compiled and "compute_80,code=sm_80" in compiled
    link = next(line for line in calls if line.startswith("-shared"))
    linked = {Path(word).name for word in link.split() if word.endswith(".o")}
    sources = (*(project.root / "csrc").glob("*.cu"), *(project.root / "csrc").glob("*.cpp"))
    assert "-cudart static" in link and linked == {f"{source.stem}.o" for source in sources}


FAILURES = {
    "nvcc": ({"nvcc": False}, {}, "no nvcc found in CUDA_HOME (/no/home), CUDA_PATH (not set), PATH or /nowhere/cuda"),
    "pybind11": ({"pybind11": False}, {}, "pybind11 is not installed (pip install pybind11)"),
    "old": ({}, {"NVCC_IS": "12.4"}, "nvcc is of CUDA 12.4, and the kernels need 12.5 or later"),
    "older": ({}, {"NVCC_IS": "9.10"}, "nvcc is of CUDA 9.10, and the kernels need 12.5 or later"),
    "error": ({}, {"NVCC_FAILS": "1"}, "nvcc failed on csrc/a.cu with exit status 2: csrc/a.cu(3): error: no such"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_1_fails_in_one_sentence(project: Project, case: str) -> None:
    there, environment, why = FAILURES[case]
    done = project.with_(**there).build(mode="1", CUDA_HOME="/no/home", **environment)
    assert done.returncode != 0 and project.built() == []
    start, _, reason = done.stderr.splitlines()[-1].partition("(JAGUAR_CUDA=1): ")
    assert start == "error: the CUDA extension was not built " and why in reason.replace(f"{project.log.parent}/", "")
    assert "Traceback" not in done.stderr


def test_1_without_gcc_says_so(project: Project) -> None:
    project.with_()
    (project.log.parent / "g++").unlink()
    assert project.build(mode="1").stderr.splitlines()[-1].endswith("g++ cannot be run: No such file or directory")


@pytest.mark.parametrize("mode", ["yes", "2", "AUTO"])
def test_other_values_are_refused(project: Project, mode: str) -> None:
    done = project.with_().build(mode=mode)
    assert done.returncode != 0 and f"JAGUAR_CUDA={mode!r}: use auto (" in done.stderr
    assert ", 0 (" in done.stderr and " 1 (" in done.stderr and "Traceback" not in done.stderr


def test_a_build_in_place_leaves_no_older_extension(project: Project) -> None:
    """As for `pip install -e`."""
    where = project.root / "jaguar"
    assert project.with_().build("build_ext", "--inplace", mode="1").returncode == 0
    assert (where / f"_cuda{SUFFIX}").exists() and "built with" in (where / NOTE).read_text()
    done = project.build("build_ext", "--inplace", mode="0")
    assert said(done) == ["jaguar: CUDA extension not built (JAGUAR_CUDA=0)"]
    assert [path.name for path in where.glob("_cuda*")] == []
    assert "not built" in (where / NOTE).read_text()


def test_pip_installs_without_compilers_and_without_pybind11(project: Project, tmp_path: Path) -> None:
    target = tmp_path / "target"
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--target", target]
    words = ["-m", "pip", "install", "-q", *map(str, options), "."]
    done = project.with_(nvcc=False, pybind11=False).run(*words, CUDA_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "not built" in (target / "jaguar" / NOTE).read_text()
    assert (target / "jaguar" / "triton_kernels" / "launch.py").exists() and not list(target.glob("jaguar/_cuda.*"))
    (metadata,) = target.glob("jaguar_zo-*.dist-info")
    assert {"License-Expression: Apache-2.0", "Author: The jaguar authors"} <= set(
        (metadata / "METADATA").read_text().splitlines()
    )
    assert (metadata / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_source_archive_has_the_kernels(project: Project) -> None:
    done = project.with_(nvcc=False).build("sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = project.root.glob("dist/*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.split("/", 1)[-1] for name in file.getnames()}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} | {"csrc/a.cu", "setup.py", "LICENSE"} <= names


# -- what is found where -----------------------------------------------------------------------------------------------


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = load(ROOT / "setup.py")
    for name in ("CUDA_HOME", "CUDA_PATH", "JAGUAR_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "on-path"))
    monkeypatch.setattr(module, "USUAL", tmp_path / "usual")
    return module


def test_where_nvcc_is_looked_for(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup.find_nvcc() is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    for folder in ("usual/bin", "on-path", "path/bin", "home/bin"):  # each before those before it
        assert setup.find_nvcc() != str(tmp_path / folder / "nvcc")
        tool(tmp_path / folder / "nvcc")
        assert setup.find_nvcc() == str(tmp_path / folder / "nvcc")


def test_torch_is_found_in_the_environment_of_an_isolated_build(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a build has none of the environment's packages on its path."""
    target = tmp_path / "site-packages"
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda kind: str(target))
    monkeypatch.setattr(setup.site, "getsitepackages", list)
    monkeypatch.setattr(setup.site, "getusersitepackages", lambda: str(tmp_path / "user"))
    assert setup.torch_cuda() == (None, "this environment has no torch")
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    torch_in(tmp_path / "user", "11.8")
    assert setup.torch_cuda() == ("11.8", "torch 9.9.0 has CUDA 11.8")
    torch_in(target, "13.0", "9.9.0+cu130")
    assert setup.torch_cuda() == ("13.0", "torch 9.9.0+cu130 has CUDA 13.0")
    torch_in(tmp_path, None, "9.9.0+cpu")  # what is on the path comes first, as when it is imported
    assert setup.torch_cuda() == (None, "torch 9.9.0+cpu has no CUDA")


def test_architectures_of_a_file(setup: ModuleType) -> None:
    assert setup.architectures(Path("csrc/product_sm90a.cu")) == ["arch=compute_90a,code=sm_90a"]
    every = ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_80,code=compute_80"]
    assert setup.architectures(Path("csrc/product.cu")) == every


@pytest.mark.slow
def test_the_kernels_compile_link_and_load(project: Project, tmp_path: Path) -> None:
    nvcc = load(ROOT / "setup.py").find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not here")
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    (project.root / "csrc" / "a.cu").unlink()
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build"],
        cwd=project.root,
        env=os.environ | {"JAGUAR_CUDA": "1", "CUDA_HOME": str(Path(nvcc).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (module,) = project.root.glob("build/lib*/jaguar/_cuda.*")
    code = "import torch, jaguar._cuda as m, jaguar.backends.polar.cuda as e; assert m.abi_version() == e.ABI; "
    code += "print(e.note())"
    environment = os.environ | {"PYTHONPATH": str(module.parents[1])}
    words = [sys.executable, "-P", "-c", code]
    loaded = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.startswith("CUDA extension built with nvcc")
