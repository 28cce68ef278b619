"""The README is true: its Python runs, its paths exist, its commands parse."""

import re
import shlex
from pathlib import Path

import pytest

from jaguar.cli.flags import parse

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.S)


def test_the_python_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.warn", lambda *a, **k: None)  # torch's, on machines without a GPU to pin memory for
    first, *more = blocks("python")
    assert len(first.strip().splitlines()) <= 12
    names: dict = {}
    exec(compile(first, "README.md", "exec"), names)
    assert "Record(step=499" in capsys.readouterr().out
    script, fragment = more
    by_itself: dict = {}  # as it is copied: what it uses it must import
    exec(compile(script, "README.md", "exec"), by_itself)
    assert "eval_loss" in capsys.readouterr().out and type(by_itself["trainer"]).__name__ == "ZOTrainer"
    exec(compile(fragment, "README.md", "exec"), names)  # goes on from the first
    assert type(names["optimizer"]).__name__ == "JaguarMuon"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(((?!http)[^)]+)\)", TEXT))))
def test_linked_files_exist(path):
    assert (ROOT / path).exists()


def test_the_commands_parse(tmp_path, monkeypatch):
    commands = re.findall(r"^jaguar (.*?[^\\])$", "\n".join(blocks("sh")), flags=re.S | re.M)
    assert len(commands) == 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model: m\noutput_dir: o\n")
    for command in commands:
        assert not parse(shlex.split(command.replace("\\\n", " "))).trainer


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:`|^)make ([a-z-]+)", TEXT, flags=re.M))
    assert targets and all(re.search(rf"^{target}:", makefile, flags=re.M) for target in targets)
