"""Table of the benchmarks, by name: the module of each, and one line on its numbers; folders that all of them use.

A module has `main() -> exit status`, which reads its options from `sys.argv`. Standard library only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

BENCH = Path(__file__).resolve().parent  # what `python` is started with
ROOT = BENCH.parent
RESULTS = BENCH / "results"


class Benchmark(NamedTuple):
    """A row of the table."""

    module: str
    measures: str


BENCHMARKS = {
    "step": Benchmark("step.step", "one step outside the forwards, on the CPU: JAGUAR SignSGD and MeZO's loop"),
    "host": Benchmark("step.host", "host time of a step whose launches do nothing: a commit and this tree"),
    "small-tensors": Benchmark("step.small_tensors", "small tensors on the reference: a commit and this tree"),
    "kernels": Benchmark("step.kernels", "kernels, and steps outside the forwards, on an NVIDIA GPU"),
    "models": Benchmark("step.models", "whole steps of OPT-1.3B and RoBERTa-large on an NVIDIA GPU: time and memory"),
    "journal": Benchmark("step.journal", "time and memory of a run with and without its journal; replay and training"),
    "newton-schulz": Benchmark(
        "polar.newton_schulz", "accuracy of Newton-Schulz; with --speed its time on an NVIDIA GPU"
    ),
    "period": Benchmark("polar.period", "loss and time of JAGUAR Muon that orthogonalises every r-th step"),
    "warm-start": Benchmark("polar.warm_start", "inverse roots that follow momentum, in place of Newton-Schulz"),
    "scoring": Benchmark("scoring.scoring", "tokens, memory and time of lean scoring and of the benchmark's"),
    "architectures": Benchmark("scoring.architectures", "every architecture of transformers: checkpoints and scores"),
    "aot": Benchmark("compile.aot", "Triton kernels compiled for sm_80 and sm_90: registers, spills, access widths"),
    "ptxas": Benchmark("compile.ptxas", "CUDA kernels compiled with nvcc: registers, spills, shared memory"),
    "learning": Benchmark("learning.learning", "loss of all methods after as many forward passes, settings searched"),
    "ablation": Benchmark("learning.ablation", "loss against beta, by coordinates and update"),
    "step-size": Benchmark("learning.step_size", "automatic steps and the best of five learning rates"),
    "theorems": Benchmark("theorems.theorems", "slopes of both theorems' terms on functions with known constants"),
    "gpu": Benchmark("gpu.gpu", "everything that needs an NVIDIA GPU: build, tests, sanitizers, benchmarks"),
}


def listed() -> str:
    """The table as text."""
    width = max(map(len, BENCHMARKS))
    lines = [f"  {name:<{width}}  {entry.measures}" for name, entry in BENCHMARKS.items()]
    return "\n".join(["usage: python bench NAME [options]", "", *lines, "", "options: python bench NAME --help"])


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """A parser of one benchmark's options, under the name by which it was started."""
    shape = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python {sys.argv[0]}", description=text, formatter_class=shape)
