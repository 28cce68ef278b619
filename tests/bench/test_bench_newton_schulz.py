"""The benchmark of Newton-Schulz without a GPU."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from gpu import clock, polar_cases, polar_report, report
from helpers.bench_samples import by, ns_sample, sample
from polar import newton_schulz
from step import shapes


def test_operations_are_those_of_the_standard_form() -> None:
    """In GFLOP."""
    for (n, m), cubic, quintic in (
        ((1024, 1024), 42.9, 32.2),
        ((2048, 8192), 1374, 773),
        ((5120, 20480), 21475, 12080),
    ):
        assert 1e-9 * polar_cases.standard_flops(n, m, "cubic", 10) == pytest.approx(cubic, rel=2e-3)
        assert 1e-9 * polar_cases.standard_flops(n, m, "quintic", 5) == pytest.approx(quintic, rel=2e-3)
    assert polar_cases.Case(8, 2048, 8192).flops == 8 * polar_cases.standard_flops(2048, 8192, "cubic", 10)
    assert polar_cases.Case(8, 5120, 20480).bytes < 2**35


def test_what_is_asked_of_newton_schulz() -> None:
    wanted = {case.name: case.least for case in polar_cases.CASES}
    sizes = {"2048 x 8192": 2.2, "5120 x 20480": 2.5, "2048 x 2048": 1.0, "4096 x 4096": 1.1}
    assert wanted == {f"8 x {size}, cubic 10": least for size, least in sizes.items()}
    assert sum(case.scheme == "quintic" for case in polar_cases.MORE) == 2
    assert {(c.batch, c.n, c.m) for c in polar_cases.MORE if c.scheme == "cubic"} == {(1, 1024, 1024), (1, 2048, 2048)}
    # All factors of OPT-1.3B's list.
    assert sorted(shape for _, shape in shapes.LISTS["opt-1.3b-lora"].shapes) == sorted(polar_cases.LORA)
    assert {n for _, n in polar_cases.PRODUCTS} == {1024, 2048, 3072, 4096} and len(set(polar_cases.PRODUCTS)) == 8


def test_the_page_shows_newton_schulz_beside_its_targets() -> None:
    rows = ns_sample()
    page = report.markdown(sample() | {"rows": rows}).splitlines()
    name = "8 x 2048 x 8192, cubic 10"
    lines = [
        f"| Newton-Schulz {name}: times as fast as the best of torch's | >= 2.20 | 2.30 | met |",
        f"| Newton-Schulz {polar_cases.LORA_NAME}: time / that of torch's loop | <= 0.050 | 0.0600 | not met |",
        "| Newton-Schulz 8 x 4096 x 4096, cubic 10: times as fast as the best of torch's | >= 1.10 |  | not measured |",
        "cuBLAS, bf16, 8192 x 8192 x 8192: 780 TFLOP/s.",
        f"| {name} | csrc | 2 (1.5 to 2.5; 7) |  | 5000 | 1.25 | 0.0025 | 2.30 |  | >= 2.20: met |",
        f"| {name} | torch.compile | 2 (1.5 to 2.5; 7) |  | 5000 | 1.25 | 0.0025 | 1.00 |  |  |",
        "- newton-schulz, c: Triton: parity: relative error 0.1, allowed is 0.01",
    ]
    assert [line for line in lines if line not in page] == []
    assert "target >= 2.20: not met" in polar_report.said(ns_sample(of_torch=2.1)[1])
    assert polar_report.said(rows[0]).endswith("780 TFLOP/s") and "0.0600 of torch's loop" in polar_report.said(rows[3])
    assert polar_report.section([]) == [] and "Newton-Schulz" not in "".join(
        line for line in report.markdown(sample()).splitlines() if line.startswith("##")
    )


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("triton")
    from polar import peers, suite

    monkeypatch.setattr(peers.torch, "compile", lambda function, **_: function)
    return suite


TINY: dict[str, Any] = {
    "cases": [polar_cases.Case(3, 8, 24)],
    "more": [polar_cases.Case(1, 6, 6, "quintic", 5)],
    "lora": ((2, 12), (12, 2)) * 2,
    "products": [(1, 40)],
    "ceiling": 16,
}
OWN, EAGER = "Triton", "torch eager, baddbmm"


def ns_rows(suite: Any, left: float = 1e3, **options: Any) -> list[dict[str, Any]]:
    timer = clock.CpuClock(torch.device("cpu"), 0.0, least=1, warm_up=0)
    rows = list(suite.run(timer, lambda: left, **TINY | options))
    assert all(polar_report.said(row) for row in rows) and report.markdown(sample() | {"rows": rows})
    assert json.loads(json.dumps(rows)) == rows
    return rows


def test_newton_schulz_is_measured_beside_torch(suite: Any) -> None:
    rows = ns_rows(suite)
    assert [row for row in rows if row["kind"] == "failure"] == []
    case, more = TINY["cases"][0], TINY["more"][0]
    found = by(rows, "ns", case.name)
    assert set(found) == {OWN, EAGER, "torch eager, matrix by matrix", "torch.compile"}
    for row in found.values():
        assert row["ms"]["n"] == 1 and row["tflops"] > 0 and row["of_ceiling"] > 0 and row["flops"] == case.flops
        assert row["error"] < 0.02
    best = min(row["ms"]["median"] for name, row in found.items() if name != OWN)
    assert found[OWN]["of_torch"] == best / found[OWN]["ms"]["median"]
    assert set(by(rows, "ns", more.name)) == {OWN, EAGER, "torch.compile", "torch.optim.Muon's"}
    lora = by(rows, "ns", polar_cases.LORA_NAME)
    assert set(lora) == {OWN, EAGER, "torch eager, matrix by matrix"}
    assert lora["torch eager, matrix by matrix"]["of_loop"] == 1.0 and lora[OWN]["device_ms"]["n"] == 1
    products = by(rows, "product", "X X^T, 1 x 40 x 40")
    assert set(products) == {"Triton, full", "Triton, triangle", "torch.bmm"}
    (gone,) = by(rows, "dropped", "all").values()
    assert gone["by"] == "csrc" and gone["reason"].startswith("not available: ")


def test_newton_schulz_that_is_wrong_has_no_speed(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaguar.backends.polar.triton import TritonProducts
    from polar import peers

    real, product = peers.own, TritonProducts.product

    def off(*arguments: Any) -> Any:
        call = real(*arguments)
        return lambda matrices: [O * 1.1 if i == 1 else O for i, O in enumerate(call(matrices))]  # noqa: E741

    def lopsided(self: Any, out: torch.Tensor, *arguments: Any, **options: Any) -> None:
        product(self, out, *arguments, **options)
        out[0, 0, 1] += 2.0**-8

    monkeypatch.setattr(peers, "own", off)
    monkeypatch.setattr(TritonProducts, "product", lopsided)
    rows = ns_rows(suite, more=[])
    for case in (TINY["cases"][0].name, polar_cases.LORA_NAME):
        bad = by(rows, "failure", case)[OWN]
        assert bad["reason"].startswith("parity: relative error 0.")
        assert not {"ms", "tflops", "of_torch"} & set(bad) and " ms" not in polar_report.said(bad)
        assert OWN not in by(rows, "ns", case) and EAGER in by(rows, "ns", case)
    assert "Triton, triangle" in by(rows, "failure", "X X^T, 1 x 40 x 40")
    assert len(report.failures(sample() | {"stages": [], "rows": rows})) >= 3


def test_errors_are_measured_by_those_of_torch() -> None:
    pytest.importorskip("triton")
    from polar import suite

    errors = {"csrc": 0.0121, "Triton": 0.0119, "usual": 0.01, "other": 0.24, "wild": 0.26, "csrc, full": float("nan")}
    assert set(suite.judged(errors, "usual", ["csrc", "Triton", "csrc, full"])) == {"csrc", "csrc, full", "wild"}


def test_another_torch_without_muons_orthogonalisation(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    muon = pytest.importorskip("torch.optim._muon")
    only: dict[str, Any] = {"cases": [], "lora": TINY["lora"][:2], "products": []}
    monkeypatch.setattr(muon, "_zeropower_via_newtonschulz", lambda G, steps: G)
    (row,) = (row for row in ns_rows(suite, **only) if row["by"] == "torch.optim.Muon's")
    assert row["kind"] == "dropped" and row["reason"] == "not available: this torch's takes G, steps"
    monkeypatch.delattr(muon, "_zeropower_via_newtonschulz")
    (row,) = (row for row in ns_rows(suite, **only) if row["by"] == "torch.optim.Muon's")
    assert row["kind"] == "dropped" and row["reason"].startswith("not available: cannot import")


def test_a_compiler_that_fails_is_reported_and_not_fatal(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from polar import peers

    def broken(*_: Any) -> Any:
        raise RuntimeError("no\n compiler")

    monkeypatch.setattr(peers.torch, "compile", lambda function, **_: broken)
    only: dict[str, Any] = {"lora": TINY["lora"][:2], "products": []}
    rows = ns_rows(suite, **only)
    for case in (TINY["cases"][0], TINY["more"][0]):
        assert by(rows, "dropped", case.name)["torch.compile"]["reason"] == "failed: RuntimeError: no compiler"
    assert not [row for row in rows if row["kind"] == "failure"]


def test_a_compiler_that_takes_too_long_is_stopped(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from polar import peers

    monkeypatch.setattr(peers.torch, "compile", lambda function, **_: lambda *_: time.sleep(3600))
    compiled = peers.Compiled()
    for _ in range(2):
        with pytest.raises(peers.NotHere, match="failed: compilation took more than 1 s"):
            compiled.first(torch.zeros(1, 2, 2), "cubic", 0.5)


def test_what_newton_schulz_has_no_time_for_is_dropped(suite: Any) -> None:
    rows = ns_rows(suite, left=0.0)
    kinds = [(row["kind"], row["reason"]) for row in rows if row["kind"] != "ceiling"][1:]
    assert kinds == 4 * [("dropped", "no time was left")]


def test_accuracy_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--shapes", "8x24", "2x4x8", "--out", str(tmp_path)]
    assert newton_schulz.main(words) == 0
    written = json.loads((tmp_path / "newton-schulz-accuracy.json").read_text())
    rows = {(*row["shape"], row["spectrum"], row["scheme"], row["by"]): row for row in written["rows"]}
    assert len(rows) == 2 * 2 * 3 * 3 + 6 * ("triton" in {row["by"] for row in written["rows"]})
    exact = rows[8, 24, "Gaussian", "cubic", "reference, fp64"]
    assert exact["error"] == 0.0 and exact["alignment"] > 0.999 and exact["largest"] < 1.0 + 1e-12
    fp32, bf16 = (rows[8, 24, "logspace(0, -3)", "cubic", f"reference, {name}"]["error"] for name in ("fp32", "bf16"))
    assert fp32 < 1e-4 < bf16 < 0.1
    page = (tmp_path / "newton-schulz-accuracy.md").read_text()
    assert "| 2 x 4 x 8 | Gaussian | polar_express | 8 | reference, fp32 |" in page and "cuda: omitted, " in page
    assert "Newton-Schulz" in capsys.readouterr().out


def test_the_program_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert newton_schulz.main(["--speed"]) == 2
    for words in (["--device", "cuda"], ["--into", "/nowhere/x.json"], ["--shapes", "8"]):
        with pytest.raises(SystemExit, match="2"):
            newton_schulz.main(words)
        assert f"argument {words[0]}" in (said := capsys.readouterr().err) or f"{words[0]} {words[1]}:" in said
