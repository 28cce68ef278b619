"""`jaguar replay`, `jaguar journal`, and runs of `jaguar finetune` that go on from a journal."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from helpers.runs import place as place
from helpers.runs import words
from jaguar import Journal
from jaguar.cli import commands as cli
from jaguar.cli.finetune.progress import Losses
from jaguar.method.described import rebuilt
from jaguar.record import JOURNAL
from jaguar.trainer import saving
from jaguar.trainer.saving import only_run
from jaguar.trainer.trainer import ScoringTrainer

WEIGHTS = "model.safetensors"


class Dies(BaseException):
    """A process that is killed."""


def killed(monkeypatch: pytest.MonkeyPatch, step: int, argv: list[str]) -> None:
    """Runs the command line until the end of a step."""
    usual = Losses.on_step_end

    def on_step_end(self: Losses, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == step:
            raise Dies
        usual(self, args, state, control, **others)

    monkeypatch.setattr(Losses, "on_step_end", on_step_end)
    with pytest.raises(Dies):
        cli.main(argv)
    monkeypatch.setattr(Losses, "on_step_end", usual)


def same_model(one: Path, other: Path, file: str = WEIGHTS) -> bool:
    return (one / file).read_bytes() == (other / file).read_bytes()


@pytest.mark.parametrize(("step", "more"), [(1, []), (3, []), (3, ["--save_steps", "0"]), (4, ["--save_steps", "0"])])
def test_a_killed_run_goes_on_with_its_folder(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, more: list[str]
) -> None:
    argv = words(place, tmp_path / "out")
    argv = argv[: argv.index("--save_steps")] + argv[argv.index("--save_steps") + 2 :] + (more or ["--save_steps", "2"])
    killed(monkeypatch, step, argv)
    assert cli.main([*argv, "--resume_from_checkpoint", str(tmp_path / "out")]) == 0
    assert same_model(place / "whole", tmp_path / "out")
    found, whole = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "out", place / "whole"))
    for key in ("after", "before", "training_forward_passes", "steps"):
        assert found[key] == whole[key]
    with Journal.read(tmp_path / "out" / JOURNAL) as journal:
        assert journal.ended and len(journal) == 4


def test_a_run_that_was_killed_in_its_first_step_goes_on_too(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dies(*_: Any) -> Any:
        raise Dies

    argv, out = words(place, tmp_path / "out"), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Dies):
        patch.setattr(ScoringTrainer, "_measure", dies)
        cli.main(argv)
    with Journal.read(out / JOURNAL) as journal:
        assert len(journal) == 0
    assert cli.main([*argv, "--resume_from_checkpoint", str(out), "--journal", "false"]) == 2
    assert "no checkpoint, and --journal is false: begin without" in " ".join(capsys.readouterr().err.split())
    assert cli.main([*argv, "--resume_from_checkpoint", str(out)]) == 0
    assert same_model(place / "whole", out) and (out / JOURNAL).read_bytes() == (place / "whole" / JOURNAL).read_bytes()


def test_an_unfinished_run_is_not_overwritten_and_other_settings_are_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = [*words(place, out), "--max_steps", "4"]
    argv[argv.index("--save_steps") + 1] = "0"
    killed(monkeypatch, 2, argv)
    before = (out / JOURNAL).read_bytes()
    assert cli.main(argv) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"holds a run that has not come to its end: go on with --resume_from_checkpoint {out}" in error
    assert cli.main([*argv, "--resume_from_checkpoint", str(out), "--train_file", str(place / "train.csv")]) == 0
    (out / JOURNAL).write_bytes(before)
    for path in (WEIGHTS, "config.json", "metrics.json"):
        (out / path).unlink()
    assert cli.main([*argv, "--resume_from_checkpoint", str(out), "--seed", "3"]) == 2
    assert "the run was started with seed = 0, this run has 3" in " ".join(capsys.readouterr().err.split())
    assert (out / JOURNAL).read_bytes() == before
    (out / JOURNAL).unlink()
    assert cli.main([*argv, "--resume_from_checkpoint", str(out)]) == 2
    assert "has neither a checkpoint nor a journal.jaguar: begin without --resume" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize(
    "more", [[], ["--lora"], ["--prefix_tuning"], ["--train", "norm", "--eval_steps", "1"]], ids=str
)
def test_replay_rebuilds_the_tuned_model(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    extra = ["--num_dev", "8"] if "--eval_steps" in more else []
    assert cli.main([*words(place, tmp_path / "out"), *more, *extra]) == 0
    moved = tmp_path / "journal"
    shutil.copy(tmp_path / "out" / JOURNAL, moved)
    capsys.readouterr()
    base = ["--base", str(place / "lm")] if more else []
    assert cli.main(["replay", "--journal", str(moved), "--out", str(tmp_path / "again"), "--use_cpu", *base]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "verified: fingerprint" in said and "steps/s" in said
    file = "adapter_model.safetensors" if "--lora" in more or "--prefix_tuning" in more else WEIGHTS
    assert same_model(tmp_path / "out", tmp_path / "again", file)
    task = "jaguar_task.json"
    assert (tmp_path / "out" / task).read_text() == (tmp_path / "again" / task).read_text()
    assert cli.main(["eval", "--model", str(tmp_path / "again"), "--test_file", str(place / "test.csv")]) == 0


def test_a_folder_of_records_is_a_model(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (JOURNAL, "jaguar_task.json"):
        shutil.copy(place / "whole" / name, tmp_path)
    said = []
    for folder in (place / "whole", tmp_path):
        assert cli.main(["eval", "--model", str(folder), "--test_file", str(place / "test.csv"), "--use_cpu"]) == 0
        said.append(capsys.readouterr().out)
    assert "verified: fingerprint" in said[1] and "verified" not in said[0]
    figures = [[line for line in text.splitlines() if "accuracy" in line or "loss" in line] for text in said]
    assert figures[0] == figures[1] and len(figures[0]) >= 2
    assert cli.main(["replay", "--journal", str(tmp_path), "--out", str(tmp_path / "again"), "--use_cpu"]) == 0
    assert same_model(place / "whole", tmp_path / "again")


def test_a_base_model_that_has_moved_is_named(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(place / "lm", tmp_path / "lm")
    argv = words(place, tmp_path / "out")
    argv[argv.index("--model") + 1] = str(tmp_path / "lm")
    assert cli.main(argv) == 0
    (tmp_path / "lm").rename(tmp_path / "moved")
    replay = ["replay", "--journal", str(tmp_path / "out"), "--out", str(tmp_path / "again"), "--use_cpu"]
    assert cli.main(replay) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path / 'lm'}" in error and "If it is elsewhere: jaguar replay --base DIR" in error
    assert cli.main([*replay, "--base", str(tmp_path / "moved")]) == 0
    assert same_model(tmp_path / "out", tmp_path / "again")


def test_replay_refuses_what_does_not_fit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = str(place / "whole" / JOURNAL)

    def refused(*more: str) -> str:
        assert cli.main(["replay", "--journal", journal, "--out", str(tmp_path / "out"), "--use_cpu", *more]) == 2
        return " ".join(capsys.readouterr().err.split())

    other = shutil.copytree(place / "lm", tmp_path / "other")
    weights = load_file(other / WEIGHTS)
    save_file({key: value + 1 for key, value in weights.items()}, other / WEIGHTS, {"format": "pt"})
    assert "the trained tensors are not those that the run" in refused("--base", str(tmp_path / "other"))
    assert "there is no way from 0 to 9" in refused("--steps", "9")
    assert "dtype is 'float32' there, 'bfloat16' here" in refused("--dtype", "bfloat16")
    assert not (tmp_path / "out" / WEIGHTS).exists()
    with only_run(tmp_path / "out"), monkeypatch.context() as patch:
        patch.setattr(saving, "_locks", {})  # another process's
        assert "another run is writing to" in refused()
    (tmp_path / "out" / "config.json").write_text("{}")
    assert "already holds a model" in refused()
    assert cli.main(["replay", "--journal", str(tmp_path / "none"), "--out", str(tmp_path / "new")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_a_journal_is_shown_verified_and_drawn(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(place / "whole" / JOURNAL)
    assert cli.main(["journal", "show", path, "--last", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "JaguarSignSGD" in said and "the last 2 of 4 steps" in said and "the end of a run" in said
    assert cli.main(["journal", "verify", path]) == 0
    assert "steps 1 to 4, 0 skipped" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["journal", "plot", path, "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    for words_without_effect in (["show", path, "--out", "a.png"], ["verify", path, "--last", "2"]):
        assert cli.main(["journal", *words_without_effect]) == 2
        assert "has no use for it" in capsys.readouterr().err
    data = Path(path).read_bytes()
    (tmp_path / "cut").write_bytes(data[:-1])
    assert cli.main(["journal", "verify", str(tmp_path / "cut")]) == 1
    assert "are no whole entry" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "bad").write_bytes(b"no journal")
    assert cli.main(["journal", "verify", str(tmp_path / "bad")]) == 1
    assert cli.main(["journal", "show", str(tmp_path / "bad")]) == 2
    assert "is no journal of jaguar" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "said",
    [
        {"parameters": [1, {}, {"shape": "x"}, {"shape": [1, "2"]}, {"shape": [[2]]}], "method": []},
        {"parameters": {"a": 1}, "method": {"rule": {"kind": ["x"]}}, "base": {"adapter": 3}},
        {"optimizer": "[red]\x1b[31m[/", "seed": None, "environment": {"[bold": "\x07"}, "base": {"model": "[/x]"}},
    ],
    ids=["shapes", "kinds", "markup"],
)
def test_a_hostile_header_is_shown_and_not_believed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], said: dict[str, Any]
) -> None:
    Journal.create(tmp_path / "j", {"first": 0, "entry": 64} | said).close()
    assert cli.main(["journal", "show", str(tmp_path / "j")]) == 0
    assert "\x1b" not in (printed := capsys.readouterr().out) and "optimizer" in printed
    assert cli.main(["journal", "verify", str(tmp_path / "j")]) == 0
    assert cli.main(["journal", "plot", str(tmp_path / "j"), "--out", str(tmp_path / "a.png")]) == 2
    assert cli.main(["replay", "--journal", str(tmp_path / "j"), "--out", str(tmp_path / "out")]) == 2


def test_the_journal_of_an_earlier_version_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    """One that a GPU wrote with 0.7.0; the model is too large to be rebuilt here."""
    path = Path(__file__).parents[2] / "bench/results/demo-h200.jaguar"
    with Journal.read(path) as journal:
        assert [record.step for record in journal] == list(range(80)) and journal.chosen == 80 and journal.ended
        method = rebuilt(journal.header["method"])
        assert method.estimator.n_directions == 4 and method.direction.coordinates == 1.0
        assert journal.marks[-1].fingerprint == "d2ccbcb6e391d32545a935a6d0a4b6f2"
    assert cli.main(["journal", "verify", str(path)]) == 0
    assert "steps 1 to 80, 0 skipped, 4 fingerprints" in " ".join(capsys.readouterr().out.split())


def test_showing_needs_no_torch(place: Path) -> None:
    code = (
        f"import sys; from jaguar.cli import main; main(['journal', 'show', {str(place / 'whole' / JOURNAL)!r}]); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def rewritten(path: Path, change: Any) -> None:
    """The journal with another header, whose checksums are right."""
    with Journal.read(path) as journal:
        header, records = json.loads(json.dumps(journal.header)), list(journal)
    change(header)
    path.unlink()
    with Journal.create(path, header) as again:
        for record in records:
            again.append(record)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["base"].pop("facts"),
        lambda header: header["base"]["facts"].update(rows={}),
        lambda header: header["base"]["facts"].update(rows=[]),
        lambda header: header["base"].update(settings={}),
        lambda header: header["base"]["settings"].update(given=3),
        lambda header: header["base"].update(fingerprint="00" * 16),
        lambda header: header.update(seed=5),
    ],
    ids=["no facts", "no rows", "list of rows", "no settings", "given", "another base", "another seed"],
)
def test_going_on_with_an_unfit_journal_is_one_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: Any
) -> None:
    argv = words(place, tmp_path / "out")
    argv[argv.index("--save_steps") + 1] = "0"
    killed(monkeypatch, 2, argv)
    rewritten(tmp_path / "out" / JOURNAL, change)
    capsys.readouterr()
    assert cli.main([*argv, "--resume_from_checkpoint", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "journal.jaguar" in error


@pytest.mark.filterwarnings("ignore:going on with the steps of journal.jaguar alone")
def test_a_damaged_journal_is_not_begun_over_and_a_damaged_checkpoint_is_passed_over(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = words(place, out)
    killed(monkeypatch, 3, argv)
    (out / "checkpoint-2" / WEIGHTS).unlink()
    assert cli.main([*argv, "--resume_from_checkpoint", str(out)]) == 0
    assert same_model(place / "whole", out)
    shutil.rmtree(out)
    argv[argv.index("--save_steps") + 1] = "0"
    killed(monkeypatch, 3, argv)
    data = bytearray((out / JOURNAL).read_bytes())
    with Journal.read(out / JOURNAL) as journal:
        data[-2 * journal.header["entry"] - 5] ^= 1
    (out / JOURNAL).write_bytes(data)
    for more in ([], ["--resume_from_checkpoint", str(out)]):
        capsys.readouterr()
        assert cli.main([*argv, *more]) == 2
        assert "cut the file to" in capsys.readouterr().err
    assert (out / JOURNAL).read_bytes() == data


def test_a_run_without_a_journal(place: Path, tmp_path: Path) -> None:
    assert cli.main([*words(place, tmp_path / "out"), "--journal", "false"]) == 0
    assert not (tmp_path / "out" / JOURNAL).exists() and same_model(place / "whole", tmp_path / "out")
