"""Cost of small tensors, all coordinates and bf16 on the reference backend: before and after, on one CPU thread.

Before is the commit given by --baseline, checked out beside this one; each of the two runs in a process of its own, in
turns. Steps outside the forwards are compared with MeZO's loop (torch.manual_seed, torch.normal per tensor, four
passes), the memory of a step is the resident set's peak over its value before, and Newton-Schulz runs with the products
that a CPU of 2013 to 2016 has (ONEDNN_MAX_CPU_ISA=AVX2). Parity is asserted first: both leave the same bits.

    python bench small-tensors --baseline COMMIT [--out bench/results]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from machine import TWO_COMMITS, command, machine
from registry import BENCH, RESULTS, parser_of
from step.commits import names, trees

SHAPES = {"768 numbers in 4 tensors": (192, 4), "300 tensors of 768": (768, 300), "2,000 tensors of 8": (8, 2000)}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ZO-SGD": ("ZOSGD", {"restore": "copy"}),
    "ZO-SignSGD": ("ZOSignSGD", {"restore": "copy"}),
    "JAGUAR SignSGD": ("JaguarSignSGD", {"coordinates": 0.01}),
}
MEMORY = {"coordinates=1.0": 1.0, "coordinates=0.5": 0.5, "coordinates=0.1": 0.1}
LARGE = 32_000_000
MATRICES = [(64, 256), (256, 512)]
LOSS = torch.tensor(0.5)


def made(shape: tuple[int, int], method: str) -> tuple[list[torch.nn.Parameter], Any]:
    """Tensors of ones and their optimizer."""
    import jaguar

    size, count = shape
    params = [torch.nn.Parameter(torch.ones(size)) for _ in range(count)]
    name, options = METHODS[method]
    return params, getattr(jaguar, name)(params, backend="reference", **options)


@torch.no_grad()
def mezo_step(params: list[torch.nn.Parameter]) -> None:
    """MeZO's bookkeeping of one step."""
    for scale in (1e-3, -2e-3, 1e-3, -1e-6):
        torch.manual_seed(0)
        for p in params:
            p.add_(scale * torch.normal(mean=0.0, std=1.0, size=p.size(), dtype=p.dtype))


def seconds(call: Callable[[], object], repeats: int) -> float:
    """The shortest of `repeats` calls, after a first one."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def fingerprint() -> dict[str, str]:
    """SHA-256 of the parameters after three steps of each method on tensors of many sizes."""
    import jaguar

    found = {}
    for coordinates in (0.01, 1.0, 30):
        METHODS[f"JAGUAR {coordinates}"] = ("JaguarSignSGD", {"coordinates": coordinates})
    for method, (name, options) in METHODS.items():
        params = [torch.nn.Parameter(torch.linspace(-1, 1, n).to(t)) for n in (1, 7, 768, 90_000) for t in DTYPES]
        optimizer = getattr(jaguar, name)(params, lr=1e-3, backend="reference", **options)
        losses = iter([0.7, 0.6, 0.5, 0.9, 0.2, 0.3])
        for _ in range(3):
            optimizer.step(lambda losses=losses: torch.tensor(next(losses)))
        digest = hashlib.sha256()
        for p in params:
            digest.update(bytes(p.detach().view(torch.uint8).tolist()))
        found[method] = digest.hexdigest()
    return found


DTYPES = (torch.float32, torch.bfloat16)


def peak(call: Callable[[], object]) -> int:
    """Bytes by which the resident set grew at most during a call."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, highest, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            highest[0] = max(highest[0], resident())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    call()
    done.set()
    thread.join()
    return highest[0] - before


def worker(task: str) -> Any:
    """One measurement in this process, with the jaguar of its PYTHONPATH."""
    import jaguar

    torch.set_num_threads(1)
    if task == "parity":
        return fingerprint()
    if task == "steps":
        rows = {}
        for shape, numbers in SHAPES.items():
            params, _ = made(numbers, "ZO-SGD")
            rows[f"{shape}: MeZO's loop"] = seconds(lambda params=params: mezo_step(params), 5)
            for method in METHODS:
                _, optimizer = made(numbers, method)
                rows[f"{shape}: {method}"] = seconds(lambda optimizer=optimizer: optimizer.step(lambda: LOSS), 3)
        return rows
    if task in MEMORY:
        p = torch.nn.Parameter(torch.full((LARGE,), 0.1))
        optimizer = jaguar.JaguarSignSGD([p], coordinates=MEMORY[task], backend="reference")
        return peak(lambda: optimizer.step(lambda: LOSS)) / (4 * LARGE)
    rows = {}
    for rows_columns in MATRICES:
        G = torch.randn(*rows_columns, generator=torch.Generator().manual_seed(0))
        exact = jaguar.newton_schulz(G, dtype=torch.float64, backend="reference")
        for dtype in (torch.bfloat16, torch.float32):
            run = lambda G=G, dtype=dtype: jaguar.newton_schulz(G, dtype=dtype, backend="reference")  # noqa: E731
            name = f"{rows_columns[0]} x {rows_columns[1]}, {str(dtype).removeprefix('torch.')}"
            error = float((run() - exact).norm() / exact.norm())
            rows[name] = {"seconds": seconds(run, 2), "error": error}
    return rows


def ask(tree: Path, task: str) -> Any:
    """What `worker` says with the jaguar of another tree."""
    env = os.environ | {"PYTHONPATH": str(tree)}
    if task == "newton-schulz":
        env["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    command = [sys.executable, "-W", "ignore", str(BENCH), "small-tensors", "--worker", task]
    return json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--baseline", help="commit to compare with")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker)))
        return 0
    if not args.baseline:
        parser.error("--baseline COMMIT says what to compare with")
    with trees(args.baseline) as sides:
        found = {task: {k: ask(t, task) for k, t in sides.items()} for task in ("parity", "steps", *MEMORY)}
        found["newton-schulz"] = {key: ask(tree, "newton-schulz") for key, tree in sides.items()}
    if found["parity"]["before"] != found["parity"]["after"]:
        raise AssertionError(f"the two differ: {found['parity']}")
    info = machine(TWO_COMMITS, threads="1", command=command("--out"), **names(args.baseline))
    table = Table(title="the reference backend on a CPU, before and after", title_justify="left")
    for column in ("what", "before", "after"):
        table.add_column(column, justify="left" if column == "what" else "right")
    steps = found["steps"]
    for name in steps["after"]:
        loop = name.split(":")[0] + ": MeZO's loop"
        cells = [f"{steps[k][name] * 1e3:,.2f} ms ({steps[k][name] / steps[k][loop]:.1f} x)" for k in sides]
        table.add_row(name, *cells)
    for name in MEMORY:
        table.add_row(f"{name}: copies of a tensor, momentum included", *(f"{found[name][k]:.2f}" for k in sides))
    for name in found["newton-schulz"]["after"]:
        cells = [found["newton-schulz"][k][name] for k in sides]
        table.add_row(
            f"Newton-Schulz {name}, AVX2", *(f"{c['seconds'] * 1e3:.2f} ms, error {c['error']:.1e}" for c in cells)
        )
    Console(width=140).print(table, "  ".join(f"{key} {value}" for key, value in info.items()))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "small-tensors.json"
    path.write_text(json.dumps({"machine": info, "results": found}, indent=2) + "\n")
    print(f"written to {path}")
    return 0
