"""Decisions at build time: the packages, and whether the CUDA extension `jaguar._cuda` is built.

The environment variable JAGUAR_CUDA says: 0, never; 1, or the build fails; auto (the default), where nvcc is found and
the torch of this environment is a CUDA build, and a failure is only a warning. The outcome is one line of output, also
kept inside the package, where `jaguar info` finds it. All other metadata is in pyproject.toml.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
USUAL = Path("/usr/local/cuda")
NOTE = "backends/polar/_cuda_build.txt"  # jaguar.backends.polar.cuda reads it
OLDEST = (12, 5)  # CUDA whose headers have cudaGetDriverEntryPointByVersion
MODES = ("auto", "0", "1")
FLAGS = ("-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden")


def find_nvcc() -> str | None:
    """The first nvcc of CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for folder in (*(home / "bin" for home in homes), None, USUAL / "bin"):
        # With None `which` looks on PATH.
        if found := shutil.which("nvcc", path=None if folder is None else str(folder)):
            return found
    return None


def no_nvcc() -> str:
    """Where nvcc was looked for, in words."""
    homes = [f"{name} ({os.environ.get(name) or 'not set'})" for name in ("CUDA_HOME", "CUDA_PATH")]
    return f"no nvcc found in {', '.join(homes)}, PATH or {USUAL}"


def nvcc_version(nvcc: str) -> str:
    """As "13.0", or "unknown"."""
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return "unknown"
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else "unknown"


def architectures(source: Path) -> list[str]:
    """nvcc's targets for one file: instructions that only sm_90a has are in files named after it."""
    if source.stem.endswith("_sm90a"):
        return ["arch=compute_90a,code=sm_90a"]
    # The PTX is for GPUs newer than both.
    return ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_80,code=compute_80"]


def compile_command(nvcc: str, source: Path, target: Path, archs: Sequence[str], *more: str) -> list[str]:
    """The command that makes one object."""
    chosen = [f"-gencode={arch}" for arch in archs]
    return [nvcc, *FLAGS, *chosen, *more, "-I", str(CSRC), "-c", str(source), "-o", str(target)]


def torch_cuda() -> tuple[str | None, str]:
    """The CUDA version of this environment's torch, and what to say of it; torch is read and not imported.

    An isolated build cannot import it: the environment's own packages are hidden from it, but their folders are known.
    """
    folders = [*sys.path, *(sysconfig.get_path(kind) for kind in ("purelib", "platlib")), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:  # a virtual environment does not see the user's packages
        folders.append(site.getusersitepackages())
    for folder in folders:
        version = Path(folder or ".", "torch", "version.py")
        if not version.is_file():
            continue
        found: dict[str, object] = {}
        for node in ast.parse(version.read_text()).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name) and isinstance(getattr(node, "value", None), ast.Constant):
                found[target.id] = node.value.value
        cuda = found.get("cuda")
        name = f"torch {found.get('__version__', 'of an unknown version')}"
        return (str(cuda), f"{name} has CUDA {cuda}") if cuda else (None, f"{name} has no CUDA")
    return None, "this environment has no torch"


def decide() -> tuple[bool, str]:
    """Whether to build the extension, and why.

    Raises:
        SystemExit: JAGUAR_CUDA is none of the three.
    """
    mode = os.environ.get("JAGUAR_CUDA", "") or "auto"
    if mode not in MODES:
        raise SystemExit(
            f"error: JAGUAR_CUDA={mode!r}: use auto (build where nvcc and a CUDA build of torch are found), "
            "0 (do not build the CUDA extension) or 1 (build it or fail)"
        )
    if mode != "auto":
        return mode == "1", f"JAGUAR_CUDA={mode}"
    if not sys.platform.startswith("linux"):
        return False, f"JAGUAR_CUDA=auto: not on {sys.platform}"
    if find_nvcc() is None:
        return False, f"JAGUAR_CUDA=auto: {no_nvcc()}"
    cuda, torch = torch_cuda()
    return cuda is not None, f"JAGUAR_CUDA=auto: {torch}" + ("" if cuda else "; JAGUAR_CUDA=1 builds all the same")


def run(command: Sequence[str], what: str) -> None:
    """Runs a compiler.

    Raises:
        CompileError: it failed; the message has the first line of its output that tells why.
    """
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise CompileError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        why = next((line for line in lines if re.search(r"error|fatal|undefined", line)), (lines or ["no message"])[-1])
        raise CompileError(f"{Path(command[0]).name} failed on {what} with exit status {done.returncode}: {why}")


def build(target: Path, temporary: Path) -> str:
    """Compiles and links the extension; returns what was built.

    Raises:
        CompileError: something is missing or a compiler failed; one sentence.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise CompileError(no_nvcc())
    try:
        import pybind11  # not above: who builds nothing needs none
    except ImportError as error:
        raise CompileError("pybind11 is not installed (pip install pybind11)") from error
    kernels = sorted(CSRC.glob("*.cu"))
    if not kernels:
        raise CompileError(f"there are no kernels in {CSRC}")
    version = nvcc_version(nvcc)
    if version != "unknown" and tuple(map(int, version.split("."))) < OLDEST:
        raise CompileError(f"{nvcc} is of CUDA {version}, and the kernels need {OLDEST[0]}.{OLDEST[1]} or later")
    for folder in (target.parent, temporary):
        folder.mkdir(parents=True, exist_ok=True)
    processors = os.cpu_count() or 1
    workers = min(processors, len(kernels) + 1)
    # nvcc can compile for several architectures at a time, if there are more processors than files.
    threads = f"--threads={max(1, processors // workers)}"
    objects = {source: temporary / f"{source.stem}.o" for source in (*kernels, CSRC / "bindings.cpp")}
    *cuda_objects, host_object = objects.values()
    includes = [f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    host = ["g++", "-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", f'-DJAGUAR_CUDA_VERSION="{version}"', *includes]
    commands = {"bindings.cpp": [*host, "-c", str(CSRC / "bindings.cpp"), "-o", str(host_object)]}
    for source, made in zip(kernels, cuda_objects, strict=True):
        commands[source.name] = compile_command(nvcc, source, made, architectures(source), threads)
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(run, command, f"csrc/{name}") for name, command in commands.items()]
        try:
            for job in jobs:
                job.result()
        except CompileError:
            pool.shutdown(cancel_futures=True)
            raise
    run([nvcc, "-shared", "-cudart", "static", "-o", str(target), *map(str, objects.values())], "linking")
    return f"CUDA extension built with nvcc {version} for sm_80, sm_90 (sm_90a where it helps) and PTX"


def commands(reason: str) -> dict[str, type]:
    """The two commands that build, for a decision with this reason."""

    def report(line: str, folders: Sequence[Path]) -> None:
        print(f"jaguar: {line}", flush=True)
        for folder in folders:
            (folder / NOTE).parent.mkdir(parents=True, exist_ok=True)
            (folder / NOTE).write_text(line.removeprefix("warning: ") + "\n")

    def clear(folders: Sequence[Path]) -> None:
        """An older build must not be taken for this one."""
        for folder in folders:
            for old in (folder / NOTE, *folder.glob("_cuda.*.so")):
                old.unlink(missing_ok=True)

    class BuildPy(build_py):
        """Says why there is no extension, where none is to be built."""

        def run(self) -> None:
            super().run()
            folders = [ROOT / "jaguar"] if self.editable_mode else [Path(self.build_lib, "jaguar")]
            if not self.distribution.has_ext_modules():
                clear(folders)
                report(f"CUDA extension not built ({reason})", folders)

    class BuildExt(build_ext):
        """Builds it with nvcc."""

        def run(self) -> None:
            folders = [Path(self.build_lib, "jaguar"), *([ROOT / "jaguar"] if self.inplace else [])]
            clear(folders)
            self.say: Callable[[str], None] = lambda line: report(line, folders)
            super().run()
            if not self.extensions:
                self.say(f"CUDA extension not built ({reason})")

        def build_extension(self, ext: Extension) -> None:
            try:
                made = build(Path(self.get_ext_fullpath(ext.name)).resolve(), Path(self.build_temp).resolve())
            except CompileError as error:
                if not ext.optional:
                    raise CompileError(f"the CUDA extension was not built ({reason}): {error}") from error
                self.say(f"warning: CUDA extension not built ({reason}): {error}")
            else:
                self.say(f"{made} ({reason})")

    return {"build_py": BuildPy, "build_ext": BuildExt}


def main() -> None:
    """Hands everything to setuptools."""
    wanted, reason = decide()
    sources = [f"csrc/{source.name}" for source in (*sorted(CSRC.glob("*.cu")), CSRC / "bindings.cpp")]
    forced = os.environ.get("JAGUAR_CUDA") == "1"
    setup(
        # The kernels lie beside the package and are installed inside it: `triton_kernels` is taken as a top-level name.
        package_dir={"jaguar": "jaguar", "jaguar.triton_kernels": "triton_kernels"},
        ext_modules=[Extension("jaguar._cuda", sources, optional=not forced)] if wanted else [],
        cmdclass=commands(reason),
    )


if __name__ == "__main__":
    main()
