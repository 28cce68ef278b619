"""Trainer's laws: the same script with Trainer and with ZOTrainer, at learning rate 0, does the same things.

Compared are the events and what callbacks see at each, the rows of every batch in their order, logs, states, metrics,
predictions and files. What differs, and why, is `DIFFERENCES`.
"""

import dataclasses
import itertools
import logging
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from jaguar import ZOTrainer, ZOTrainingArguments

DIFFERENCES = {
    "log grad_norm": "there are no gradients",
    "log projected_grad": "the root mean square of the directional derivatives, in its place",
    "log loss": "the mean of the losses at x + tau e and x - tau e, not the loss at x: it differs by the order of tau",
    "log train_loss": "the same",
    "log loss, batches of unequal size in a window": "the mean over all rows, not the mean of the batches' means",
    "log loss, window that is left": "a window that a stream or a callback ends early makes no step and has no loss; "
    "Trainer adds its gradients to the next step",
    "log *_runtime, *_per_second, *_time, *_mem_*": "measured",
    "state total_flos": "operations of forward passes only (0 for the model of these tests, as for Trainer)",
    "file scaler.pt": "ZOTrainer has no scaler (fp16=True is refused)",
    "file contents": "optimizer.pt holds the optimizer's own state, training_args.bin its arguments",
    "file jaguar_checkpoint.json": "the checksums by which a checkpoint that is not whole is refused",
    "file journal.jaguar": "the record of every step, from which a run that was killed goes on",
    "training mode": "the model is in evaluation mode while it is measured: no dropout",
    "warning of a finished run": "that it takes no step is said; Trainer says nothing, or takes one step more",
    "random state": "that of a step's evaluations is the step's own; what a script draws is the same",
}
_MEASURED = ("_runtime", "_per_second", "_time")
_ABOUT = {"loss", "train_loss"}


class Line(nn.Module):
    """a x + b, with the squared error as loss."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor([0.7, -0.2, 0.1])), nn.Parameter(torch.tensor(0.3))

    def forward(self, input_ids, labels=None, target=None):
        y = (input_ids * self.a).sum(-1) + self.b
        wanted = labels if labels is not None else target
        return {"logits": y} if wanted is None else {"loss": (y - wanted).pow(2).mean(), "logits": y}


def rows(count=22, name="labels", start=0):
    numbers = torch.arange(start, start + count, dtype=torch.float)
    return [{"input_ids": torch.stack([x / 9, x.sin(), x.cos()]), name: x / 7 + x.sin(), "place": x} for x in numbers]


class Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(rows(self.count))


class Watch(TrainerCallback):
    """Every event with what it shows, and what a script may ask for at some."""

    def __init__(self, asks):
        self.events, self.asks = [], asks

    def _note(self, name, args, state, control, **others):
        shown = sorted(others.get("logs") or others.get("metrics") or ())
        flags = {key: value for key, value in vars(control).items() if key.startswith("should")}
        given = sorted(key for key, value in others.items() if value is not None)
        keys = [key for key in shown if key not in ("grad_norm", "projected_grad")]
        self.events.append((name, state.global_step, state.epoch, state.max_steps, flags, keys, given))
        for key, value in self.asks.get((name, state.global_step), {}).items():
            setattr(control, key, value)
        return control


_EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]
for _name in _EVENTS:
    setattr(Watch, _name, lambda self, *given, _name=_name, **others: self._note(_name, *given, **others))


def metrics_of(found, compute_result=True):
    losses = {} if found.losses is None else {"losses": float(np.mean(found.losses))}
    inputs = {} if found.inputs is None else {"inputs": float(len(found.inputs))}
    predictions = found.predictions
    if isinstance(predictions, list):
        predictions = np.concatenate(predictions)
    return {"spread": float(np.ptp(np.asarray(predictions))), **losses, **inputs}


@dataclasses.dataclass
class Seen:
    """What a script has done."""

    events: list = dataclasses.field(default_factory=list)
    batches: list = dataclasses.field(default_factory=list)
    logs: list = dataclasses.field(default_factory=list)
    states: list = dataclasses.field(default_factory=list)
    outputs: list = dataclasses.field(default_factory=list)
    warned: list = dataclasses.field(default_factory=list)


def run(kind, folder, setting):
    """The script: only two names differ."""
    trainer_class, args_class, more = {
        "stock": (Trainer, TrainingArguments, {"optim": "sgd"}),
        "zo": (ZOTrainer, ZOTrainingArguments, {"tau": 1e-5, "coordinates": 1.0}),
    }[kind]
    options = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 2}
    options |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 5, "remove_unused_columns": False}
    options |= {"learning_rate": 0.0, **setting.get("args", {})}
    seen = Seen()

    def collate(part):
        seen.batches.append([float(row["place"]) for row in part])
        return {key: torch.stack([row[key] for row in part]) for key in part[0] if key not in ("place", "nothing")}

    def make(changes):
        args = args_class(output_dir=str(folder), **(options | changes), **more)
        name = setting.get("label", "labels")
        data = {"train_dataset": rows(name=name), "eval_dataset": rows(11, name, 50), "data_collator": collate}
        data |= {key: value() for key, value in setting.get("given", {}).items()}
        data |= {} if "model_init" in data else {"model": Line()}
        trainer = trainer_class(args=args, **data)
        seen.events.append(watch := Watch(setting.get("asks", {})))
        trainer.add_callback(watch)
        return trainer

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for changes, *actions in setting.get("steps", [({}, "train")]):
            trainer = make(changes)
            for action in actions:
                name, *given = action if isinstance(action, tuple) else (action,)
                seen.outputs.append(plain(getattr(trainer, name)(*given)))
            seen.logs.append(trainer.state.log_history)
            state = dataclasses.asdict(trainer.state) | {"log_history": None}
            state["best_model_checkpoint"] = str(state["best_model_checkpoint"]).replace(str(folder), "")
            seen.states.append(state)
    seen.warned = [str(w.message) for w in caught if "jaguar" in w.filename or w.category is UserWarning]
    seen.events = [watch.events for watch in seen.events]
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    return seen, files, weights, trainer


def plain(value):
    """Outputs as lists and dictionaries of numbers."""
    if hasattr(value, "_asdict"):
        return {key: plain(part) for key, part in value._asdict().items()}
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


def same(one, other, where="", same_loss=True):
    """Raises AssertionError where two results differ more than `DIFFERENCES` says."""
    if isinstance(one, dict) and isinstance(other, dict):
        left, right = one.keys() - {"grad_norm"}, other.keys() - {"projected_grad"}
        assert left == right, f"{where}: {left ^ right}"
        for key in left:
            if not str(key).endswith(_MEASURED) and "_mem_" not in str(key):
                same(one[key], other[key], f"{where}.{key}", same_loss)
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        assert len(one) == len(other), f"{where}: {len(one)} and {len(other)}"
        for i, (left, right) in enumerate(zip(one, other, strict=True)):
            same(left, right, f"{where}[{i}]", same_loss)
    elif where.rsplit(".", 1)[-1] in {*_ABOUT, "training_loss"}:
        assert not same_loss or math.isclose(one, other, rel_tol=1e-3), f"{where}: {one} and {other}"
    else:
        assert one == other or (one != one and other != other), f"{where}: {one} and {other}"


EVAL = {"eval_strategy": "steps", "eval_steps": 2}
SAVE = {"save_strategy": "steps", "save_steps": 2}
BEST = EVAL | SAVE | {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
STOP = {"given": {"callbacks": lambda: [EarlyStoppingCallback(2)]}}
# Windows with batches of unequal size, or windows that are left: see DIFFERENCES.
OTHER_LOSS = {"same_loss": False}
EQUAL = {"given": {"train_dataset": lambda: rows(24)}}
METRICS = {"given": {"compute_metrics": lambda: metrics_of}}
SEVEN = {"max_steps": 7}


def resumed(step, **changes):
    return [({}, "train"), (changes, ("train", f"checkpoint-{step}"))]


SETTINGS = {
    "three epochs": {},
    "steps": {"args": SEVEN},
    "steps of less than an epoch": {"args": {"max_steps": 2}},
    "one epoch and a half": {"args": {"num_train_epochs": 1.5}},
    "accumulation": {"args": {"gradient_accumulation_steps": 2}, **EQUAL},
    "accumulation with a short end": {"args": {"gradient_accumulation_steps": 4, "num_train_epochs": 2}, **EQUAL},
    "accumulation, steps": {"args": SEVEN | {"gradient_accumulation_steps": 4}, **EQUAL},
    "accumulation over more than there is": {"args": {"gradient_accumulation_steps": 50}, **EQUAL},
    "accumulation with a short batch": {"args": {"gradient_accumulation_steps": 4}, **OTHER_LOSS},
    "last batch left out": {"args": {"dataloader_drop_last": True, "num_train_epochs": 2}},
    "last batch left out, accumulation": {
        "args": {"dataloader_drop_last": True, "gradient_accumulation_steps": 3, "num_train_epochs": 2}
    },
    "batches of more than there is": {"args": {"per_device_train_batch_size": 64}},
    "rows in order": {"args": {"train_sampling_strategy": "sequential"}},
    "rows by length": {"args": {"train_sampling_strategy": "group_by_length"}},
    "rows rebalanced": {"args": {"train_sampling_strategy": "batch_rebalance"}},
    "another order": {"args": {"data_seed": 5}},
    "another seed": {"args": {"seed": 7, "max_steps": 4}},
    "logs by epoch": {"args": {"logging_strategy": "epoch"}},
    "logs of the first step": {"args": SEVEN | {"logging_first_step": True, "logging_steps": 3}},
    "no logs": {"args": {"logging_strategy": "no"}},
    "logs by share": {"args": {"logging_steps": 0.25}},
    "logs of what is no number": {"args": SEVEN | {"logging_nan_inf_filter": False}},
    "tokens in logs": {"args": SEVEN | {"include_num_input_tokens_seen": "all"}},
    "memory in logs": {"args": SEVEN | {"skip_memory_metrics": False}},
    "evaluation": {"args": SEVEN | EVAL},
    "evaluation by epoch": {"args": {"eval_strategy": "epoch"}},
    "evaluation by share": {"args": {"eval_strategy": "steps", "eval_steps": 0.3}},
    "evaluation later": {"args": SEVEN | EVAL | {"eval_delay": 3}},
    "evaluation first": {"args": SEVEN | EVAL | {"eval_on_start": True}},
    "evaluation of several sets": {
        "args": SEVEN | EVAL,
        "given": {"eval_dataset": lambda: {"a": rows(7), "b": rows(9, start=30)}},
    },
    "evaluation of losses only": {"args": SEVEN | EVAL | {"prediction_loss_only": True}, **METRICS},
    "evaluation piece by piece": {"args": SEVEN | EVAL | {"eval_accumulation_steps": 1}, **METRICS},
    "evaluation with inputs and losses": {
        "args": SEVEN | EVAL | {"include_for_metrics": ["inputs", "loss"]},
        **METRICS,
    },
    "evaluation batch by batch": {"args": SEVEN | EVAL | {"batch_eval_metrics": True}, **METRICS},
    "evaluation with batches apart": {"args": SEVEN | EVAL | {"eval_do_concat_batches": False}, **METRICS},
    "evaluation of other logits": {
        "args": SEVEN | EVAL,
        "given": {"compute_metrics": lambda: metrics_of, "preprocess_logits_for_metrics": lambda: lambda x, y: x - y},
    },
    "labels of another name": {"args": SEVEN | EVAL | {"label_names": ["target"]}, "label": "target", **METRICS},
    "evaluate before and after": {"steps": [(SEVEN, "evaluate", "train", ("evaluate", None, None, "later"))]},
    "predict": {
        "steps": [(SEVEN, ("predict", rows(9)), "train", ("predict", rows(9, start=4), None, "held"))],
        **METRICS,
    },
    "predict without labels": {"steps": [(SEVEN, "train", ("predict", rows(9, "nothing")))], **METRICS},
    "checkpoints": {"args": SEVEN | SAVE},
    "checkpoints by epoch": {"args": {"save_strategy": "epoch"}},
    "checkpoints by share": {"args": {"save_strategy": "steps", "save_steps": 0.4}},
    "one checkpoint": {"args": SEVEN | SAVE | {"save_total_limit": 1}},
    "two checkpoints": {"args": SEVEN | SAVE | {"save_total_limit": 2}},
    "checkpoints of the model only": {"args": SEVEN | SAVE | {"save_only_model": True}},
    "checkpoints of the best": {
        "args": SEVEN | EVAL | {"save_strategy": "best", "metric_for_best_model": "spread"},
        **METRICS,
    },
    "best model": {"args": SEVEN | BEST},
    "best model, one checkpoint": {"args": SEVEN | BEST | {"save_total_limit": 1}},
    "best model of a metric": {"args": SEVEN | BEST | {"metric_for_best_model": "eval_spread"}, **METRICS},
    "best model, smaller is better": {
        "args": SEVEN | BEST | {"metric_for_best_model": "spread", "greater_is_better": False},
        **METRICS,
    },
    "stopped early": {"args": {"max_steps": 20} | BEST, **STOP},
    "resumed": {"args": SEVEN | SAVE, "steps": resumed(4)},
    "resumed from the newest": {"args": SEVEN | SAVE, "steps": [({}, "train"), ({"max_steps": 11}, ("train", True))]},
    "resumed within an epoch": {"args": SAVE | {"num_train_epochs": 2}, "steps": resumed(8)},
    "resumed between epochs": {"args": SAVE | {"num_train_epochs": 2}, "steps": resumed(6)},
    "resumed at the end": {"args": SAVE | {"num_train_epochs": 2}, "steps": resumed(12), "told": "no step is taken"},
    "resumed, accumulation": {
        "args": SAVE | {"gradient_accumulation_steps": 2, "num_train_epochs": 3},
        "steps": resumed(4),
        **EQUAL,
    },
    "resumed with the first rows": {"args": SEVEN | SAVE | {"ignore_data_skip": True}, "steps": resumed(4)},
    "resumed, best model": {"args": SEVEN | BEST, "steps": resumed(4)},
    "resumed, stopped early": {
        "args": {"max_steps": 20, "restore_callback_states_from_checkpoint": True} | BEST,
        "steps": [({"max_steps": 4}, "train"), ({}, ("train", "checkpoint-4"))],
        **STOP,
    },
    "a stream": {"args": SEVEN, "given": {"train_dataset": lambda: Stream(40)}},
    "a stream that ends": {"args": {"max_steps": 12}, "given": {"train_dataset": lambda: Stream(18)}},
    "a stream, accumulation": {
        "args": {"max_steps": 4, "gradient_accumulation_steps": 3},
        "given": {"train_dataset": lambda: Stream(36)},
    },
    "a stream, accumulation, windows that are left": {
        "args": {"max_steps": 4, "gradient_accumulation_steps": 3},
        "given": {"train_dataset": lambda: Stream(30)},
        **OTHER_LOSS,
    },
    "streams that are evaluated": {"args": SEVEN | EVAL, "given": {"eval_dataset": lambda: Stream(8)}},
    "train twice": {"steps": [({"max_steps": 3}, "train", "train")]},
    "a model of its own": {
        "given": {"model_init": lambda: Line},
        "steps": [({"max_steps": 3}, "train", "train", "evaluate")],
    },
    "a smaller batch, if need be": {"args": SEVEN | {"auto_find_batch_size": True}},
    "a warm-up": {"args": SEVEN | {"warmup_steps": 2, "lr_scheduler_type": "cosine"}},
    "a rate by plateau": {
        "args": SEVEN | EVAL | {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"}
    },
    "a cache that is emptied": {"args": SEVEN | {"torch_empty_cache_steps": 2}},
    "stopped by a callback": {"args": SEVEN, "asks": {("on_step_end", 3): {"should_training_stop": True}}},
    "stopped before the first step": {"args": SEVEN, "asks": {("on_epoch_begin", 0): {"should_training_stop": True}}},
    "an epoch cut short": {"asks": {("on_step_end", 3): {"should_epoch_stop": True}}},
    "stopped in a window": {
        "args": {"gradient_accumulation_steps": 3},
        "asks": {("on_substep_end", 1): {"should_training_stop": True}},
        **OTHER_LOSS,
    },
    "asked to save, log and evaluate": {
        "args": SEVEN | {"logging_strategy": "no"},
        "asks": {("on_step_end", 3): {"should_save": True, "should_log": True, "should_evaluate": True}},
    },
}


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


def located(setting, folder):
    """The setting with its checkpoints in a folder."""

    def placed(action):
        return ("train", str(folder / action[1])) if action[0] == "train" and action[1] is not True else action

    steps = [
        (changes, *(placed(action) if isinstance(action, tuple) else action for action in actions))
        for changes, *actions in setting.get("steps", [({}, "train")])
    ]
    return setting | {"steps": steps}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_script_does_the_same(tmp_path, name):
    found = []
    for kind in ("stock", "zo"):
        torch.manual_seed(0)
        folder = tmp_path / kind
        found.append((*run(kind, folder, located(SETTINGS[name], folder)), torch.rand(3).tolist()))
    (one, files, weights, _, drawn), (other, our_files, our_weights, trainer, our_drawn) = found
    for field in ("events", "batches", "logs", "states", "outputs"):
        same(getattr(one, field), getattr(other, field), field, SETTINGS[name].get("same_loss", True))
    ours = ("jaguar_checkpoint.json", "journal.jaguar", "journal-before.jaguar")
    assert [file for file in our_files if not file.endswith(ours)] == files
    assert all(torch.equal(weights[key], our_weights[key]) for key in weights)  # lr = 0
    assert drawn == our_drawn
    told = SETTINGS[name].get("told")
    assert all(told is not None and told in text for text in other.warned if text not in one.warned), other.warned
    assert isinstance(trainer, ZOTrainer)


def test_the_laws_notice(tmp_path, monkeypatch):
    """A trainer that logs once more, takes a batch more, or leaves out an event is found."""

    def late(self, *given):
        self.args.logging_steps = 3
        return super(ZOTrainer, self).train(*given)

    def hungry(self, *given):
        next(iter(self.get_train_dataloader()))
        return super(ZOTrainer, self).train(*given)

    for broken in (late, hungry):
        with monkeypatch.context() as patch:
            patch.setattr(ZOTrainer, "train", broken)
            with pytest.raises(AssertionError):
                test_the_same_script_does_the_same(tmp_path / broken.__name__, "steps")


def test_there_are_enough_settings():
    assert len(SETTINGS) >= 40 and len({id(value) for value in SETTINGS.values()}) == len(SETTINGS)
    used = itertools.chain.from_iterable(setting.get("args", {}) for setting in SETTINGS.values())
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(used) <= fields
