"""Checkpoints: what was saved comes back bit for bit, or the run stops and says what is missing."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.checkpoints import ADAPTERS, MODELS, bits, equal, make, resumed, rows, trainer
from jaguar.trainer import checkpoints, staging, weights

ALL = [*MODELS, *ADAPTERS, "two adapters", "transformers' own", "plain"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about what it saves
@pytest.mark.parametrize("name", ALL)
def test_a_resumed_run_is_an_uninterrupted_one(tmp_path, name):
    whole = trainer(tmp_path, make(name))
    whole.train()
    # Another seed: whatever does not come back from the checkpoint is seen.
    again = trainer(tmp_path / "again", make(name, seed=1))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(bits(whole.model), bits(again.model))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["gpt-neox", "mixtral", "nomic-bert", "p-tuning", "two adapters", "plain"])
def test_the_best_model_is_that_of_the_best_step(tmp_path, name):
    losses, seen = iter([3.0, 1.0, 2.0]), {}
    run = trainer(tmp_path, make(name), steps=3, save_steps=1, eval_steps=1, eval_strategy="steps",
                  load_best_model_at_end=True)  # fmt: skip

    def evaluate(*args, **others):
        seen[run.state.global_step] = bits(run.model)
        metrics = {"eval_loss": next(losses)}
        run.control = run.callback_handler.on_evaluate(run.args, run.state, run.control, metrics)
        return metrics

    run.evaluate = evaluate
    run.train()
    assert equal(bits(run.model), seen[2]) and not equal(seen[2], seen[3])


def test_a_best_step_between_two_checkpoints_is_kept(tmp_path):
    losses, seen = {1: 3.0, 2: 2.0, 3: 1.0, 4: 2.0}, {}
    run = trainer(tmp_path, make("tied"), save_steps=2, eval_steps=1, eval_strategy="steps",
                  load_best_model_at_end=True, save_total_limit=1)  # fmt: skip

    def evaluate(*args, **others):
        seen[run.state.global_step] = bits(run.model)
        return {"eval_loss": losses[run.state.global_step]}

    run.evaluate = evaluate
    run.train()
    assert run.state.best_global_step == 3 and equal(bits(run.model), seen[3]) and not equal(seen[3], seen[4])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "journal.jaguar"]


def test_most_weights_are_stored_once(tmp_path):
    """A copy of its own is kept only of what `save_pretrained` fuses, or does not save."""
    for name, expected in (("mixtral", 0), ("gpt-neox", 0), ("tied", 0), ("nomic-bert", 6), ("p-tuning", 7)):
        model, folder = make(name), tmp_path / name
        model.save_pretrained(folder)
        weights.write(model, folder)
        extra = folder / weights.EXACT_FILE
        assert (len(load_file(extra)) if extra.exists() else 0) == expected, name


@pytest.mark.parametrize("name", ["gpt-neox", "mixtral"])
def test_shards_come_back(tmp_path, name):
    model, other = make(name), make(name, seed=1)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    weights.read(other, tmp_path, json.loads(json.dumps(weights.write(model, tmp_path))))
    assert equal(bits(model), bits(other))


def test_checkpoints_of_trainer_itself_are_read_or_refused(tmp_path):
    model, other = make("gpt-neox"), make("gpt-neox", seed=1)
    model.save_pretrained(tmp_path)
    checkpoints.load_weights(other, tmp_path)
    assert equal(bits(model), bits(other))
    stored = load_file(tmp_path / "model.safetensors")
    del stored["embed_out.weight"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack lm_head\.weight"):
        checkpoints.load_weights(make("gpt-neox", seed=1), tmp_path)


def test_tied_weights_that_are_stored_twice_come_back(tmp_path):
    model, other = make("tied"), make("tied", seed=1)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoints.load_weights(other, tmp_path)
    assert equal(bits(model), bits(other)) and other.lm_head.weight is other.model.embed_tokens.weight


def test_what_is_written_wrongly_is_noticed(tmp_path, monkeypatch):
    """A tensor that save_pretrained wrote otherwise than it is in memory is kept in the file beside it."""
    model = make("tied")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    weights.write(model, tmp_path)
    assert load_file(tmp_path / weights.EXACT_FILE).keys() == {"model.norm.weight"}
    monkeypatch.setattr(weights, "save_file", lambda tensors, path, metadata: save_file(
        {name: tensor + 1 for name, tensor in tensors.items()}, path, metadata))  # fmt: skip
    (tmp_path / weights.EXACT_FILE).unlink()
    with pytest.raises(OSError, match=r"does not hold model\.norm\.weight as it was written"):
        weights.write(model, tmp_path)


# -- what is missing is named ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    trainer(folder, make("tied"), steps=2).train()
    return folder / "checkpoint-2"


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_missing_file_is_named(saved, tmp_path, file, recorded):
    folder = shutil.copytree(saved, tmp_path / "checkpoint-2")
    (folder / file).unlink()
    if not recorded:  # as a checkpoint of another program
        (folder / checkpoints.RECORD).unlink()
    with pytest.raises(ValueError, match=file):
        resumed(folder, tmp_path)


def test_a_whole_checkpoint_without_a_record_is_gone_on_from(saved, tmp_path):  # Trainer's own
    folder = shutil.copytree(saved, tmp_path / "checkpoint-2")
    (folder / checkpoints.RECORD).unlink()
    assert resumed(folder, tmp_path).state.global_step > 2


def test_a_missing_tensor_or_a_cut_file_is_named(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "checkpoint-2")
    path = folder / "model.safetensors"
    stored = load_file(path)
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors is missing or not as it was saved"):
        resumed(folder, tmp_path)
    record = json.loads((folder / checkpoints.RECORD).read_text())
    record["files"]["model.safetensors"] = path.stat().st_size
    (folder / checkpoints.RECORD).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        resumed(folder, tmp_path)


def test_save_only_model_is_no_checkpoint_to_go_on_from(tmp_path):
    trainer(tmp_path, make("tied"), steps=2, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"no optimizer\.pt, scheduler\.pt, rng_state\.pth \(save_only_model"):
        resumed(tmp_path / "checkpoint-2", tmp_path)


def test_another_model_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match=r"holds .* as torch.float32 .*, the model has torch.bfloat16"):
        resumed(saved, tmp_path, make("tied").to(torch.bfloat16))
    with pytest.raises(ValueError, match="which this model has not"):
        resumed(saved, tmp_path, make("gpt-neox"))
    model = make("tied")
    model.extra = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="lacks extra, which are trained here"):
        resumed(saved, tmp_path, model)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_on_another_base_is_refused(tmp_path):
    trainer(tmp_path, make("ia3"), steps=2).train()
    other = make("ia3")
    with torch.no_grad():
        other.get_base_model().model.norm.weight.add_(1)
    with pytest.raises(ValueError, match="the frozen weights are not those beside which the adapter"):
        resumed(tmp_path / "checkpoint-2", tmp_path, other)


@pytest.mark.filterwarnings("ignore:the steps of .*journal.jaguar")  # the run before it is in the same folder
def test_other_rows_or_processes_are_said(saved, tmp_path):
    run = trainer(tmp_path / "a", make("tied", seed=1))
    run.train_dataset = rows(40)
    with pytest.warns(UserWarning, match="training rows 32 then, 40 now"):
        run.train(resume_from_checkpoint=str(saved))
    with pytest.warns(UserWarning, match="rows per step 8 then, 16 now"):
        resumed(saved, tmp_path, gradient_accumulation_steps=2)
    folder = shutil.copytree(saved, tmp_path / "checkpoint-2")
    record = json.loads((folder / checkpoints.RECORD).read_text())
    record["run"] |= {"processes": 2}
    (folder / checkpoints.RECORD).write_text(json.dumps(record))
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    record["files"]["rng_state_0.pth"] = record["files"].pop("rng_state.pth")
    (folder / checkpoints.RECORD).write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="processes 2 then, 1 now"):
        resumed(folder, tmp_path)


def test_the_best_so_far_is_found_where_the_run_was_moved(tmp_path):
    def run(folder, steps):
        return trainer(
            tmp_path / folder, make("tied"), steps=steps, eval_strategy="steps", eval_steps=2,
            load_best_model_at_end=True, save_total_limit=None,
        )  # fmt: skip

    run("a", 2).train()
    (tmp_path / "a").rename(tmp_path / "b")
    moved = run("c", 2)
    with pytest.warns(UserWarning, match="no step is taken"):
        moved.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert moved.state.best_model_checkpoint == str(tmp_path / "b" / "checkpoint-2")
    state = json.loads((tmp_path / "b" / "checkpoint-2" / "trainer_state.json").read_text())
    state["best_model_checkpoint"] = str(tmp_path / "a" / "checkpoint-1")
    (tmp_path / "b" / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    gone = run("d", 4)
    with pytest.warns(UserWarning, match="checkpoint-1, is gone"):
        gone.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert gone.state.best_model_checkpoint == str(tmp_path / "d" / "checkpoint-4")


# -- what a killed process leaves --------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing is cleaned up."""


OPERATIONS = [(os, "replace"), (shutil, "rmtree"), (Path, "mkdir"), (os, "fsync")]


@pytest.mark.parametrize("earlier", [True, False])
def test_a_kill_at_any_instant_leaves_a_whole_checkpoint_or_none(tmp_path, monkeypatch, earlier):
    """The process dies before the n-th operation on the file system, and so do the runs that clean up after it."""

    def write(text):
        with staging.saving(folder) as made:
            for file in ("weights", "trainer_state.json"):
                made.joinpath(file).write_text(text)
                alive()

    def alive():
        count[0] -= 1
        if not count[0]:
            dead[0] = True
        if dead[0]:
            raise Killed

    def dying(original):
        def call(*args, **others):
            alive()
            return original(*args, **others)

        return call

    count, dead = [10**9], [False]
    for owner, name in OPERATIONS:
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    for first in range(1, 40):
        for second in range(1, 8):
            folder = tmp_path / f"{first}-{second}" / "checkpoint-2"
            count[0], dead[0] = 10**9, False
            folder.parent.mkdir()
            if earlier:
                write("old")
            count[0] = first
            survived = True
            try:
                write("new")
            except Killed:
                survived = False
            count[0], dead[0] = second, False
            with contextlib.suppress(Killed):
                staging.recover_all(folder.parent)
            count[0], dead[0] = 10**9, False
            staging.recover_all(folder.parent)
            texts = {file.read_text() for file in folder.iterdir()} if folder.exists() else set()
            assert not texts or len(list(folder.iterdir())) == 2
            assert texts in ([{"new"}, {"old"}] if earlier else [{"new"}, set()]), (first, second)
            assert not survived or texts == {"new"}
            assert {path.name for path in folder.parent.iterdir()} <= {"checkpoint-2"}
            write("again")
    assert survived


def test_a_killed_run_is_gone_on_with_from_the_newest_whole_checkpoint(tmp_path):
    program = textwrap.dedent(f"""
        import os, sys
        sys.path[:0] = {sys.path!r}
        from helpers import checkpoints as t
        run = t.trainer({str(tmp_path)!r}, t.make("tied"))
        save = type(run.model).save_pretrained
        def dying(model, folder, **others):
            save(model, folder, **others)
            if "checkpoint-4" in str(folder):
                os._exit(9)
        type(run.model).save_pretrained = dying
        run.train()
    """)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert {".checkpoint-4.saving", "checkpoint-2", "journal.jaguar"} == set(os.listdir(tmp_path)) - {"runs"}
    whole = trainer(tmp_path / "whole", make("tied"))
    whole.train()
    run = trainer(tmp_path, make("tied", seed=1))
    with pytest.warns(UserWarning, match=r"removed .*checkpoint-4.saving: a process was killed"):
        run.train(resume_from_checkpoint=True)
    assert equal(bits(whole.model), bits(run.model))
    assert sorted(p.name for p in tmp_path.glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-4"]


def test_resume_passes_over_what_is_not_whole(tmp_path):
    trainer(tmp_path, make("tied")).train()
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.warns(UserWarning, match=r"going on from checkpoint-2; checkpoint-4: optimizer\.pt is missing"):
        assert checkpoints.newest(tmp_path, 1).name == "checkpoint-2"
    (tmp_path / "checkpoint-2" / "scheduler.pt").unlink()
    (tmp_path / "journal.jaguar").unlink()
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        trainer(tmp_path, make("tied")).train(resume_from_checkpoint=True)


def test_nothing_is_deleted_before_the_new_checkpoint_is_whole(tmp_path):
    run = trainer(tmp_path, make("tied"), save_total_limit=1)
    there = []
    run.on_checkpoint = lambda folder: there.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
    run.train()
    assert there == [[], ["checkpoint-2"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "journal.jaguar"]
    args = torch.load(tmp_path / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert args.save_total_limit == 1
