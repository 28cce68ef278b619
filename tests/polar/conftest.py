"""The bindings of the CUDA extension with a stub, compiled once in a process: a second copy would be the first one."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sysconfig
from types import ModuleType

import pytest

from helpers.extension_stub import CSRC, STUB, Stub


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, ctypes.CDLL]:
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH")
    folder = tmp_path_factory.mktemp("bindings")
    (folder / "stub.cpp").write_text(STUB)
    includes = [f"-I{path}" for path in (CSRC, pybind11.get_include(), sysconfig.get_path("include"))]
    flags = ["-O0", "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", "-shared"]
    target = folder / "_cuda.so"
    words = ["g++", *flags, *includes, str(CSRC / "bindings.cpp"), str(folder / "stub.cpp"), "-o", str(target)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("jaguar._cuda", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    library = ctypes.CDLL(str(target))
    for name in ("product", "prepare", "small", "last"):
        getattr(library, f"stub_{name}").restype = ctypes.c_void_p
    return module, library


@pytest.fixture
def stub(built: tuple[ModuleType, ctypes.CDLL]) -> Stub:
    return Stub(*built)
