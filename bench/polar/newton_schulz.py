"""Accuracy of Newton-Schulz: the reference in three precisions, and every kernel that runs here.

Per shape, spectrum and scheme (with its own number of steps): alignment <O, U V^T> / n with the SVD's polar factor,
singular values of O, and the relative error against the same iteration in float64. Prints a table and, with --out,
writes newton-schulz-accuracy.json and .md. Needs no GPU; Triton's interpreter (TRITON_INTERPRET=1) takes the smallest
shapes only. How fast the kernels are is measured on a GPU by `make gpu`, which calls this program with --speed.

    python bench newton-schulz [--out bench/results] [--device cpu]
    python bench newton-schulz --speed [--seconds 75]
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu import result
from machine import machine
from registry import parser_of

SHAPES = ((1, 64), (64, 1), (8, 2048), (2048, 8), (768, 768), (1000, 1003), (4, 64, 256))
SPECTRA = ("Gaussian", "logspace(0, -3)")
# Elements of a batch up to which Triton's interpreter is bearable.
_TINY = 64
_COLUMNS = ("shape", "spectrum", "scheme", "steps", "by", "alignment", "least", "median", "largest", "error")
_ABOUT = (
    "Alignment is `<O, U V^T> / n` with the polar factor of the SVD; least, median and largest are singular values of O"
    "; the error is relative (Frobenius), against the same iteration in fp64. Means over a batch, errors its largest."
)


def inputs(shape: Sequence[int], spectrum: str, device: str) -> Any:
    """Matrices in fp64 that are the same on every machine."""
    import torch

    generator = torch.Generator().manual_seed(math.prod(shape))
    G = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if spectrum != "Gaussian":
        U, s, Vh = torch.linalg.svd(G, full_matrices=False)
        G = U * torch.logspace(0, -3, s.shape[-1], dtype=torch.float64) @ Vh
    return G.to(device)


def competitors(device: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Arguments of jaguar.newton_schulz by name, and why the others cannot run."""
    import torch

    from jaguar.backends import availability

    found: dict[str, dict[str, Any]] = {
        f"reference, {name}": {"backend": "reference", "dtype": dtype}
        for name, dtype in (("fp64", torch.float64), ("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    omitted = dict(availability.unavailable())
    for name in ("cuda", "triton"):
        runs_on = "cpu" if name == "triton" and availability.interpreted() else "cuda"
        if name not in omitted and torch.device(device).type != runs_on:
            omitted[name] = f"it runs on {runs_on} tensors, and these are on {device}"
        if name not in omitted:
            found[name] = {"backend": name}
    return found, omitted


def measured(G: Any, exact: Any, O: Any) -> dict[str, float]:  # noqa: E741
    """The numbers of a row."""
    import torch

    batch, found, right = (x.double().reshape(-1, *x.shape[-2:]) for x in (G, O, exact))
    U, _, Vh = torch.linalg.svd(batch, full_matrices=False)
    s = torch.linalg.svdvals(found)
    norms = torch.linalg.matrix_norm
    return {
        "alignment": float(((U @ Vh) * found).sum((-2, -1)).mean() / min(batch.shape[-2:])),
        "least": float(s.min()),
        "median": float(s.median()),
        "largest": float(s.max()),
        "error": float((norms(found - right) / norms(right)).max()),
    }


def rows(shapes: Sequence[Sequence[int]], device: str) -> Iterator[dict[str, Any]]:
    """One row per shape, spectrum, scheme and competitor."""
    import torch

    import jaguar
    from jaguar.backends import availability
    from jaguar.method.schemes import SCHEMES

    found, _ = competitors(device)
    for shape in shapes:
        for spectrum in SPECTRA:
            G = inputs(shape, spectrum, device)
            for scheme in SCHEMES:
                exact = jaguar.newton_schulz(G, coefficients=scheme, dtype=torch.float64, backend="reference")
                for by, how in found.items():
                    if how["backend"] == "triton" and availability.interpreted() and math.prod(shape) > _TINY:
                        continue
                    O = jaguar.newton_schulz(G, coefficients=scheme, **how)  # noqa: E741
                    about = {"shape": list(shape), "spectrum": spectrum, "scheme": scheme, "by": by}
                    yield about | {"steps": SCHEMES[scheme].steps} | measured(G, exact, O)


def cells(row: dict[str, Any]) -> list[str]:
    """A row as words."""
    numbers = [f"{row[key]:.5f}" for key in _COLUMNS[5:9]]
    words = [" x ".join(map(str, row["shape"])), row["spectrum"], row["scheme"], str(row["steps"]), row["by"]]
    return [*words, *numbers, f"{row['error']:.1e}"]


def accuracy(shapes: Sequence[Sequence[int]], device: str, out: Path | None) -> int:
    """Prints the table, and writes it."""
    import torch
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from gpu import tables
    from jaguar.backends import availability
    from jaguar.method.schemes import SCHEMES

    console = Console(stderr=True)
    runners, omitted = competitors(device)
    count = len(shapes) * len(SPECTRA) * len(SCHEMES) * len(runners)
    found = list(track(rows(shapes, device), "Newton-Schulz", total=count, console=console))
    notes = [f"{name}: omitted, {reason}" for name, reason in omitted.items()]
    if "triton" in runners and availability.interpreted():
        notes.append(f"triton: in its interpreter, shapes of at most {_TINY} elements")
    table = Table(*_COLUMNS, title="Newton-Schulz")
    for row in found:
        table.add_row(*cells(row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for note in notes:
        console.print(note)
    if out is not None:
        about = machine(
            ("command", "date", "device", "torch", "python"),
            date=datetime.date.today().isoformat(),
            device=torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "CPU",
        )
        out.mkdir(parents=True, exist_ok=True)
        path = out / "newton-schulz-accuracy.json"
        path.write_text(json.dumps({"about": about, "notes": notes, "rows": found}, indent=1) + "\n")
        lines = ["# Accuracy of Newton-Schulz", "", f"{_ABOUT}", "", *(f"- {k}: {v}" for k, v in about.items())]
        lines += [*(f"- {note}" for note in notes), "", *tables.table(_COLUMNS, [cells(row) for row in found])]
        path.with_suffix(".md").write_text("\n".join(lines))
        console.print(f"written to {path} and {path.with_suffix('.md').name}")
    return 0


def speed(args: argparse.Namespace, begin: float) -> int:
    """The rows of `make gpu`, saved after each one."""
    if reason := result.no_gpu():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    # Compilation in this process, where a time limit reaches it.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    import torch

    from gpu import polar_report
    from gpu.clock import CudaClock
    from jaguar.backends import availability
    from polar import suite

    if availability.interpreted():
        print("error: TRITON_INTERPRET is set, and the interpreter's speed is of no interest", file=sys.stderr)
        return 2
    found = result.load(args.into) if args.into else {"rows": []}

    def left() -> float:
        return float(args.seconds - (time.monotonic() - begin))

    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    rows = suite.run(CudaClock(device, 0.15), left)
    return 1 if result.keep(rows, found, args.into, begin, polar_report.said) else 0


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(part) for part in text.split("x"))
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError
    return shape


def main(arguments: list[str] | None = None) -> int:
    begin = time.monotonic()
    parser = parser_of(__doc__)
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, default=SHAPES, metavar="NxM", help="(default: seven; BxNxM is a batch)"
    )
    parser.add_argument("--device", default="cpu", help="where the matrices lie (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the files (default: none are written)")
    parser.add_argument("--speed", action="store_true", help="measure speed on an NVIDIA GPU instead")
    parser.add_argument(
        "--seconds", type=float, default=75.0, help="with --speed: begin nothing more after so many (default: 75)"
    )
    parser.add_argument("--into", type=Path, help="with --speed: result file that `make gpu` has begun")
    args = parser.parse_args(arguments)
    result.check_begun(parser, args.into)
    try:
        import jaguar  # noqa: F401
    except ImportError as error:
        print(f"error: {error}; run `make gpu`, which builds the package, or `pip install -e .`", file=sys.stderr)
        return 2
    if args.speed:
        return speed(args, begin)
    import torch

    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch finds no NVIDIA GPU on this machine")
    return accuracy(args.shapes, args.device, args.out)
