"""The presets are settings that the command line and the optimizers accept, and each says where it is from."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import fields
from importlib.resources import files

import pytest
import yaml

from jaguar.optimizers.names import METHODS
from jaguar.tasks import TASKS
from jaguar.tasks.presets import Preset, find, presets
from jaguar.trainer.arguments import ZOTrainingArguments

ALL = presets()
ADAPTERS = {"none": set(), "lora": {"lora_r", "lora_alpha"}, "prefix": {"num_virtual_tokens"}}
ADAPTERS["prompt"] = ADAPTERS["prefix"]
OF_THE_TRAINER = {f.name for f in fields(ZOTrainingArguments)}
BESIDE_THE_TRAINER = {"num_k_shot", "max_length", "dtype"}.union(*ADAPTERS.values())
KINDS = {str: {"lr_scheduler_type", "ns_coefficients", "dtype"}}
KINDS[float] = {"learning_rate", "tau", "beta", "momentum", "weight_decay"}


def key(preset: Preset) -> tuple[str, ...]:
    return preset.model, preset.task, preset.method, preset.adapter


each = pytest.mark.parametrize("preset", ALL, ids=lambda preset: "-".join(key(preset)))


def test_every_file_is_read() -> None:
    names = {path.name for path in files("jaguar.tasks.presets").iterdir() if path.name.endswith((".yaml", ".yml"))}
    assert names == {"copa.yaml", "sst2.yaml", "winogrande.yaml"}
    lengths = {name: len(yaml.safe_load(files("jaguar.tasks.presets").joinpath(name).read_text())) for name in names}
    assert Counter(f"{preset.task}.yaml" for preset in ALL) == lengths
    assert {preset.task for preset in ALL} <= set(TASKS)


def test_one_preset_per_key() -> None:
    assert not [k for k, count in Counter(map(key, ALL)).items() if count > 1]


@each
def test_names_are_known(preset: Preset) -> None:
    assert preset.source and preset.note
    assert preset.method in METHODS
    assert preset.adapter in ADAPTERS
    assert set(preset.settings) <= OF_THE_TRAINER | BESIDE_THE_TRAINER
    assert set(preset.settings) & set().union(*ADAPTERS.values()) == ADAPTERS[preset.adapter]
    # What a table was made with is the user's choice, not that of a preset.
    assert "released" not in preset.settings


@each
def test_values_are_of_their_kind(preset: Preset) -> None:
    """YAML reads 1e-3 as text."""
    for name, value in preset.settings.items():
        kind = next((kind for kind, names in KINDS.items() if name in names), int)
        assert {type(v) for v in (value, *preset.grid.get(name, ()))} == {kind}, name


@each
def test_settings_are_among_what_was_tried(preset: Preset) -> None:
    assert set(preset.grid) <= set(preset.settings)
    for name, tried in preset.grid.items():
        assert len(tried) == len(set(tried)) > 1
        assert preset.settings[name] in tried


@pytest.mark.parametrize(
    ("method", "words"), [("zo-signsgd", "AdamW on"), ("zo-sgd-cons", "AdamW,"), ("zo-adamm", "Adam,")]
)
def test_notes_say_what_the_sweeps_ran(method: str, words: str) -> None:
    found = [preset for preset in ALL if preset.method == method]
    assert len(found) == 6 and all(f"ZO-Bench's sweep ran {words} " in preset.note for preset in found)


@each
def test_the_optimizer_accepts_them(preset: Preset, tmp_path) -> None:
    settings = {name: value for name, value in preset.settings.items() if name in OF_THE_TRAINER}
    ZOTrainingArguments(str(tmp_path), optim_zo=preset.method, use_cpu=True, **settings)


@pytest.mark.parametrize(
    "name", ["opt-1.3b", "facebook/opt-1.3b", "facebook/OPT-1.3B", "/models/opt-1.3b/", "./opt-1.3b", "x/opt-1.3b-hf"]
)
def test_find_reads_the_last_part_of_a_name(name: str) -> None:
    found = find(name, "sst2", "jaguar-signsgd", "lora")
    assert found is not None
    assert key(found) == ("opt-1.3b", "sst2", "jaguar-signsgd", "lora")
    assert found.settings["learning_rate"] == found.settings["tau"] == 1e-3
    assert found.settings["beta"] == 1e-2


@each
def test_find_finds(preset: Preset) -> None:
    assert find(preset.model, preset.task, preset.method, preset.adapter) == preset


def test_find_knows_llama_as_the_hub_has_it() -> None:
    found = find("meta-llama/Llama-2-7b-hf", "copa", "zo-sgd", "lora")
    assert found is not None and found.model == "llama-2-7b"


@pytest.mark.parametrize(
    "wanted",
    [
        ("facebook/opt-2.7b", "sst2", "zo-sgd", "none"),
        ("facebook/opt-1.3b-chat", "sst2", "zo-sgd", "none"),
        ("opt-1.3b/checkpoint-10", "sst2", "zo-sgd", "none"),
        ("facebook/opt-1.3b", "copa", "zo-sgd", "none"),
        ("facebook/opt-1.3b", "sst2", "zo-sgd", "prompt"),
        ("roberta-large", "sst2", "jaguar-muon", "none"),
        ("facebook/opt-1.3b", "sst2", "lezo", "none"),
        ("roberta-large", "sst2", "zo-adamm", "lora"),
        ("", "", "", ""),
    ],
)
def test_find_finds_nothing_else(wanted: tuple[str, str, str, str]) -> None:
    assert find(*wanted) is None


def test_presets_need_no_torch() -> None:
    code = "import sys; from jaguar.tasks.presets import presets; presets(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0
