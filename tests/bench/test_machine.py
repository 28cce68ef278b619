"""Fields of results that say what their numbers depend on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))
import machine  # noqa: E402

FILES = {"cpu-step-2026-11-22": machine.CPU, "host-step": machine.TWO_COMMITS, "small-tensors": machine.TWO_COMMITS,
         "h200-2026-11-26-1e6ca4e": machine.GPU, "h100-80gb-hbm3-2026-11-26-1e6ca4e": machine.GPU}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_results_have_the_fields_that_they_had(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(name="NVIDIA H200", total_memory=2**37, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    kept = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())["machine"]
    found = machine.machine(FILES[name], before="1f8946a", after="839416d")
    assert list(found) == [field for field in kept if field != "note"]
    own = {field: value for field, value in found.items() if field != "cuda"}  # None without a GPU
    assert {field: type(value) for field, value in own.items()} == {field: type(kept[field]) for field in own}


def test_what_is_given_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **more: (_ for _ in ()).throw(FileNotFoundError))
    assert machine.machine(["commit"], commit=None) == {"commit": "unknown"}  # no git
    assert machine.machine(["threads", "commit"], commit="abc", threads="1") == {"threads": "1", "commit": "abc"}


def test_the_command_that_is_recorded_names_no_folder_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--stages", "build", "--out", "/somewhere", "--commit", "abc", "--out=/else"]
    monkeypatch.setattr(sys, "argv", ["bench gpu", *words])
    assert machine.command("--out") == "python bench gpu --stages build --commit abc"
    monkeypatch.setattr(sys, "argv", ["bench learning", "--only", "ZO-SGD, 4", "--model", "/here", "--out", "there"])
    assert machine.command("--out", "--model") == "python bench learning --only 'ZO-SGD, 4'"
    assert machine.command().endswith("--model /here --out there")
