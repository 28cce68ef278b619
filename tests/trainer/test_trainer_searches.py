"""Hyperparameter searches of Trainer over optimizers and their options."""

import pytest
import torch
from transformers.hyperparameter_search import HPSearchBackend

from helpers.trainers import QUIET, bits, classifier, equal, labelled
from jaguar import ZOSGD, JaguarMuon, JaguarSignSGD, Journal, ZOTrainer, ZOTrainingArguments

# -- searches ----------------------------------------------------------------------------------------------------------


class Trial(dict):
    """The parameters, with what else optuna's trials have."""

    def __init__(self, number, params):
        super().__init__(params)
        self.number, self.params = number, params


class Search:
    """A backend that tries what it is given, as optuna's does."""

    trials = ()

    def ensure_available(self):
        pass

    def run(self, trainer, n_trials, direction, **_):
        runs = []
        for number, params in enumerate(self.trials[:n_trials]):
            trainer.objective = None
            trainer.train(resume_from_checkpoint=None, trial=Trial(number, params))
            if trainer.objective is None:
                trainer.objective = trainer.compute_objective(trainer.evaluate())
            runs.append((trainer.objective, number, trainer.optimizer.optimizer, bits(trainer.model)))
        return runs


def searched(tmp_path, monkeypatch, trials, **more):
    monkeypatch.setattr(Search, "trials", trials)
    monkeypatch.setattr("transformers.integrations.hp_params", dict)
    monkeypatch.setattr("transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS", {HPSearchBackend.OPTUNA: Search})
    args = ZOTrainingArguments(str(tmp_path), max_steps=3, save_strategy="no", **QUIET, **more)
    trainer = ZOTrainer(
        args=args, model_init=lambda: classifier(), train_dataset=labelled(), eval_dataset=labelled(10, 1)
    )
    return trainer.hyperparameter_search(lambda trial: trial.params, backend="optuna", n_trials=len(trials))


def test_a_search_over_optim_zo_runs_each_optimizer(tmp_path, monkeypatch):
    trials = [
        {"optim_zo": name, "learning_rate": 1e-2} for name in ("jaguar-muon", "fo-sgd", "zo-sgd", "jaguar-signsgd")
    ]
    runs = searched(tmp_path, monkeypatch, trials)
    assert [type(run[2]) for run in runs] == [JaguarMuon, torch.optim.SGD, ZOSGD, JaguarSignSGD]
    for trial, run in zip(trials, runs, strict=True):  # each as on its own
        args = ZOTrainingArguments(str(tmp_path), max_steps=3, save_strategy="no", **QUIET, **trial)
        alone = ZOTrainer(args=args, model_init=lambda: classifier(), train_dataset=labelled())
        alone.train()
        assert equal(bits(alone.model), run[3])


def test_a_search_over_options(tmp_path, monkeypatch):
    trials = [{"tau": 1e-3, "coordinates": 0.1}, {"tau": 1e-2, "coordinates": 0.5, "per_device_train_batch_size": 4}]
    runs = searched(tmp_path, monkeypatch, trials, learning_rate=1e-2)
    assert [run[2].param_groups[0]["tau"] for run in runs] == [1e-3, 1e-2]
    with pytest.raises(ValueError, match="zo-sgd has no option coordinates"):
        searched(tmp_path, monkeypatch, [{"optim_zo": "zo-sgd"}], coordinates=0.5)


def test_every_trial_has_its_own_journal(tmp_path, monkeypatch):
    searched(tmp_path, monkeypatch, [{"optim_zo": name} for name in ("zo-sgd", "fo-sgd", "jaguar-signsgd")])
    there = {path.parent.name: path for path in tmp_path.rglob("*.jaguar")}
    assert there.keys() == {"run-0", "run-2"}
    for name, optimizer in (("run-0", "ZOSGD"), ("run-2", "JaguarSignSGD")):
        with Journal.read(there[name]) as journal:
            assert journal.header["optimizer"] == optimizer and journal.ended and len(journal) == 3
