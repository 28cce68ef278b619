"""Every architecture of transformers as a tiny random model: does what is saved come back, are scores the model's own?

saved   `save_pretrained` and the auto class's `from_pretrained` give back every bit.
resume  a checkpoint, read into a model with other weights, goes on to the bits of the run that was not interrupted.
best    `load_best_model_at_end` gives the bits of the best step.
scores  `jaguar.Scorer` without a `verify` of one's own, by `jaguar.scoring.evaluate`, `ZOTrainer.evaluate`, the first
        loss of `train` and `predict`, in batches of 1 and 6 rows of 5 to 38 tokens, equals the model's plain forward,
        one sequence at a time. How far the farthest is from it, and how rows are put into batches for that, stands
        beside it.

An outcome is "equal", "refused" (an error that has the model's name and the reason) or "differs". The checks are those
of tests/helpers/architecture_checks.py, the models those of tests/helpers/architectures.py. Rows are written as they
come; rows that were not asked for stay as they are in the file.

    python bench architectures [PATTERN ...] [--missing] [--workers 2] [--out bench/results]
"""

from __future__ import annotations

import contextlib
import datetime
import fnmatch
import io
import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track

from gpu import tables
from machine import machine
from registry import RESULTS, ROOT, parser_of

sys.path.insert(0, str(ROOT / "tests"))
from helpers import architecture_checks as checks
from helpers import architectures

CONSOLE = Console(stderr=True)
KINDS = {"causal": "Causal language models", "masked": "Masked language models", "classifier": "Sequence classifiers"}
READ = {"padded": "padded", "equal": "rows of one length", "one": "row by row"}


def row_of(name: str) -> dict[str, Any]:
    """What every check says of an architecture."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    begin, row = time.monotonic(), {"name": name}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        model = architectures.model_of(name)
        row |= {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}
        for what, outcome, more in checks.every_check(name, Path(folder)):
            row |= {what: outcome} | {key: value for key, value in more.items() if key == "farthest"}
            if reading := more.get("reading"):
                own_pad = " (its own padding)" if reading.pad_id != checks.pads_of(name, model)[0] else ""
                row["read"] = "own masks" if reading.own_masks else READ[reading.together] + own_pad
    return row | {"seconds": round(time.monotonic() - begin, 1)}


def lines_of(rows: list[dict[str, Any]], about: dict[str, str]) -> list[str]:
    """The table as Markdown."""
    reasons = [row for row in rows if any(row[what].startswith(("refused", "differs")) for what in checks.CHECKS)]
    counts = {what: [row[what].split(":")[0] for row in rows] for what in checks.CHECKS}
    lines = ["# Architectures of transformers", "", *__doc__.split("\n\n")[0].split("\n"), "", "```"]
    lines += [*__doc__.split("\n\n")[1].split("\n"), "```", "", __doc__.split("\n\n")[2].replace("\n", " "), ""]
    lines += [*(f"- {key}: {value}" for key, value in about.items()), ""]
    kinds = ("equal", "refused", "differs")
    lines += tables.table(["", *kinds], [[what, *(str(c.count(k)) for k in kinds)] for what, c in counts.items()])
    if reasons:
        lines += ["## Refused, or different", ""]
        lines += [f"- {row['name']}, {what}: {row[what]}" for row in reasons for what in counts if row[what] != "equal"]
        lines.append("")
    for kind, title in KINDS.items():
        own = [row for row in rows if row["name"].startswith(kind)]
        cells = [
            [
                row["name"].split("-", 1)[1],
                row["class"],
                *(row[what].split(":")[0] for what in checks.CHECKS),
                f"{row['farthest']:.0e}" if "farthest" in row else "",
                row.get("read", ""),
            ]
            for row in own
        ]
        lines += [f"## {title}: {len(own)}", ""]
        lines += tables.table(["architecture", "class", *checks.CHECKS, "farthest", "batches"], cells)
    lines += ["## Not counted", "", *(f"- {name}: {why}" for name, why in architectures.ABSENT.items()), ""]
    return lines


def main(words: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("patterns", nargs="*", default=["*"], metavar="PATTERN", help="causal-llama, 'masked-*', ...")
    parser.add_argument("--missing", action="store_true", help="only what the file does not have of this commit")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: bench/results)")
    args = parser.parse_args(words)
    path, about = args.out / "architectures.json", machine() | {"transformers": transformers.__version__}
    about |= {"date": datetime.date.today().isoformat(), "tolerance of scores": str(checks.TOLERANCE)}
    del about["commit"], about["command"]
    commit, known = machine()["commit"], architectures.names()
    found = {row["name"]: row for row in json.loads(path.read_text())["rows"]} if path.is_file() else {}
    wanted = [name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in args.patterns)]
    if args.missing:
        wanted = [name for name in wanted if found.get(name, {}).get("commit") != commit]
    if not wanted:
        print("nothing to do: no name fits, or the file has them all", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)

    def write() -> list[dict[str, Any]]:
        rows = [found[name] for name in known if name in found]
        commits = ", ".join(sorted({row["commit"] for row in rows}))
        said = about | {"commit": commits, "command": "python bench architectures"}
        path.write_text(json.dumps({"about": said, "absent": architectures.ABSENT, "rows": rows}, indent=1) + "\n")
        path.with_suffix(".md").write_text("\n".join(lines_of(rows, said)))
        return rows

    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(row_of, name): name for name in wanted}
        for done in track(as_completed(running), "architectures", len(running), console=CONSOLE):
            row = done.result() | {"commit": commit}
            found[row["name"]] = row
            for what in checks.CHECKS:
                if row[what] != "equal":
                    CONSOLE.print(f"{row['name']}, {what}: {row[what]}", highlight=False, markup=False)
            write()
    rows = write()
    print(f"{len(rows)} rows in {path} and {path.with_suffix('.md').name}")
    return 0 if all(not row[what].startswith("differs") for row in rows for what in checks.CHECKS) else 1
