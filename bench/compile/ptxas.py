"""Every CUDA kernel of csrc/ as setup.py compiles it: registers, spills, stack and shared memory, as ptxas says.

Needs nvcc and no GPU. Exit status 1 where something spills.

    python bench ptxas [--json FILE]        (make ptxas: the tables in bench/results)
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from registry import RESULTS, ROOT, parser_of

NUMBERS = ("registers", "spill_stores", "spill_loads", "stack", "shared")
# Shared memory that a launch asks for, in the words of the source; ptxas knows nothing of it. By file and by what the
# kernel's name begins with.
DYNAMIC = {
    "prepare.cu": {"convert_kernel": "BLOCK_BYTES"},
    "product_sm80.cu": {"product_kernel": "SHARED_BYTES"},
    "product_sm90a.cu": {f"product_kernel<{n}": f"Plan<{n}>::SHARED_BYTES" for n in (128, 256)},
    "small.cu": {f"small_kernel<{n}>": f"Shared<{n}>::BYTES" for n in (16, 32, 64)},
}


def build_script() -> Any:
    """setup.py as a module: what is measured must be what is built."""
    spec = importlib.util.spec_from_file_location("jaguar_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def short(name: str) -> str:
    """A demangled name without return type, anonymous namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|_INTERNAL_\w+::|\((int|bool|unsigned int|long)\)", "", name)
    name = re.sub(r"^void ", "", name)
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def demangled(names: list[str], nvcc: str) -> dict[str, str]:
    """Short names by mangled ones; the mangled ones themselves where there is no demangler."""
    tool = shutil.which("cu++filt", path=str(Path(nvcc).parent)) or shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    said = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return {name: short(line) for name, line in zip(names, said.splitlines(), strict=True)}


def parse(said: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Functions and warnings in what `nvcc -Xptxas=-v` said of one file and architecture.

    A function that is called and not inlined has no registers of its own: None.
    """
    found: dict[str, dict[str, Any]] = {}
    warnings: list[str] = []
    entry = function = ""
    for line in said.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            entry = function = match[1]
        elif match := re.search(r"Function properties for '?([^\s']+)", line):
            function = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            numbers = dict(zip(("stack", "spill_stores", "spill_loads"), map(int, match.groups()), strict=True))
            found.setdefault(function, {"registers": None, "shared": 0}).update(numbers)
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            numbers = {"registers": int(match[1]), "shared": int(shared[1]) if shared else 0}
            found.setdefault(entry, dict.fromkeys(NUMBERS, 0)).update(numbers)
        elif re.search(r"warning|Potential Performance Loss", line):
            warnings.append(line.strip())
    return [{"mangled": name, **numbers} for name, numbers in found.items()], warnings


def compiled(build: Any, nvcc: str, source: Path, arch: str, folder: Path) -> dict[str, Any]:
    """What ptxas says of one file on one architecture.

    Raises:
        RuntimeError: it does not compile; with nvcc's output.
    """
    sm = arch.rpartition("=")[2]
    target = folder / f"{source.stem}.{sm}.o"
    done = subprocess.run(
        build.compile_command(nvcc, source, target, [arch], "-Xptxas=-v"), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for {sm}:\n{done.stdout}{done.stderr}")
    functions, warnings = parse(done.stdout + done.stderr)
    return {"file": source.name, "sm": sm, "functions": functions, "warnings": warnings}


def dynamic(build: Any, nvcc: str, file: str, folder: Path) -> dict[str, int]:
    """Bytes that launches of a file's kernels ask for: the source itself is made to print its constants."""
    words = DYNAMIC.get(file)
    if not words or not (build.CSRC / file).exists():
        return {}
    lines = "".join(f'    std::printf("%d\\n", int(jaguar::{text}));\n' for text in words.values())
    program = folder / f"print_{file}"
    program.write_text(f'#include <cstdio>\n#include "{build.CSRC / file}"\nint main() {{\n{lines}}}\n')
    target = program.with_suffix("")
    arch = next(arch for arch in build.architectures(Path(file)) if "code=sm_" in arch)
    link = build.compile_command(nvcc, program, target, [arch])
    link.remove("-c")
    done = subprocess.run([*link, "-cudart", "static"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{file} does not print its constants:\n{done.stdout}{done.stderr}")
    said = subprocess.run([target], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(words, map(int, said), strict=True))


def table(parts: list[dict[str, Any]], nvcc: str, asked: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """One row per function and architecture, with readable names and what launches ask for."""
    names = demangled(sorted({f["mangled"] for part in parts for f in part["functions"]}), nvcc)
    rows = [
        {"name": names[f["mangled"]], "file": part["file"], "sm": part["sm"]} | {n: f[n] for n in NUMBERS}
        for part in parts
        for f in part["functions"]
    ]
    for row in rows:
        own = row["name"].rpartition("::")[2] if "<" not in row["name"] else row["name"].removeprefix("jaguar::")
        sizes = asked.get(row["file"], {})
        row["dynamic"] = next((size for start, size in sizes.items() if own.startswith(start)), 0)
    return sorted(rows, key=lambda row: (row["file"], row["name"], row["sm"]))


def markdown(result: dict[str, Any]) -> str:
    """The table of all results."""
    lines = [
        f"# CUDA kernels as compiled (nvcc {result['nvcc']}; `make ptxas`)",
        "",
        "Registers per thread; bytes of spills, stack, static shared memory, and shared memory that a launch asks for.",
        "Of each file: `" + result["command"] + "`",
        "",
        "| kernel | file | target | registers | spill stores | spill loads | stack | shared | asked for |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["results"]:
        numbers = ["" if row[n] is None else str(row[n]) for n in (*NUMBERS, "dynamic")]
        lines.append(f"| {row['name']} | {row['file']} | {row['sm']} | " + " | ".join(numbers) + " |")
    lines += ["", *(f"- {text}" for text in result["warnings"])] if result["warnings"] else []
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--json", type=Path, help="write the results here as JSON instead of the tables")
    args = parser.parse_args()
    build = build_script()
    nvcc = build.find_nvcc()
    if nvcc is None:
        print(f"error: {build.no_nvcc()}", file=sys.stderr)
        return 1
    console = Console(stderr=True)
    sources = sorted(build.CSRC.glob("*.cu"))
    work = [(source, arch) for source in sources for arch in build.architectures(source) if "code=sm_" in arch]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compiled, build, nvcc, *item, Path(folder)) for item in work]
        try:
            printing = {file: pool.submit(dynamic, build, nvcc, file, Path(folder)) for file in DYNAMIC}
            parts = [job.result() for job in track(jobs, "compiling", console=console)]
            asked = {file: job.result() for file, job in printing.items()}
        except RuntimeError as error:
            pool.shutdown(cancel_futures=True)
            console.print(f"error: {error}", markup=False, highlight=False)
            return 1
    example = build.compile_command("nvcc", Path("csrc/FILE.cu"), Path("FILE.o"), ["ARCH"], "-Xptxas=-v")
    result = {
        "nvcc": build.nvcc_version(nvcc),
        "command": shlex.join(example).replace(str(build.CSRC), "csrc"),
        "results": table(parts, nvcc, asked),
        "warnings": [f"{part['file']}, {part['sm']}: {text}" for part in parts for text in part["warnings"]],
    }
    spilling = [row for row in result["results"] if row["spill_stores"] or row["spill_loads"]]
    for text in result["warnings"]:
        console.print(text, style="yellow", markup=False, highlight=False)
    for row in spilling:
        spills = f"{row['spill_stores']} bytes of spill stores, {row['spill_loads']} of spill loads"
        console.print(f"{row['name']} {row['sm']}: {spills}", style="red", markup=False, highlight=False)
    target = args.json or RESULTS / "ptxas.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    if not args.json:
        (RESULTS / "ptxas.md").write_text(markdown(result))
    verdict = f"{len(spilling)} of them spill" if spilling else "nothing spills"
    console.print(f"{len(result['results'])} kernels and targets, {verdict}; written to {target}", highlight=False)
    return 1 if spilling else 0
