"""Runs of a small classifier that are ended at a step, as by a kill, and what of two runs must be the same."""

import json

import torch
from transformers import TrainerCallback

from helpers.checkpoints import bits, equal
from helpers.trainers import arguments, classifier, labelled
from jaguar import ZOTrainer


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
