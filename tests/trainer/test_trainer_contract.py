"""Promises of Trainer besides training: rows in order, model cards, attempts, searches, optimizers of one's own."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers import tiny
from helpers.trainers import QUIET, Bad, arguments, bits, classifier, equal, examples, labelled, scored
from jaguar import ZOSGD, JaguarSignSGD, Method, Scorer, ZerothOrder, ZOTrainer, ZOTrainingArguments
from jaguar.method.directions import Rademacher
from jaguar.method.estimators import TwoSided
from jaguar.method.rules import Sign
from jaguar.models.adapters import Adapter
from jaguar.optimizers.guards import NonFiniteLoss
from jaguar.scoring import evaluate
from jaguar.tasks import COPA, SST2

# -- rows in the order of the data set ---------------------------------------------------------------------------------


def watched(trainer):
    """What compute_metrics is given, call by call."""
    seen = []
    trainer.compute_metrics = lambda found, **_: seen.append(found) or {"rows": float(len(found.label_ids))}
    return seen


@pytest.mark.parametrize("task", [SST2, COPA])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_metrics_see_rows_in_the_order_of_the_data_set(tmp_path, task, size):
    trainer = scored(tmp_path, task, per_device_eval_batch_size=size, include_for_metrics=["loss"])
    seen, data = watched(trainer), trainer.eval_dataset
    expected = evaluate(trainer.scorer, data, 1)
    assert [e.length for e in data] != sorted(e.length for e in data)
    metrics, output = trainer.evaluate(), trainer.predict(data)
    assert metrics["eval_rows"] == output.metrics["test_rows"] == len(data)
    for found in (*seen, output):
        assert found.label_ids.tolist() == [e.label for e in data]
        torch.testing.assert_close(torch.tensor(found.predictions), expected.logits, rtol=1e-5, atol=1e-5)
    if size == 1:  # Trainer repeats a batch's mean for each of its rows
        np.testing.assert_allclose(seen[0].losses, expected.losses, rtol=1e-5)


def test_several_data_sets_and_data_sets_that_went_away(tmp_path):
    sets = {"few": examples(SST2, 5, 3), "many": examples(SST2, 17, 4)}
    trainer = scored(tmp_path, per_device_eval_batch_size=4)
    seen = watched(trainer)
    metrics = trainer.evaluate(sets)
    assert [found.label_ids.tolist() for found in seen] == [[e.label for e in data] for data in sets.values()]
    assert (metrics["eval_few_rows"], metrics["eval_many_rows"]) == (5.0, 17.0)
    for count in range(3, 9):  # an id of an object may be another's later
        output = trainer.predict(examples(SST2, count, count))
        assert output.label_ids.tolist() == [e.label for e in examples(SST2, count, count)]


def test_data_sets_with_more_options_than_the_one_before(tmp_path):
    trainer = scored(tmp_path, per_device_eval_batch_size=3)
    two = examples(SST2, 6, 3)
    three = [dataclasses.replace(e, choices=(*e.choices, e.choices[0])) if i % 2 else e for i, e in enumerate(two)]
    for data in (two, three, two):
        expected = evaluate(trainer.scorer, data, 1).logits
        found = torch.tensor(trainer.predict(data).predictions)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_dictionary_of_data_sets_while_training(tmp_path):
    trainer = scored(tmp_path, steps=2, eval_strategy="steps", eval_steps=1)
    trainer.eval_dataset = {"a": examples(SST2, 5, 3), "b": examples(SST2, 6, 4)}
    seen = watched(trainer)
    trainer.train()
    labels = [[e.label for e in data] for data in trainer.eval_dataset.values()]
    assert [found.label_ids.tolist() for found in seen] == labels * 2
    assert {"eval_a_loss", "eval_b_loss"} <= {key for entry in trainer.state.log_history for key in entry}


def test_batches_that_are_shown_one_by_one_come_in_order(tmp_path):
    trainer = scored(tmp_path, eval_do_concat_batches=False, per_device_eval_batch_size=4)
    output = trainer.predict(trainer.eval_dataset)
    assert [label for part in output.label_ids for label in part.tolist()] == [e.label for e in trainer.eval_dataset]
    trainer = scored(tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=4)  # the last two of ten rows
    output = trainer.predict(trainer.eval_dataset)
    assert output.label_ids.tolist() == [e.label for e in trainer.eval_dataset[:8]]
    trainer = scored(tmp_path, batch_eval_metrics=True, per_device_eval_batch_size=4)
    labels = []

    def counted(found, compute_result):
        labels.extend(found.label_ids.tolist())
        return {"rows": len(labels)} if compute_result else {}

    trainer.compute_metrics = counted
    assert trainer.evaluate()["eval_rows"] == len(trainer.eval_dataset)
    assert labels == [e.label for e in trainer.eval_dataset]


def test_logits_that_are_changed_before_metrics_are_in_order(tmp_path):
    data = examples(SST2, 10, 7)
    for change in (lambda logits, labels: logits.argmax(1), lambda logits, labels: (logits, labels + 10)):
        trainer = scored(tmp_path, per_device_eval_batch_size=4)
        plain = trainer.predict(data).predictions
        trainer.compute_metrics, trainer.preprocess_logits_for_metrics = None, change
        found = trainer.predict(data).predictions
        if isinstance(found, tuple):
            assert found[1].tolist() == [e.label + 10 for e in data] and np.array_equal(found[0], plain)
        else:
            assert found.tolist() == plain.argmax(1).tolist()


def test_what_a_scorer_cannot_show_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"include_for_metrics: .* leave 'inputs' out"):
        scored(tmp_path, include_for_metrics=["inputs", "loss"])
    model = tiny.architecture("opt")
    with pytest.raises(ValueError, match="a scorer belongs to one model: leave model_init out"):
        ZOTrainer(args=arguments(tmp_path), model_init=lambda: model, scorer=Scorer(model, 1))


@pytest.mark.parametrize("kind", ["non_padding", "all"])
def test_tokens_seen_are_the_tokens_of_the_rows(tmp_path, kind):
    trainer = scored(tmp_path, COPA, steps=3, include_num_input_tokens_seen=kind, logging_steps=1)
    trainer.scorer.layout = "padded"
    trainer.train()
    batches = list(trainer.get_train_dataloader())
    pads = sum(int((batch["input_ids"] == 1).sum()) for batch in batches)
    total = sum(batch["input_ids"].numel() for batch in batches)
    assert pads > 0 and trainer.state.num_input_tokens_seen == total - (pads if kind == "non_padding" else 0)


# -- the model card ----------------------------------------------------------------------------------------------------


def card(trainer, folder):
    trainer.create_model_card(model_name="example")
    text = (folder / "README.md").read_text()
    return text.split("### Training hyperparameters")[1].split("### ")[0]


def test_the_model_card_names_the_optimizer_that_ran(tmp_path):
    model, rows = classifier(), labelled()
    for method, name, lr in (
        ("jaguar-signsgd", "JaguarSignSGD", "0.0001"),
        ("jaguar-muon", "JaguarMuon", "0.001"),
        ("zo-sgd", "ZOSGD", None),
        ("fo-sgd", "SGD", None),
    ):
        args = ZOTrainingArguments(str(tmp_path), optim_zo=method, max_steps=2, **QUIET, save_strategy="no")
        trainer = ZOTrainer(model, args, train_dataset=rows)
        trainer.train()
        text = card(trainer, tmp_path)
        assert f"Use {name} and" in text and "AdamW" not in text and "adamw" not in text
        assert f"learning_rate: {lr}" in text if lr else "learning_rate: None" not in text
        assert ("tau=" in text) == (method != "fo-sgd")
        assert trainer.args is args and args.learning_rate is None
    (tmp_path / "README.md").unlink()
    args = arguments(tmp_path, 2, optim_zo="fo-sgd", coordinates=None, tau=None)
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.7, 0.8))
    trainer = ZOTrainer(model, args, train_dataset=rows, optimizers=(adam, None))
    trainer.train()
    text = card(trainer, tmp_path)
    assert "Use AdamW with betas=(0.7,0.8)" in text and "learning_rate: 0.003" in text
    args = arguments(tmp_path, 2)
    own = ZOSGD(model.named_parameters(), lr=0.02, tau=5e-3)
    assert "Use ZOSGD" in card(ZOTrainer(model, args, train_dataset=rows, optimizers=(own, None)), tmp_path)
    options = {"betas": (0.7, 0.8), "eps": 1e-4}
    zo_adamm = arguments(tmp_path, 2, optim_zo="zo-adamm", coordinates=None, zo_options=options)
    text = card(ZOTrainer(model, zo_adamm, train_dataset=rows), tmp_path)
    assert "Use ZOAdaMM with betas=(0.7,0.8) and epsilon=0.0001" in text
    parts = ZerothOrder(model.named_parameters(), Method(Rademacher(), Sign(), TwoSided()), lr=0.02, momentum=0.5)
    text = card(ZOTrainer(model, args, train_dataset=rows, optimizers=(parts, None)), tmp_path)
    assert "Use ZerothOrder(ZOSignSGD) and" in text and "momentum=0.5, distribution=rademacher" in text


# -- steps that are skipped --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*was skipped, because a loss was nan")
def test_skipped_steps_are_in_the_log_and_in_what_train_returns(tmp_path):
    for filtered in (True, False):
        args = arguments(tmp_path, 4, logging_steps=2, logging_nan_inf_filter=filtered)
        trainer = ZOTrainer(Bad({3, 5}), args, train_dataset=labelled())
        output = trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry["skipped_steps"] for entry in logs] == [1, 2] and output.metrics["skipped_steps"] == 2
        assert [entry["loss"] == entry["loss"] for entry in logs] == [filtered] * 2
    trainer = ZOTrainer(Bad(()), arguments(tmp_path, 2), train_dataset=labelled())
    assert "skipped_steps" not in trainer.train().metrics


@pytest.mark.filterwarnings("ignore:.*was skipped, because a loss was nan")
def test_a_run_that_never_took_a_step_fails(tmp_path):
    trainer = ZOTrainer(Bad(range(99)), arguments(tmp_path, 4), train_dataset=labelled())
    before = bits(trainer.model)
    with pytest.raises(NonFiniteLoss, match="no step was taken: the loss was not finite in any of 4 steps"):
        trainer.train()
    assert equal(before, bits(trainer.model))
    with pytest.raises(NonFiniteLoss, match="any of 2 steps"):  # this call, whatever was before
        trainer.model.bad = range(12, 99)
        trainer.train()
        trainer.args.max_steps = 2
        trainer.train()
    nothing = ZOTrainer(Bad(()), arguments(tmp_path, 4), train_dataset=labelled())
    nothing.add_callback(Stop())
    nothing.train()  # was stopped before the first


class Stop(TrainerCallback):
    def on_epoch_begin(self, args, state, control, **_):
        control.should_epoch_stop = control.should_training_stop = True


# -- optimizers --------------------------------------------------------------------------------------------------------


def test_get_optimizer_cls_and_kwargs_gives_what_runs(tmp_path):
    args = arguments(tmp_path, beta=0.5)
    kind, options = ZOTrainer.get_optimizer_cls_and_kwargs(args)
    assert kind is JaguarSignSGD
    assert options == {"lr": 1e-2, "tau": 1e-2, "coordinates": 0.5, "beta": 0.5, "seed": 42}
    args = arguments(tmp_path, optim_zo="fo-sgd", momentum=0.9, tau=None, coordinates=None)
    assert ZOTrainer.get_optimizer_cls_and_kwargs(args) == (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9})

    class Mine(ZOTrainer):
        @staticmethod
        def get_optimizer_cls_and_kwargs(args, model=None):
            return ZOSGD, {"lr": 1e-3, "tau": 1e-2}

    trainer = Mine(classifier(), arguments(tmp_path, 1), train_dataset=labelled())
    trainer.train()
    assert isinstance(trainer.zeroth_order, ZOSGD)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
@pytest.mark.parametrize("how", ["optimizers", "class"])
def test_the_baseline_takes_any_gradient_optimizer(tmp_path, kind, how):
    found = []
    for trainer_class, args_class, more in (
        (ZOTrainer, ZOTrainingArguments, {"optim_zo": "fo-sgd"}),
        (Trainer, TrainingArguments, {}),
    ):
        args = args_class(str(tmp_path), max_steps=3, save_strategy="no", **QUIET, **more)
        model = classifier()
        given = {"optimizer_cls_and_kwargs": (kind, {"lr": 1e-2})}
        if how == "optimizers":
            given = {"optimizers": (kind(model.parameters(), lr=1e-2), None)}
        trainer = trainer_class(model, args, train_dataset=labelled(), **given)
        trainer.train()
        assert "grad_norm" in trainer.state.log_history[0]
        found.append(bits(model))
    assert equal(*found)


def test_train_twice_goes_on_and_a_model_of_its_own_begins_anew(tmp_path):
    trainer = ZOTrainer(classifier(), arguments(tmp_path, 3), train_dataset=labelled())
    trainer.train()
    first = bits(trainer.model)
    trainer.train()
    assert trainer.zeroth_order.steps_done == 6 and not equal(first, bits(trainer.model))
    trainer = ZOTrainer(args=arguments(tmp_path, 3), model_init=lambda: classifier(), train_dataset=labelled())
    found = []
    for _ in range(2):
        trainer.train()
        found.append(bits(trainer.model))
        assert trainer.zeroth_order.steps_done == 3
    assert equal(*found)


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_the_cache_is_emptied_every_so_many_steps(tmp_path, monkeypatch):
    emptied = []
    trainer = ZOTrainer(classifier(), arguments(tmp_path, 5, torch_empty_cache_steps=2), train_dataset=labelled())
    monkeypatch.setattr("jaguar.trainer.trainer.clear_device_cache", lambda: emptied.append(trainer.state.global_step))
    trainer.train()
    assert emptied == [0, 2, 4]


def test_callbacks_that_touch_the_optimizer(tmp_path):
    class Halve(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **_):
            optimizer.zero_grad()
            assert optimizer.param_groups[0]["lr"] == lr_scheduler.get_last_lr()[0]
            copy.deepcopy(optimizer.state_dict())
            rates.append(optimizer.param_groups[0]["lr"])

    rates = []
    for adapter in ("none", "lora"):
        model = tiny.architecture("opt")
        model = Adapter(adapter).applied(model, "causal") if adapter != "none" else model
        scored(tmp_path, model=model, steps=3, tau=5e-2, callbacks=[Halve()], eval_on_start=True).train()
    assert rates[:3] == rates[3:] == pytest.approx([1e-2 * 2 / 3, 1e-2 / 3, 0.0])
