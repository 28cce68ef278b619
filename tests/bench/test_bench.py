"""The GPU benchmark's lists, byte counts, clocks and report, without a GPU."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from gpu import clock, report, result
from helpers.bench_samples import sample
from step import shapes, traffic

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


FLOORS = [  # bytes per parameter, with p = 1 % of the coordinates sampled
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


# -- clocks ------------------------------------------------------------------------------------------------------------


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


# -- report ------------------------------------------------------------------------------------------------------------


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
    from step import whole_steps

    kind, values = whole_steps.MODELS[0].config
    small = {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_attention_heads": 2, "vocab_size": 300}
    tiny = whole_steps.Model("tiny", (kind, values | small | {"num_hidden_layers": 1}), rows=2, tokens=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of perturbations that bf16 swallows
        rows = list(whole_steps.run(clock.CpuClock(torch.device("cpu"), 0.0, 2, 1), lambda: 100.0, [tiny]))
    assert [row["what"] for row in rows] == [whole_steps.FORWARD, *(name for name, _ in whole_steps.JOBS)]
    assert all(row["kind"] == "model" and row["ms"]["n"] >= 2 and whole_steps.said(row) for row in rows), rows
    late = list(whole_steps.run(clock.CpuClock(torch.device("cpu"), 0.0, 2, 1), lambda: 1.0, [tiny]))
    assert [row["kind"] for row in late] == ["dropped"] and report.failures({"stages": [], "rows": late}) == []


def test_rows_are_saved_as_they_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is cut off has those before; failures are counted."""
    path, found, seen = tmp_path / "gpu.json", sample() | {"rows": []}, []

    def rows() -> Any:
        for row in sample()["rows"]:  # one of them a failure
            seen.append(len(result.load(path)["rows"]) if path.exists() else 0)
            yield row

    assert result.keep(rows(), found, path, 0.0, lambda row: row["kind"]) == 1
    assert seen == list(range(len(seen))) and result.load(path)["rows"] == json.loads(json.dumps(found["rows"]))
    assert capsys.readouterr().out.count("\n") == len(seen) == len(found["rows"]) > 2
    whole = [row for row in sample()["rows"] if row["kind"] != "failure"]
    assert result.keep(whole, {"rows": []}, None, 0.0, lambda row: row["kind"]) == 0
