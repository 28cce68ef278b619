"""The fields of transformers.TrainingArguments that `jaguar finetune` has no flag of its own for."""

from __future__ import annotations

import argparse
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, cast

from jaguar.cli import values
from jaguar.cli.flags import FINETUNE, OF_THE_RUN, named, unrecognized
from jaguar.optimizers.names import FIRST_ORDER

_NOT_TRAINERS = "it is of Trainer's own optimizers; those of --method have their arguments in --zo_options"
_ROWS = "the task says how rows are read"
_SCORER = "rows are scored by jaguar's scorer"
_NOT_COMPILED = "cannot be had: the scorer looks into the model at its output head, where a compiled one is closed"
_ALWAYS = "this command trains, and then scores the held-out rows"
_NOT_PUSHED = "this command does not push; upload the output folder with: hf upload NAME FOLDER"
_TOGETHER = "has another value here: the figures of an evaluation are of all its rows together"

# Field -> why this command cannot have it; its default is taken all the same.
REFUSED = {
    "optim": "is of Trainer's own optimizers; choose one of jaguar's with --method",
    "torch_compile": _NOT_COMPILED,
    "torch_compile_backend": _NOT_COMPILED,
    "torch_compile_mode": _NOT_COMPILED,
    "use_liger_kernel": f"would change the model after its scores were checked, and its loss is not used: {_SCORER}",
    "liger_kernel_config": "is of --use_liger_kernel, which this command does not have",
    "push_to_hub": f"cannot be had: {_NOT_PUSHED}",
    "eval_do_concat_batches": _TOGETHER,
    "batch_eval_metrics": _TOGETHER,
}

# Field -> why it does nothing in this command, whatever the method; jaguar.trainer.arguments has those of the trainer.
WITHOUT_EFFECT = {
    "label_smoothing_factor": _SCORER,
    "average_tokens_across_devices": _SCORER,
    "use_cache": _SCORER,
    "enable_jit_checkpoint": "SIGTERM always ends a run after its step, with a checkpoint",
    "bf16_full_eval": "rows are scored in the precision of the weights, see --dtype",
    "fp16_full_eval": "rows are scored in the precision of the weights, see --dtype",
    "remove_unused_columns": _ROWS,
    "label_names": _ROWS,
    "length_column_name": _ROWS,
    "do_train": _ALWAYS,
    "do_eval": _ALWAYS,
    "do_predict": _ALWAYS,
    "hub_token": _NOT_PUSHED,
    "hub_private_repo": _NOT_PUSHED,
    "hub_model_id": _NOT_PUSHED,
    "hub_strategy": _NOT_PUSHED,
    "hub_always_push": _NOT_PUSHED,
    "hub_revision": _NOT_PUSHED,
    "fsdp_config": "it is of --fsdp, which forward-only training cannot have",
    "local_rank": "torchrun's environment says which process this is",
    "include_for_metrics": "the figures are loss and accuracy",
    **dict.fromkeys(("optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon"), _NOT_TRAINERS),
}
# The same for what fo-sgd does use.
_OF_GRADIENTS = {"torch_empty_cache_steps": "it is emptied in steps with a backward pass only"}
# Fields that do nothing beside what is (not) given.
_OF_REPORTS = ("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
_OF_EVALUATIONS = ("eval_delay", "metric_for_best_model", "greater_is_better", "prediction_loss_only")

# Checks that the fields' types leave open: ranges, and words that are looked at only when training has begun.
_CHECKS: dict[str, Callable[[str], Any]] = {
    "num_train_epochs": values.number(above=0.0),
    "eval_delay": values.number(0.0),
    "eval_accumulation_steps": values.positive,
    "torch_empty_cache_steps": values.positive,
    "save_total_limit": values.positive,
    "data_seed": values.natural,
    "dataloader_num_workers": values.natural,
    "dataloader_prefetch_factor": values.positive,
    "ddp_bucket_cap_mb": values.positive,
    "ddp_timeout": values.positive,
    "local_rank": values.whole(-1),
    "include_num_input_tokens_seen": lambda text: text if text in ("all", "non_padding") else values.boolean(text),
    "accelerator_config": values.json_or_file,
    "lr_scheduler_kwargs": values.json_object,
    "liger_kernel_config": values.json_object,
    "activation_checkpointing_kwargs": values.json_object,
    "gradient_checkpointing_kwargs": values.json_object,
    "parallelism_config": values.json_object,
}


@functools.cache
def _parser() -> Any:
    """The fields as flags without defaults: what is not given is not there."""
    from transformers import HfArgumentParser, TrainingArguments
    from transformers.hf_argparser import string_to_bool

    own = {names[0].lstrip("-") for _, _, flags in FINETUNE for names, _ in flags}
    parser: Any = HfArgumentParser(
        cast(Any, TrainingArguments),
        add_help=False,
        prog="jaguar finetune",
        allow_abbrev=False,
        formatter_class=argparse.HelpFormatter,
    )
    fields = TrainingArguments.__dataclass_fields__
    for action in parser._actions:
        name, default = action.dest, action.default
        if action.type is string_to_bool:
            action.type, action.metavar = values.boolean, "true|false"
        elif action.type is float:
            action.type = values.finite
        elif action.type is int:
            action.type = values.whole(-(2**31))
        action.type = _CHECKS.get(name, action.type) if action.nargs != 0 else None
        action.default, action.required = argparse.SUPPRESS, False
        # For the help; words are spelled with underscores before they are parsed.
        action.option_strings = [word for word in action.option_strings if "-" not in word[2:]]
        action.metavar = action.metavar or (None if action.choices and name != "optim" else "X")
        hidden = name in own or action.nargs == 0  # --no_..., which is --... false
        action.help = argparse.SUPPRESS if hidden else _help(name, action.help or "", default, fields)
    return parser


def _help(name: str, text: str, default: Any, fields: Any) -> str:
    from jaguar.trainer.arguments import WITHOUT_EFFECT as OF_THE_TRAINER

    if name in REFUSED:
        return f"Refused: --{name} {REFUSED[name]}."
    if why := (OF_THE_TRAINER | _OF_GRADIENTS | WITHOUT_EFFECT).get(name):
        return f"Does nothing here: {why.replace('%', '%%')}."
    text = re.sub(r"\s*Defaults? (?:to|based on) [^.]*\.", "", text)  # defaults that hold in transformers' scripts
    value = OF_THE_RUN.get(name, getattr(fields[name].default, "value", fields[name].default))
    return f"{text} (default: {value})" if isinstance(value, (str, int, float)) and value != "" else text


def without_effect(given: Mapping[str, Any]) -> dict[str, str]:
    """The given fields that do nothing in this run -> why."""
    from jaguar.trainer.arguments import WITHOUT_EFFECT as OF_THE_TRAINER

    known = WITHOUT_EFFECT
    if given.get("optim_zo") != FIRST_ORDER:
        known = OF_THE_TRAINER | _OF_GRADIENTS | known
    if "RANK" not in os.environ:
        known = known | dict.fromkeys(("ddp_backend", "ddp_timeout"), "there is one process; torchrun starts several")
    if given.get("report_to", "none") == "none":
        known = known | dict.fromkeys(_OF_REPORTS, "it is for --report_to")
    if not given.get("eval_steps") and given.get("eval_strategy", "no") == "no":
        known = known | dict.fromkeys(_OF_EVALUATIONS, "nothing is evaluated on the way, see --eval_steps")
    return {name: why for name, why in known.items() if name in given}


def parsed(words: Sequence[str], error: Callable[[str], NoReturn]) -> dict[str, Any]:
    """The given fields; anything else ends the program by `error`."""
    parser = _parser()
    parser.error = error
    found, unknown = parser.parse_known_args(list(words))
    if unknown:
        error(unrecognized(unknown, [*named(FINETUNE), *parser._option_string_actions]))
    given: dict[str, Any] = vars(found)
    return given


def help_text() -> str:
    """All fields, as --help_all shows them."""
    text: str = _parser().format_help()
    return text.split("\n\n", 1)[1]
