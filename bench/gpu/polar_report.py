"""Newton-Schulz in the Markdown of a result, and its targets. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpu import polar_cases
from gpu.tables import Target, table, times

OWN = ("csrc", "Triton")


def _of_case(case: str, key: str, best: Callable[..., float]) -> Callable[[Sequence[dict[str, Any]]], float | None]:
    """The best number of our kernels."""

    def measured(rows: Sequence[dict[str, Any]]) -> float | None:
        found = [r[key] for r in rows if r["kind"] == "ns" and r["case"] == case and r["by"] in OWN and r.get(key)]
        return best(found) if found else None

    return measured


TARGETS = {
    **{
        case.name: Target(
            f"Newton-Schulz {case.name}: times as fast as the best of torch's",
            case.least,
            True,
            _of_case(case.name, "of_torch", max),
        )
        for case in polar_cases.CASES
        if case.least is not None
    },
    polar_cases.LORA_NAME: Target(
        f"Newton-Schulz {polar_cases.LORA_NAME}: time / that of torch's loop",
        polar_cases.LORA_MOST,
        False,
        _of_case(polar_cases.LORA_NAME, "of_loop", min),
    ),
}


def verdict(row: dict[str, Any]) -> str:
    """A target and whether this row reaches it; nothing where there is none, or the row is not ours."""
    target = TARGETS.get(row["case"])
    if target is None or row["kind"] != "ns" or row["by"] not in OWN:
        return ""
    return f"{target.asked}: {target.met(target.measured([row]))}"


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def said(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    if row["kind"] == "ceiling":
        return f"{row['method']}: {row['tflops']:.0f} TFLOP/s"
    if row["kind"] not in ("ns", "product"):
        return f"{row['method']}: {row['kind'].upper()}, no speed: {row['reason']}"
    parts = [f"{row['ms']['median']:.4g} ms", f"{row['tflops']:.4g} TFLOP/s", f"error {row['error']:.2g}"]
    if row.get("of_ceiling") is not None:
        parts.insert(2, f"{row['of_ceiling']:.2f} of cuBLAS")
    if row.get("of_torch") is not None:
        parts.append(f"{row['of_torch']:.2f} x the best of torch's")
    if row.get("of_loop") is not None:
        parts.append(f"{row['of_loop']:.4f} of torch's loop")
    if found := verdict(row):
        parts.append(f"target {found}")
    return f"{row['method']}: {', '.join(parts)}"


def section(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The Markdown of all rows; nothing where there are none."""
    measured = [row for row in rows if row["kind"] in ("ns", "product")]
    if not measured:
        return []
    lines = ["## Newton-Schulz", ""]
    lines += [
        "Random inputs; errors are relative (Frobenius), against the reference in fp32. TFLOP/s count the dense "
        "operations of the standard form (of a product, 2 n^3), whatever is in fact computed: half tiles and the Gram "
        "form compute less. LoRA factors by the host's clock, from an idle device; everything else is the device's "
        "work, competitors in turn, each with a cold L2 cache. '/ torch' is the time of the best of torch's over the "
        "row's.",
        "",
    ]
    for row in rows:
        if row["kind"] == "ceiling":
            lines += [f"{row['by']}, {row['case']}: {row['tflops']:.0f} TFLOP/s.", ""]
    head = ("case", "by", "ms", "device ms", "TFLOP/s", "of cuBLAS", "error", "/ torch", "of loop", "target")
    lines += table(
        head,
        [
            [
                row["case"],
                row["by"],
                times(row["ms"]),
                times(row["device_ms"]) if "device_ms" in row else "",
                f"{row['tflops']:.4g}",
                _number(row.get("of_ceiling")),
                f"{row['error']:.2g}",
                _number(row.get("of_torch")),
                _number(row.get("of_loop"), ".4f"),
                verdict(row),
            ]
            for row in measured
        ],
    )
    return lines
