"""The flags and their help, group by group; names are those of transformers' TrainingArguments where it has them."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

from jaguar.choices import METHOD, METHODS, TRAINABLE

TASKS = ("sst2", "copa", "winogrande", "text-classification", "multiple-choice")

# What a run takes where nothing else is said, beside the defaults of TrainingArguments and of the optimizer.
DEFAULTS = {"max_steps": 100, "per_device_train_batch_size": 16, "logging_steps": 10, "seed": 0}
EVAL_BATCH = 32

# What the authors' released step decides: neither a preset nor a user can say otherwise.
RELEASED_FIXES = {"coordinates", "layout", "signs", "update", "beta", "vector_lr", "adjust_lr"}
RELEASED_FIXES |= {"ns_steps", "ns_coefficients", "ns_dtype", "ns_period"}


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n")


def _coordinates(text: str) -> int | float:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of coordinates (100) nor a fraction (0.01)")


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _flag(*names: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, options


def _switch(name: str, text: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    return (name,), {"action": "store_true", "help": text}


_MODEL = (
    "model",
    None,
    [
        _flag("--model", required=True, metavar="DIR", help="folder in Hugging Face form, or a name on the hub"),
        _flag(
            "--dtype",
            choices=("auto", "float32", "bfloat16", "float16"),
            help="precision of the weights; auto: as saved (default: auto)",
        ),
        _switch("--load_in_4bit", "hold the frozen weights in 4 bits (NF4, bitsandbytes); with an adapter"),
        _switch("--use_cpu", "stay on the CPU even if there is a GPU"),
    ],
)

_DATA = (
    "task and data",
    None,
    [
        _flag("--task", choices=TASKS, help="default: that of the model's folder, else text-classification"),
        _flag("--test_file", metavar="FILE", help="held-out rows, .csv or .jsonl"),
        _flag(
            "--dataset",
            metavar="NAME|DIR",
            help="data set of the hub, or a folder that `datasets` reads, in place of files (default: the task's own)",
        ),
        _flag("--text_column", metavar="NAME", help="column of the text (default: text)"),
        _flag("--label_column", metavar="NAME", help="column of the label (default: label)"),
        _flag(
            "--choice_columns",
            nargs="+",
            metavar="NAME",
            help="columns of multiple-choice's options; the label is the number of the right one, from 0, or its text "
            "(default: choice1 choice2)",
        ),
        _flag(
            "--template",
            metavar="PROMPT",
            type=_unescaped,
            help=r"prompt; {text} stands for the text, \n for a new line, {mask} for the place of a masked LM's answer "
            "(default: as saved beside the model, else '{text}')",
        ),
        _flag(
            "--verbalizers",
            nargs="+",
            metavar="WORD",
            help="what a language model should say for each label, in the order of the sorted labels, with their "
            "leading blank (default: as saved beside the model, else the labels)",
        ),
        _flag(
            "--max_length",
            type=_positive,
            metavar="N",
            help="tokens of a prompt; longer texts lose their end (default: longer than the model takes is an error)",
        ),
        _flag(
            "--num_eval",
            type=_positive,
            metavar="N",
            help="test rows (default: all; 1000 for sst2, copa and winogrande)",
        ),
        _flag("--train_set_seed", type=_natural, metavar="N", help="of the permutation that samples rows (default: 0)"),
        _flag(
            "--per_device_eval_batch_size",
            type=_positive,
            metavar="N",
            help=f"rows per forward pass when scoring (default: {EVAL_BATCH})",
        ),
    ],
)

_TRAINING_DATA = (
    "training data and output",
    "with dev rows, the best checkpoint by dev loss is kept (see --eval_steps)",
    [
        _flag("--train_file", metavar="FILE", help="rows to train on (and dev rows, see --num_dev), .csv or .jsonl"),
        _flag("--dev_file", metavar="FILE", help="dev rows (default: drawn from the training rows)"),
        _flag(
            "--num_train", type=_positive, metavar="N", help="training rows (default: all; 1000 for the three tasks)"
        ),
        _flag(
            "--num_dev",
            type=_natural,
            metavar="N",
            help="dev rows (default: 0; 500 for sst2, 100 for copa and winogrande)",
        ),
        _flag(
            "--num_k_shot",
            type=_positive,
            metavar="K",
            help="MeZO's k-shot protocol instead: K rows of each label to train on and K others as dev rows",
        ),
        _flag(
            "--output_dir",
            required=True,
            metavar="DIR",
            help="gets the tuned model or adapter, training_curves.png and metrics.json",
        ),
        _switch("--overwrite_output_dir", "allow an output folder that already holds a model"),
        _flag(
            "--resume_from_checkpoint", metavar="DIR", help="go on from a checkpoint that Ctrl-C or --save_steps left"
        ),
        _flag("--config", metavar="FILE", help="YAML or JSON with flags and their values; the command line wins"),
        _switch("--no_preset", "do not take published settings"),
    ],
)

_ADAPTER = (
    "what trains",
    None,
    [
        _flag(
            "--train",
            choices=TRAINABLE,
            help="parameters of the model itself; norm: weights and biases of the normalisation layers (default: all)",
        ),
        _switch("--lora", "LoRA factors on queries and values instead, by PEFT"),
        _flag("--lora_r", type=_positive, metavar="N", help="rank (default: 8)"),
        _flag("--lora_alpha", type=_positive, metavar="N", help="scale is alpha / rank (default: 16)"),
        _flag(
            "--lora_target_modules", nargs="+", metavar="NAME", help="modules that get factors (default: PEFT's choice)"
        ),
        _switch("--prefix_tuning", "a trained prefix of keys and values instead"),
        _switch("--prompt_tuning", "trained tokens before the prompt instead"),
        _flag("--num_virtual_tokens", type=_positive, metavar="N", help="length of prefix or prompt (default: 5)"),
    ],
)

_TRAINING = (
    "training",
    None,
    [
        _flag(
            "--method",
            "--optim-zo",
            "--optim_zo",
            choices=tuple(METHODS),
            dest="optim_zo",
            help=f"optimizer; fo-sgd is the first-order baseline, with backward passes (default: {METHOD})",
        ),
        _flag(
            "--max_steps",
            type=_positive,
            metavar="N",
            help="steps, two forward passes each unless --estimator or --n_directions say otherwise (default: 100)",
        ),
        _flag("--per_device_train_batch_size", type=_positive, metavar="N", help="rows per forward pass (default: 16)"),
        _flag(
            "--gradient_accumulation_steps",
            type=_positive,
            metavar="N",
            help="batches per step, all evaluated at the same two points (default: 1)",
        ),
        _flag(
            "--lr_scheduler_type",
            choices=("linear", "constant", "cosine", "constant_with_warmup"),
            help="linear and cosine fall to 0 over the run (default: linear)",
        ),
        _flag("--warmup_steps", type=_natural, metavar="N", help="steps over which lr rises from 0 (default: 0)"),
        _flag(
            "--eval_steps",
            type=_natural,
            metavar="N",
            help="score the dev rows every N steps and keep the best; without dev rows the held-out rows, for the "
            "picture only; 0: before and after only (default: 0)",
        ),
        _flag(
            "--logging_steps", type=_positive, metavar="N", help="a line, and a log entry, every N steps (default: 10)"
        ),
        _flag(
            "--save_steps",
            type=_natural,
            metavar="N",
            help="a checkpoint every N steps; 0: only on Ctrl-C (default: 0)",
        ),
        _flag("--seed", type=_natural, metavar="N", help="of directions, rounding noise and batch order (default: 0)"),
    ],
)

_OPTIMIZER = (
    "optimizer",
    "what is left out keeps the default of the optimizer",
    [
        _flag("--learning_rate", type=float, metavar="X", help="length of a step"),
        _flag("--tau", type=float, metavar="X", help="length of the perturbation"),
        _flag("--weight_decay", type=float, metavar="X", help="decoupled, multiplied by the learning rate"),
        _flag("--beta", type=float, metavar="X", help="momentum factor of the jaguar methods"),
        _flag("--momentum", type=float, metavar="X", help="momentum factor of zo-sgd, zo-signsgd and fo-sgd"),
        _flag(
            "--coordinates",
            type=_coordinates,
            metavar="K|P",
            help="perturbed coordinates: 100 is a number over the whole set, 0.01 a fraction of every tensor "
            "(1 is one, 1.0 is all)",
        ),
        _flag("--layout", help="uniform or block"),
        _flag("--signs", help="rademacher or ones"),
        _flag("--update", help="sampled: the sign step moves the sampled coordinates; all: every one"),
        _flag("--ns_steps", type=int, metavar="N", help="Newton-Schulz iterations of jaguar-muon"),
        _flag("--ns_coefficients", help="cubic, quintic or polar_express"),
        _flag("--ns_dtype", metavar="DTYPE", help="of Newton-Schulz: bfloat16, float32 or float64"),
        _flag(
            "--ns_period",
            type=int,
            metavar="R",
            help="orthogonalise 1/R of the matrices in each step, which move by R lr",
        ),
        _flag(
            "--vector_lr", type=float, metavar="X", help="step of what Newton-Schulz does not move (a hundredth of lr)"
        ),
        _flag("--adjust_lr", help="original or match_rms_adamw: lr by the shape of the matrix"),
        _switch("--released", "what the authors' released code computes"),
        _flag("--distribution", help="gaussian or rademacher direction of zo-sgd and zo-signsgd"),
        _flag("--restore", help="how zo-sgd and zo-signsgd get back to their parameters: copy, module or walk"),
        _flag("--n_directions", type=int, metavar="N", help="directions per step"),
        _flag("--estimator", help="two-sided or one-sided"),
        _flag("--rho_clip", type=float, metavar="X", help="bound on the directional derivative"),
        _flag("--momentum_dtype", metavar="DTYPE", help="float32, bfloat16 or float8_e5m2"),
        _flag("--rounding", help="stochastic or nearest, for weights stored in less than float32"),
        _flag("--backend", help="auto, or a name that `jaguar info` lists"),
    ],
)

FINETUNE = (_MODEL, _DATA, _TRAINING_DATA, _ADAPTER, _TRAINING, _OPTIMIZER)
EVAL = (_MODEL, _DATA)
INFO = (("model", None, [_flag("--model", metavar="DIR", help="folder in Hugging Face form, or a name on the hub")]),)
