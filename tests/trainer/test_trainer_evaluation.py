"""Evaluation, logging and the best model of ZOTrainer."""

import logging

import pytest
import torch
from transformers import (
    EarlyStoppingCallback,
)

from helpers.trainers import examples, scored
from jaguar.scoring import evaluate
from jaguar.tasks import COPA, SST2


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


# -- evaluation, logging, best model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [SST2, COPA])
def test_evaluation_and_prediction_are_the_scorers(tmp_path, task):
    trainer = scored(tmp_path, task, per_device_eval_batch_size=4)
    expected = evaluate(trainer.scorer, trainer.eval_dataset, 1)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected.figures()["loss"], rel=1e-5)
    assert metrics["eval_accuracy"] == expected.figures()["accuracy"]
    output = trainer.predict(trainer.eval_dataset)  # in the order of the data set
    torch.testing.assert_close(torch.tensor(output.predictions), expected.logits, rtol=1e-5, atol=1e-5)
    assert output.label_ids.tolist() == expected.labels.tolist()


def test_batches_of_similar_length(tmp_path):
    trainer = scored(tmp_path, train_sampling_strategy="group_by_length", per_device_train_batch_size=4)
    trainer.train_dataset = examples(SST2, 200)
    lengths = [e.length for e in trainer.train_dataset]
    order = list(trainer._get_train_sampler())
    batches = [[lengths[i] for i in order[k : k + 4]] for k in range(0, 200, 4)]
    assert sorted(order) == list(range(200))
    spread = sum(max(b) - min(b) for b in batches) / len(batches)
    assert spread < (max(lengths) - min(lengths)) / 4
    trainer.train()


def test_callbacks_best_model_and_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = scored(
        tmp_path,
        steps=40,
        report_to="tensorboard",
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="best",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        learning_rate=0.1,
        callbacks=[EarlyStoppingCallback(2)],
    )
    trainer.train()
    evals = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(evals, key=evals.get)
    assert trainer.state.best_global_step == best and trainer.state.global_step == best + 4  # patience of 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evals[best], rel=1e-6)
    (folder,) = {path.parent for path in tmp_path.rglob("events.out*")}
    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "train/projected_grad", "train/learning_rate", "eval/loss", "eval/accuracy"} <= set(tags)
    assert "train/grad_norm" not in tags
    points = [e.value for e in events.Scalars("eval/loss")]
    assert points == pytest.approx([*evals.values(), evals[best]], rel=1e-5)
