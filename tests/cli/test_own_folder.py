"""A run touches what is its own: checkpoints of others, of earlier runs and of users stay, or it is said what goes."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import TrainerCallback

from helpers.checkpoints import bits, equal, make, trainer
from helpers.runs import place as place
from helpers.runs import words
from helpers.tiny import refused
from jaguar.cli import commands as cli
from jaguar.cli.finetune.progress import Stop
from jaguar.trainer import staging

BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "runs" and path.suffix != ".jaguar")


def test_a_run_into_another_folder_leaves_the_one_it_goes_on_from(tmp_path: Path) -> None:
    # Steps that are far too long: the first checkpoint is the best.
    trainer(tmp_path / "a", make("tied"), 6, learning_rate=1.0, save_total_limit=5, **BEST).train()
    assert names(tmp_path / "a") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    other = trainer(tmp_path / "b", make("tied"), 8, learning_rate=1.0, save_total_limit=1, **BEST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
        assert other.state.best_model_checkpoint == str(tmp_path / "a" / "checkpoint-2")
        copied = trainer(tmp_path / "copy", make("tied"), 8, learning_rate=1.0, save_total_limit=1, **BEST)
        copied.train(resume_from_checkpoint=str(tmp_path / "copy" / "checkpoint-6"))
    assert names(tmp_path / "a") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert copied.state.best_model_checkpoint == str(tmp_path / "copy" / "checkpoint-2")
    assert names(tmp_path / "copy") == ["checkpoint-2"]


def test_a_stop_keeps_as_many_checkpoints_as_were_asked_for(tmp_path: Path) -> None:
    stop = Stop()

    class Asks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            stop.asked = 2 if state.global_step == 4 else 0

    run = trainer(tmp_path, make("tied"), 9, save_steps=1, save_total_limit=4)
    run.add_callback(Asks())
    run.add_callback(stop)
    run.train()
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (2, 3, 4, 5)]


@pytest.mark.parametrize("limit", [None, 0, -1, 2])
def test_limits_are_those_of_trainer(tmp_path: Path, limit: int | None) -> None:
    trainer(tmp_path, make("tied"), 8, save_total_limit=limit).train()
    assert len(names(tmp_path)) == (2 if limit == 2 else 4)


@pytest.mark.filterwarnings("ignore:.*holds checkpoints of another run")
def test_a_run_that_was_not_asked_to_go_on_is_not_begun_over_a_checkpoint(
    place: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    shutil.copytree(place / "whole" / "checkpoint-4", out / "checkpoint-4")
    said = refused(capsys, *words(place, out))
    assert f"go on with --resume_from_checkpoint {out}, " in said and names(out) == ["checkpoint-4"]
    assert cli.main(words(place, out, "--overwrite_output_dir")) == 0


def test_the_trainer_says_that_there_are_checkpoints_already(tmp_path: Path) -> None:
    trainer(tmp_path, make("tied")).train()
    with pytest.warns(UserWarning, match="holds checkpoints of another run, the last one checkpoint-4"):
        trainer(tmp_path, make("tied")).train()


def test_a_run_without_checkpoints_disturbs_none(tmp_path: Path) -> None:
    """Beside it a run may be writing one."""
    made = staging.staged(tmp_path / "checkpoint-2")
    made.mkdir(parents=True)
    trainer(tmp_path, make("tied"), save_strategy="no").train()
    assert made.is_dir()


def test_hidden_files_of_users_stay(tmp_path: Path) -> None:
    inner = tmp_path / "out"
    for folder in (inner / ".checkpoint-data", tmp_path / ".out.saving", inner / ".checkpoint-x.saving"):
        folder.mkdir(parents=True)
    assert staging.recover_all(inner) == [] and len(list(tmp_path.iterdir())) == 2
    assert names(inner) == [".checkpoint-data", ".checkpoint-x.saving"]


def test_a_checkpoint_that_is_a_link_is_unlinked(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint-1").symlink_to(elsewhere)
    run = trainer(tmp_path / "out", make("tied"), save_total_limit=1)
    with pytest.warns(UserWarning, match="holds checkpoints of another run"):
        run.train()
    assert names(tmp_path / "out") == ["checkpoint-4"] and elsewhere.is_dir()


def test_the_newest_that_can_be_read_is_taken(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", make("tied"), 8)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    optimizer = tmp_path / "run" / "checkpoint-6" / "optimizer.pt"
    optimizer.write_bytes(bytes(optimizer.stat().st_size))
    for file in ("model.safetensors", staging.RECORD):
        (tmp_path / "run" / "checkpoint-4" / file).unlink()
    run = trainer(tmp_path / "run", make("tied", seed=1), 8)
    with pytest.warns(
        UserWarning, match=r"going on from checkpoint-2; checkpoint-6: .*optimizer\.pt.*; checkpoint-4: "
    ):
        run.train(resume_from_checkpoint=True)
    assert equal(bits(run.model), bits(whole.model))


def test_what_other_versions_of_torch_write_is_read(tmp_path: Path) -> None:
    whole = trainer(tmp_path, make("tied"))
    whole.train()
    folder = tmp_path / "checkpoint-2"
    (folder / staging.RECORD).unlink()
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    torch.save(saved, folder / "optimizer.pt", _use_new_zipfile_serialization=False)
    schedule = torch.load(folder / "scheduler.pt", weights_only=True)
    torch.save({key: schedule[key] for key in schedule if key != "_is_initial"}, folder / "scheduler.pt")
    run = trainer(tmp_path / "again", make("tied", seed=1))
    run.train(resume_from_checkpoint=str(folder))
    assert equal(bits(run.model), bits(whole.model))


class Mine(Exception):
    pass


def test_exceptions_of_a_user_are_no_errors_of_the_disk(tmp_path: Path) -> None:
    run = trainer(tmp_path, make("tied"))

    def on_checkpoint(folder: Path) -> None:
        raise Mine("my bug")

    run.on_checkpoint = on_checkpoint
    with pytest.raises(Mine):
        run.train()
    assert names(tmp_path) == []


def test_memory_that_runs_out_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer(tmp_path, make("tied")).train()

    def full(*args: Any, **others: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(torch.OutOfMemoryError):
        trainer(tmp_path, make("tied")).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_best_checkpoint_is_known_where_the_best_step_has_one(tmp_path: Path) -> None:
    more = BEST | {"load_best_model_at_end": False, "learning_rate": 1.0}
    run = trainer(tmp_path, make("tied"), 6, **more)
    run.train()
    assert run.state.best_global_step == 2 and run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert not re.search(r"\.saving", (tmp_path / "checkpoint-6" / "trainer_state.json").read_text())


class Looks(TrainerCallback):
    """Set on the instance, as `functools.partial` and mocks are."""

    def __init__(self) -> None:
        self.on_pre_optimizer_step = lambda *args, **others: None


@pytest.mark.parametrize("who", ["instance", "global hook"])
def test_whoever_looks_between_losses_and_update_is_noticed(tmp_path: Path, who: str) -> None:
    run = trainer(tmp_path, make("tied"), save_strategy="no")
    run.create_optimizer()
    assert not run._is_watched
    if who == "instance":
        run.add_callback(Looks())
        assert run._is_watched
    else:
        handle = register_optimizer_step_pre_hook(lambda *args: None)
        assert run._is_watched
        handle.remove()


def test_trials_of_a_search_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may hold the folder around them."""
    run = trainer(tmp_path, make("tied"))
    monkeypatch.setattr(type(run), "_get_output_dir", lambda self, trial: str(tmp_path / "run-3"))
    locked: list[Path] = []

    def only_run(folder: Path) -> Any:
        locked.append(folder)
        raise RuntimeError

    monkeypatch.setattr("jaguar.trainer.exact_trainer.only_run", only_run)
    with pytest.raises(RuntimeError):
        run.train(trial={})
    assert locked == [tmp_path / "run-3"]
