"""Host time of an optimizer step whose launches do nothing, before and after: what the Python around the kernels costs.

Before is the commit given by --baseline, checked out beside this tree; each of the two runs in a process of its own, on
one thread, in turns of a few steps (before, after, after, before, ...). The Triton backend runs on CPU tensors, and
Triton is given no kernel to run: a launch costs what jaguar does for it, and nothing is computed. Tensors have the
names of OPT-1.3B (388, and 96 of its LoRA adapter) and RoBERTa-large (394), with sides of at most 64, above which host
time does not depend on them. Newton-Schulz is left out; its results have fixed places, as a GPU's allocator gives them.

The closure returns a number that lies ready. Its own time is taken off, and the rest is split at its two calls. Parity
is asserted first: with kernels that do run, both leave the same bits, and both launch as often.

    python bench host --baseline COMMIT [--rounds 30] [--out bench/results]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from machine import TWO_COMMITS, command, machine
from registry import BENCH, RESULTS, parser_of
from step.commits import has, names, trees
from step.shapes import LISTS, Named, Shape

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "JAGUAR SignSGD": ("JaguarSignSGD", {}),
    "ZO-SGD, copy": ("ZOSGD", {"restore": "copy"}),
    "ZO-SGD, copy, momentum": ("ZOSGD", {"restore": "copy", "momentum": 0.9}),
    "JAGUAR Muon": ("JaguarMuon", {}),
}
_LISTS = "opt-1.3b", "opt-1.3b-lora", "roberta-large"
MODELS = {str(len(LISTS[name].shapes)): LISTS[name].shapes for name in _LISTS}
# What kernels compute when both sides are compared: a matrix, a vector, and what Muon moves as a vector too.
SMALL: tuple[Shape, ...] = (("a.weight", (24, 55)), ("a.bias", (300,)), ("embed.weight", (30, 20)))
SIDE = 64  # at most; above the 32 up to which Muon would take all matrices at once
# What `without_newton_schulz` puts itself in the place of, and the first commit that has it.
SCHEDULE, OLDEST = "jaguar/backends/polar/schedule.py", "2fa1141"
STEPS, WARM_UP = 10, 20  # in a turn, and before the first
PARTS = ("before", "between", "after", "closure")


class Losses:
    """A closure that costs nothing, and when it was called.

    Attributes:
        stamps: beginning and end of every call.
    """

    def __init__(self) -> None:
        self._ready = torch.tensor(0.71), torch.tensor(0.64)
        self.stamps: list[float] = []

    def __call__(self) -> Tensor:
        """The one of two losses, and then the other."""
        begin = time.perf_counter()
        loss = self._ready[len(self.stamps) // 2 % 2]
        self.stamps += begin, time.perf_counter()
        return loss


def named(shapes: Sequence[Shape], *dtypes: torch.dtype) -> Named:
    """Parameters of these names, with shortened sides; `dtypes` take turns, and tau moves almost all in bf16 too."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for (name, shape), dtype in zip(shapes, cycle(dtypes), strict=False):
        numbers = 0.02 * torch.randn([min(SIDE, side) for side in shape], generator=generator)
        made.append((name, nn.Parameter(numbers.to(dtype))))
    return made


def made(method: str, params: Named) -> Any:
    """An optimizer on Triton kernels."""
    import jaguar

    name, options = METHODS[method]
    groups: Any = params
    if name == "JaguarMuon":
        matrices = [(n, p) for n, p in params if p.dim() == 2 and "embed" not in n]
        others = [(n, p) for n, p in params if p.dim() != 2 or "embed" in n]
        groups = [{"params": g, "ns": ns} for g, ns in ((matrices, True), (others, False)) if g]
    return getattr(jaguar, name)(groups, backend="triton", **options)


@contextmanager
def silent() -> Iterator[list[str]]:
    """The names of the kernels that are launched meanwhile, none of which runs.

    Taken where Triton takes launches, below all of jaguar, so that it does not depend on the names in there.
    """
    from triton.runtime.interpreter import InterpretedFunction

    seen: list[str] = []
    run = InterpretedFunction.run
    InterpretedFunction.run = lambda kernel, *_, grid, warmup, **constants: seen.append(kernel.__name__)
    try:
        yield seen
    finally:
        InterpretedFunction.run = run


@contextmanager
def without_newton_schulz() -> Iterator[list[int]]:
    """The numbers of matrices that had polar factors meanwhile: memory of theirs that is never filled."""
    from jaguar.backends.polar import schedule as iteration

    places: dict[tuple[int, ...], list[Tensor]] = {}
    asked: list[int] = []
    real = iteration.orthogonalise

    def orthogonalise(kernels: Any, matrices: Sequence[Tensor], *more: Any) -> Iterator[tuple[list[int], list[Tensor]]]:
        asked.append(len(matrices))
        scheduled = getattr(more[-1], "batches", None)  # by later versions, before the step writes anything
        for members in iteration.batches(matrices, kernels.small) if scheduled is None else [b[0] for b in scheduled]:
            if scheduled is None:  # these took memory batch by batch, and 1f8946a kept it to the next step
                yield members, [torch.empty(matrices[i].shape, dtype=torch.bfloat16) for i in members]
                continue
            key = tuple(matrices[i].data_ptr() for i in members)
            if key not in places:
                places[key] = [torch.zeros(matrices[i].shape, dtype=torch.bfloat16) for i in members]
            yield members, list(places[key])

    iteration.orthogonalise = orthogonalise
    try:
        yield asked
    finally:
        iteration.orthogonalise = real


def timed(step: Callable[[Losses], object], closure: Losses) -> list[float]:
    """Seconds of one step by PARTS: up to the first call of the closure, between its two, after them, and in them."""
    closure.stamps.clear()
    begin = time.perf_counter()
    step(closure)
    end = time.perf_counter()
    first, first_end, second, second_end = closure.stamps
    return [first - begin, second - first_end, end - second_end, (first_end - first) + (second_end - second)]


def fingerprint(method: str) -> str:
    """SHA-256 of parameters and state after two steps whose kernels run."""
    params = named(SMALL, torch.bfloat16, torch.float32)
    optimizer, closure = made(method, params), Losses()
    for _ in range(2):
        optimizer.step(closure)
    digest = hashlib.sha256()
    for _, p in params:
        state = [value for value in optimizer.state.get(p, {}).values() if isinstance(value, Tensor)]
        for tensor in (p.detach(), *state):
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Bench:
    """What a worker does: one method of this process's jaguar, silently."""

    def __init__(self) -> None:
        self._optimizers: dict[tuple[str, int], Any] = {}
        self._closure = Losses()

    def turn(self, method: str, shapes: Sequence[Shape], steps: int) -> dict[str, Any]:
        """Seconds of every step by PARTS, and the kernels that the last one launched."""
        key = method, len(shapes)
        with silent() as launched, without_newton_schulz() as asked:
            if key not in self._optimizers:
                self._optimizers[key] = made(method, named(shapes, torch.bfloat16))
                for _ in range(WARM_UP):
                    self._optimizers[key].step(self._closure)
            seconds = []
            for _ in range(steps):
                launched.clear()
                seconds.append(timed(self._optimizers[key].step, self._closure))
        if not launched or bool(asked) != (METHODS[method][0] == "JaguarMuon"):
            raise AssertionError(f"{method}: launched {launched}, asked for {len(asked)} times Newton-Schulz")
        return {"seconds": seconds, "launched": list(launched)}


def serve(tree: Path) -> None:
    """Answers questions on standard input with the jaguar of a tree, until there are no more."""
    sys.path.insert(0, str(tree))
    import jaguar

    # The kernels lie beside the package. An installed jaguar would find those of another tree.
    jaguar.__path__.append(str(tree))
    import jaguar.triton_kernels as kernels

    for found in (jaguar.__file__, kernels.__file__):
        if not Path(str(found)).is_relative_to(tree):
            raise AssertionError(f"{found} is not of {tree}")
    torch.set_num_threads(1)
    bench = Bench()
    for line in sys.stdin:
        task, *arguments = json.loads(line)
        print(json.dumps({"fingerprint": fingerprint, "turn": bench.turn}[task](*arguments)), flush=True)


class Worker:
    """A process that measures the jaguar of one tree."""

    def __init__(self, tree: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(BENCH), "host", "--worker", str(tree)],
            # With hashes of their own, two processes of the same code were 7 % apart.
            env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._process:  # closes its pipes and waits
            self._process.kill()  # it has nothing to save, and may be in the middle of a turn

    def tell(self, *question: Any) -> None:
        """Asks without waiting for the answer."""
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)

    def answer(self) -> Any:
        """What the process answers to the oldest open question; RuntimeError if it ended instead."""
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the worker ended; its reason is above")
        return json.loads(answer)

    def ask(self, *question: Any) -> Any:
        """What the process answers."""
        self.tell(*question)
        return self.answer()


def expect_equal(what: str, found: Mapping[str, Any]) -> None:
    """Raises AssertionError where before and after differ: no speed without parity."""
    if found["before"] != found["after"]:
        raise AssertionError(f"{what} before and after differ: {found['before']} and {found['after']}")


def compare(sides: Mapping[str, Path], models: Mapping[str, Sequence[Shape]], rounds: int) -> list[dict[str, Any]]:
    """A row for every method and model, after both sides were seen to leave the same bits."""
    rows = []
    with Worker(sides["before"]) as before, Worker(sides["after"]) as after:
        workers = {"before": before, "after": after}
        for method in METHODS:
            for worker in workers.values():
                worker.tell("fingerprint", method)
            expect_equal(f"{method}: bits", {key: worker.answer() for key, worker in workers.items()})
        for method in METHODS:
            for model, shapes in models.items():
                turns: dict[str, list[dict[str, Any]]] = {key: [] for key in workers}
                for i in range(rounds):
                    for key in list(workers)[:: 1 if i % 2 == 0 else -1]:
                        turns[key].append(workers[key].ask("turn", method, shapes, STEPS))
                launched = {key: turns[key][-1]["launched"] for key in workers}
                expect_equal(f"{method}: number of launches", {key: len(names) for key, names in launched.items()})
                seconds = {key: [turn["seconds"] for turn in turns[key]] for key in workers}
                rows.append({"method": method, "tensors": int(model), "launched": launched, **judged(seconds)})
    return rows


def judged(seconds: Mapping[str, Sequence[Sequence[Sequence[float]]]]) -> dict[str, Any]:
    """Medians over all steps, and quartiles of the rounds' ratios, of (round, step, part) seconds of each side."""
    found: dict[str, Any] = {}
    for key, turns in seconds.items():
        steps = [step for turn in turns for step in turn]
        found[key] = {"step": statistics.median(map(sum, steps)), "outside": statistics.median(map(outside, steps))}
        found[key] |= {
            part: statistics.median(column) for part, column in zip(PARTS, zip(*steps, strict=True), strict=True)
        }
    for name, of in (("step", sum), ("outside", outside)):
        medians = {key: [statistics.median(map(of, turn)) for turn in turns] for key, turns in seconds.items()}
        ratios = [after / before for before, after in zip(medians["before"], medians["after"], strict=True)]
        found[f"{name} ratio"] = statistics.quantiles(ratios, n=4, method="inclusive")
    return found


def outside(step: Sequence[float]) -> float:
    """Seconds of a step outside the closure."""
    return sum(step[: PARTS.index("closure")])


def report(rows: Sequence[dict[str, Any]], info: Mapping[str, str], folder: Path) -> None:
    """Prints the rows and writes them to a file."""
    table = Table(title="host time of a step whose launches do nothing: before, after", title_justify="left")
    for column in ("method", "tensors", "launches", "step, us", "outside, us"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for column in ("step after / before", "outside after / before", *PARTS[:3]):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [", ".join(f"{row[k][n] * 1e6:,.0f}" for k in ("before", "after")) for n in ("step", "outside")]
        for name in ("step", "outside"):
            low, middle, high = row[f"{name} ratio"]
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        cells += [", ".join(f"{row[k][n] * 1e6:,.0f}" for k in ("before", "after")) for n in PARTS[:3]]
        table.add_row(row["method"], str(row["tensors"]), str(len(row["launched"]["after"])), *cells)
    Console(width=180).print(table, "  ".join(f"{key} {value}" for key, value in info.items()))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "host-step.json"
    path.write_text(json.dumps({"machine": dict(info), "rows": list(rows)}, indent=2) + "\n")
    print(f"written to {path}")


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--baseline", help="commit to compare with")
    parser.add_argument("--rounds", type=int, default=30, help=f"turns of {STEPS} steps on each side (default: 30)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(args.worker)
        return 0
    if not args.baseline:
        parser.error("--baseline COMMIT says what to compare with")
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: quartiles of their ratios need at least 2")
    if not has(args.baseline, SCHEDULE):
        reason = f"no commit with {SCHEDULE}; {OLDEST} is the oldest that this tree can be compared with"
        print(f"error: --baseline {args.baseline}: {reason}", file=sys.stderr)
        return 2
    with trees(args.baseline) as sides:
        rows = compare(sides, MODELS, args.rounds)
    report(rows, machine(TWO_COMMITS, threads="1", command=command("--out"), **names(args.baseline)), args.out)
    return 0
