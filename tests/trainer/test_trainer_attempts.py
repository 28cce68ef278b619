"""Attempts with fewer rows after an out-of-memory error, and windows that a stream or an end cuts off."""

import contextlib

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from helpers.trainers import arguments, bits, classifier, equal, labelled, scored
from jaguar import JaguarSignSGD, ZOTrainer

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
