"""Damaged files of a checkpoint: one line that names the file, exit code 2; never a traceback, never other weights."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.runs import place as place
from helpers.runs import words
from helpers.tiny import refused
from jaguar.cli import commands as cli
from jaguar.trainer.staging import RECORD

# What a run goes on from; the others of a checkpoint are for those who use the model.
READ = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "jaguar_run.pt",
        RECORD]  # fmt: skip
OF_THE_MODEL = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "jaguar_task.json"]


def bits(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def content(path: Path, value: Any) -> None:
    """A whole file with something else in it."""
    if path.suffix == ".json":
        path.write_text(json.dumps(value))
    else:
        torch.save(value, path)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: bits(path, b""),
    "cut": lambda path: bits(path, path.read_bytes()[: path.stat().st_size // 2]),
    "cut at its end": lambda path: bits(path, path.read_bytes()[:-3]),
    "zeros": lambda path: bits(path, bytes(path.stat().st_size)),
    "noise": lambda path: bits(path, random.Random(0).randbytes(path.stat().st_size)),
    "a dict": lambda path: content(path, {}),
    "a list": lambda path: content(path, [1, 2]),
    "a number": lambda path: content(path, 7),
    "a text": lambda path: content(path, "text"),
    "nothing": lambda path: content(path, None),
    "text": lambda path: bits(path, b"it was here\n"),
}


# The default suite tries some.
SOME = {"empty", "cut", "a dict"}
damages = pytest.mark.parametrize(
    "damage", [pytest.param(name, marks=[] if name in SOME else pytest.mark.slow) for name in DAMAGE]
)


@pytest.fixture
def checkpoint(place: Path, tmp_path: Path) -> Path:
    """A checkpoint of step 2 of 4."""
    if not (place / "kept" / "checkpoint-2").exists():
        assert cli.main(words(place, place / "kept", "--save_total_limit", "2")) == 0
    made: Path = shutil.copytree(place / "kept" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    return made


def refusal(place: Path, folder: Path, capsys: Any) -> str:
    capsys.readouterr()
    said: str = refused(capsys, *words(place, folder.parent / "again", "--resume_from_checkpoint", str(folder)))
    return said


@damages
@pytest.mark.parametrize(
    ("file", "recorded"),
    [(file, recorded) for file in READ for recorded in (True, False) if recorded or file != RECORD],
)
def test_a_damaged_file_is_named(
    place: Path, checkpoint: Path, capsys: Any, file: str, damage: str, recorded: bool
) -> None:
    if not recorded:
        (checkpoint / RECORD).unlink()
    DAMAGE[damage](checkpoint / file)
    said = refusal(place, checkpoint, capsys)
    assert file in said or (file == "model.safetensors" and "weights" in said), said


def kinds(value: Any) -> list[Any]:
    """Values of other kinds than this one."""
    others = [{}, [], "text", 7, None, torch.zeros(2), True]
    return [other for other in others if type(other) is not type(value)]


@pytest.mark.slow
@pytest.mark.parametrize("file", [file for file in READ if file != "model.safetensors"])
def test_every_value_of_another_kind_is_named_or_harmless(
    place: Path, checkpoint: Path, capsys: Any, monkeypatch: Any, file: str
) -> None:
    """In each entry of each file, one after the other; what is not needed may be anything."""
    path = checkpoint / file
    text = path.suffix == ".json"
    whole = json.loads(path.read_text()) if text else torch.load(path, weights_only=False)
    good, record = path.read_bytes(), (checkpoint / RECORD).read_text()
    if file != RECORD:
        (checkpoint / RECORD).unlink()
    draw, tried = random.Random(1), 0
    for key in whole:
        others = [other for other in kinds(whole[key]) if not (text and isinstance(other, torch.Tensor))]
        for other in draw.sample(others, 2):
            content(path, whole | {key: other})
            capsys.readouterr()
            out = checkpoint.parent / "again"
            code = cli.main(words(place, out, "--resume_from_checkpoint", str(checkpoint), "--overwrite_output_dir"))
            said = capsys.readouterr().err
            assert code in (0, 2), (key, other, said)
            named = file in said or "the run was started with" in said
            assert code == 0 or (said.count("\n") == 1 and named), (key, other, said)
            tried += 1
    path.write_bytes(good)
    (checkpoint / RECORD).write_text(record)
    assert tried >= 4


@damages
@pytest.mark.parametrize("file", OF_THE_MODEL)
def test_a_damaged_model_is_one_line(place: Path, checkpoint: Path, capsys: Any, file: str, damage: str) -> None:
    DAMAGE[damage](checkpoint / file)
    line = ["eval", "--model", str(checkpoint), "--test_file", str(place / "test.csv"), "--use_cpu"]
    assert checkpoint.name in refused(capsys, *line)
