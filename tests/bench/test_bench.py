"""The GPU benchmark without a GPU: lists, byte counts, report, refusals, and its code paths in the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import bench_gpu  # noqa: E402
import bench_kernels  # noqa: E402
import bench_newton_schulz  # noqa: E402
from gpu import clock, ns_cases, ns_report, report, result, shapes, stages, traffic  # noqa: E402

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


def sgd_step() -> None:
    """What a launch calls the function of its rule."""


FLOORS = [  # DESIGN.md, section 6, at p = 1 %
    ("tiles", {"RESTORE": True, "X_FORMAT": "bf16", "S0": "bf16"}, 6.34),
    ("tiles", {"RESTORE": True, "X_FORMAT": "bf16", "S0": "fp32"}, 8.34),
    ("tiles", {"RESTORE": True, "X_FORMAT": "bf16", "S0": "e5m2"}, 5.34),
    ("tiles", {"RESTORE": False, "X_FORMAT": "bf16", "S0": "bf16"}, 6.32),
    ("sparse", {"JOB": "perturb", "X_FORMAT": "bf16", "S0": "fp32"}, 0.66),
    ("sparse", {"JOB": "fused", "X_FORMAT": "bf16", "S0": "bf16"}, 1.30),
    ("sparse", {"JOB": "update", "X_FORMAT": "bf16", "S0": "bf16"}, 1.28),
    ("move", {"JOB": "walk", "FORMAT": "bf16", "DISTRIBUTION": "gaussian"}, 4.0),
    ("move", {"JOB": "save", "FORMAT": "bf16", "DISTRIBUTION": "gaussian"}, 6.0),
    ("step", {"JOB": "walked", "X_FORMAT": "bf16", "S0": "none", "STEP": sgd_step, "DISTRIBUTION": "gaussian"}, 4.0),
    ("step", {"JOB": "plain", "X_FORMAT": "fp32", "S0": "bf16", "STEP": sgd_step, "DISTRIBUTION": "gaussian"}, 12.0),
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


def test_competitors_take_turns_with_a_head_start_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(clock, "_FLUSH", 64)
    order: list[str] = []
    now = [0.0]
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))  # the machine may be busy

    def slow() -> None:
        now[0] += 0.002
        order.append("b")

    calls = [lambda: order.append("a"), slow]
    timer = clock.CudaClock(torch.device("cpu"), 0.0, least=3, warm_up=2)
    assert timer.side_by_side_ms(calls) == 2 * [{"median": 1.0, "q1": 1.0, "q3": 1.0, "n": 3}]
    assert "".join(order) == "aabb" + 3 * "ab"
    # What takes the host 2 ms gets 2.4 ms of 2.5 GHz; what takes no time gets what a kernel gets.
    assert set(slept[::2]) == {400_000} and min(slept[1::2]) > 5_900_000
    assert max(slept) < 6_100_000
    found = clock.CpuClock(torch.device("cpu"), 0.0, least=3, warm_up=1).side_by_side_ms(calls)
    assert (
        found[1]["median"] == pytest.approx(2.0) and found[0]["median"] == 0.0 and found[0]["n"] == found[1]["n"] == 3
    )


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


def test_the_page_shows_steps_of_models_beside_inference() -> None:
    ms = {"median": 1.5, "q1": 1.25, "q3": 1.75, "n": 50}
    row = {"kind": "model", "list": "models", "model": "OPT", "what": "MeZO", "method": "OPT: MeZO", "rows": 16}
    row |= {"tokens": 32, "ms": ms, "of_two": 1.25, "weights": 2**31, "inference": 3 * 2**30, "peak": 4 * 2**30}
    line = "| OPT, 16 x 32 tokens | MeZO | 1.5 (1.25 to 1.75; 50) | 1.25 | 4.00 | 0.500 |"
    assert line in report.markdown(sample() | {"rows": [row]}).splitlines()


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


def test_models_are_measured_beside_inference() -> None:
    """Tiny ones, on the CPU: the same rows, and what an optimizer cannot do is a failure of its own."""
    pytest.importorskip("transformers")
    from gpu import models

    kind, values = models.MODELS[0].config
    small = {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_attention_heads": 2, "vocab_size": 300}
    tiny = models.Model("tiny", (kind, values | small | {"num_hidden_layers": 1}), rows=2, tokens=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of perturbations that bf16 swallows
        rows = list(models.run(clock.CpuClock(torch.device("cpu"), 0.0, 2, 1), lambda: 100.0, [tiny]))
    assert [row["what"] for row in rows] == [models.FORWARD, *(name for name, _ in models.JOBS)]
    assert all(row["kind"] == "model" and row["ms"]["n"] >= 2 and models.said(row) for row in rows), rows
    late = list(models.run(clock.CpuClock(torch.device("cpu"), 0.0, 2, 1), lambda: 1.0, [tiny]))
    assert [row["kind"] for row in late] == ["dropped"] and report.failures({"stages": [], "rows": late}) == []


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
    stage = stages.tests("memcheck", 1.0, tmp_path, ["sanitize"], "small")
    assert stage.status == status and stage.note


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    begin, log = time.monotonic(), tmp_path / "log"
    for limit in (1.0, 10.0, 100.0):  # on a busy machine the shell takes its time to begin
        assert stages.run(["sh", "-c", "echo begun; sleep 3600"], limit, log) is None
        if log.read_text():
            break
    assert time.monotonic() - begin < 1800 and log.read_text() == "begun\n"


def test_a_stage_that_is_cut_off_reports_its_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text(
        "import pytest, time\npytestmark = pytest.mark." + "gpu\ndef test_wrong(): assert 1 == 2\n"
        "def test_endless(): time.sleep(3600)\ndef test_last(): time.sleep(3600)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    for limit in (5.0, 20.0, 100.0):  # on a busy machine the processes take their time to begin
        stage = stages.tests("tests", limit, tmp_path)
        log = (tmp_path / "gpu-tests.log").read_text()
        if "FAILED" in log:
            break
    assert stage.status == "failed" and "1 failed" in stage.note and "assert 1 == 2" in log


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("jaguar/__init__.py", "jaguar/backends/ops.py", "triton_kernels/launch.py"):
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
    stage = stages.build(1.0, repository / "logs")
    assert stage.status == status and "cop" in stage.note
    built = {str(p.relative_to(stages.TARGET)): p.read_text() for p in stages.TARGET.rglob("*.py")}
    assert built == {
        "jaguar/__init__.py": "# jaguar/__init__.py\n",
        "jaguar/backends/ops.py": "# jaguar/backends/ops.py\n",
        "jaguar/triton_kernels/launch.py": "# triton_kernels/launch.py\n",
    }


class Runs:
    """Stands for stages.run; a benchmark adds rows to its result file."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.selected: list[str] = []

    def __call__(self, command: list[Any], seconds: float, log: Path | None = None, **more: str) -> int:
        words = [str(word) for word in command]
        name = next((Path(w).name for w in words if w.endswith(".py") and "bench_" in w), "pytest")
        if name == "pytest":
            self.selected.append(words[-1])
        else:
            self.seconds[name] = seconds
            path = Path(words[words.index("--into") + 1])
            found = result.load(path)
            found["rows"] += ns_sample() if "--speed" in words else sample()["rows"]
            result.save(path, found)
        if log is not None:
            log.write_text("3 passed in 1s")
        return 0 if name == "pytest" else 1


def test_make_gpu_runs_all_stages_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs()
    monkeypatch.setattr(result, "no_gpu", lambda: None)
    monkeypatch.setattr(result, "machine", lambda *_: sample()["machine"])
    monkeypatch.setattr(stages, "run", runs)
    monkeypatch.setattr(stages, "BUILD", tmp_path)
    monkeypatch.setattr(stages.shutil, "which", lambda name: name)
    monkeypatch.setattr(stages, "build", lambda seconds, logs: stages.Stage("build", "passed", 1.0, "built"))
    monkeypatch.setattr(bench_gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(bench_gpu, "time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # main takes it out, and it comes back
    assert bench_gpu.main(["--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.json")
    found = result.load(path)
    names = ["build", "tests", "memcheck", "racecheck", "kernels", "newton-schulz", "models"]
    assert [stage["name"] for stage in found["stages"]] == names
    assert {p.name for p in tmp_path.glob("*.log")} == {f"gpu-{n}.log" for n in ("tests", "memcheck", "racecheck")}
    assert sorted(runs.selected)[1:] == ["small", "small"], "all tests, and the small ones under each tool"
    notes = {stage["name"]: stage["note"] for stage in found["stages"]}
    # Each benchmark counts its own rows.
    assert notes["kernels"] == "3 measurements; 1 failures" and notes["newton-schulz"] == "4 measurements; 1 failures"
    caps = bench_gpu.CAPS
    assert runs.seconds["bench_newton_schulz.py"] == caps["newton-schulz"]
    # Nothing here takes time, so the benchmark gets all but what the last stages need.
    assert (
        bench_gpu.LIMIT - caps["newton-schulz"] - caps["models"] - 20
        < runs.seconds["bench_kernels.py"]
        < bench_gpu.LIMIT
    )
    assert sum(cap or 60.0 for cap in caps.values()) < bench_gpu.LIMIT < 540


def test_stages_at_the_same_time_end_with_the_run(tmp_path: Path) -> None:
    def interrupted() -> stages.Stage:
        while not (tmp_path / "log").exists() or not stages._running:
            time.sleep(0.01)
        raise KeyboardInterrupt

    def sleeping() -> stages.Stage:
        code = stages.run(["sleep", "3600"], 3600.0, tmp_path / "log")
        return stages.Stage("sleep", "failed", 0.0, str(code))

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stages.together(interrupted, sleeping)
    assert time.monotonic() - begin < 1800 and not stages._running
    ends = stages.together(*(partial(stages.Stage, name, "passed", 0.0, "") for name in "ab"))
    assert [stage.name for stage in ends] == ["a", "b"]


# -- the benchmark itself, in Triton's interpreter -----------------------------------------------------------------

TRIAL = """
import json, sys
sys.path.insert(0, "bench")
import torch
from gpu import compiled, peers, shapes, suite
from gpu.clock import CpuClock
from jaguar.method import rules

torch.set_num_threads(1)
CpuClock.copy_bytes = 4096
tiny = shapes.ParameterList("tiny", "one tensor", (("a.weight", (3, 71)),))
two = shapes.ParameterList("two", "a matrix and a vector", (("a.weight", (40, 70)), ("b.bias", (33,))))
clock = CpuClock(torch.device("cpu"), 0.0, least=1, warm_up=0)
rademacher = next(m for m in suite.MORE if m.name == "ZO-SGD rademacher, copy")
good = list(suite.run([(tiny, [suite.METHODS[0], rademacher]), (two, peers.PEERS)], clock, lambda: 1e3))
late = list(suite.run([(tiny, [suite.METHODS[0]])], clock, lambda: 0.0))
slow = list(suite.run([(tiny, [compiled.CompiledSign])], clock, lambda: 30.0))
def sign_step(x, m, decay, lr):
    return x + m.sign() * lr
rules.sign_step = sign_step
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
        timeout=600,
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


# -- Newton-Schulz -------------------------------------------------------------------------------------------------


def ns_sample(of_torch: float = 2.3) -> list[dict[str, Any]]:
    ms = {"median": 2.0, "q1": 1.5, "q3": 2.5, "n": 7}
    case = {"kind": "ns", "list": "newton-schulz", "case": "8 x 2048 x 8192, cubic 10", "ms": ms, "flops": 1e13,
            "tflops": 5000.0, "of_ceiling": 1.25, "error": 2.5e-3}  # fmt: skip
    lora = case | {"case": ns_cases.LORA_NAME, "device_ms": ms, "of_torch": 4.0, "of_loop": 0.06, "by": "Triton"}
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


def test_operations_are_those_of_the_standard_form() -> None:
    """In GFLOP."""
    for (n, m), cubic, quintic in (
        ((1024, 1024), 42.9, 32.2),
        ((2048, 8192), 1374, 773),
        ((5120, 20480), 21475, 12080),
    ):
        assert 1e-9 * ns_cases.standard_flops(n, m, "cubic", 10) == pytest.approx(cubic, rel=2e-3)
        assert 1e-9 * ns_cases.standard_flops(n, m, "quintic", 5) == pytest.approx(quintic, rel=2e-3)
    assert ns_cases.Case(8, 2048, 8192).flops == 8 * ns_cases.standard_flops(2048, 8192, "cubic", 10)
    assert ns_cases.Case(8, 5120, 20480).bytes < 2**35


def test_what_is_asked_of_newton_schulz() -> None:
    wanted = {case.name: case.least for case in ns_cases.CASES}
    sizes = {"2048 x 8192": 2.2, "5120 x 20480": 2.5, "2048 x 2048": 1.0, "4096 x 4096": 1.1}
    assert wanted == {f"8 x {size}, cubic 10": least for size, least in sizes.items()}
    assert sum(case.scheme == "quintic" for case in ns_cases.MORE) == 2
    assert {(c.batch, c.n, c.m) for c in ns_cases.MORE if c.scheme == "cubic"} == {(1, 1024, 1024), (1, 2048, 2048)}
    # All factors of OPT-1.3B's list.
    assert sorted(shape for _, shape in shapes.LISTS["opt-1.3b-lora"].shapes) == sorted(ns_cases.LORA)
    assert {n for _, n in ns_cases.PRODUCTS} == {1024, 2048, 3072, 4096} and len(set(ns_cases.PRODUCTS)) == 8


def test_the_page_shows_newton_schulz_beside_its_targets() -> None:
    rows = ns_sample()
    page = report.markdown(sample() | {"rows": rows}).splitlines()
    name = "8 x 2048 x 8192, cubic 10"
    lines = [
        f"| Newton-Schulz {name}: times as fast as the best of torch's | >= 2.20 | 2.30 | met |",
        f"| Newton-Schulz {ns_cases.LORA_NAME}: time / that of torch's loop | <= 0.050 | 0.0600 | not met |",
        "| Newton-Schulz 8 x 4096 x 4096, cubic 10: times as fast as the best of torch's | >= 1.10 |  | not measured |",
        "cuBLAS, bf16, 8192 x 8192 x 8192: 780 TFLOP/s.",
        f"| {name} | csrc | 2 (1.5 to 2.5; 7) |  | 5000 | 1.25 | 0.0025 | 2.30 |  | >= 2.20: met |",
        f"| {name} | torch.compile | 2 (1.5 to 2.5; 7) |  | 5000 | 1.25 | 0.0025 | 1.00 |  |  |",
        "- newton-schulz, c: Triton: parity: relative error 0.1, allowed is 0.01",
    ]
    assert [line for line in lines if line not in page] == []
    assert "target >= 2.20: not met" in ns_report.said(ns_sample(of_torch=2.1)[1])
    assert ns_report.said(rows[0]).endswith("780 TFLOP/s") and "0.0600 of torch's loop" in ns_report.said(rows[3])
    assert ns_report.section([]) == [] and "Newton-Schulz" not in "".join(
        line for line in report.markdown(sample()).splitlines() if line.startswith("##")
    )


@pytest.fixture
def ns_suite(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("triton")
    from gpu import ns_peers, ns_suite

    monkeypatch.setattr(ns_peers.torch, "compile", lambda function, **_: function)
    return ns_suite


TINY: dict[str, Any] = {
    "cases": [ns_cases.Case(3, 8, 24)],
    "more": [ns_cases.Case(1, 6, 6, "quintic", 5)],
    "lora": ((2, 12), (12, 2)) * 2,
    "products": [(1, 40)],
    "ceiling": 16,
}
OWN, EAGER = "Triton", "torch eager, baddbmm"


def ns_rows(ns_suite: Any, left: float = 1e3, **options: Any) -> list[dict[str, Any]]:
    timer = clock.CpuClock(torch.device("cpu"), 0.0, least=1, warm_up=0)
    rows = list(ns_suite.run(timer, lambda: left, **TINY | options))
    assert all(ns_report.said(row) for row in rows) and report.markdown(sample() | {"rows": rows})
    assert json.loads(json.dumps(rows)) == rows
    return rows


def by(rows: list[dict[str, Any]], kind: str, case: str) -> dict[str, dict[str, Any]]:
    return {row["by"]: row for row in rows if row["kind"] == kind and row["case"] == case}


def test_newton_schulz_is_measured_beside_torch(ns_suite: Any) -> None:
    rows = ns_rows(ns_suite)
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
    lora = by(rows, "ns", ns_cases.LORA_NAME)
    assert set(lora) == {OWN, EAGER, "torch eager, matrix by matrix"}
    assert lora["torch eager, matrix by matrix"]["of_loop"] == 1.0 and lora[OWN]["device_ms"]["n"] == 1
    products = by(rows, "product", "X X^T, 1 x 40 x 40")
    assert set(products) == {"Triton, full", "Triton, triangle", "torch.bmm"}
    (gone,) = by(rows, "dropped", "all").values()
    assert gone["by"] == "csrc" and gone["reason"].startswith("not available: ")


def test_newton_schulz_that_is_wrong_has_no_speed(ns_suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu import ns_peers

    from jaguar.backends.polar.triton import TritonProducts

    real, product = ns_peers.own, TritonProducts.product

    def off(*arguments: Any) -> Any:
        call = real(*arguments)
        return lambda matrices: [O * 1.1 if i == 1 else O for i, O in enumerate(call(matrices))]  # noqa: E741

    def lopsided(self: Any, out: torch.Tensor, *arguments: Any, **options: Any) -> None:
        product(self, out, *arguments, **options)
        out[0, 0, 1] += 2.0**-8

    monkeypatch.setattr(ns_peers, "own", off)
    monkeypatch.setattr(TritonProducts, "product", lopsided)
    rows = ns_rows(ns_suite, more=[])
    for case in (TINY["cases"][0].name, ns_cases.LORA_NAME):
        bad = by(rows, "failure", case)[OWN]
        assert bad["reason"].startswith("parity: relative error 0.")
        assert not {"ms", "tflops", "of_torch"} & set(bad) and " ms" not in ns_report.said(bad)
        assert OWN not in by(rows, "ns", case) and EAGER in by(rows, "ns", case)
    assert "Triton, triangle" in by(rows, "failure", "X X^T, 1 x 40 x 40")
    assert len(report.failures(sample() | {"stages": [], "rows": rows})) >= 3


def test_errors_are_measured_by_those_of_torch() -> None:
    pytest.importorskip("triton")
    from gpu import ns_suite

    errors = {"csrc": 0.0121, "Triton": 0.0119, "usual": 0.01, "other": 0.24, "wild": 0.26, "csrc, full": float("nan")}
    assert set(ns_suite.judged(errors, "usual", ["csrc", "Triton", "csrc, full"])) == {"csrc", "csrc, full", "wild"}


def test_another_torch_without_muons_orthogonalisation(ns_suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    muon = pytest.importorskip("torch.optim._muon")
    only: dict[str, Any] = {"cases": [], "lora": TINY["lora"][:2], "products": []}
    monkeypatch.setattr(muon, "_zeropower_via_newtonschulz", lambda G, steps: G)
    (row,) = (row for row in ns_rows(ns_suite, **only) if row["by"] == "torch.optim.Muon's")
    assert row["kind"] == "dropped" and row["reason"] == "not available: this torch's takes G, steps"
    monkeypatch.delattr(muon, "_zeropower_via_newtonschulz")
    (row,) = (row for row in ns_rows(ns_suite, **only) if row["by"] == "torch.optim.Muon's")
    assert row["kind"] == "dropped" and row["reason"].startswith("not available: cannot import")


def test_a_compiler_that_fails_is_reported_and_not_fatal(ns_suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu import ns_peers

    def broken(*_: Any) -> Any:
        raise RuntimeError("no\n compiler")

    monkeypatch.setattr(ns_peers.torch, "compile", lambda function, **_: broken)
    only: dict[str, Any] = {"lora": TINY["lora"][:2], "products": []}
    rows = ns_rows(ns_suite, **only)
    for case in (TINY["cases"][0], TINY["more"][0]):
        assert by(rows, "dropped", case.name)["torch.compile"]["reason"] == "failed: RuntimeError: no compiler"
    assert not [row for row in rows if row["kind"] == "failure"]


def test_a_compiler_that_takes_too_long_is_stopped(ns_suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu import ns_peers

    monkeypatch.setattr(ns_peers.torch, "compile", lambda function, **_: lambda *_: time.sleep(3600))
    compiled = ns_peers.Compiled()
    for _ in range(2):
        with pytest.raises(ns_peers.NotHere, match="failed: compilation took more than 1 s"):
            compiled.first(torch.zeros(1, 2, 2), "cubic", 0.5)


def test_what_newton_schulz_has_no_time_for_is_dropped(ns_suite: Any) -> None:
    rows = ns_rows(ns_suite, left=0.0)
    kinds = [(row["kind"], row["reason"]) for row in rows if row["kind"] != "ceiling"][1:]
    assert kinds == 4 * [("dropped", "no time was left")]


def test_accuracy_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--shapes", "8x24", "2x4x8", "--out", str(tmp_path)]
    assert bench_newton_schulz.main(words) == 0
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
    assert bench_newton_schulz.main(["--speed"]) == 2
    for words in (["--device", "cuda"], ["--into", "/nowhere/x.json"], ["--shapes", "8"]):
        with pytest.raises(SystemExit, match="2"):
            bench_newton_schulz.main(words)
        assert f"argument {words[0]}" in (said := capsys.readouterr().err) or f"{words[0]} {words[1]}:" in said


def test_the_command_that_is_recorded_names_no_folder_of_a_machine() -> None:
    words = ["bench/bench_gpu.py", "--stages", "build", "--out", "/somewhere", "--commit", "abc", "--out=/else"]
    assert bench_gpu._without_out(words) == ["bench/bench_gpu.py", "--stages", "build", "--commit", "abc"]
