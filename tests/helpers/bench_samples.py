"""Rows as the GPU benchmark writes them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from gpu import polar_cases, report


def sample(of_copy: float = 0.9, all_ms: float = 3.0) -> dict[str, Any]:
    ms = {"median": 1.5, "q1": 1.25, "q3": 1.75, "n": 50}
    where = {"kind": "step", "list": report.FULL, "what": "step", "host_ms": ms}
    kernel = {"kind": "kernel", "list": report.FULL, "ms": ms, "launches": 1, "bytes": 8e9, "gb_s": 4000.0}
    return {
        "machine": {"gpu": "NVIDIA H200", "date": "2026-11-22T10:00:00", "commit": "abc-dirty", "command": "make gpu"},
        "stages": [{"name": "racecheck", "status": "skipped", "seconds": 0.0, "note": "it is not on PATH"}],
        "lists": {report.FULL: {"title": "OPT-1.3B, all parameters", "tensors": 388, "parameters": 1315758080}},
        "rows": [
            {"kind": "copy", "list": report.FULL, "gb_s": 4300.0, "ms": ms, "bytes": 2**31},
            kernel | {"method": report.ALL, "kernel": "tiles restore + step, m bf16", "bytes_per_parameter": 6.34,
                      "formula": "2 m + 4 x + p (32 m + 2 saved)", "of_copy": of_copy},
            where | {"method": report.ALL, "launches": 3, "wall_ms": ms | {"median": all_ms}},
            where | {"method": report.MEZO, "wall_ms": ms | {"median": 30.0}, "peer": True},
            {"kind": "failure", "list": report.FULL, "method": "broken", "reason": "parity: differs"},
            {"kind": "dropped", "list": "opt-13b", "method": "late", "reason": "no time was left"},
        ],
    }  # fmt: skip


def ns_sample(of_torch: float = 2.3) -> list[dict[str, Any]]:
    ms = {"median": 2.0, "q1": 1.5, "q3": 2.5, "n": 7}
    case = {"kind": "ns", "list": "newton-schulz", "case": "8 x 2048 x 8192, cubic 10", "ms": ms, "flops": 1e13,
            "tflops": 5000.0, "of_ceiling": 1.25, "error": 2.5e-3}  # fmt: skip
    lora = case | {"case": polar_cases.LORA_NAME, "device_ms": ms, "of_torch": 4.0, "of_loop": 0.06, "by": "Triton"}
    return [
        {"kind": "ceiling", "list": "newton-schulz", "method": "8192: cuBLAS, bf16", "by": "cuBLAS, bf16",
         "case": "8192 x 8192 x 8192", "tflops": 780.0},
        case | {"by": "csrc", "method": "csrc", "of_torch": of_torch},
        case | {"by": "torch.compile", "method": "torch.compile", "of_torch": 1.0},
        lora | {"method": "lora"},
        {"kind": "product", "list": "newton-schulz", "case": "X X^T, 8 x 2048 x 2048", "by": "csrc, triangle", "ms": ms,
         "method": "product", "flops": 1e12, "tflops": 500.0, "error": 1e-4, "of_torch": 1.7},
        {"kind": "failure", "list": "newton-schulz", "case": "c", "method": "c: Triton", "by": "Triton",
         "reason": "parity: relative error 0.1, allowed is 0.01"},
    ]  # fmt: skip


def by(rows: list[dict[str, Any]], kind: str, case: str) -> dict[str, dict[str, Any]]:
    return {row["by"]: row for row in rows if row["kind"] == kind and row["case"] == case}
