"""The stages of `make gpu` before the benchmark: build, tests, compute-sanitizer. None may take another one's time.

The package is built into a folder of its own: the source folder `jaguar/` has no `jaguar.triton_kernels`, which lies
beside it and is put inside at build time, so the repository root must not be on the path of what runs here.
"""

from __future__ import annotations

import filecmp
import importlib.util
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry import ROOT

BUILD = ROOT / "build"
TARGET = BUILD / "gpu"
_CUDA_SHARE = 0.75  # of the build's time, for the build with nvcc; the rest is for one without
# Processes of a stage of tests, at most: each has a CUDA context of half a gigabyte.
_MOST_WORKERS = 14
# Seconds in which what is interrupted may still say what it found, and then in which it may end.
_GRACE = ((signal.SIGINT, 8.0), (signal.SIGTERM, 3.0))
# What `run` has started and not ended yet.
_running: set[subprocess.Popen[bytes]] = set()
_FOUND = 7  # compute-sanitizer's exit code when it found something


@dataclass
class Stage:
    """How a stage ended: "passed", "failed" or "skipped", in how many seconds, and what there is to say."""

    name: str
    status: str
    seconds: float
    note: str


def environment(**more: str) -> dict[str, str]:
    """This process's, with the built package first on the path and without Triton's interpreter."""
    path = os.pathsep.join([str(TARGET), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"} | more


def run(command: Sequence[str | Path], seconds: float, log: Path | None = None, **more: str) -> int | None:
    """Exit status of a command; None if it took too long and was ended with everything that it had started.

    Args:
        log: where its output goes; None: where ours goes.
        more: environment variables.
    """
    out = log.open("wb") if log else None
    try:
        child = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=environment(**more),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT if out else None,
            process_group=0,
        )
        _running.add(child)
        try:
            return child.wait(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            return None
        finally:  # after Ctrl-C too
            _running.discard(child)
            if child.poll() is None:
                _end(child)
    finally:
        if out:
            out.close()


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends a process and what it started: first as Ctrl-C does, after which pytest prints the failures so far."""
    for number, seconds in _GRACE:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        try:
            child.wait(timeout=seconds)
            break
        except subprocess.TimeoutExpired:
            continue
    with suppress(ProcessLookupError):  # what outlived the process that started it
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def together(*works: Callable[[], Stage]) -> list[Stage]:
    """Stages at the same time: kernels are compiled on the CPU, which one process leaves mostly idle."""
    threads = ThreadPoolExecutor(len(works))
    try:
        return [each.result() for each in [threads.submit(work) for work in works]]
    except BaseException:  # Ctrl-C reaches this thread, and not those that wait for the children
        for child in list(_running):
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
        raise
    finally:
        threads.shutdown()


def build(seconds: float, logs: Path) -> Stage:
    """Installs the package into build/gpu with what this Python has; copies it together where pip cannot.

    The logs go into the folder `logs`. Where there is nvcc the CUDA extension must come with it. If that fails or takes
    most of the time, the stage has failed, and the package is installed without it, for the stages that do not need it.
    """
    begin = time.monotonic()
    # setuptools would keep files there that the sources no longer have
    for old in (TARGET, *BUILD.glob("lib*"), *BUILD.glob("temp*")):
        shutil.rmtree(old, ignore_errors=True)
    BUILD.mkdir(exist_ok=True)
    logs.mkdir(parents=True, exist_ok=True)
    log, cuda_log, import_log = (logs / f"gpu-{name}.log" for name in ("build", "build-cuda", "import"))
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--target", TARGET]
    # -v: else what the build itself says is lost.
    pip = [sys.executable, "-P", "-m", "pip", "install", "-v", *options, "."]
    nvcc = _nvcc()
    extension = "no CUDA extension: nvcc was not found"
    code: int | None = 1
    if nvcc:
        code = run(["env", "JAGUAR_CUDA=1", *pip], _CUDA_SHARE * seconds, cuda_log)
        extension = f"CUDA extension built with {nvcc}"
        if code != 0:
            why = (
                _last(cuda_log, r"CUDA extension was not built")
                if code
                else f"ended after {time.monotonic() - begin:.0f} s"
            )
            extension = f"the CUDA extension was not built ({why}; see {cuda_log.name})"
            shutil.rmtree(TARGET, ignore_errors=True)
    failed = nvcc and code != 0
    if not nvcc or failed:
        code = run(["env", "JAGUAR_CUDA=0", *pip], seconds - (time.monotonic() - begin), log)
    wanted = _sources()
    missing = [name for name, source in wanted.items() if not _same(TARGET / name, source)]
    status, note = "failed" if failed else "passed", f"pip put {len(wanted)} files into build/gpu; {extension}"
    if missing:
        shutil.rmtree(TARGET, ignore_errors=True)
        for name, source in wanted.items():
            (TARGET / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, TARGET / name)
        if code == 0:
            status, note = (
                "failed",
                f"pip's build lacks {missing[0]} ({len(missing)} files); copied the sources instead",
            )
        else:
            note = f"pip cannot build here ({log.name} says why); copied {len(wanted)} files; {extension}"
    names = ["jaguar", "jaguar.backends.triton", "jaguar.triton_kernels.launch"]
    if not missing and nvcc and not failed:
        names.insert(0, "torch")  # before the extension, as jaguar.backends.polar.cuda does
        names.append("jaguar._cuda")
    probe = f"import sys, {', '.join(names)}; sys.exit(0 if jaguar.__file__.startswith({str(TARGET)!r}) else 3)"
    if run([sys.executable, "-P", "-c", probe], 60.0, import_log):
        status, note = "failed", f"the built package cannot be imported: {_last(import_log)}"
    return Stage("build", status, time.monotonic() - begin, note)


def tests(name: str, seconds: float, logs: Path, before: Sequence[str] = (), select: str = "", **more: str) -> Stage:
    """Pytest over the files that have GPU tests, in several processes where this Python has pytest-xdist.

    Args:
        name: of the stage.
        seconds: after which it is ended.
        logs: folder of its log.
        before: a command that pytest is run under, in one process.
        select: pytest's -k.
        more: environment variables.
    """
    begin = time.monotonic()
    sources = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda path: path.name)
    files = [path for path in sources if re.search(r"\bmark\.gpu\b", path.read_text())]
    if not files:
        return Stage(name, "failed", 0.0, "no file in tests/ has a GPU test")
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"gpu-{name}.log"
    # -P: else Python looks for `jaguar` in the repository root first. -vv: a line per test, should no summary come.
    pytest = [sys.executable, "-P", "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-vv", "--tb=short", "-rf"]
    parallel = [] if before else _workers()
    words = [*before, *pytest, *parallel, *map(str, files), *(["-k", select] if select else [])]
    code = run(words, seconds, log, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", **more)
    last = _last(log, r"^=* ?\d+ (passed|failed|skipped|deselected|error)|ERROR SUMMARY|RACECHECK SUMMARY")
    if code is None:
        status, note = "failed", f"ended after {seconds:.0f} s; {_last(log, r'[0-9] (passed|failed).* in ')}"
    elif code == 0:
        status, note = ("passed" if " passed" in last else "failed"), last  # all skipped is no pass
    elif code == 5:
        status, note = "failed", f"no test was selected{f' by -k {select}' if select else ''}"
    else:
        status, note = "failed", f"exit status {code}; {last}; see {log.name}"
        if before and "Device not supported" in log.read_text(errors="replace"):
            status, note = "skipped", "compute-sanitizer says that it does not support this device here"
    return Stage(name, status, time.monotonic() - begin, note)


def _workers() -> list[str]:
    """Options of pytest: kernels are compiled on the CPU, and one process would do little else.

    Tests are handed out one by one in the order of the files, so that the long ones, which come first, start first.
    """
    if importlib.util.find_spec("xdist") is None:
        return []
    n = max(1, min(_MOST_WORKERS, (os.cpu_count() or 1) - 2))
    return ["-p", "xdist.plugin", "-n", str(n), "--dist", "load", "--maxschedchunk", "1"]


def sanitizer(tool: str, seconds: float, logs: Path) -> Stage:
    """One of compute-sanitizer's tools over the small GPU tests."""
    found = shutil.which("compute-sanitizer")
    if found is None:
        return Stage(tool, "skipped", 0.0, "compute-sanitizer is not on PATH")
    before = [found, "--tool", tool, "--error-exitcode", str(_FOUND)]
    # Without torch's cache of freed memory an access past the end of a tensor is one past the end of an allocation.
    return tests(tool, seconds, logs, before, "small", PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def _sources() -> dict[str, Path]:
    """Every module of the package by its path in the built package."""
    found = {}
    for folder, name in (("jaguar", "jaguar"), ("triton_kernels", "jaguar/triton_kernels")):
        for source in sorted((ROOT / folder).rglob("*.py")):
            found[f"{name}/{source.relative_to(ROOT / folder)}"] = source
    return found


def _nvcc() -> str | None:
    """The nvcc that setup.py would take."""
    try:
        return runpy.run_path(str(ROOT / "setup.py"), run_name="jaguar_setup")["find_nvcc"]()
    except (ImportError, FileNotFoundError):  # no setuptools: pip will say so
        return None


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and filecmp.cmp(one, other, shallow=False)


def _last(log: Path, pattern: str = r"\S") -> str:
    """The last lines of a log that match, shortened: one of each kind that a summary has."""
    lines = [line.strip("= \n") for line in log.read_text(errors="replace").splitlines() if re.search(pattern, line)]
    return "; ".join(lines[-2:] if pattern != r"\S" else lines[-1:])[:300] or "it said nothing"


def as_row(stage: Stage) -> dict[str, Any]:
    """For the result file."""
    return dict(vars(stage))
