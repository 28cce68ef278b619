"""The GPU benchmark without a GPU: lists, byte counts, report, refusals, and its code paths in the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import bench_gpu  # noqa: E402
import bench_kernels  # noqa: E402
from gpu import clock, report, result, shapes, stages, traffic  # noqa: E402

COUNTS = {
    "opt-1.3b": (388, 1_315_758_080),
    "opt-1.3b-lora": (96, 1_572_864),
    "roberta-large": (394, 355_412_057),
    "llama-2-7b-lora": (128, 4_194_304),
    "opt-13b-lora": (160, 6_553_600),
    "llama-2-7b": (291, 6_738_415_616),
    "opt-13b": (644, 12_853_473_280),
}


def test_the_lists_have_the_models_numbers_of_parameters() -> None:
    assert {name: (len(entry.shapes), entry.count) for name, entry in shapes.LISTS.items()} == COUNTS
    assert list(shapes.LISTS)[:2] == [report.FULL, report.LORA]  # those with targets first


def test_the_lists_are_those_of_transformers() -> None:
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        OPTConfig,
        OPTForCausalLM,
        RobertaConfig,
        RobertaForMaskedLM,
    )

    opt = OPTConfig(hidden_size=2048, num_hidden_layers=24, ffn_dim=8192, num_attention_heads=32, vocab_size=50272,
                    word_embed_proj_dim=2048, max_position_embeddings=2048)  # fmt: skip
    llama = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
    roberta = RobertaConfig(hidden_size=1024, num_hidden_layers=24, intermediate_size=4096, num_attention_heads=16,
                            vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)  # fmt: skip
    models = {
        "opt-1.3b": (OPTForCausalLM, opt),
        "llama-2-7b": (LlamaForCausalLM, llama),
        "roberta-large": (RobertaForMaskedLM, roberta),
    }
    for name, (make, config) in models.items():
        with torch.device("meta"):
            model = make(config)
        assert dict(shapes.LISTS[name].shapes) == {n: tuple(p.shape) for n, p in model.named_parameters()}


FLOORS = [  # DESIGN.md, section 6, at p = 1 %
    ("tiles", {"RESTORE": True, "X_FORMAT": "bf16", "M_FORMAT": "bf16"}, 6.34),
    ("tiles", {"RESTORE": True, "X_FORMAT": "bf16", "M_FORMAT": "fp32"}, 8.34),
    ("tiles", {"RESTORE": True, "X_FORMAT": "bf16", "M_FORMAT": "e5m2"}, 5.34),
    ("tiles", {"RESTORE": False, "X_FORMAT": "bf16", "M_FORMAT": "bf16"}, 6.32),
    ("sparse", {"JOB": "perturb", "X_FORMAT": "bf16", "M_FORMAT": "fp32"}, 0.66),
    ("sparse", {"JOB": "fused", "X_FORMAT": "bf16", "M_FORMAT": "bf16"}, 1.30),
    ("sparse", {"JOB": "update", "X_FORMAT": "bf16", "M_FORMAT": "bf16"}, 1.28),
    ("move", {"JOB": "walk", "FORMAT": "bf16", "DISTRIBUTION": "gaussian"}, 4.0),
    ("move", {"JOB": "save", "FORMAT": "bf16", "DISTRIBUTION": "gaussian"}, 6.0),
    ("step", {"JOB": "walked", "X_FORMAT": "bf16", "M_FORMAT": "none", "RULE": "sgd", "DISTRIBUTION": "gaussian"}, 4.0),
    ("step", {"JOB": "plain", "X_FORMAT": "fp32", "M_FORMAT": "bf16", "RULE": "sgd", "DISTRIBUTION": "gaussian"}, 12.0),
]


@pytest.mark.parametrize("kernel, options, floor", FLOORS)
def test_bytes_are_those_of_the_floor_table(kernel: str, options: dict[str, Any], floor: float) -> None:
    assert traffic.per_parameter(kernel, options, 0.01)[0] == pytest.approx(floor)
    assert traffic.label(kernel, options)


# -- clocks --------------------------------------------------------------------------------------------------------


def test_summary_gives_median_and_quartiles() -> None:
    assert clock.summary([3.0, 1.0, 2.0, 5.0, 4.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "n": 5}
    assert clock.summary([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0, "n": 1}


class _Event:
    """Stands for torch.cuda.Event: the n-th one was recorded at n milliseconds."""

    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        _Event.made += 1
        self._at = _Event.made

    def elapsed_time(self, other: _Event) -> float:
        return float(other._at - self._at)


def test_the_cuda_clock_warms_up_and_times_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(clock, "_FLUSH", 64)
    calls: list[int] = []
    timer = clock.CudaClock(torch.device("cpu"), 0.0, least=4, warm_up=2)
    assert timer.kernel_ms(lambda: calls.append(1)) == {"median": 1.0, "q1": 1.0, "q3": 1.0, "n": 4}
    assert len(calls) == 2 + 4
    timer.copy_bytes = 4096
    assert timer.copy_gb_s()["bytes"] == 8192
    assert timer.wall_ms(lambda: None, before=lambda: calls.append(2))["n"] == 4
    assert calls.count(2) == 2 + 4


# -- report --------------------------------------------------------------------------------------------------------


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


def test_the_page_shows_targets_numbers_failures_and_what_was_dropped() -> None:
    page = report.markdown(sample())
    lines = [
        "# NVIDIA H200, 2026-11-22",
        "- commit: abc-dirty",
        "| racecheck | skipped | 0.0 | it is not on PATH |",
        "| dense sign step (update='all', m bf16), share of copy | >= 0.85 | 0.90 | met |",
        "| JAGUAR 'all' step / MeZO's loop, OPT-1.3B | <= 0.125 | 0.1000 | met |",
        "| JAGUAR 'sampled' step / MeZO's loop, OPT-1.3B | <= 0.033 |  | not measured |",
        "388 bf16 tensors, 1,315,758,080 parameters. Device copy: 4300 GB/s read and written.",
        f"| tiles restore + step, m bf16 | {report.ALL} | 1.5 (1.25 to 1.75; 50) | "
        "6.34 = 2 m + 4 x + p (32 m + 2 saved) | 4000 | 0.90 |",
        f"| {report.MEZO} | step |  | 30 (1.25 to 1.75; 50) | 1.5 (1.25 to 1.75; 50) | 1.0000 |",
        "- opt-1.3b, broken: parity: differs",
        "- opt-13b, late: no time was left",
    ]
    assert [line for line in lines if line not in page.splitlines()] == []
    assert report.failures(sample()) == ["opt-1.3b, broken: parity: differs"]


def test_a_missed_target_is_not_met() -> None:
    verdicts = {row[0]: row[3] for row in report.target_rows(sample(of_copy=0.84, all_ms=4.0))}
    assert verdicts["dense sign step (update='all', m bf16), share of copy"] == "not met"
    assert verdicts["JAGUAR 'all' step / MeZO's loop, OPT-1.3B"] == "not met"


def test_a_result_is_named_after_gpu_and_day_and_can_be_read_back(tmp_path: Path) -> None:
    path = result.path_of({"gpu": "NVIDIA A100-SXM4-80GB", "date": "2026-11-22T10:00:00"}, tmp_path)
    assert path.name == "a100-sxm4-80gb-2026-11-22.json"
    result.save(path, sample())
    assert result.load(path) == json.loads(json.dumps(sample()))
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".md"]


# -- stages and command lines --------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    own = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode == 2 and done.stdout == ""
    assert own == ["error: no NVIDIA GPU: torch finds none on this machine"]


def test_both_programs_exit_with_2_where_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main([]) == bench_kernels.main([]) == 2
    assert capsys.readouterr().err.count("error: no NVIDIA GPU") == 2


@pytest.mark.parametrize("words", [["--seconds", "-1"], ["--lists", "bert"], ["--into", "/nowhere/x.json"]], ids=str)
def test_wrong_arguments_are_named(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(result, "no_gpu", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        bench_kernels.main(words)
    assert f"{words[0]} {words[1]}:" in capsys.readouterr().err


ENDS = [
    (0, "3 passed, 2 deselected in 9.1s", "passed"),
    (0, "3 skipped in 0.1s", "failed"),
    (1, "1 failed, 2 passed in 3.0s", "failed"),
    (5, "5 deselected in 0.1s", "failed"),
    (None, "", "failed"),
    (1, "========= Error: Device not supported", "skipped"),
    (stages._FOUND, "1 passed in 2s\n========= ERROR SUMMARY: 4 errors", "failed"),
]


@pytest.mark.parametrize("code, said, status", ENDS, ids=lambda v: repr(v)[:20])
def test_how_a_test_stage_ends(
    code: int | None, said: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], seconds: float, log: Path, **more: str) -> int | None:
        assert command[0] == "sanitize" and "-P" in command and str(tmp_path / "tests" / "test_a.py") in command
        log.write_text(said)
        return code

    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("@pytest.mark." + "gpu\ndef test_small(): pass\n")
    (tmp_path / "tests" / "test_b.py").write_text("def test_other(): pass\n")
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    monkeypatch.setattr(stages, "BUILD", tmp_path)
    monkeypatch.setattr(stages, "run", run)
    stage = stages.tests("memcheck", 1.0, ["sanitize"], "small")
    assert stage.status == status and stage.note


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    begin = time.monotonic()
    assert stages.run(["sh", "-c", "echo begun; sleep 60"], 1.0, tmp_path / "log") is None
    assert time.monotonic() - begin < 10 and (tmp_path / "log").read_text() == "begun\n"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("jaguar/__init__.py", "jaguar/ops.py", "triton_kernels/launch.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    monkeypatch.setattr(stages, "BUILD", tmp_path / "build")
    monkeypatch.setattr(stages, "TARGET", tmp_path / "build" / "gpu")
    yield tmp_path


@pytest.mark.parametrize("pip, status", [(1, "passed"), (0, "failed")], ids=["pip-cannot", "pip-forgets-modules"])
def test_where_pip_cannot_the_package_is_copied_together(
    pip: int, status: str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "run", lambda command, *_: pip if "pip" in command else 0)
    stage = stages.build(1.0)
    assert stage.status == status and "cop" in stage.note
    built = {str(p.relative_to(stages.TARGET)): p.read_text() for p in stages.TARGET.rglob("*.py")}
    assert built == {
        "jaguar/__init__.py": "# jaguar/__init__.py\n",
        "jaguar/ops.py": "# jaguar/ops.py\n",
        "jaguar/triton_kernels/launch.py": "# triton_kernels/launch.py\n",
    }


# -- the benchmark itself, in Triton's interpreter -----------------------------------------------------------------

TRIAL = """
import json, sys
sys.path.insert(0, "bench")
import torch
from gpu import compiled, peers, shapes, suite
from gpu.clock import CpuClock
from jaguar import rules

torch.set_num_threads(1)
CpuClock.copy_bytes = 4096
tiny = shapes.ParameterList("tiny", "one tensor", (("a.weight", (3, 71)),))
two = shapes.ParameterList("two", "a matrix and a vector", (("a.weight", (40, 70)), ("b.bias", (33,))))
clock = CpuClock(torch.device("cpu"), 0.0, least=1, warm_up=0)
rademacher = next(m for m in suite.MORE if m.name == "ZO-SGD rademacher, copy")
good = list(suite.run([(tiny, [suite.METHODS[0], rademacher]), (two, peers.PEERS)], clock, lambda: 1e3))
late = list(suite.run([(tiny, [suite.METHODS[0]])], clock, lambda: 0.0))
slow = list(suite.run([(tiny, [compiled.CompiledSign])], clock, lambda: 30.0))
rules.sign_step = lambda x, m, decay, lr: x + m.sign() * lr
peers.MezoLoop._z = lambda self, p: torch.full_like(p, float("nan"))
bad = list(suite.run([(tiny, [suite.METHODS[0], peers.MezoLoop])], clock, lambda: 1e3))
print(json.dumps([good, late, slow, bad]))
"""


@pytest.fixture(scope="module")
def trial() -> list[list[dict[str, Any]]]:
    """Rows of a run on tiny lists, without time, with too little for a compiler, and with parity broken."""
    pytest.importorskip("triton")
    before = sorted((ROOT / "bench" / "results").iterdir())
    done = subprocess.run(
        [sys.executable, "-P", "-c", TRIAL],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert sorted((ROOT / "bench" / "results").iterdir()) == before
    rows: list[list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def test_the_benchmark_measures_every_kernel_step_and_peer(trial: list[list[dict[str, Any]]]) -> None:
    good = trial[0]
    assert not [row for row in good if row["kind"] in ("failure", "dropped")]
    kernels = {(row["method"], row["kernel"]): row for row in good if row["kind"] == "kernel"}
    zo = "ZO-SGD rademacher, copy"
    assert set(kernels) == {
        *((report.ALL, job) for job in ("perturb", "flip", "restore")),
        *((report.ALL, f"tiles {job}, m bf16") for job in ("restore + step", "step")),
        *((zo, f"{job}, rademacher") for job in ("save", "flip", "restore")),
        *((zo, f"step {job}, sgd, rademacher") for job in ("plain", "saved")),
    }
    assert all(row["ms"]["n"] == 1 and row["gb_s"] > 0 for row in kernels.values())
    assert kernels[report.ALL, "tiles restore + step, m bf16"]["bytes"] == pytest.approx(6.34 * 213)
    steps = {(row["method"], row["what"]): row for row in good if row["kind"] == "step"}
    assert steps[report.ALL, "step"]["launches"] == 3 and steps[report.ALL, "apply_"]["launches"] == 1
    assert (report.MEZO, "step") in steps and ("JAGUAR as released", "step") in steps and len(steps) == 4 + 5


def test_every_row_can_be_printed_and_reported(trial: list[list[dict[str, Any]]]) -> None:
    for rows in trial:
        assert all(bench_kernels.said(row) for row in rows)
        assert report.markdown(sample() | {"rows": rows})


def test_what_there_is_no_time_for_is_dropped(trial: list[list[dict[str, Any]]]) -> None:
    assert [(row["kind"], row["reason"]) for row in trial[1]] == [("dropped", "no time was left")]
    assert [row["kind"] for row in trial[2]] == ["copy", "dropped"]


def test_a_failing_parity_prints_no_speed(trial: list[list[dict[str, Any]]]) -> None:
    bad = trial[3]
    assert [row["kind"] for row in bad] == ["copy", "failure", "failure"]
    for row in bad[1:]:
        assert row["reason"].startswith("parity: ") and not {"ms", "wall_ms", "host_ms", "gb_s"} & set(row)
        assert "FAILURE, no speed" in bench_kernels.said(row) and " ms" not in bench_kernels.said(row)
    assert len(report.failures(sample() | {"stages": [], "rows": bad})) == 2
    assert "GB/s |" not in report.markdown(sample() | {"rows": bad})
