"""Runs of a trainer that are stopped anywhere go on from their journal, and end with the same bits."""

import logging
import shutil
import warnings

import pytest
import torch
from transformers import TrainerCallback

import jaguar
from helpers.checkpoints import bits, equal, make, trainer
from helpers.dying import At, Dies, run, same
from helpers.trainers import Bad, arguments, classifier, labelled, scored
from jaguar import Journal, ZOTrainer
from jaguar.record import JOURNAL
from jaguar.trainer.journaling import BEFORE

SETTINGS = {
    "no checkpoints": {},
    "rare checkpoints": {"save_strategy": "steps", "save_steps": 4},
    "best of evaluations": {
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    },
    "windows and epochs": {
        "max_steps": -1,
        "num_train_epochs": 3,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
    },
    "walk": {"optim_zo": "zo-sgd", "restore": "walk", "coordinates": None, "learning_rate": 1e-4, "momentum": 0.5},
    "muon": {"optim_zo": "jaguar-muon", "learning_rate": 1e-3},
    "dizo": {"optim_zo": "dizo", "coordinates": None, "zo_options": "every=3,search_steps=1", "learning_rate": 1e-4},
    "automatic": {
        "optim_zo": "zo-sgd",
        "learning_rate": "auto",
        "tau": "auto",
        "coordinates": None,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 5,  # whole windows only
    },
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore")
def test_a_run_that_died_after_any_step_ends_as_one_that_never_stopped(tmp_path, name, caplog):
    options = SETTINGS[name]
    whole = run(tmp_path / "whole", **options)
    whole.train()
    steps = whole.state.global_step
    for died in (1, 5, steps):
        folder = tmp_path / str(died)
        with pytest.raises(Dies):
            run(folder, callbacks=[At(died)], **options).train()
        job = run(folder, **options)
        torch.manual_seed(99)  # what the next lines draw is no part of the run
        job = run(folder, **options)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            job.train(resume_from_checkpoint=True)
        same(whole, job)
        assert whole.forward_passes == job.forward_passes or options.get("save_strategy")
        measured = [step for step in job.calls if step >= died]
        assert job.calls == measured or "eval_steps" in options, "steps of the journal were measured again"
        began = died // options["save_steps"] * options["save_steps"] if "save_steps" in options else 0
        assert (f"steps {began + 1} to {died} are taken as" in caplog.text) == (began < died)


def test_replay_gives_the_model_of_the_run_and_its_best_one(tmp_path):
    for name in ("no checkpoints", "best of evaluations"):
        job = run(tmp_path / name, **SETTINGS[name])
        job.train()
        with Journal.read(tmp_path / name / JOURNAL) as journal:
            assert journal.ended and len(journal) == 9
            best = job.state.best_global_step
            assert journal.chosen == (9 if best is None else best)
            assert journal.header["run"]["training_rows"] == 20
            again = classifier()
            assert jaguar.replay(again, journal).steps_done == journal.chosen
        assert equal(bits(again), bits(job.model))
    assert best is not None and best < 9


def test_evaluations_of_steps_that_are_taken_again_find_the_best_one(tmp_path):
    options = SETTINGS["best of evaluations"] | {"save_steps": 50}
    whole = run(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(Dies):
        run(tmp_path / "died", callbacks=[At(8)], **options).train()
    shutil.rmtree(tmp_path / "died" / f"checkpoint-{whole.state.best_global_step}", ignore_errors=True)
    job = run(tmp_path / "died", **options)
    job.train(resume_from_checkpoint=True)
    same(whole, job)
    assert job.state.best_global_step == whole.state.best_global_step


def test_another_base_model_is_refused(tmp_path):
    with pytest.raises(Dies):
        run(tmp_path, callbacks=[At(3)]).train()
    other = run(tmp_path)
    with torch.no_grad():
        other.model.classifier.bias += 1
    with pytest.raises(ValueError, match=r"cannot go on with .*: the trained tensors are not those that the run"):
        other.train(resume_from_checkpoint=True)
    frozen = run(tmp_path / "frozen", callbacks=[At(3)])
    frozen.model.bert.requires_grad_(False)
    with pytest.raises(Dies):
        frozen.train()
    other = run(tmp_path / "frozen")
    other.model.bert.requires_grad_(False)
    other.model.bert.embeddings.LayerNorm.bias.data += 1
    with pytest.raises(ValueError, match="the model's frozen parameters are not those"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"beta": 0.5}, r"the journal of another run: groups\[0\]\.beta is 0\.9 there, 0\.5 here"),
        ({"coordinates": 0.25}, r"method\.direction\.coordinates is 0\.5 there, 0\.25 here"),
        ({"optim_zo": "zo-sgd", "coordinates": None}, r"groups\[0\]\.beta is 0\.9 there, nothing here"),
    ],
)
def test_other_settings_are_named(tmp_path, changed, said):
    with pytest.raises(Dies):
        run(tmp_path, callbacks=[At(3)]).train()
    with pytest.raises(ValueError, match=said):
        run(tmp_path, **changed).train(resume_from_checkpoint=True)
    assert len(Journal.read(tmp_path / JOURNAL)) == 3


def test_other_rows_are_measured_anew_from_the_checkpoint(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(Dies):
        run(tmp_path, callbacks=[At(5)], **options).train()
    job = run(tmp_path, per_device_train_batch_size=5, **options)
    with pytest.warns(UserWarning) as said:
        job.train(resume_from_checkpoint=True)
    texts = [str(warning.message) for warning in said]
    assert any("not as a run that never stopped: rows per step 4 then, 5 now" in text for text in texts)
    assert any(
        "are not taken again: its steps are of other rows: rows per step 4 then, 5 now" in text for text in texts
    )
    assert min(job.calls) == 4
    assert len(Journal.read(tmp_path / BEFORE)) == 5
    with Journal.read(tmp_path / JOURNAL) as journal:
        assert (journal.first, journal.next_step, journal.ended) == (4, 9, True)


def test_first_rows_again_are_measured(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(Dies):
        run(tmp_path, callbacks=[At(5)], **options).train()
    job = run(tmp_path, ignore_data_skip=True, **options)
    job.train(resume_from_checkpoint=True)
    assert min(job.calls) == 4


def test_a_new_run_puts_the_journal_of_the_one_before_aside(tmp_path):
    run(tmp_path, 4).train()
    first = (tmp_path / JOURNAL).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path, 3).train()
    assert (tmp_path / BEFORE).read_bytes() == first and len(Journal.read(tmp_path / JOURNAL)) == 3


def test_a_run_that_died_in_its_first_step_begins_again(tmp_path):
    whole, died = run(tmp_path / "whole"), run(tmp_path / "died")
    whole.train()

    def dies(*_):
        raise Dies

    died._measure = dies
    with pytest.raises(Dies):
        died.train()
    again = run(tmp_path / "died")
    again.train(resume_from_checkpoint=True)
    same(whole, again)
    assert (tmp_path / "died" / JOURNAL).read_bytes() == (tmp_path / "whole" / JOURNAL).read_bytes()


def test_a_step_by_hand_is_in_no_journal(tmp_path):
    job = run(tmp_path, 2)
    job.train()
    before = (tmp_path / JOURNAL).read_bytes()
    job.training_step(job.model, job._prepare_inputs(job.data_collator(labelled(4))))
    job.optimizer.step()
    assert job.zeroth_order.steps_done == 3 and job.journal is None
    assert (tmp_path / JOURNAL).read_bytes() == before and not (tmp_path / BEFORE).exists()


def test_a_journal_that_lost_its_end_or_is_damaged_is_put_aside(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    whole = run(tmp_path / "whole", **options)
    whole.train()
    for name, change in (("cut", lambda data: data[:-400]), ("head", lambda data: b"x" + data[1:])):
        folder = tmp_path / name
        with pytest.raises(Dies):
            run(folder, callbacks=[At(5)], **options).train()
        data = (folder / JOURNAL).read_bytes()
        with Journal.read(folder / JOURNAL) as journal:
            size = journal.header["entry"]
        change = (lambda data, size=size: data[: -4 * size]) if name == "cut" else change
        (folder / JOURNAL).write_bytes(change(data))
        job = run(folder, **options)
        with pytest.warns(UserWarning, match="are not taken again"):
            job.train(resume_from_checkpoint=True)
        same(whole, job)
        assert (folder / BEFORE).exists() and Journal.read(folder / JOURNAL).first == 4


def test_a_journal_removed_during_the_run_is_written_again(tmp_path):
    class Removes(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            if state.global_step == 3:
                (tmp_path / JOURNAL).unlink()

    run(tmp_path, callbacks=[Removes()]).train()
    assert [record.step for record in Journal.read(tmp_path / JOURNAL)] == list(range(9))


def test_without_a_journal_there_is_none(tmp_path):
    run(tmp_path, 2, journal=False).train()
    assert not (tmp_path / JOURNAL).exists()
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        run(tmp_path, 2, journal=False).train(resume_from_checkpoint=True)
    run(tmp_path / "fo", 2, optim_zo="fo-sgd", coordinates=None, tau=None).train()
    assert not (tmp_path / "fo" / JOURNAL).exists()


def test_skipped_steps_are_in_it(tmp_path):
    def bad(folder, **more):
        return ZOTrainer(Bad({3, 4}), arguments(folder, 5, **more), train_dataset=labelled(20))

    whole = bad(tmp_path / "whole")
    with pytest.warns(UserWarning, match="was skipped"):
        whole.train()
    with pytest.raises(Dies), pytest.warns(UserWarning, match="was skipped"):
        job = bad(tmp_path / "died")
        job.add_callback(At(3))
        job.train()
    job = ZOTrainer(Bad(set()), arguments(tmp_path / "died", 5), train_dataset=labelled(20))
    with pytest.warns(UserWarning, match="was skipped"):
        job.train(resume_from_checkpoint=True)
    assert equal(bits(whole.model), bits(job.model)) and job.zeroth_order.n_skipped == 1


def test_models_that_are_scored_and_adapters(tmp_path):
    for name in ("lora and a whole module", "bf16"):
        whole = trainer(tmp_path / name / "whole", make(name), 6, save_steps=4)
        whole.train()
        with pytest.raises(Dies):
            job = trainer(tmp_path / name / "died", make(name), 6, save_steps=4)
            job.add_callback(At(5))
            job.train()
        job = trainer(tmp_path / name / "died", make(name, seed=1), 6, save_steps=4)
        if name == "bf16":  # of an adapter the base stays what it was
            job.train(resume_from_checkpoint=True)
            assert equal(bits(whole.model), bits(job.model))
    one = scored(tmp_path / "scored")
    one.train()
    again = scored(tmp_path / "again")
    jaguar.replay(again.model, tmp_path / "scored" / JOURNAL)
    assert equal(bits(one.model), bits(again.model))
