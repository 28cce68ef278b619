"""Every Triton kernel compiled ahead of time for GPUs that need not be there: registers, spills, access widths.

Reads what ptxas and the disassembler in Triton's wheel say of each specialisation, for sm_80 and sm_90:

    python bench/aot.py [--only SUBSTRING ...] [--out bench/results] [--json -]

`make aot` writes bench/results/aot.json and bench/results/aot.md.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's kernels cannot be compiled

import triton
from rich.console import Console
from rich.progress import track
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jaguar.triton_kernels import coordinate, dense, launch

TARGETS = (80, 90)
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {"tensors": "*i64", "programs": "*i64", "keys": "*i64", "scalars": "*fp64", "geometry": "*i64",
            "listed": "*i64", "lost": "*i64", "first_program": "i32", "factor": "fp32"}  # fmt: skip
SAVED = {"fp64": "*fp64", "fp32": "*fp32", "fp16": "*fp16", "bf16": "*u16"}


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel: what a launch of these options compiles."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    format: str = "bf16"
    wide: bool = False  # full tiles must use 16-byte accesses
    options: dict[str, Any] = field(default_factory=dict)


def cases() -> list[Case]:
    """The specialisations of the table."""
    found = []

    def sparse(job: str, x: str = "bf16", m: str = "bf16", layout: str = "fraction", **more: Any) -> None:
        constants = {"JOB": job, "X_FORMAT": x, "M_FORMAT": m, "LAYOUT": layout, "ONES": False, "TWO_SIDED": True,
                     "STOCHASTIC": True} | {"BLOCK": launch.STRATA} | more  # fmt: skip
        found.append(Case(f"sparse {job} x={x} m={m} {layout}", coordinate.sparse, constants, x))

    def tiles(x: str = "bf16", m: str = "bf16", layout: str = "fraction", hint: bool = True, **more: Any) -> None:
        constants = {"RESTORE": True, "SEVERAL": False, "X_FORMAT": x, "M_FORMAT": m, "LAYOUT": layout, "ONES": False,
                     "TWO_SIDED": True, "STOCHASTIC": True, "HINT": hint, "GROUPED": hint, "LANES": 128}  # fmt: skip
        constants |= {"BLOCK": launch.BLOCK, "TILE": launch.TILES["tiles"]} | more
        name = (
            f"tiles x={x} m={m} {layout}"
            + ("" if hint else " unaligned")
            + "".join(f" {k}={v}" for k, v in more.items())
        )
        found.append(Case(name, coordinate.tiles, constants, x, wide=hint))

    def move(job: str, distribution: str, x: str = "bf16", hint: bool = True) -> None:
        constants = {"JOB": job, "FORMAT": x, "DISTRIBUTION": distribution, "TWO_SIDED": True, "HINT": hint,
                     "GROUPED": hint, "BLOCK": launch.BLOCK, "TILE": launch.TILES["move"][distribution]}  # fmt: skip
        name = f"move {job} {distribution} x={x}" + ("" if hint else " unaligned")
        found.append(Case(name, dense.move, constants, x, wide=hint and job != "lost"))

    def step(
        job: str, distribution: str, rule: str = "sgd", x: str = "bf16", m: str = "none", hint: bool = True, **more: Any
    ) -> None:
        constants = {"JOB": job, "RULE": rule, "SEVERAL": False, "X_FORMAT": x, "M_FORMAT": m,
                     "DISTRIBUTION": distribution, "STOCHASTIC": True, "HINT": hint, "GROUPED": hint}  # fmt: skip
        constants |= {"BLOCK": launch.BLOCK, "TILE": launch.TILES["step"][distribution]} | more
        name = (
            f"step {job} {distribution} {rule} x={x} m={m}"
            + ("" if hint else " unaligned")
            + "".join(f" {k}={v}" for k, v in more.items())
        )
        found.append(Case(name, dense.step, constants, x, wide=hint))

    for job in ("perturb", "flip", "restore", "lost", "update", "fused", "several"):
        sparse(job)
    for x, m in (("fp32", "fp32"), ("fp16", "bf16"), ("bf16", "e5m2"), ("fp64", "fp64")):
        sparse("perturb", x, m)
        sparse("fused", x, m)
    for layout in ("count", "block", "listed"):
        sparse("perturb", layout=layout)
        sparse("fused", layout=layout)
    for x, m in (
        ("bf16", "bf16"),
        ("bf16", "fp32"),
        ("bf16", "e5m2"),
        ("fp16", "bf16"),
        ("fp32", "fp32"),
        ("fp32", "e5m2"),
        ("fp64", "fp64"),
    ):
        tiles(x, m)
    tiles(layout="count")
    tiles(layout="block")
    tiles(hint=False)
    tiles(RESTORE=False)
    tiles(RESTORE=False, SEVERAL=True)
    tiles(STOCHASTIC=False)
    for distribution in ("gaussian", "rademacher"):
        for job in ("walk", "save", "flip", "lost"):
            move(job, distribution)
        for x in ("fp32", "fp16", "fp64"):
            move("walk", distribution, x)
        move("walk", distribution, hint=False)
        for job in ("plain", "saved", "walked"):
            step(job, distribution)
        step("plain", distribution, m="bf16")
        step("plain", distribution, m="fp32")
        step("plain", distribution, "sign", m="bf16")
        step("plain", distribution, x="fp32", m="fp32")
        step("plain", distribution, x="fp16", m="bf16")
        step("plain", distribution, x="fp32", m="e5m2")
        step("plain", distribution, x="fp64", m="fp64")
        step("plain", distribution, SEVERAL=True)
        step("plain", distribution, hint=False)
    move("restore", "rademacher")
    return found


def compiled(case: Case, capability: int) -> dict[str, Any]:
    """What the tools say of one specialisation on one target."""
    names = case.kernel.arg_names
    signature = {
        n: "constexpr" if n in case.constants else SAVED[case.format] if n == "saved" else POINTERS[n] for n in names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=case.constants, attrs=aligned)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.OPTIONS | case.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([BIN / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    operations = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.M)
    memory = collections.Counter(op for op in operations if re.match(r"(LDG|STG|LDL|STL|LDS|STS|ATOM|RED|BAR)", op))
    return {
        "name": case.name,
        "sm": capability,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "local": sum(n for op, n in memory.items() if op.startswith(("LDL", "STL"))),
        "shared": result.metadata.shared,
        "loads16": sum(n for op, n in memory.items() if op.startswith("LDG") and ".128" in op),
        "stores16": sum(n for op, n in memory.items() if op.startswith("STG") and ".128" in op),
        "barriers": sum(n for op, n in memory.items() if op.startswith("BAR")),
        "instructions": len(operations),
        "wide": case.wide,
    }
