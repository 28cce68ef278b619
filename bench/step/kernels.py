"""The kernels, and whole optimizer steps outside the forwards, on an NVIDIA GPU: bytes, GB/s, share of a device copy.

Every optimizer is first compared with the reference on the same tensors, bit for bit, and every peer with its formula;
what fails is reported and not timed. Prints the numbers and writes no file, unless `make gpu` calls it (--into).

    python bench kernels [--lists opt-1.3b opt-1.3b-lora ...] [--seconds 240]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from gpu import report, result
from registry import parser_of

# Compilation in this process, where a time limit reaches it.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def said(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    where = f"{row['list']:<16}"
    if row["kind"] == "copy":
        return f"{where} device copy: {row['gb_s']:.0f} GB/s"
    if row["kind"] == "kernel":
        return (
            f"{where} {row['method']}: {row['kernel']}: {row['ms']['median']:.4g} ms, {row['gb_s']:.0f} GB/s, "
            f"{row['of_copy']:.2f} of copy"
        )
    if row["kind"] == "step":
        times = f"{row['wall_ms']['median']:.4g} ms, host {row['host_ms']['median']:.4g} ms"
        return f"{where} {row['method']}: {row['what']}: {times}"
    return f"{where} {row['method']}: {row['kind'].upper()}, no speed: {row['reason']}"


def main(arguments: list[str] | None = None) -> int:
    begin = time.monotonic()
    parser = parser_of(__doc__)
    parser.add_argument("--lists", nargs="+", metavar="NAME", help="parameter lists (default: all, until time is up)")
    parser.add_argument(
        "--seconds", type=float, default=240.0, help="begin nothing more after so many seconds (default: 240)"
    )
    parser.add_argument("--into", type=Path, help="result file that `make gpu` has begun; rows are added to it")
    args = parser.parse_args(arguments)
    if args.seconds <= 0:
        parser.error(f"--seconds {args.seconds:g}: must be positive")
    if reason := result.no_gpu():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    from step import shapes

    for name in args.lists or ():
        if name not in shapes.LISTS:
            parser.error(f"--lists {name}: choose from {', '.join(shapes.LISTS)}")
    result.check_begun(parser, args.into)
    try:
        from step import suite
    except ImportError as error:
        print(f"error: {error}; run `make gpu`, which builds the package, or `pip install -e .`", file=sys.stderr)
        return 2
    return _measured(args, begin, suite)


def _measured(args: argparse.Namespace, begin: float, suite: Any) -> int:
    import torch

    from gpu.clock import CudaClock
    from jaguar.backends import availability
    from step import shapes

    if availability.interpreted():
        print("error: TRITON_INTERPRET is set, and the interpreter's speed is of no interest", file=sys.stderr)
        return 2
    found = result.load(args.into) if args.into else {"rows": [], "stages": []}
    lists = [shapes.LISTS[name] for name in args.lists or shapes.LISTS]
    found["lists"] = found.get("lists", {}) | {
        entry.name: {"title": entry.title, "tensors": len(entry.shapes), "parameters": entry.count} for entry in lists
    }

    def left() -> float:
        return float(args.seconds - (time.monotonic() - begin))

    device = torch.device("cuda", torch.cuda.current_device())
    result.keep(suite.run(suite.plan(lists), CudaClock(device, 0.3), left), found, args.into, begin, said)
    return 1 if report.failures(found | {"stages": []}) else 0
