"""ZOTrainingArguments: every field of Trainer's arguments works, does nothing and says so, or is refused."""

import warnings
from dataclasses import fields

import pytest
import torch
from transformers import BertForSequenceClassification, TrainingArguments

from helpers import tiny
from jaguar import ZOTrainer, ZOTrainingArguments
from jaguar.trainer.arguments import WITHOUT_EFFECT

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}

# A value of each that would change a run with gradients, or how it is set up.
VALUES = {
    "optim": "adafactor",
    "optim_args": "amsgrad=True",
    "optim_target_modules": "all-linear",
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 0.1,
    "max_grad_norm": 1.0,  # Trainer's default, but written down
    "neftune_noise_alpha": 50.0,
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 1,
    "ddp_broadcast_buffers": True,
    "ddp_static_graph": True,
}
REFUSED = {"fp16": True, "deepspeed": {"zero_optimization": {"stage": 2}}, "fsdp": True, "parallelism_config": object()}
# Tuning of something that is refused.
OF_THE_REFUSED = {"fsdp_config"}
# do_train and those after it are for scripts.
WORKING = """
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
lr_scheduler_kwargs warmup_steps weight_decay gradient_accumulation_steps label_smoothing_factor bf16
average_tokens_across_devices bf16_full_eval fp16_full_eval tf32 torch_compile torch_compile_backend
torch_compile_mode use_liger_kernel liger_kernel_config use_cache torch_empty_cache_steps auto_find_batch_size
logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project
trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object
eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model save_strategy save_steps
save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id
hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better
ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
remove_unused_columns label_names train_sampling_strategy length_column_name ddp_backend ddp_timeout debug
skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank
"""


def test_every_field_of_trainers_arguments_is_settled():
    settled = {*WORKING.split()} | WITHOUT_EFFECT.keys() | REFUSED.keys() | OF_THE_REFUSED
    assert {field.name for field in fields(TrainingArguments)} <= settled
    assert VALUES.keys() == WITHOUT_EFFECT.keys()
    assert not WITHOUT_EFFECT.keys() & {*WORKING.split()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return _trained(ZOTrainingArguments(str(tmp_path_factory.mktemp("plain")), **_SETTINGS))


_SETTINGS = QUIET | {"max_steps": 2, "save_strategy": "no", "learning_rate": 1e-2, "tau": 1e-2, "coordinates": 0.5}


def _trained(args):
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(5, 400, (9,), generator=generator), "labels": i % 2} for i in range(16)]
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny.architecture("bert").config)
    ZOTrainer(model, args, train_dataset=rows).train()
    return model.state_dict()


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_what_does_nothing_says_so_and_does_nothing(tmp_path, name, plain):
    with pytest.warns(UserWarning, match=rf"^{name} has no effect: "):
        args = ZOTrainingArguments(str(tmp_path), **(_SETTINGS | {name: VALUES[name]}))
    with warnings.catch_warnings(action="ignore"):
        found = _trained(args)
    assert all(torch.equal(found[key], plain[key]) for key in plain)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"^{name}"):
        ZOTrainingArguments(str(tmp_path), **QUIET, **{name: REFUSED[name]})


def test_nothing_is_said_of_defaults_and_of_what_is_switched_off(tmp_path):
    args = ZOTrainingArguments(str(tmp_path), **QUIET, max_grad_norm=0.0, gradient_checkpointing_kwargs=None)
    assert args.max_grad_norm == 0.0
    assert ZOTrainingArguments(str(tmp_path), **QUIET).max_grad_norm == TrainingArguments.max_grad_norm


def test_the_baseline_has_gradients_and_an_optimizer_of_its_own(tmp_path):
    args = ZOTrainingArguments(str(tmp_path), optim_zo="fo-sgd", max_grad_norm=0.5, neftune_noise_alpha=5.0, **QUIET)
    assert args.max_grad_norm == 0.5
    with pytest.warns(UserWarning, match="optim has no effect: .* handed over with optimizers="):
        ZOTrainingArguments(str(tmp_path), optim_zo="fo-sgd", optim="adafactor", **QUIET)
