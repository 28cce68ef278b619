"""ZOTrainer: Trainer's loop, schedules, callbacks and checkpoints, with records in the place of gradients."""

import copy
import json
import logging
import warnings

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertForSequenceClassification,
    EarlyStoppingCallback,
    HfArgumentParser,
    RobertaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from helpers import tiny
from helpers.trainers import QUIET, Bad, arguments, bits, classifier, equal, examples, labelled, scored
from jaguar import ZOSGD, JaguarMuon, JaguarSignSGD, Scorer, ZOTrainer, ZOTrainingArguments
from jaguar.models.adapters import Adapter
from jaguar.optimizers.guards import NonFiniteLoss
from jaguar.scoring import evaluate
from jaguar.tasks import COPA, SST2


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


# -- the two names -----------------------------------------------------------------------------------------------------


def script(trainer_class, arguments_class, folder, **more):
    """A user's script: only the two names differ."""
    model = classifier()
    args = arguments_class(str(folder), max_steps=4, per_device_train_batch_size=8, save_steps=2, **QUIET, **more)
    trainer = trainer_class(model=model, args=args, train_dataset=labelled(), eval_dataset=labelled(10, 1))
    trainer.train()
    return trainer, trainer.evaluate()


@pytest.mark.parametrize("names", [(Trainer, TrainingArguments), (ZOTrainer, ZOTrainingArguments)], ids=["stock", "zo"])
def test_a_trainer_script_becomes_zeroth_order_by_two_names(tmp_path, names):
    trainer, metrics = script(*names, tmp_path)
    assert trainer.state.global_step == 4 and metrics["eval_loss"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    if names[0] is ZOTrainer:
        assert isinstance(trainer.zeroth_order, JaguarSignSGD) and trainer.zeroth_order.steps_done == 4
        assert not any(p.grad is not None for p in trainer.model.parameters())


def test_the_first_order_baseline_is_trainers_own_sgd(tmp_path):
    ours, _ = script(ZOTrainer, ZOTrainingArguments, tmp_path / "a", optim_zo="fo-sgd", learning_rate=1e-2)
    stock, _ = script(Trainer, TrainingArguments, tmp_path / "b", optim="sgd", learning_rate=1e-2)
    assert equal(bits(ours.model), bits(stock.model))
    assert "grad_norm" in ours.state.log_history[0]


def test_a_script_that_pops_its_labels_and_one_with_positional_arguments(tmp_path):
    class Mine(ZOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = F.cross_entropy(outputs.logits, labels)
            return (loss, outputs) if return_outputs else loss

    mine = Mine(classifier(), arguments(tmp_path, 2), None, labelled(), labelled(10, 1))
    plain = ZOTrainer(classifier(), arguments(tmp_path, 2), train_dataset=labelled())
    for trainer in (mine, plain):
        trainer.train()
    assert mine.zeroth_order.last_record.losses == pytest.approx(plain.zeroth_order.last_record.losses, rel=1e-6)
    assert mine.evaluate()["eval_loss"] > 0


def test_arguments_can_be_parsed_by_transformers(tmp_path):
    (args,) = HfArgumentParser(ZOTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--optim_zo", "jaguar-signsgd", "--coordinates", "0.5", "--use_cpu"]
    )
    assert args.optimizer_options() == {"coordinates": 0.5, "seed": 42}
    for text, value in (("3", 3), ("1.0", 1.0)):
        made = arguments(tmp_path, coordinates=text).optimizer_options()["coordinates"]
        assert made == value and type(made) is type(value)
    assert arguments(tmp_path, coordinates=None, released=True, rho_clip=0.0).optimizer_options()["rho_clip"] == 0.0


@pytest.mark.parametrize("task", [SST2, COPA])
def test_the_first_order_baselines_step_does_not_grow_with_its_micro_batches(tmp_path, task):
    moved = []
    for i, (size, micro) in enumerate([(8, 1), (4, 2), (2, 4)]):
        more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": micro, "optim_zo": "fo-sgd"}
        model = tiny.architecture("opt", dropout=0.0)
        more |= {"tau": None, "coordinates": None, "max_grad_norm": 0.0}
        trainer = scored(tmp_path / str(i), task, model, 1, **more)
        before = bits(trainer.model)
        trainer.train()
        moved.append(sum((t - before[n]).pow(2).sum() for n, t in bits(trainer.model).items()).sqrt().item())
    # COPA: a mean of means over micro-batches of unequal numbers of tokens.
    assert moved[1:] == pytest.approx([moved[0]] * 2, rel=1e-3 if task is SST2 else 0.2)


def test_the_first_order_baseline_trains_on_a_task(tmp_path):
    trainer = scored(tmp_path, optim_zo="fo-sgd", steps=30, learning_rate=0.05, tau=None, coordinates=None)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_the_learning_rate_left_out_is_the_optimizers(tmp_path):
    for method, lr in (("jaguar-signsgd", 1e-4), ("jaguar-muon", 1e-3)):
        args = ZOTrainingArguments(str(tmp_path), optim_zo=method, **QUIET)
        trainer = ZOTrainer(classifier(), args, train_dataset=labelled())
        assert args.learning_rate is None and trainer.create_optimizer().param_groups[0]["lr"] == lr


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


# -- what is not there -------------------------------------------------------------------------------------------------


def test_logs_have_no_gradient_norm_and_no_gradients_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.clip_grad_norm_", None)  # a scan over all parameters, for 0.0
    trainer = scored(tmp_path, steps=4)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all("grad_norm" not in entry and entry["projected_grad"] > 0 for entry in logs)
    rhos = trainer.zeroth_order.rho(trainer.zeroth_order.last_record)
    assert abs(rhos[0]) <= logs[-1]["projected_grad"] * 2**0.5 + 1e-6


def test_no_scaler_and_no_ddp(tmp_path, monkeypatch):
    trainer = scored(tmp_path)
    wraps = []
    prepare = trainer.accelerator.__class__.prepare_model
    monkeypatch.setattr(
        trainer.accelerator.__class__,
        "prepare_model",
        lambda self, *a, **k: wraps.append(k["evaluation_mode"]) or prepare(self, *a, **k),
    )
    assert trainer.accelerator.scaler is None
    trainer2 = scored(tmp_path)
    trainer2.train()
    assert wraps == [True] and trainer2.model_wrapped is trainer2.model

    original = Trainer.create_accelerator_and_postprocess

    def with_scaler(self):
        original(self)
        self.accelerator.scaler = object()

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", with_scaler)
    with pytest.raises(ValueError, match="fp16 mixed precision, whose scaler needs gradients"):
        scored(tmp_path)


def test_the_wrapped_optimizer_is_reached_and_stepped(tmp_path):
    trainer = scored(tmp_path)
    trainer.train()
    assert type(trainer.optimizer).__name__ == "AcceleratedOptimizer" and not hasattr(trainer.optimizer, "measure")
    assert trainer.zeroth_order.steps_done == 6 and trainer.zeroth_order.last_record.lrs[0] < 1e-2 / 5


class _WithNorm(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.embed, self.norm, self.head = torch.nn.Embedding(400, 6), norm, torch.nn.Linear(6, 2)

    def forward(self, input_ids, labels=None):
        hidden = self.norm(self.embed(input_ids).transpose(1, 2)).mean(2)
        logits = self.head(hidden)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize(
    ("norm", "moves"),
    [
        (torch.nn.BatchNorm1d(6), True),
        (torch.nn.InstanceNorm1d(6, track_running_stats=True), True),
        (torch.nn.SyncBatchNorm(6), True),
        (torch.nn.Sequential(torch.nn.Identity(), torch.nn.BatchNorm1d(6, affine=False)), True),
        (torch.nn.BatchNorm1d(6, track_running_stats=False), False),
        (torch.nn.InstanceNorm1d(6), False),
        (torch.nn.GroupNorm(2, 6), False),
    ],
    ids=lambda value: "" if isinstance(value, bool) else str(value).split("(")[0],
)
def test_running_statistics_that_stand_still_are_told(tmp_path, norm, moves):
    trainer = ZOTrainer(_WithNorm(norm), arguments(tmp_path, 2), train_dataset=labelled())
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(w.message) for w in said if "running statistics of 1 modules (norm" in str(w.message)]
    assert len(told) == moves
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())


def test_the_baseline_with_gradients_moves_running_statistics(tmp_path):
    norm = torch.nn.BatchNorm1d(6)
    trainer = ZOTrainer(
        _WithNorm(norm), arguments(tmp_path, 2, optim_zo="fo-sgd", tau=None, coordinates=None), train_dataset=labelled()
    )
    trainer.train()
    assert norm.running_mean.abs().sum() > 0


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_flops_count_forward_passes(tmp_path, micro_batches):
    window = {"steps": 2 // micro_batches, "gradient_accumulation_steps": micro_batches}
    two, five = scored(tmp_path, **window), scored(tmp_path, **window, estimator="one-sided", n_directions=4)
    for trainer in (two, five):
        trainer.train()
    tokens = sum(b["input_ids"].numel() for b in list(two.get_train_dataloader())[:2])
    assert two.state.total_flos == 2 * 2 * tokens * two.model.num_parameters(exclude_embeddings=True)
    assert five.state.total_flos == two.state.total_flos * 5 / 2


# -- schedules, groups, optimizers -------------------------------------------------------------------------------------


def test_groups_are_trainers_and_muons_are_param_groups(tmp_path):
    trainer = scored(tmp_path, weight_decay=0.1)
    decays = {g["weight_decay"]: g["param_names"] for g in trainer.create_optimizer().param_groups}
    assert set(decays) == {0.1, 0.0} and all("bias" in n or "norm" in n for n in decays[0.0])
    muon = scored(tmp_path, optim_zo="jaguar-muon", weight_decay=0.1).create_optimizer()
    assert isinstance(muon, JaguarMuon) and {g["ns"] for g in muon.param_groups} == {True, False}


def test_an_optimizer_of_ones_own(tmp_path):
    model = classifier()
    own = ZOSGD(model.named_parameters(), lr=1e-3, tau=1e-2)
    trainer = ZOTrainer(model, arguments(tmp_path, 2), train_dataset=labelled(), optimizers=(own, None))
    trainer.train()
    assert trainer.zeroth_order is own and own.steps_done == 2
    pair = (ZOSGD, {"lr": 1e-3, "tau": 1e-2})
    trainer = ZOTrainer(model, arguments(tmp_path, 2), train_dataset=labelled(), optimizer_cls_and_kwargs=pair)
    trainer.train()
    assert isinstance(trainer.zeroth_order, ZOSGD)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"fp16": True}, "fp16=True is mixed precision with a gradient scaler.*bf16=True"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed shards gradients"),
        ({"fsdp": "full_shard"}, "fsdp is not supported"),
        ({"optim_zo": "adam"}, "optim_zo='adam': choose one of jaguar-signsgd"),
        ({"momentum": 0.9}, "jaguar-signsgd has no option momentum; it has tau, beta, coordinates"),
        ({"optim_zo": "fo-sgd"}, "fo-sgd has no option tau; it has momentum"),
        ({"optim_zo": "jaguar-muon", "ns_dtype": "half-baked"}, "ns_dtype='half-baked' is not a dtype"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_in_one_sentence(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **more)


def test_wrong_objects_are_refused(tmp_path):
    model, rows = classifier(), labelled()
    with pytest.raises(TypeError, match=r"args is a TrainingArguments; ZOTrainer takes jaguar\.ZOTrainingArguments"):
        ZOTrainer(model, TrainingArguments(str(tmp_path), **QUIET), train_dataset=rows)
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(TypeError, match=r"a Adam needs gradients.*any other with optim_zo='fo-sgd'"):
        ZOTrainer(model, arguments(tmp_path), train_dataset=rows, optimizers=(adam, None))
    with pytest.raises(ValueError, match="the scorer has its own loss"):
        scored(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="torch_compile=True does not see the scorer's hook"):
        scored(tmp_path, torch_compile=True)
    frozen = ZOTrainer(classifier().requires_grad_(False), arguments(tmp_path), train_dataset=rows)
    with pytest.raises(ValueError, match="there is nothing to train"):
        frozen.train()
    with pytest.raises(TypeError, match=r"create_optimizer\(\) comes first"):
        _ = scored(tmp_path).zeroth_order


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


# -- checkpoints -------------------------------------------------------------------------------------------------------

RESUMED = {
    "micro-batches": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 5},
    "muon": {"optim_zo": "jaguar-muon", "weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    "zo-sgd": {"optim_zo": "zo-sgd", "momentum": 0.9, "coordinates": None, "learning_rate": 1e-3},
    "fo-sgd": {"optim_zo": "fo-sgd", "momentum": 0.9, "coordinates": None, "tau": None},
    "bf16": {},
    "lora": {},
    "prefix": {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4},
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, case):
    def make(folder):
        model = tiny.architecture("opt")
        model = model.to(torch.bfloat16) if case == "bf16" else model
        torch.manual_seed(5)  # of LoRA's factors
        model = Adapter(case).applied(model, "causal") if case in ("lora", "prefix") else model
        more = {"save_strategy": "steps", "save_steps": 4, "tau": 5e-2 if case == "bf16" else 1e-2} | RESUMED[case]
        return scored(tmp_path / folder, model=model, steps=8, **more)

    whole = make("whole")
    whole.train()
    again = make("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert equal(bits(whole.model), bits(again.model)) and again.state.global_step == 8
    if case != "fo-sgd":
        one, other = (t.zeroth_order.state_dict() for t in (whole, again))
        assert one["jaguar"] == other["jaguar"] and one["jaguar"]["step"] == 8
        for key, state in one["state"].items():
            assert all(torch.equal(value, other["state"][key][name]) for name, value in state.items())


@pytest.mark.filterwarnings("ignore:.*holds checkpoints of another run")
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    trainer = scored(tmp_path, steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    good = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    trainer = scored(tmp_path, steps=2, save_strategy="steps", save_steps=2)
    trainer.beside = full
    with pytest.raises(OSError, match=r"checkpoint-2.*: no space left on the disk; the checkpoint of step 2 is whole"):
        trainer.train()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == good
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_adapters_train_and_are_saved_and_loaded_by_peft(tmp_path, kind):
    from peft import PeftModel

    base = tiny.architecture("opt")
    before = bits(base)
    torch.manual_seed(0)
    model = Adapter(kind).applied(base, "causal")
    trainer = scored(tmp_path, model=model, steps=4, tau=5e-2)
    start = bits(model)
    trainer.train()
    moved = {name for name, tensor in bits(model).items() if not torch.equal(tensor, start[name])}
    assert moved and all("lora_" in name or "prompt_encoder" in name for name in moved)
    trainer.save_model(str(tmp_path / "adapter"))
    saved = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= saved and "model.safetensors" not in saved
    fresh = tiny.architecture("opt")
    assert equal(before, bits(fresh))
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    data = examples(SST2, 6, 3)
    scores = [evaluate(Scorer(m, 1), data, 3).logits for m in (model, loaded)]
    assert torch.equal(*scores)


def test_arguments_are_saved_as_plain_values(tmp_path):
    args = arguments(tmp_path, momentum_dtype="bfloat16", optim_zo="jaguar-muon")
    saved = json.loads(args.to_json_string())
    assert saved["optim_zo"] == "jaguar-muon" and saved["momentum_dtype"] == "bfloat16" and saved["tau"] == 1e-2
    assert args.optimizer_options()["momentum_dtype"] is torch.bfloat16
