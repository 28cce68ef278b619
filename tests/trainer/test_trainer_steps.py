"""Steps of ZOTrainer are the optimizer's own: whole parameters, micro-batches, dtypes, losses that are no numbers."""

import copy
import logging

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertForSequenceClassification,
    RobertaForSequenceClassification,
    TrainerCallback,
)

from helpers import tiny
from helpers.trainers import Bad, arguments, bits, classifier, equal, labelled, scored
from jaguar import JaguarSignSGD, Scorer, ZOTrainer
from jaguar.optimizers.guards import NonFiniteLoss
from jaguar.tasks import COPA


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


def stream(count=24, seed=0):
    """Rows of a language model, with different numbers of tokens that count."""
    rows = labelled(count, seed)
    for i, row in enumerate(rows):
        row["labels"] = row["input_ids"].clone()
        row["labels"][: 1 + i % 6] = -100
    return rows


# -- steps -------------------------------------------------------------------------------------------------------------


def test_a_run_is_the_optimizers_own_steps(tmp_path):
    """Trainer adds nothing: the records are those of a plain loop over the same batches."""
    trainer = scored(tmp_path, warmup_steps=2, lr_scheduler_type="cosine")
    model = copy.deepcopy(trainer.model)
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    scorer = Scorer(model, 1)
    scorer.verify(trainer.train_dataset)
    named = [(n, p) for n, p in model.named_parameters()]
    optimizer = JaguarSignSGD([{"params": named, "weight_decay": 0.0}], lr=1e-2, tau=1e-2, coordinates=0.5, seed=42)
    from transformers import get_scheduler

    schedule = get_scheduler("cosine", optimizer, 2, 6)
    for i in range(6):
        if i == 3:  # the second epoch shuffles anew
            loader = trainer.get_train_dataloader()
            loader.set_epoch(1)
            batches = list(loader)

        def loss(batch=batches[i % 3]):
            total, weight = scorer.loss(batch)
            return total.double() / weight.double()

        optimizer.step(loss)
        schedule.step()
    assert equal(bits(model), bits(trainer.model))
    assert trainer.zeroth_order.last_record == optimizer.last_record


def test_parameters_are_whole_wherever_callbacks_look(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **others):
            self.before = bits(model)

        def on_pre_optimizer_step(self, args, state, control, model=None, **others):
            seen.append(equal(self.before, bits(model)))

        def on_step_end(self, args, state, control, model=None, **others):
            seen.append(not equal(self.before, bits(model)))

    scored(tmp_path, steps=3, callbacks=[Look()]).train()
    assert seen == [True] * 6


def test_dropout_is_off_while_a_step_is_measured(tmp_path):
    model = classifier(hidden_dropout_prob=0.5)
    modes = []
    model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    model.train()
    ZOTrainer(model, arguments(tmp_path, 3), train_dataset=labelled()).train()
    assert len(modes) == 6 and not any(modes)


@pytest.mark.parametrize("kind", ["classifier", "roberta", "language model", "scorer"])
def test_micro_batches_make_the_step_of_one_large_batch(tmp_path, kind):
    """Also for heads that take **kwargs and ignore num_items_in_batch, and for rows with unequal numbers of tokens."""
    records = []
    for i, (size, micro) in enumerate([(12, 1), (4, 3), (6, 2)]):
        more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": micro}
        if kind == "scorer":
            trainer = scored(tmp_path / str(i), COPA, steps=4, **more)
            trainer.scorer.verify(trainer.train_dataset)
        else:
            made = {"classifier": BertForSequenceClassification, "roberta": RobertaForSequenceClassification}
            model = tiny.architecture("opt") if kind == "language model" else classifier(made[kind])
            rows = stream() if kind == "language model" else labelled()
            trainer = ZOTrainer(model, arguments(tmp_path / str(i), 4, **more), train_dataset=rows)
        calls = []
        trainer.model.register_forward_hook(lambda *a, calls=calls: calls.append(1))
        losses = []

        class Keep(TrainerCallback):
            def on_step_end(self, args, state, control, losses=losses, trainer=trainer, **others):
                losses.extend(trainer.zeroth_order.last_record.losses)

        trainer.add_callback(Keep())
        trainer.train()
        asked = 6 if micro > 1 and kind != "scorer" else 0  # what its loss is a mean of, once
        assert 0 <= len(calls) - 2 * micro * 4 <= asked  # one pair of evaluations, whatever the micro-batches
        records.append(losses)
        assert sum("loss" in entry for entry in trainer.state.log_history) == 2
        logged = trainer.state.log_history[0]["loss"]
        assert logged == pytest.approx(sum(losses[:4]) / 4, rel=1e-6)  # not divided by the micro-batches
    for other in records[1:]:  # fp32 sums in another order; the first step only: later ones have moved by its sign
        assert other[:2] == pytest.approx(records[0][:2], rel=1e-5)


def test_labels_survive_both_evaluations(tmp_path):
    """compute_loss pops them for label smoothing and compute_loss_func; the second evaluation would find none."""
    smooth = ZOTrainer(classifier(), arguments(tmp_path, 2, label_smoothing_factor=0.1), train_dataset=labelled())
    smooth.train()
    assert smooth.zeroth_order.n_skipped == 0

    def own(outputs, labels, num_items_in_batch=None):
        assert labels is not None
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    plain = ZOTrainer(classifier(), arguments(tmp_path, 2), train_dataset=labelled())
    given = ZOTrainer(classifier(), arguments(tmp_path, 2), train_dataset=labelled(), compute_loss_func=own)
    for trainer in (plain, given):
        trainer.train()
    assert plain.zeroth_order.last_record.losses == pytest.approx(given.zeroth_order.last_record.losses, rel=1e-6)
    assert plain.zeroth_order.last_record.losses != pytest.approx(smooth.zeroth_order.last_record.losses, rel=1e-4)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "bf16=True"])
def test_bf16(tmp_path, autocast):
    model = tiny.architecture("opt")
    model = model if autocast else model.to(torch.bfloat16)
    trainer = scored(tmp_path, model=model, bf16=autocast, steps=4, tau=5e-2)
    trainer.train()
    assert {p.dtype for p in model.parameters()} == {torch.float32 if autocast else torch.bfloat16}
    losses = trainer.zeroth_order.last_record.losses
    assert losses[0] != losses[1] and trainer.zeroth_order.n_skipped == 0


# -- losses that are no numbers ----------------------------------------------------------------------------------------


def test_a_nan_skips_its_step_and_the_log_says_so(tmp_path):
    model = Bad(bad={3})
    trainer = ZOTrainer(model, arguments(tmp_path, 4, logging_steps=1), train_dataset=labelled())
    moved = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            moved.append(model.weight.detach().clone())

    trainer.add_callback(Look())
    with pytest.warns(UserWarning, match="step 1 was skipped, because a loss was nan"):
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert torch.equal(moved[0], moved[1]) and not torch.equal(moved[1], moved[2])
    assert logs[0]["loss"] > 0 and logs[1]["loss"] != logs[1]["loss"] and logs[1]["skipped_steps"] == 1
    assert logs[2]["loss"] > 0 and logs[3]["skipped_steps"] == 1 and trainer.zeroth_order.n_skipped == 1
    with pytest.raises(NonFiniteLoss, match="25 steps in a row"), pytest.warns(UserWarning, match="was skipped"):
        ZOTrainer(Bad(bad=set(range(100))), arguments(tmp_path, 40), train_dataset=labelled()).train()


def test_an_error_in_an_evaluation_leaves_the_parameters(tmp_path):
    trainer = scored(tmp_path)
    before, count = bits(trainer.model), []

    def fail(*_):
        count.append(1)
        if len(count) == 2:
            raise RuntimeError("CUDA out of memory")

    trainer.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert equal(before, bits(trainer.model))
