"""What Trainer promises besides training: rows in order, model cards, attempts, searches, optimizers of one's own."""

import contextlib
import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.hyperparameter_search import HPSearchBackend

from helpers import tiny
from helpers.trainers import QUIET, Bad, arguments, bits, classifier, equal, examples, labelled, scored
from jaguar import ZOSGD, JaguarMuon, JaguarSignSGD, Method, Scorer, ZerothOrder, ZOTrainer, ZOTrainingArguments
from jaguar.method.directions import Rademacher
from jaguar.method.estimators import TwoSided
from jaguar.method.rules import Sign
from jaguar.models.adapters import Adapter
from jaguar.optimizers.guards import NonFiniteLoss
from jaguar.scoring import evaluate
from jaguar.tasks import COPA, SST2


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # Trainer's, before each run: most of the time of a tiny one


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


# -- attempts ----------------------------------------------------------------------------------------------------------


def test_what_an_interrupted_window_held_is_forgotten(tmp_path):
    class Interrupt(TrainerCallback):
        def on_substep_end(self, args, state, control, **_):
            if state.global_step == 1:
                raise KeyboardInterrupt

    args = arguments(tmp_path, 3, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    trainer = ZOTrainer(classifier(), args, train_dataset=labelled(), callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.forward_passes == 2 * 2
    trainer.remove_callback(Interrupt)
    trainer.train()
    assert trainer.forward_passes == 2 * 2 + 3 * 2 * 2


class Stream(IterableDataset):
    def __iter__(self):
        return iter(labelled(30))


def test_what_a_stream_leaves_over_is_no_part_of_the_next_window(tmp_path):
    args = arguments(tmp_path, 4, gradient_accumulation_steps=3, per_device_train_batch_size=4)
    trainer = ZOTrainer(classifier(), args, train_dataset=Stream())  # 8 batches
    trainer.train()
    assert trainer.zeroth_order.steps_done == 4 and trainer.forward_passes == 4 * 3 * 2


@contextlib.contextmanager
def memory_for(model, rows, calls):
    """Batches of more than `rows` rows run out of memory from the given call of the model on."""
    count = [0]

    def run_out(_module, _args, kwargs):
        count[0] += 1
        if len(kwargs["input_ids"]) > rows and count[0] > calls:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    hook = model.register_forward_pre_hook(run_out, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"optim_zo": "jaguar-muon", "weight_decay": 0.1},
        {"optim_zo": "zo-sgd", "momentum": 0.9, "coordinates": None, "restore": "walk", "learning_rate": 1e-4},
        {"own": True},
    ],
    ids=["signsgd", "micro-batches", "muon", "walk", "optimizer of one's own"],
)
@pytest.mark.parametrize("calls", [0, 1, 7], ids=["first", "second", "later"])
def test_an_attempt_is_a_run_of_its_own(tmp_path, more, calls):
    more = {
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
    } | more
    own = more.pop("own", False)
    found = []
    for folder, size, auto in (("auto", 8, True), ("plain", 7, False)):
        model = classifier()
        args = arguments(
            tmp_path / folder, 6, auto_find_batch_size=auto, **(more | {"per_device_train_batch_size": size})
        )
        optimizer = JaguarSignSGD(model.named_parameters(), lr=1e-2, tau=1e-2, coordinates=0.5) if own else None
        trainer = ZOTrainer(model, args, train_dataset=labelled(), optimizers=(optimizer, None))
        with memory_for(model, 7, calls) if auto else contextlib.nullcontext():
            trainer.train()
        found.append(trainer)
    one, other = found
    assert equal(bits(one.model), bits(other.model)) and one.forward_passes == other.forward_passes
    assert one.zeroth_order.steps_done == one.state.global_step == 6
    logs = [
        [{k: e[k] for k in ("step", "loss", "learning_rate")} for e in t.state.log_history if "loss" in e]
        for t in found
    ]
    assert logs[0] == logs[1]
    saved = [torch.load(tmp_path / name / "checkpoint-3" / "optimizer.pt")["jaguar"] for name in ("auto", "plain")]
    assert saved[0] == saved[1]


@pytest.mark.filterwarnings("ignore:.*rows per step")
def test_a_resumed_run_tries_again_from_its_checkpoint(tmp_path):
    more = {
        "train_sampling_strategy": "sequential",
        "save_strategy": "steps",
        "save_steps": 2,
        "ignore_data_skip": True,
    }
    more |= {"per_device_train_batch_size": 7}
    ZOTrainer(classifier(), arguments(tmp_path / "first", 4, **more), train_dataset=labelled()).train()
    found = []
    for auto in (True, False):
        model = classifier()
        args = arguments(tmp_path / str(auto), 4, **(more | {"auto_find_batch_size": auto}))
        trainer = ZOTrainer(model, args, train_dataset=labelled())
        with memory_for(model, 6, 2) if auto else contextlib.nullcontext():
            trainer.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
        found.append(trainer)
    assert [t.zeroth_order.steps_done for t in found] == [4, 4] and found[0]._train_batch_size == 6
    args = arguments(tmp_path / "c", 4, **(more | {"per_device_train_batch_size": 6}))
    third = ZOTrainer(classifier(), args, train_dataset=labelled())
    third.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert equal(bits(found[0].model), bits(third.model))


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "batch_rebalance", "sequential"])
def test_a_resumed_run_takes_the_rows_of_its_epoch(tmp_path, strategy):
    """With a scorer; in whatever order it takes them."""
    found, seen = [], []
    for folder in ("whole", "again"):
        more = {"save_strategy": "steps", "save_steps": 4, "train_sampling_strategy": strategy}
        trainer = scored(tmp_path / folder, steps=8, **more)  # three steps an epoch
        collate = trainer.data_collator
        trainer.data_collator = lambda part, collate=collate: seen.append([e.choices for e in part]) or collate(part)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4") if found else None)
        found.append(bits(trainer.model))
    assert equal(*found)
    assert seen[9:] == seen[4:9]  # the loader is a batch ahead
    assert (seen[:3] == seen[3:6]) == (strategy == "sequential")


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
