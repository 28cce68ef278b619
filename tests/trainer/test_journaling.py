"""Runs of a trainer that are stopped anywhere go on from their journal, and end with the same bits."""

import json
import logging
import shutil
import warnings
from dataclasses import dataclass

import pytest
import torch
from transformers import TrainerCallback

import jaguar
from helpers.checkpoints import bits, equal, make, trainer
from helpers.trainers import Bad, arguments, classifier, labelled, scored
from jaguar import Journal, ZOTrainer
from jaguar.trainer.journaling import BEFORE, JOURNAL, JournalUnfit


class Dies(BaseException):
    """A process that is killed: nothing is saved any more."""


class At(TrainerCallback):
    """Ends the run at the end of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **others):
        if state.global_step == self.step:
            raise Dies


def noisy(batch):
    """A collator that draws from the global generator: rows lose a token at random."""
    kept = {key: torch.stack([torch.as_tensor(row[key]) for row in batch]) for key in batch[0]}
    kept["input_ids"] = torch.where(torch.rand(kept["input_ids"].shape) < 0.2, 3, kept["input_ids"])
    return kept


def run(folder, steps=9, **more):
    callbacks = more.pop("callbacks", [])
    args = arguments(folder, steps, **{"per_device_train_batch_size": 4, "logging_steps": 1} | more)
    # Trainer collates a row ahead of its checkpoints, so that after one a random collator draws other numbers.
    collate = noisy if args.save_strategy == "no" else None
    job = ZOTrainer(classifier(), args, collate, labelled(20), labelled(8, 1), callbacks=callbacks)
    job.calls = []
    compute = job.compute_loss

    def counted(*args, **others):
        job.calls.append(job.state.global_step)
        return compute(*args, **others)

    job.compute_loss = counted
    return job


def momenta(job):
    return {name: t.clone() for p in job.zeroth_order.state.values() for name, t in p.items()}


def same(one, other):
    assert equal(bits(one.model), bits(other.model))
    saved = [job.zeroth_order.state_dict()["jaguar"] for job in (one, other)]
    assert saved[0] == saved[1] and equal(momenta(one), momenta(other))
    of_time = ("runtime", "second", "train_loss")  # which Trainer counts from where it goes on
    logs = [
        [{k: v for k, v in entry.items() if not any(word in k for word in of_time)} for entry in job.state.log_history]
        for job in (one, other)
    ]
    assert json.dumps(logs[0], sort_keys=True) == json.dumps(logs[1], sort_keys=True)


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


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"per_device_train_batch_size": 5}, "rows per step 4 then, 5 now"),
        ({"data_seed": 7}, "data seed None then, 7 now"),
        ({"lr_scheduler_type": "constant"}, "lr scheduler type linear then, constant now"),
    ],
)
def test_without_a_checkpoint_other_rows_are_refused(tmp_path, changed, said):
    with pytest.raises(Dies):
        run(tmp_path, callbacks=[At(5)]).train()
    with pytest.raises(JournalUnfit, match=f"cannot go on with .*: its steps are of other rows: {said}"):
        run(tmp_path, **changed).train(resume_from_checkpoint=True)
    with Journal.read(tmp_path / JOURNAL) as journal:
        assert len(journal) == 5


def test_a_journal_that_another_run_writes_is_refused(tmp_path):
    with pytest.raises(Dies):
        run(tmp_path, callbacks=[At(5)]).train()
    with Journal.resume(tmp_path / JOURNAL):
        for again in (True, None):
            with pytest.raises(JournalUnfit, match="a run is writing to"):
                run(tmp_path).train(resume_from_checkpoint=again)


def test_a_trainer_that_was_interrupted_does_not_go_on_from_its_middle(tmp_path):
    job = run(tmp_path, callbacks=[At(4)])
    with pytest.raises(Dies):
        job.train()
    job.pop_callback(At)
    with pytest.raises(JournalUnfit, match="this trainer has taken 4 steps already: make a new one"):
        job.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_run_does_not_take_this_journal_s_steps(tmp_path):
    """Its settings are the same and its rows are not, which only the fingerprints tell."""
    options = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 9}
    other = run(tmp_path / "other", **options)
    other.train_dataset = labelled(20, 5)
    other.train()
    with pytest.raises(Dies):
        run(tmp_path / "own", callbacks=[At(8)], save_strategy="no").train()
    job = run(tmp_path / "own", **options)
    job.train_dataset = labelled(20, 5)
    with pytest.warns(UserWarning, match="are not taken again: it notes no weights of step 6"):
        job.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-6"))
    assert equal(bits(job.model), bits(other.model))


def test_other_learning_rates_are_said(tmp_path):
    with pytest.raises(Dies):
        run(tmp_path, callbacks=[At(5)]).train()
    job = run(tmp_path, learning_rate=0.1)
    with pytest.warns(
        UserWarning, match=r"step 1 is taken with the learning rate that it had, 0\.01; this run's .* 0\.1"
    ):
        job.train(resume_from_checkpoint=True)


def test_a_new_run_over_an_unfinished_one_says_so(tmp_path):
    with pytest.raises(Dies):
        run(tmp_path, callbacks=[At(5)]).train()
    with pytest.warns(UserWarning, match="a new run begins, and that one had come to step 5"):
        run(tmp_path).train()
    assert len(Journal.read(tmp_path / BEFORE)) == 5


def test_a_journal_without_records_goes_on(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    whole = run(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(Dies):
        run(tmp_path / "died", callbacks=[At(5)], **options).train()
    with Journal.read(tmp_path / "died" / JOURNAL) as journal:
        header = dict(journal.header) | {"first": 4}
        header["base"] = header["base"] | {"fingerprint": journal.noted(4)}
    (tmp_path / "died" / JOURNAL).unlink()
    Journal.create(tmp_path / "died" / JOURNAL, header).close()
    job = run(tmp_path / "died", **options)
    job.train(resume_from_checkpoint=True)
    same(whole, job)
    with Journal.read(tmp_path / "died" / JOURNAL) as journal:
        assert (journal.first, len(journal)) == (4, 5)


def test_an_optimizer_of_one_s_own_has_no_journal(tmp_path):
    @dataclass(frozen=True)
    class Own(jaguar.rules.Sign):
        numbers: object = None

    model = classifier()
    method = jaguar.Method(jaguar.directions.Rademacher(), Own(numbers=object()))
    optimizer = jaguar.ZerothOrder(model.named_parameters(), method, lr=1e-4, momentum=0.0)
    job = ZOTrainer(model, arguments(tmp_path, 2), train_dataset=labelled(20), optimizers=(optimizer, None))
    with pytest.warns(UserWarning, match="there is no journal: the optimizer has a part of your own"):
        job.train()
    assert not (tmp_path / JOURNAL).exists() and optimizer.steps_done == 2


def test_a_run_that_was_stopped_has_not_ended(tmp_path):
    job = run(tmp_path, 4)
    job.came_to_its_end = lambda: False
    job.train()
    with Journal.read(tmp_path / JOURNAL) as journal:
        assert not journal.ended and len(journal) == 4
