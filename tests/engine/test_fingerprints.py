"""The bits of every optimizer are those that were recorded: a change of any rounding, draw or order is seen and named.

`fingerprints.json` has a line per row of `fingerprint_rows.py`: digests of the parameters, of the state and of the
records, and the commit that they were recorded at. This adds the runs that the file lacks, and leaves its lines as they
are:

    TRITON_INTERPRET=1 PYTHONPATH=tests python tests/engine/test_fingerprints.py --write

Whoever means to change bits deletes the lines that differ, records them anew, and says so in the changelog.

Draws, roundings and update rules are the same on every machine. Sums in products of matrices are not, so that runs of
Newton-Schulz are compared where products have the bits that they had there. Some of these runs are exact, and always
compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import fingerprints
from helpers.fingerprint_rows import interpreter_rows, reference_rows, row_id
from helpers.fingerprints import Row, fingerprint
from helpers.tensors import bits

FILE = Path(__file__).with_name("fingerprints.json")
RECORDED: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"rows": {}}
ROWS = {
    f"{backend}: {row_id(row)}": (backend, row)
    for backend, rows in (("reference", reference_rows()), ("triton", interpreter_rows()))
    for row in rows
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    try:
        from helpers import interpreter  # noqa: F401 (twice as fast)
    except ModuleNotFoundError:  # without triton
        INTERPRETED = False


def sums_differ(row: Row) -> bool:
    """Whether a run has sums whose bits depend on the machine: Newton-Schulz, where it is not exact."""
    return row["optimizer"] == "JaguarMuon" and row.get("model") != "square" and not row.get("released", False)


@cache
def products() -> str:
    """A digest of what this machine's products of matrices are, in the forms and sizes of the recorded runs."""
    digest = hashlib.sha256(torch.backends.cpu.get_cpu_capability().encode())
    shapes = [(12, 17), (11, 6), (19, 3), (3, 4, 5), (5, 6), (6, 8), (8, 10), (16, 16), (16, 32), (32, 32)]
    for turn, shape in enumerate(shapes):
        values = fingerprints.numbers(torch.Size(shape).numel(), turn).reshape(shape)
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            x = values if values.dim() == 3 else values.unsqueeze(0)
            x = (x / torch.linalg.vector_norm(x.to(dtype), dim=(-2, -1), keepdim=True)).to(dtype)
            for _ in range(3):
                r = x @ x.mT
                x = torch.baddbmm(x, torch.baddbmm(r, r, r, beta=-4.775, alpha=2.0315), x, beta=3.4445)
            digest.update(bits(x))
        if len(shape) == 2:  # the interpreter's
            half = values.to(torch.float16).numpy()
            digest.update(np.matmul(half, half.T.copy(), dtype=np.float32).tobytes())
    return digest.hexdigest()[:16]


def differences(name: str, found: str) -> str:
    """Which of the digests of a run are not the recorded ones."""
    recorded = RECORDED["rows"][name].split()[:3]
    parts = zip(("parameters", "state", "records"), found.split(), recorded, strict=True)
    return " and ".join(part for part, ours, theirs in parts if ours != theirs)


@pytest.mark.parametrize("name", ROWS, ids=str)
def test_the_bits_are_those_that_were_recorded(name: str) -> None:
    backend, row = ROWS[name]
    if backend == "triton" and not INTERPRETED:
        pytest.skip("runs kernels on CPU tensors, in Triton's interpreter")
    if sums_differ(row) and products() != RECORDED["products"]:
        pytest.skip("products of matrices have other bits here than where these runs were recorded")
    found = differences(name, fingerprint(row, backend))
    assert not found, f"other bits in the {found} than at {RECORDED['rows'][name].split()[-1]}: {name}"


def test_every_run_is_recorded_and_no_other() -> None:
    assert list(RECORDED["rows"]) == list(ROWS)


def _complementary(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A stochastic rounding with the same probabilities, and up where the real one goes down."""
    return lambda value, noise: real(value, 0xFFFF - noise)


@pytest.mark.parametrize("optimizer", ["JaguarSignSGD", "JaguarMuon", "ZOSGD", "ZOSignSGD"])
def test_another_rounding_is_seen(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every run that rounds bf16 stochastically, and in no other."""
    from jaguar.method import rounding

    monkeypatch.setattr(rounding, "_bf16", _complementary(rounding._bf16))
    some = [name for name, (backend, row) in ROWS.items() if backend == "reference" and row["optimizer"] == optimizer]
    rounded = [name for name in some if ROWS[name][1]["dtype"] == "bf16" and "rounding" not in ROWS[name][1]]
    exact = [name for name in some if ROWS[name][1]["dtype"] == "fp64" and "momentum_dtype" not in ROWS[name][1]]
    assert rounded and exact
    for name in [*rounded[:3], *exact[:3]]:
        if not sums_differ(ROWS[name][1]) or products() == RECORDED["products"]:
            assert bool(differences(name, fingerprint(ROWS[name][1]))) == (name in rounded), name


def write() -> None:
    """Records the runs that the file lacks."""

    torch.set_num_threads(1)  # as tests/conftest.py does

    def git(*words: str) -> str:
        package = [str(FILE.parents[2] / name) for name in ("jaguar", "triton_kernels")]
        done = subprocess.run(
            ["git", *words, "--", *package], cwd=FILE.parent, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    if not INTERPRETED:
        sys.exit("kernels run in Triton's interpreter here: set TRITON_INTERPRET=1, and install triton")
    if git("status", "--porcelain", "--untracked-files=no"):
        sys.exit("the package has changes that are not committed: bits are recorded of a commit")
    if RECORDED.get("products", products()) != products():
        sys.exit("products of matrices have other bits here than where the file was made: delete it, or record there")
    old, commit = RECORDED["rows"], git("log", "-1", "--format=%h")
    rows = {name: old.get(name) or f"{fingerprint(row, backend)} {commit}" for name, (backend, row) in ROWS.items()}
    header = {"torch": RECORDED.get("torch", torch.__version__), "products": products()}
    FILE.write_text(json.dumps(header | {"rows": rows}, indent=1) + "\n")
    print(f"recorded {len(rows.keys() - old)} runs at {commit}, dropped {len(old.keys() - rows)}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write()
