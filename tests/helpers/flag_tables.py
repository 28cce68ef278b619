"""Tables of every flag: its kind, legal and other values, and what must be given with it."""

from __future__ import annotations

from dataclasses import fields

from transformers import TrainingArguments

from helpers.flags import settled as settled
from jaguar.cli import flags as flag_groups
from jaguar.trainer import options as choices

# Kind of a flag -> what is legal, and what is not.
KINDS = {
    "positive": (["3", "1"], ["0", "-1", "x", "nan", "1.5", "1_0", ""]),
    "natural": (["3", "0"], ["-1", "x", "nan", "1.5", "0x10", ""]),
    "switch": ([None, "true", "False", "yes", "off", "0"], ["-1", "2", "0.5", "x"]),
    "length": (["0.25", "0", "1e-4", ".5"], ["-1", "x", "nan", "inf", "-inf", ""]),
    "above 0": (["0.25"], ["0", "-1", "x", "nan", "inf", ""]),
    "share": (["0.25", "0"], ["1", "-1", "x", "nan", "inf"]),
    "any number": (["0.25", "0", "-1"], ["x", "nan", "inf", ""]),
    "object": (["{}"], ["0", "-1", "x", "[1]", "{", "null"]),
    "text": (["word", "0", "-1"], []),
}
OWN = {
    "positive": "max_length num_eval per_device_eval_batch_size num_train lora_r lora_alpha max_steps n_directions "
    "num_virtual_tokens per_device_train_batch_size gradient_accumulation_steps logging_steps ns_steps ns_period",
    "natural": "train_set_seed num_dev eval_steps save_steps seed check_replicas_steps journal_sync_steps",
    "switch": "load_in_4bit use_cpu trust_remote_code overwrite_output_dir no_preset lora prefix_tuning prompt_tuning "
    "released direction_parallel journal",
    "length": "learning_rate weight_decay vector_lr",
    "above 0": "tau rho_clip",
    "share": "beta momentum",
    "object": "zo_options",
    "text": "model test_file dataset text_column label_column choice_columns template verbalizers train_file dev_file "
    "output_dir resume_from_checkpoint lora_target_modules",
}
OF_TRAINER = {
    "positive": "eval_accumulation_steps torch_empty_cache_steps save_total_limit ddp_timeout ddp_bucket_cap_mb "
    "dataloader_prefetch_factor",
    "natural": "data_seed dataloader_num_workers",
    "switch": "average_tokens_across_devices bf16 bf16_full_eval fp16_full_eval activation_checkpointing "
    "gradient_checkpointing use_cache auto_find_batch_size logging_first_step log_on_each_node logging_nan_inf_filter "
    "prediction_loss_only eval_on_start eval_use_gather_object save_only_model save_on_each_node enable_jit_checkpoint "
    "hub_private_repo hub_always_push load_best_model_at_end greater_is_better ignore_data_skip full_determinism "
    "restore_callback_states_from_checkpoint dataloader_drop_last dataloader_pin_memory dataloader_in_order "
    "dataloader_persistent_workers remove_unused_columns ddp_find_unused_parameters ddp_broadcast_buffers "
    "ddp_static_graph skip_memory_metrics do_train do_eval do_predict disable_tqdm include_num_input_tokens_seen",
    "length": "eval_delay",
    "above 0": "num_train_epochs",
    "any number": "adam_beta1 adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor neftune_noise_alpha",
    "object": "activation_checkpointing_kwargs gradient_checkpointing_kwargs accelerator_config lr_scheduler_kwargs",
    "text": "optim_args optim_target_modules run_name project trackio_space_id trackio_bucket_id hub_token "
    "hub_model_id trackio_static_space_id hub_revision label_names length_column_name fsdp_config include_for_metrics",
}
KIND = {name: kind for table in (OWN, OF_TRAINER) for kind, names in table.items() for name in names.split()}
# One of a few words.
WORDS = {
    "dtype": "float32",
    "task": "copa",
    "train": "norm",
    "method": "jaguar-muon",
    "lr_scheduler_type": "cosine",
    "logging_strategy": "epoch",
    "log_level": "error",
    "log_level_replica": "error",
    "report_to": "none",
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "hub_strategy": "end",
    "metric_for_best_model": "accuracy",
    "dataloader_multiprocessing_context": "spawn",
    "train_sampling_strategy": "batch_rebalance",
    "debug": "underflow_overflow",
    "ddp_backend": "gloo",
    **{name: words[0] for name, words in choices.OPTIONS.items()},
}

# What else must be given, and what must be left out.
WITH = {
    **{key: ["--lora"] for key in ("lora_r", "lora_alpha", "lora_target_modules")},
    "num_virtual_tokens": ["--prefix_tuning"],
    "bf16": ["--use_cpu"],  # a GPU that has it, or a CPU by choice
    **{key: ["--method", "zo-sgd"] for key in ("momentum", "distribution", "restore")},
    **{
        key: ["--method", "jaguar-muon"]
        for key in ("ns_steps", "ns_period", "ns_coefficients", "ns_dtype", "adjust_lr", "vector_lr")
    },
    **{
        key: ["--dataloader_num_workers", "1"]
        for key in ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context")
    },
    **{key: ["--eval_strategy", "epoch"] for key in ("eval_delay", "prediction_loss_only")},
    **{key: ["--eval_steps", "2"] for key in ("metric_for_best_model", "greater_is_better")},
    "load_best_model_at_end": ["--eval_steps", "2", "--num_dev", "4"],
}

OURS = {names[0][2:] for _, _, flags in flag_groups.FINETUNE for names, _ in flags}
FIELDS = {f.name for f in fields(TrainingArguments)} - {"optim_zo"}
