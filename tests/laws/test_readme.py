"""The README and the pages of docs/ are true: their Python runs, their links resolve, their commands parse.

The README's commands run too, but for the one that needs the hub.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import load_file

from helpers import tiny
from jaguar.backends.availability import Backend
from jaguar.backends.launches import Launches
from jaguar.cli import commands as cli
from jaguar.cli.parser import parse

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
TEXT = TEXTS["README.md"]
# test_docs.py runs the blocks of this one.
OWN_TEST = "docs/adding-a-method.md"


def blocks(language: str, text: str = TEXT) -> list[str]:
    """In lists they are indented."""
    return [dedent(block) for block in re.findall(rf"^ *```{language}\n(.*?)^ *```", text, flags=re.S | re.M)]


def promised(block: str) -> list[str]:
    """What the comments behind calls of print say that it prints."""
    return re.findall(r"^print\(.*\)  # (.*)$", block, flags=re.M)


def anchors(text: str) -> set[str]:
    """The names that links give to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def unresolved(link: str, page: Path, texts: dict[str, str]) -> str | None:
    """The reason why a link leads nowhere; None: it leads somewhere."""
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    if not target.exists():
        return f"{name} does not exist"
    known = texts.get(target.relative_to(ROOT).as_posix())
    if anchor and (known is None or anchor not in anchors(known)):
        return f"{target.name} has no heading #{anchor}"
    return None


def test_the_python_runs(capsys):
    (block,) = blocks("python")
    assert len(block.strip().splitlines()) <= 12
    names: dict = {}
    exec(compile(block, "README.md", "exec", dont_inherit=True), names)
    assert "Record(step=499" in capsys.readouterr().out


# torch's, on machines without a GPU to pin memory for
pins_memory = pytest.mark.filterwarnings("ignore:.*pin_memory")


@pins_memory
@pytest.mark.parametrize("trains", ["with gradients", "forward only"])
def test_the_diff_is_all_that_a_script_needs(trains, tmp_path, monkeypatch):
    """It is applied to the trainer page's script, as that would be for transformers."""
    monkeypatch.chdir(tmp_path)
    removed, added = re.fullmatch(r"-(.*)\n\+(.*)\n", blocks("diff")[0]).groups()
    (script,) = blocks("python", TEXTS["docs/trainer.md"])
    assert script.count(added) == 1
    names: dict = {}
    has_gradients = trains == "with gradients"
    source = script.replace(added, removed) if has_gradients else script
    exec(compile(source, "script", "exec", dont_inherit=True), names)
    trainer = names["trainer"]
    assert type(trainer).__name__ == ("Trainer" if has_gradients else "ZOTrainer")
    assert trainer.state.global_step == 20
    assert hasattr(trainer, "zeroth_order") is not has_gradients


def test_the_first_screen_shows_it_working():
    """What it is for, a command, results and code; nothing about how it came to be."""
    assert len(TEXT.splitlines()) <= 130
    first = "\n".join(TEXT.splitlines()[:40])
    assert "make demo" in first and "| `SEED=0` |" in first and "print(loss.item()" in first
    assert not re.search(r"version|changelog|since|was (added|moved|wrong)|no longer|used to|\b0\.\d\.0\b", first, re.I)


WITH_PYTHON = [name for name, text in TEXTS.items() if name not in ("README.md", OWN_TEST) and blocks("python", text)]


@pins_memory
@pytest.mark.parametrize("name", WITH_PYTHON)
def test_the_python_of_a_page_runs(name, tmp_path, monkeypatch):
    """Its blocks in order, as one program; what follows a print as a comment is what it prints."""
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "page"}
    for block in blocks("python", TEXTS[name]):
        with redirect_stdout(StringIO()) as out:
            exec(compile(block, name, "exec", dont_inherit=True), names)
        if said := promised(block):
            assert out.getvalue().splitlines() == said


LINKS = [(name, link) for name, text in TEXTS.items() for link in re.findall(r"\]\(((?!http)[^)]+)\)", text)]


@pytest.mark.parametrize(("name", "link"), sorted(set(LINKS)))
def test_links_resolve(name, link):
    assert unresolved(link, ROOT / name, TEXTS) is None


@pytest.mark.parametrize("name", sorted(TEXTS.keys() - {"CHANGELOG.md"}))  # which names what there was
def test_files_that_are_named_exist(name):
    paths = re.findall(r"`((?:jaguar|triton_kernels|csrc|tests|bench|demo|docs)/[\w./-]+)`", TEXTS[name])
    assert [path for path in paths if not (ROOT / path).exists()] == []
    tests = re.findall(r"`(test_\w+\.py)`", TEXTS[name])
    assert [test for test in tests if not list((ROOT / "tests").rglob(test))] == []


@pytest.mark.parametrize("name", [name for name in TEXTS if name.startswith("docs/")])
def test_every_page_is_linked_from_the_first(name):
    assert f"]({name}" in TEXT


@pytest.mark.parametrize("link", ["no-such.md", "docs/gpu.md#no-such-heading", "#no-such-heading"])
def test_a_broken_link_is_found(link):
    assert unresolved(link, README, TEXTS)


def test_the_page_on_backends_names_the_whole_interface():
    text = TEXTS["docs/adding-a-backend.md"]
    fields = re.findall(r"^\| `(\w+)", text, flags=re.M)
    assert sorted(fields) == sorted(Backend.__dataclass_fields__)
    members = {name for name in vars(Launches) if not name.startswith("_")}
    assert members <= set(re.findall(r"`(\w+)`", text))


COMMANDS = [
    (name, command.replace("\\\n", " "))
    for name, text in TEXTS.items()
    for command in re.findall(r"^jaguar (.*?[^\\])$", "\n".join(blocks("sh", text)), flags=re.S | re.M)
]


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_the_commands_parse(name, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model: m\noutput_dir: o\n")
    assert not parse(shlex.split(command, comments=True)).trainer


# Its model and its rows come from the hub, and tests have no network: it is parsed above and not run.
FROM_THE_HUB = "--model facebook/opt-1.3b --task sst2"
SMALL = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1"]


def test_the_commands_of_the_first_page_run(tmp_path, monkeypatch, capsys):
    """They run in order and in one folder, where a tiny model and a few rows have the names that they give."""
    monkeypatch.chdir(tmp_path)
    tiny.causal_lm(Path("SmolLM2-135M"))
    tiny.write_csv(Path("train.csv"), tiny.sentences(24, seed=1))
    tiny.write_csv(Path("test.csv"), tiny.sentences(23, seed=2))
    printed = {}
    for command in [command for name, command in COMMANDS if name == "README.md" and FROM_THE_HUB not in command]:
        words = shlex.split(command, comments=True)
        assert cli.main(words + SMALL * (words[0] == "finetune")) == 0
        printed[words[0]] = capsys.readouterr().out
    assert list(printed) == ["finetune", "eval", "replay", "info"]
    metrics = json.loads(Path("tuned/metrics.json").read_text())
    assert metrics["steps"] == 2 and metrics["test_rows"] == 23
    before, after = (load_file(f"{name}/model.safetensors") for name in ("SmolLM2-135M", "tuned"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    figures = f"{metrics['after']['accuracy']:.2%}", f"{metrics['after']['auc']:.4f}"
    assert all(figure in printed["eval"] for figure in figures)  # with the prompt that was saved beside the model
    assert "jaguar.JaguarMuon" in printed["info"]
    assert "verified: fingerprint" in printed["replay"]
    assert Path("rebuilt/model.safetensors").read_bytes() == Path("tuned/model.safetensors").read_bytes()


def test_there_are_commands():
    assert len([name for name, _ in COMMANDS if name == "README.md"]) >= 4


@pytest.mark.parametrize("name", TEXTS)
def test_what_commands_name_exists(name):
    """Targets of make, scripts, extras of the package."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:`|^)make ([a-z-]+)", TEXTS[name], flags=re.M))
    assert all(re.search(rf"^{target}:", makefile, flags=re.M) for target in targets)
    scripts = set(re.findall(r"python (\w+/\w+\.py)", TEXTS[name]))
    assert all((ROOT / script).exists() for script in scripts)
    extras = {extra for found in re.findall(r"'\.\[([\w,]+)\]'", TEXTS[name]) for extra in found.split(",")}
    assert extras <= tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    assert name != "README.md" or {"demo", "test"} <= targets
