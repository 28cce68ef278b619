"""Journals with which a run cannot go on, or goes on otherwise than it was, and what is said of them."""

from dataclasses import dataclass

import pytest

import jaguar
from helpers.checkpoints import bits, equal
from helpers.dying import At, Dies, run, same
from helpers.trainers import arguments, classifier, labelled
from jaguar import Journal, ZOTrainer
from jaguar.record import JOURNAL
from jaguar.trainer.journaling import BEFORE, JournalUnfit


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
