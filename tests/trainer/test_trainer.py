"""ZOTrainer in Trainer's place: scripts, arguments, schedules, groups, and what a zeroth-order run has not."""

import logging
import warnings

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from helpers import tiny
from helpers.trainers import QUIET, arguments, bits, classifier, equal, labelled, scored
from jaguar import ZOSGD, JaguarMuon, JaguarSignSGD, ZOTrainer, ZOTrainingArguments
from jaguar.tasks import COPA, SST2


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


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
    ours = ["journal.jaguar"] if names[0] is ZOTrainer else []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4", *ours]
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
