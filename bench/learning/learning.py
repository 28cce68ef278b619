"""Losses that all methods reach with as many forward passes on the same work: a search of settings, a table, curves.

    python bench learning [--work NAME ...] [--passes N] [--seeds N] [--only NAME ...] [--out FOLDER]

Work "bytes": a byte-level Llama of 0.12 M parameters, all of them or LoRA; nothing is downloaded. "reviews": the
demo's SmolLM2-135M-Instruct and film reviews; weights of normalisation layers, LoRA, or all; other packages beside us
where PYTHONPATH has them (bench/learning/peers.py). "sst2": the same in the prompt of SST-2. Learning rates are chosen
by successive halving on dev rows; the table has held-out rows, by the seeds. Runs are lines of FOLDER/WORK.jsonl: what
stands there is not run again, so a search that was killed, or that --minutes ended, goes on where it was. A GPU has
room for several --processes: forward passes of so small a model keep a processor busy, which launches them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from learning import report
from learning.byte_model import CONSOLE
from learning.contenders import CONTENDERS, Contender
from learning.peers import PEERS, versions
from learning.reviews import PROMPTS, Reviews
from learning.search import Journal, Plan, run
from learning.works import Bytes, Work
from machine import command, machine
from registry import BENCH, RESULTS, parser_of

BASELINE = "ZO-SGD"
ALL = [*CONTENDERS, *PEERS]
_FOLDERS = ("--out", "--model")  # what a command says of the machine alone


class Search:
    """The search of one work: what is to be run, its journal, and what is written of it.

    Args:
        ends: when the last run must have ended, on the clock of `time.monotonic`; None: whenever.

    Attributes:
        pairs: what stands in the tables, in the order of runs.
        own: of these what is to be run, in this part of the work.
    """

    def __init__(self, work: Work, args: argparse.Namespace, ends: float | None) -> None:
        self.work, self.out, self._ends, self._commit = work, args.out, ends, args.commit
        self.journal = Journal(self.path)
        self.passes = args.passes or work.passes
        chosen = [v for v in work.variants if not args.variants or v in args.variants]
        pairs = []
        for variant in chosen:
            seeds = range(args.seeds or work.seeds(variant))
            plan = Plan((work.name, variant), self.passes, seeds, work.grid)
            asked = [c for c in ALL if args.all or c.runs_in(plan.name) or c.name in args.only]
            asked = [c for c in asked if not args.only or any(text in c.name for text in args.only)]
            pairs += [(plan, contender) for contender in asked]
        self.plans = list({plan.name: plan for plan, _ in pairs}.values())
        part, parts = args.part
        self.pairs = pairs
        self.own = [pair for pair in pairs if not pair[1].refusal(pair[0].name)][part - 1 :: parts]
        self._longest = 0.0

    @property
    def path(self) -> Path:
        """The journal of runs."""
        return self.out / f"{self.work.name}.jsonl"

    @property
    def clock(self) -> str:
        """The processor whose seconds the journal has, on whichever machine the table is written."""
        devices = {about.get("device", "cpu") for about in self.journal.abouts} or {self.work.device.type}
        return "CPU" if devices == {"cpu"} else "GPU"

    def left(self) -> str:
        """How many runs are missing, and how long they will take, by a step in every variant and a look at dev rows."""
        runs, seconds, watched = 0, 0.0, int(self.work.watched)
        for plan in self.plans:
            missing = [(c, plan.expected(c, self.journal.results)) for p, c in self.own if p is plan]
            missing = [(contender, counts) for contender, counts in missing if any(counts)]
            if not missing:
                continue
            early, late = (sum(counts[i] for _, counts in missing) for i in (0, 1))
            forward, look = self._costs(plan, missing[0][0])
            looks = early + late + (1 + watched) * self.work.points * (late + watched * early)
            runs, seconds = runs + early + late, seconds + forward * plan.budget * (late + early / 4) + look * looks
        if not runs:
            return f"{self.work.name}: all runs are there"
        return f"{self.work.name}: about {runs} runs, {seconds / 60:.0f} minutes on this machine as it is now"

    def _costs(self, plan: Plan, contender: Contender) -> tuple[float, float]:
        """Seconds of a forward pass with its share of a step, and of a look at the dev rows."""
        net = self.work.network(plan.where[1])
        optimizer = contender.optimizer(net, 100, 0, contender.settings(plan.name, plan.grid)[0])
        losses = self.work.losses(net, 0, contender.by_row)
        before = monotonic()
        self.work.held_out(net, True)
        begin = monotonic()
        optimizer.step(next(losses))
        return (monotonic() - begin) / contender.passes(optimizer), begin - before

    @property
    def whole(self) -> bool:
        """Whether no run is missing."""
        return all(next(plan.missing(c, self.journal.results), None) is None for plan, c in self.own)

    def go(self, progress: Progress) -> None:
        """Runs what is missing while there is time."""
        task, begun = progress.add_task("", total=None), False
        for plan, contender in self.own:
            for point in plan.missing(contender, self.journal.results):
                begin = monotonic()
                if self._ends is not None and begin + self._longest >= self._ends:
                    return
                if not begun:
                    self.journal.begin(self._about())
                    begun = True
                setting = "".join(f", {key} {value:g}" for key, value in point.setting.items())
                text = f"{plan.name}: {contender.name}{setting}, {point.budget} passes, seed {point.seed}"
                progress.update(task, description=text)
                self.journal.add(point, run(self.work, contender, point, point.budget == plan.budget))
                self._longest = max(self._longest, monotonic() - begin)

    def _about(self) -> dict[str, str]:
        """What numbers depend on."""
        device = torch.cuda.get_device_name() if self.work.device.type == "cuda" else "cpu"
        said = machine(commit=self._commit, command=command(*_FOLDERS))
        own = {"device": device, "precision": self.work.precision}
        return said | own | (versions() if any(c in PEERS for _, c in self.own) else {})

    def write(self) -> str:
        """The tables as Markdown; they, what they are made of, and pictures lie in the folder afterwards."""
        texts: list[str] = []
        tables: dict[str, Any] = {}
        for plan in self.plans:
            table = report.rows(plan, [c for p, c in self.pairs if p is plan], self.journal.results)
            report.compare(table, BASELINE)
            n = len(plan.seeds)
            title = f"{plan.where[0]}, {plan.where[1]}: {plan.budget} forward passes, {n} seed{'s' if n > 1 else ''}"
            texts.append(report.markdown(title, table, BASELINE, self.clock))
            if any("curves" in row for row in table):
                report.draw(table, title, self.out / f"{plan.where[0]}-{plan.where[1]}.png", self.clock)
            tables[plan.where[1]] = [{key: value for key, value in row.items() if key != "curves"} for row in table]
        texts += report.about(self.journal.abouts)
        text = "\n".join(texts)
        (self.out / f"{self.work.name}.md").write_text(text, encoding="utf-8")
        (self.out / f"{self.work.name}.json").write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
        return text


def made(name: str, args: argparse.Namespace) -> Work:
    """The work of a name."""
    return Reviews(name, args.model) if name in PROMPTS else Bytes(args.out, args.pretraining)


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r}: give I/N, such as 2/3 for the second of three shares")
    return int(part), int(parts)


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--work", nargs="+", default=["bytes"], choices=("bytes", *PROMPTS))
    parser.add_argument("--passes", type=int, help="forward passes of a run (default: the work's)")
    parser.add_argument("--seeds", type=int, help="runs of the best setting (default: the work's)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="contenders with this in their names")
    parser.add_argument("--all", action="store_true", help="every contender in every work")
    parser.add_argument("--variants", nargs="+", choices=Reviews.variants, help="what is trained (default: all)")
    parser.add_argument("--pretraining", type=int, default=1000, help="steps of AdamW for bytes (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="folder of the model for reviews and sst2, beside the files of rows")
    parser.add_argument("--part", type=_part, default=(1, 1), metavar="I/N", help="the I-th of N shares of the work")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="as many at once, each with its share")
    parser.add_argument("--minutes", type=float, help="begin no run that would end later; 0: only write the tables")
    parser.add_argument("--commit", help="what to record as the commit in place of what git says")
    parser.add_argument("--out", type=Path, default=RESULTS / "learning", help="folder of the results")
    args = parser.parse_args(words)
    if args.only and not any(text in c.name for c in ALL for text in args.only):
        parser.error(f"none is called {' or '.join(args.only)}; there are {', '.join(c.name for c in ALL)}")
    if args.passes is not None and args.passes < 40:
        parser.error("--passes: give at least 40, a quarter of which shows what a setting is worth")
    if args.processes < 1:
        parser.error("--processes: give at least 1")
    return args


def side_by_side(args: argparse.Namespace, words: Sequence[str], searches: Sequence[Search]) -> None:
    """Shares of the searches in processes of their own, which write into the same journals; they end with this one."""
    (part, parts), n = args.part, args.processes
    own = [word for word, before in zip(words, ["", *words], strict=False) if "--processes" not in (word, before)]
    command = [sys.executable, str(BENCH), "learning", *own, "--part"]
    shares = [f"{part + parts * i}/{parts * n}" for i in range(n)]
    children = [subprocess.Popen([*command, share], stdout=subprocess.DEVNULL) for share in shares]
    try:
        with Progress(TextColumn("{task.description}"), TimeElapsedColumn(), console=CONSOLE) as progress:
            shown = progress.add_task("", total=None)
            while any(child.poll() is None for child in children):
                runs = sum(one.path.read_bytes().count(b'"point"') for one in searches if one.path.exists())
                progress.update(shown, description=f"{n} processes, {runs} runs in the journal")
                time.sleep(0.2)
    finally:
        for child in children:
            child.terminate()
        failed = sum(child.wait() != 0 for child in children)
    if failed:
        raise SystemExit(f"error: {failed} of {n} processes failed; what they finished is kept")
    for one in searches:
        one.journal = Journal(one.path)


def main(words: Sequence[str] | None = None) -> int:
    args = parsed(words)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    ends = None if args.minutes is None else monotonic() + 60 * args.minutes
    searches = [Search(made(name, args), args, ends) for name in args.work]
    for one in searches if args.minutes != 0 else ():
        CONSOLE.print(one.left(), highlight=False)
    if args.processes > 1 and args.minutes != 0:
        side_by_side(args, sys.argv[1:] if words is None else words, searches)
    for one in searches:
        if args.processes == 1:
            columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
            with Progress(*columns, console=CONSOLE) as progress:
                one.go(progress)
        CONSOLE.print(one.write(), markup=False, highlight=False)
    whole = all(one.whole for one in searches)
    CONSOLE.print(f"written to {args.out}" + ("" if whole else "; runs are missing: the same command goes on"))
    return 0
