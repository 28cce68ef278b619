"""Trainers on tiny models and generated rows."""

import copy
import itertools

import torch
from transformers import (
    BertForSequenceClassification,
)

from helpers import synthetic, tiny
from jaguar import Scorer, ZOTrainer, ZOTrainingArguments
from jaguar.tasks import SST2, Encoder
from jaguar.tasks.rows import Row

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "logging_steps": 2}
ZO = {"learning_rate": 1e-2, "tau": 1e-2, "coordinates": 0.5}


def arguments(folder, steps=6, **more):
    given = QUIET | ZO | {"max_steps": steps, "per_device_train_batch_size": 8, "save_strategy": "no"} | more
    return ZOTrainingArguments(str(folder), **given)


def classifier(kind=BertForSequenceClassification, **more):
    torch.manual_seed(0)
    config = tiny.architecture("bert" if kind is BertForSequenceClassification else "roberta").config
    config = copy.deepcopy(config)
    config.num_labels = 2
    for key, value in more.items():
        setattr(config, key, value)
    return kind(config)


def labelled(count=24, seed=0, length=9):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 400, (count, length), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones(length, dtype=torch.long), "labels": int(row[0]) % 2}
        for row in ids
    ]


def examples(task=SST2, count=24, seed=0, name="opt"):
    rows = [
        Row({k: str(v).strip() for k, v in r.items()}, f"row {i}")
        for i, r in enumerate(synthetic.ROWS[task.name](count, seed))
    ]
    return Encoder(tiny.tokenizer_of(name), "causal", 128)([task().question(r, False) for r in rows])


def scored(folder, task=SST2, model=None, steps=6, seed=0, **more):
    model = tiny.architecture("opt") if model is None else model
    scorer = Scorer(model, 1, "causal", task.objective)
    others = {key: more.pop(key) for key in ("callbacks",) if key in more}
    return ZOTrainer(
        model,
        arguments(folder, steps, **more),
        scorer=scorer,
        train_dataset=examples(task, seed=seed),
        eval_dataset=examples(task, 10, 7),
        **others,
    )


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Bad(torch.nn.Module):
    """A model whose loss is NaN in the given calls."""

    def __init__(self, bad):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(200))
        self.calls, self.bad = itertools.count(1), bad  # a plain number would be put back after each evaluation

    def forward(self, input_ids, labels=None, **_):
        loss = (self.weight * input_ids.float().mean()).pow(2).mean() / 1e4
        return {"loss": loss * float("nan") if next(self.calls) in self.bad else loss}
