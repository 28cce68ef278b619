"""Every Triton kernel compiled ahead of time for GPUs that need not be there: registers, spills, access widths.

Reads what ptxas and the disassembler in Triton's wheel say of each specialisation, and checks it: nothing spills, full
tiles use 16-byte accesses, products tensor cores and, on Hopper, at most half of an SM's registers, and the barrier
between the phases of `tiles` stands where it must.

    python bench aot [--only TEXT ...] [--sm 80 90] [--json FILE]        (make aot: everything, and the tables)
"""

from __future__ import annotations

import json
import os
import re
import subprocess
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

from jaguar.backends.polar import triton as products
from jaguar.triton_kernels import coordinate, dense, launch, matrix, mixed, newton_schulz, rules
from registry import RESULTS, parser_of

TARGETS = (80, 90)
REGISTERS = 65536  # of an SM
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {"tensors": "*i64", "programs": "*i64", "keys": "*i64", "scalars": "*fp64", "geometry": "*i64",
            "active": "*i64", "listed": "*i64", "lost": "*i64", "factor": "fp32",
            "a": "*fp16", "b": "*fp16", "c": "*fp16", "x": "*fp16", "matrices": "*i64", "statistics": "*fp32",
            "items": "*i64", "coefficients": "*fp32", "alpha": "fp32", "beta": "fp32", "scale": "fp32",
            "shift": "fp32"}  # fmt: skip
# The functions of the rules, and how many numbers of their own they take.
RULES = {name: {"ENTRY": rules.heavy_ball, "STEP": step, "N_ENTRY": 1, "N_STEP": 0}
         for name, step in (("sgd", rules.sgd_step), ("sign", rules.sign_step))}  # fmt: skip
RULES |= {name: {"ENTRY": entry, "STEP": step, "N_ENTRY": 4, "N_STEP": 3}
          for name, entry, step in (("adam", rules.adam, rules.adam_step),
                                    ("amsgrad", rules.amsgrad, rules.amsgrad_step))}  # fmt: skip
RULES["recursive"] = {"ENTRY": rules.heavy_ball, "STEP": rules.recursive_step, "N_ENTRY": 1, "N_STEP": 1}
SAVED = {"fp64": "*fp64", "fp32": "*fp32", "fp16": "*fp16", "bf16": "*u16"}


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel: what a launch of these options compiles."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    format: str = "bf16"
    wide: tuple[int, int] = (0, 0)  # 16-byte loads and stores that a thread needs for one full tile
    options: dict[str, Any] = field(default_factory=dict)  # that differ from launch.OPTIONS


def accesses(
    tile: int, loaded: tuple[str, ...], stored: tuple[str, ...], num_warps: int = launch.OPTIONS["num_warps"]
) -> tuple[int, int]:
    """16-byte loads and stores per thread and tile; 8 float8 values in a row have only 8 bytes, and count as none."""
    size = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2, "e5m2": 0, "none": 0}
    each = tile // (32 * num_warps)
    return sum(size[f] for f in loaded) * each // 16, sum(size[f] for f in stored) * each // 16


def cases() -> list[Case]:
    """The specialisations of the table."""
    found = []

    def sparse(job: str, x: str = "bf16", m: str = "bf16", layout: str = "fraction", **more: Any) -> None:
        constants = {"JOB": job, "X_FORMAT": x, "S0": m, "LAYOUT": layout, "ONES": False, "TWO_SIDED": True,
                     "STOCHASTIC": True} | RULES["sign"] | {"BLOCK": launch.STRATA} | more  # fmt: skip
        found.append(Case(f"sparse {job} x={x} m={m} {layout}", coordinate.sparse, constants, x, options=launch.WIDE))

    def tiles(x: str = "bf16", m: str = "bf16", layout: str = "fraction", hint: bool = True, **more: Any) -> None:
        constants = {"RESTORE": True, "SEVERAL": False, "X_FORMAT": x, "S0": m, "LAYOUT": layout, "ONES": False,
                     "TWO_SIDED": True, "STOCHASTIC": True, "HINT": hint, "GROUPED": hint, "PREFETCH": True,
                     "LANES": launch.STRATA if layout == "block" else launch.LEAST_LANES}  # fmt: skip
        constants |= RULES["sign"] | {"BLOCK": launch.BLOCK, "TILE": launch.WIDE_TILE} | more
        name = (
            f"tiles x={x} m={m} {layout}"
            + ("" if hint else " unaligned")
            + "".join(f" {k}={v}" for k, v in more.items())
        )
        found.append(
            Case(
                name,
                coordinate.tiles,
                constants,
                x,
                accesses(launch.WIDE_TILE, (x, m), (x,), **launch.WIDE) if hint else (0, 0),
                launch.WIDE,
            )
        )

    def move(job: str, distribution: str, x: str = "bf16", hint: bool = True, masked: bool = False) -> None:
        constants = {"JOB": job, "MASKED": masked, "FORMAT": x, "DISTRIBUTION": distribution, "TWO_SIDED": True,
                     "HINT": hint, "GROUPED": hint, "BLOCK": launch.BLOCK}  # fmt: skip
        constants["TILE"] = launch.dense_tile("move", distribution, hint)
        name = f"move {job} {distribution} x={x}" + ("" if hint else " unaligned") + " masked" * masked
        stored = () if job == "lost" else (x, x) if job == "save" else (x,)
        found.append(
            Case(name, dense.move, constants, x, accesses(constants["TILE"], (x,), stored) if hint else (0, 0))
        )

    def step(
        job: str,
        distribution: str,
        rule: str = "sgd",
        x: str = "bf16",
        m: str = "none",
        hint: bool = True,
        **options: Any,
    ) -> None:
        constants = {"JOB": job, "MASKED": False, "SEVERAL": False, "X_FORMAT": x, "S0": m, "S1": "none", "S2": "none",
                     "DISTRIBUTION": distribution, "STOCHASTIC": True, "HINT": hint, "GROUPED": hint}  # fmt: skip
        constants |= RULES[rule] | {"BLOCK": launch.BLOCK} | options
        more = constants["SEVERAL"] or constants["S1"] != "none"
        constants["TILE"] = launch.dense_tile("step", distribution, constants["GROUPED"], more)
        name = (
            f"step {job} {distribution} {rule} x={x} m={m}"
            + ("" if hint else " unaligned")
            + "".join(f" {k}={v}" for k, v in options.items())
        )
        held = (x, *(constants[buffer] for buffer in ("S0", "S1", "S2")))
        found.append(Case(name, dense.step, constants, x, accesses(constants["TILE"], held, held) if hint else (0, 0)))

    def mixes(job: str, x: str = "bf16", m: str = "bf16", held: bool = True, hint: bool = True) -> None:
        moves = job in ("walk", "save", "flip", "lost")
        state = m if held else "none"
        constants = {"JOB": job, "MASKED": False, "X_FORMAT": x, "S0": state, "M_FORMAT": m, "TWO_SIDED": True,
                     "STOCHASTIC": True, "HINT": hint, "GROUPED": hint, "BLOCK": launch.BLOCK,
                     "TILE": launch.TILE}  # fmt: skip
        name = f"mixed {job} x={x} m={state}" + ("" if hint else " unaligned")
        stored = {"walk": (x,), "save": (x, x), "flip": (x,), "lost": ()}.get(job, (x, m))
        wide = accesses(launch.TILE, (x, state), stored) if hint else (0, 0)
        found.append(Case(name, mixed.move if moves else mixed.step, constants, x, wide))

    def along(x: str = "bf16", o: str = "bf16", hint: bool = True) -> None:
        constants = {"X_FORMAT": x, "O_FORMAT": o, "STOCHASTIC": True, "HINT": hint, "GROUPED": hint}
        constants |= {"BLOCK": launch.BLOCK, "TILE": launch.TILE}
        name = f"along x={x} o={o}" + ("" if hint else " unaligned")
        wide = accesses(launch.TILE, (x, o), (x,)) if hint else (0, 0)
        found.append(Case(name, matrix.along, constants, x, wide))

    for x, o in (("bf16", "bf16"), ("fp16", "bf16"), ("fp32", "bf16"), ("bf16", "fp32"), ("fp64", "fp64")):
        along(x, o)
    along(hint=False)
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
        for x, m in (("bf16", "none"), ("bf16", "bf16"), ("fp32", "e5m2"), ("fp64", "fp64")):
            step("plain", distribution, x=x, m=m, SEVERAL=True)
        step("plain", distribution, m="bf16", SEVERAL=True, GROUPED=False)
        step("plain", distribution, x="fp16", m="e5m2", SEVERAL=True, GROUPED=False)
        step("plain", distribution, hint=False)
        for job in ("plain", "saved"):
            step(job, distribution, "amsgrad", m="bf16", S1="fp32", S2="fp32")
        for x, m in (("fp32", "fp32"), ("fp16", "bf16"), ("bf16", "e5m2")):
            step("plain", distribution, "amsgrad", x, m, S1="fp32", S2="fp32")
        step("plain", distribution, "amsgrad", "fp64", "fp64", S1="fp64", S2="fp64")
        step("plain", distribution, "recursive", m="bf16")
        step("plain", distribution, "adam", m="bf16", S1="fp32")
        step("plain", distribution, "adam", m="bf16", S1="fp32", SEVERAL=True)
        for job in ("save", "flip", "lost"):
            move(job, distribution, masked=True)
        step("saved", distribution, MASKED=True)
        step("plain", distribution, m="bf16", MASKED=True)
    move("restore", "rademacher")
    for job in ("walk", "save", "flip", "lost", "plain", "saved", "walked"):
        mixes(job)
    for x, m in (("fp32", "fp32"), ("fp16", "bf16"), ("bf16", "fp32"), ("bf16", "e5m2"), ("fp64", "fp64")):
        mixes("walk", x, m)
        mixes("plain", x, m)
    for job in ("save", "lost"):
        mixes(job, held=False)
    for job in ("walk", "plain"):
        mixes(job, hint=False)
    return found + newton_schulz_cases()


def newton_schulz_cases() -> list[Case]:
    """The specialisations of Newton-Schulz."""
    found = []

    def product(size: dict[str, int], d: str = "fp16", full: bool = True, hint: bool = True, **flags: bool) -> None:
        size = dict(size)
        options = {"num_warps": size.pop("num_warps"), "num_stages": size.pop("num_stages")}
        constants = dict.fromkeys(("B_TRANSPOSED", "D_TRANSPOSED", "ADD", "TRIANGLE"), False) | flags
        constants |= {"FORMAT": d, "FULL": full, "HINT": hint} | size
        tile, warps = size["TILE"], options["num_warps"]
        read = accesses(2 * tile * size["DEPTH"], ("fp16",), (), warps)[0]
        added = accesses(tile**2, ("fp16",), ("fp16",) * (1 + constants["TRIANGLE"]), warps)
        wide = (read + added[0] * constants["ADD"], added[1])
        name = f"product {tile} d={d}" + ("" if full else " ragged") + ("" if hint else " unaligned")
        name += "".join(f" {flag}" for flag in flags)
        found.append(Case(name, newton_schulz.product, constants, d, wide if hint else (0, 0), options))

    def prepare(g: str, tall: bool = False, hint: bool = True) -> None:
        end = f" g={g}" + ("" if hint else " unaligned")
        constants = {"FORMAT": g, "HINT": hint, "TILE": products.MEASURED}
        wide = accesses(products.MEASURED, (g,), (), 8) if hint else (0, 0)
        if not tall:  # it sees elements in order
            found.append(Case("measure" + end, newton_schulz.measure, constants, g, wide, {"num_warps": 8}))
        constants = {"FORMAT": g, "TALL": tall, "HINT": hint, "TILE": products.PREPARED}
        wide = accesses(products.PREPARED**2, (g,), ("fp16",)) if hint else (0, 0)
        found.append(Case("prepare" + end + " tall" * tall, newton_schulz.prepare, constants, g, wide))

    def small(n: int, g: str = "bf16", o: str = "bf16", hint: bool = True) -> None:
        constants = {"FORMAT": g, "O_FORMAT": o, "HINT": hint, "N": n, "BLOCK": products.BLOCKS[n]}
        wide = accesses(n * products.BLOCKS[n], (g,), (o,)) if hint else (0, 0)
        name = f"small {n} g={g} o={o}" + ("" if hint else " unaligned")
        found.append(Case(name, newton_schulz.small, constants, g, wide, {"num_stages": products.STAGES}))

    for size in (products.LARGE, products.LITTLE):
        product(size, B_TRANSPOSED=True, TRIANGLE=True)
        product(size, TRIANGLE=True, ADD=True)
        product(size)
        product(size, ADD=True)
        product(size, "bf16")
        product(size, "bf16", D_TRANSPOSED=True)
        product(size, full=False, ADD=True)
        product(size, full=False, B_TRANSPOSED=True, TRIANGLE=True)
    product(products.LITTLE, full=False, hint=False, ADD=True)
    for g in ("fp32", "bf16", "fp16"):
        prepare(g)
        for n in products.BLOCKS:
            small(n, g, g)
    prepare("bf16", tall=True)
    prepare("bf16", hint=False)
    for n in products.BLOCKS:
        small(n, hint=False)
    return found


def compiled(case: Case, capability: int) -> dict[str, Any]:
    """What the tools say of one specialisation on one target."""
    names = case.kernel.arg_names
    signature = {
        n: "constexpr" if n in case.constants else SAVED[case.format] if n in ("saved", "d") else POINTERS.get(n, "i32")
        for n in names
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
    found = {
        "name": case.name,
        "sm": capability,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "local": count(operations, "LDL", "STL"),
        "shared": result.metadata.shared,
        "loads16": count([op for op in operations if ".128" in op], "LDG"),
        "stores16": count([op for op in operations if ".128" in op], "STG"),
        "barriers": count(operations, "BAR"),
        "instructions": len(operations) - count(operations, "NOP"),
    }
    return found | {"faults": faults(case, found, operations)}


def count(operations: list[str], *kinds: str) -> int:
    """How many instructions are of these kinds."""
    return sum(op.startswith(kinds) for op in operations)


def faults(case: Case, found: dict[str, Any], operations: list[str]) -> list[str]:
    """What is not as it should be; the interpreter, which runs one program after another, sees none of it."""
    wrong = []
    if found["stack"] or found["local"]:
        wrong.append(f"{found['local']} spills, {found['stack']} bytes of stack")
    if found["loads16"] < case.wide[0] or found["stores16"] < case.wide[1]:
        wrong.append(f"{found['loads16']} + {found['stores16']} 16-byte accesses instead of {case.wide}")
    if case.kernel is newton_schulz.product and not count(operations, "HGMMA" if found["sm"] >= 90 else "HMMA"):
        wrong.append("no tensor cores")
    warps = (launch.OPTIONS | case.options)["num_warps"]
    if case.kernel is newton_schulz.product and found["sm"] >= 90 and 2 * 32 * warps * found["registers"] > REGISTERS:
        wrong.append(f"{found['registers']} registers: two programs do not fit on an SM")
    if case.constants.get("JOB") == "several" and found["barriers"] < 2:
        wrong.append("no barriers between the directions' entries and steps")
    if case.kernel is coordinate.tiles:
        barrier = next((i for i, op in enumerate(operations) if op.startswith("BAR")), None)
        tile = next((i for i, op in enumerate(operations) if op.startswith("LDG") and ".128" in op), len(operations))
        entry = next((i for i, op in enumerate(operations) if op.startswith("STG")), len(operations))
        if barrier is None or not entry < barrier < tile:
            wrong.append("no barrier between momentum entries and tile")
    return wrong


def markdown(results: list[dict[str, Any]]) -> str:
    """The table of all results."""
    columns = ["registers", "shared", "loads16", "stores16", "barriers", "instructions"]
    lines = [
        f"# Triton kernels ahead of time (triton {triton.__version__}, ptxas of its wheel; `make aot`)",
        "",
        "128 threads a program (large products and `measure`: 256), registers per thread, bytes of shared memory; "
        "nothing spills, nothing uses the stack. loads16, stores16: 16-byte global accesses in the code of full tiles "
        "(where loops are unrolled, of several).",
        "",
        "| kernel | sm | " + " | ".join(columns) + " |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    lines += [f"| {r['name']} | {r['sm']} | " + " | ".join(str(r[c]) for c in columns) + " |" for r in results]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--only", nargs="+", default=[], help="cases of these names, or with one of these texts in the name"
    )
    parser.add_argument("--sm", nargs="+", type=int, default=TARGETS, help="compute capabilities (default: 80 90)")
    parser.add_argument("--json", help="write the results here as JSON instead of the tables in bench/results")
    args = parser.parse_args()
    named = [case for case in cases() if case.name in args.only]
    chosen = named or [case for case in cases() if not args.only or any(text in case.name for text in args.only)]
    if not chosen:
        parser.error(f"no case is called {args.only}; the names begin like {cases()[0].name!r}")
    work = [(case, sm) for case in chosen for sm in args.sm]
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # what is read must be what is compiled now
        results = [compiled(case, sm) for case, sm in track(work, "compiling", console=console)]
    failed = [r for r in results if r["faults"]]
    for r in failed:
        console.print(f"[red]{r['name']} sm_{r['sm']}:[/] {'; '.join(r['faults'])}")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    elif not failed and not args.only:
        (RESULTS / "aot.json").write_text(
            json.dumps({"triton": triton.__version__, "results": results}, indent=1) + "\n"
        )
        (RESULTS / "aot.md").write_text(markdown(results))
        console.print(f"{len(results)} specialisations, nothing spills; written to {RESULTS / 'aot.md'}")
    return 1 if failed else 0
