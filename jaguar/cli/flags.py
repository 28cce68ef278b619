"""Flags: their spelling and their help, group by group; named as in TrainingArguments where it has them."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from jaguar import tasks
from jaguar.cli import values
from jaguar.cli.values import filled, finite, natural, number_or_auto, positive, seed
from jaguar.models.choices import TRAINABLE
from jaguar.optimizers.names import METHODS
from jaguar.trainer.options import OPTIONS, OptimizerOptions

TASKS = tuple(tasks.TASKS)

# Schedules of the learning rate that need no figures of an evaluation.
SCHEDULES = (
    *("linear", "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "cosine_with_min_lr"),
    *("cosine_warmup_with_min_lr", "polynomial", "inverse_sqrt", "warmup_stable_decay"),
)

# Values of a run where nothing else is said, beside the defaults of TrainingArguments and of the optimizer.
DEFAULTS: dict[str, Any] = {"max_steps": 100, "per_device_train_batch_size": 16, "logging_steps": 10, "seed": 0}
EVAL_BATCH = 32
# Values of a run for fields of TrainingArguments instead of their own defaults; None: the other flags decide it.
OF_THE_RUN = DEFAULTS | {"per_device_eval_batch_size": EVAL_BATCH, "report_to": "none", "save_total_limit": 1}
OF_THE_RUN |= {"disable_tqdm": True, "num_train_epochs": None, "eval_strategy": None, "save_strategy": None}
OF_THE_RUN |= {"load_best_model_at_end": None, "dataloader_pin_memory": None}

# Options that the authors' released step decides: neither a preset nor a user can say otherwise.
RELEASED_FIXES = {"coordinates", "layout", "signs", "update", "beta", "vector_lr", "adjust_lr"}
RELEASED_FIXES |= {"ns_steps", "ns_coefficients", "ns_dtype", "ns_period"}


class Switch(argparse.Action):
    """A flag that may also be given as `--flag true` or `--flag false`; what is off is as if it were not there."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, option: Any = None
    ) -> None:
        """Keeps what is on."""
        if value:
            setattr(namespace, self.dest, True)
        else:
            vars(namespace).pop(self.dest, None)


class Together(argparse.Action):
    """A flag with several mappings, which are one; a key has one value."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        """Keeps what they say together."""
        found: dict[str, Any] = {}
        for key, value in (pair for part in values for pair in part.items()):
            if found.setdefault(key, value) != value:
                raise argparse.ArgumentError(self, f"{key} has two values")
        setattr(namespace, self.dest, found)


def _flag(*names: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """A flag of the command; its default is shown if it is one of a run."""
    if (value := OF_THE_RUN.get(names[0][2:])) is not None:
        options["help"] += f" (default: {value})"
    return names, options


def _switch(name: str, text: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    bare = {"nargs": "?", "const": True, "type": values.boolean, "metavar": "true|false"}
    return (name,), {"action": Switch, "help": text} | bare


# Annotation of a field of `OptimizerOptions` -> type of its flag.
_TYPES: dict[str, dict[str, Any]] = {
    "str": {},
    "str | None": {"type": values.dtype},
    "int": {"type": values.natural, "metavar": "N"},
    "int | None": {"type": positive, "metavar": "N"},
    "float": {"type": finite, "metavar": "X"},
    "float | None": {"type": finite, "metavar": "X"},
    "float | str | None": {"type": number_or_auto, "metavar": "X|auto"},
    "dict | str | None": {"type": values.keywords, "nargs": "+", "action": Together, "metavar": "KEY=VALUE"},
}
# Field -> parts of its flag that its annotation does not say.
_PARTS: dict[str, dict[str, Any]] = {name: {"choices": words} for name, words in OPTIONS.items()}
_PARTS |= {
    "optim_zo": {"choices": tuple(METHODS), "dest": "optim_zo"},
    "coordinates": {"type": values.coordinates, "metavar": "K|P"},
    "ns_period": {"metavar": "R"},
}
# Defaults that are the command's, not the optimizer's: a run chooses lr and tau from the losses where it can.
_DEFAULTS_HERE = {
    "learning_rate": "; ".join(f"{name} {'auto' if row.automatic else row.lr}" for name, row in METHODS.items()),
    "tau": "auto where the learning rate is, by default; else 1e-3",
}


def _of_field(name: str, *names: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The flag of an argument of the optimizers; `names` are other spellings, shown before the field's own name."""
    field, kind = OptimizerOptions.__dataclass_fields__[name], OptimizerOptions.__annotations__[name]
    text = field.metadata["help"]
    if kind == "bool":
        return _switch(f"--{name}", text)
    if (default := _DEFAULTS_HERE.get(name, field.default)) is not None:
        text += f" (default: {default})"
    return (*names, f"--{name}"), _TYPES[kind] | _PARTS.get(name, {}) | {"help": text}


_TRUST = _switch(
    "--trust_remote_code",
    "run Python files that come with the model, which its config.json names under auto_map; read them first (default: "
    "such a model is refused, and nothing of it runs)",
)

DTYPES: dict[str, Any] = {"choices": ("auto", "float32", "bfloat16", "float16")}
_PLACES = [_switch("--use_cpu", "stay on the CPU even if there is a GPU"), _TRUST]
_FOLDER = _flag("--model", type=filled, metavar="DIR", help="folder in Hugging Face form, or a name on the hub")
_MODEL = (
    "model",
    None,
    [
        (_FOLDER[0], _FOLDER[1] | {"required": True}),
        _flag("--dtype", **DTYPES, help="precision of the weights; auto: as saved (default: auto)"),
        _switch("--load_in_4bit", "hold the frozen weights in 4 bits (NF4, bitsandbytes); with an adapter"),
        *_PLACES,
    ],
)

_DATA = (
    "task and data",
    None,
    [
        _flag("--task", choices=TASKS, help="default: that of the model's folder, else text-classification"),
        _flag("--test_file", type=filled, metavar="FILE", help="held-out rows, .csv or .jsonl"),
        _flag(
            "--dataset",
            type=filled,
            metavar="NAME|DIR",
            help="data set of the hub, or a folder that `datasets` reads, in place of files (default: the task's own)",
        ),
        _flag("--text_column", type=filled, metavar="NAME", help="column of the text (default: text)"),
        _flag("--label_column", type=filled, metavar="NAME", help="column of the label (default: label)"),
        _flag(
            "--choice_columns",
            type=filled,
            nargs="+",
            metavar="NAME",
            help="columns of multiple-choice's options; the label is the number of the right one, from 0, or its text "
            "(default: choice1 choice2)",
        ),
        _flag(
            "--template",
            metavar="PROMPT",
            type=values.unescaped,
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
            type=positive,
            metavar="N",
            help="tokens of a prompt; longer texts lose their end (default: longer than the model takes is an error)",
        ),
        _flag(
            "--num_eval",
            type=positive,
            metavar="N",
            help="test rows (default: all; 1000 for sst2, copa and winogrande)",
        ),
        _flag(
            "--train_set_seed",
            type=natural,
            metavar="N",
            help="seed of the permutation that samples rows (default: 0)",
        ),
        _flag(
            "--per_device_eval_batch_size",
            type=positive,
            metavar="N",
            help="rows per forward pass when scoring",
        ),
    ],
)

_TRAINING_DATA = (
    "training data and output",
    "with dev rows, the best checkpoint by dev loss is kept (see --eval_steps)",
    [
        _flag(
            "--train_file",
            type=filled,
            metavar="FILE",
            help="rows to train on (and dev rows, see --num_dev), .csv or .jsonl",
        ),
        _flag("--dev_file", type=filled, metavar="FILE", help="dev rows (default: drawn from the training rows)"),
        _flag(
            "--num_train",
            type=positive,
            metavar="N",
            help="training rows (default: all; 1000 for the three tasks)",
        ),
        _flag(
            "--num_dev",
            type=natural,
            metavar="N",
            help="dev rows (default: 0; 500 for sst2, 100 for copa and winogrande)",
        ),
        _flag(
            "--num_k_shot",
            type=positive,
            metavar="K",
            help="MeZO's k-shot protocol instead: K rows of each label to train on and K others as dev rows",
        ),
        _flag(
            "--output_dir",
            type=filled,
            required=True,
            metavar="DIR",
            help="gets the tuned model or adapter, training_curves.png, metrics.json and journal.jaguar",
        ),
        _switch("--overwrite_output_dir", "allow an output folder that already holds a model"),
        _flag(
            "--resume_from_checkpoint",
            type=filled,
            metavar="DIR",
            help="go on with a run that was stopped or killed: its output folder, or one of its checkpoints",
        ),
        _flag(
            "--config",
            type=filled,
            metavar="FILE",
            help="YAML or JSON with flags and their values; the command line wins",
        ),
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
        _flag("--lora_r", type=positive, metavar="N", help="rank (default: 8)"),
        _flag("--lora_alpha", type=positive, metavar="N", help="scale is alpha / rank (default: 16)"),
        _flag(
            "--lora_target_modules",
            type=filled,
            nargs="+",
            metavar="NAME",
            help="modules that get factors: ends of names, a single pattern, or all-linear (default: PEFT's choice)",
        ),
        _switch("--prefix_tuning", "a trained prefix of keys and values instead"),
        _switch("--prompt_tuning", "trained tokens before the prompt instead"),
        _flag("--num_virtual_tokens", type=positive, metavar="N", help="length of prefix or prompt (default: 5)"),
    ],
)

_METHOD = _of_field("optim_zo", "--method")
_TRAINING = (
    "training",
    None,
    [
        _METHOD,
        _flag(
            "--max_steps",
            type=positive,
            metavar="N",
            help="steps, two forward passes each unless --estimator or --n_directions say otherwise; nine with fzoo, "
            "five with zo-sgd-cons, four with acc-zom, one of dual numbers with forward-grad",
        ),
        _flag(
            "--per_device_train_batch_size",
            type=positive,
            metavar="N",
            help="rows per forward pass",
        ),
        _flag(
            "--gradient_accumulation_steps",
            type=positive,
            metavar="N",
            help="batches per step, all evaluated at the same points (default: 1)",
        ),
        _flag(
            "--lr_scheduler_type",
            choices=SCHEDULES,
            metavar="NAME",
            help=f"{', '.join(SCHEDULES)}; their options with --lr_scheduler_kwargs (default: linear)",
        ),
        _flag(
            "--warmup_steps",
            type=values.warm_up,
            metavar="N|P",
            help="steps over which lr rises from 0, or their share of the run (default: 0)",
        ),
        _flag(
            "--eval_steps",
            type=natural,
            metavar="N",
            help="score the dev rows every N steps and keep the best; without dev rows the held-out rows, for the "
            "picture only; 0: before and after only (default: 0)",
        ),
        _flag(
            "--logging_steps",
            type=positive,
            metavar="N",
            help="a line, and a log entry, every N steps",
        ),
        _flag(
            "--save_steps",
            type=natural,
            metavar="N",
            help="a checkpoint every N steps; 0: only on Ctrl-C (default: 0)",
        ),
        _flag(
            "--journal",
            type=values.boolean,
            metavar="true|false",
            help="keep every step in journal.jaguar, from which a run that was killed goes on (default: true)",
        ),
        _flag(
            "--journal_sync_steps",
            type=natural,
            metavar="N",
            help="steps after which the journal is forced onto the disk; 0: with checkpoints (default: 100)",
        ),
        _flag("--seed", type=seed, metavar="N", help="seed of directions, rounding noise and batch order"),
    ],
)

_OPTIMIZER = (
    "optimizer",
    "an option that the chosen method does not have is refused",
    [_of_field(name) for name in OptimizerOptions.__dataclass_fields__ if name != "optim_zo"],
)

_ABOUT_METHOD = "what it is and does, read from its class; an argument that has no flag is one of --zo_options"
FINETUNE = (_MODEL, _DATA, _TRAINING_DATA, _ADAPTER, _TRAINING, _OPTIMIZER)
EVAL = (_MODEL, _DATA)
INFO = (
    ("model", None, [_FOLDER, _TRUST]),
    ("method", None, [(_METHOD[0], _METHOD[1] | {"help": _ABOUT_METHOD})]),
)

_JOURNAL = _flag("--journal", type=filled, required=True, metavar="FILE", help="journal.jaguar of a run, or its folder")
REPLAY = (
    (
        "run",
        None,
        [
            _flag(
                "--base", type=filled, metavar="DIR", help="base model: a folder or a hub name (default: the journal's)"
            ),
            _JOURNAL,
            _flag("--out", type=filled, required=True, metavar="DIR", help="gets the tuned model or adapter"),
            _flag(
                "--steps",
                type=natural,
                metavar="N",
                help="finished steps of the run after which to stop (default: those of the run's model, its best one)",
            ),
            _of_field("backend"),
            _flag("--dtype", **DTYPES, help="precision of the weights (default: the run's; else other bits)"),
            *_PLACES,
        ],
    ),
)
JOURNAL = (
    (
        "journal",
        None,
        [
            _flag("action", choices=("show", "verify", "plot"), help="what to do with it"),
            _flag("file", type=filled, metavar="FILE", help="journal.jaguar of a run, or its folder"),
            _flag("--last", type=natural, metavar="N", help="steps that show prints (default: 10)"),
            _flag("--out", type=filled, metavar="PNG", help="picture of plot (default: FILE with .png)"),
        ],
    ),
)


def named(sections: Sequence[Any]) -> dict[str, str]:
    """Every spelling of the flags -> the first one."""
    return {name: names[0] for _, _, flags in sections for names, _ in flags for name in names}


def unrecognized(words: Sequence[str], known: Iterable[str]) -> str:
    """The error for words that are no flags, with the flag that was meant, if one is spelled alike."""
    flag = next((word.partition("=")[0] for word in words if word.startswith("--")), "")
    alike = difflib.get_close_matches(flag, known, 1, 0.8) if flag else []
    return f"unrecognized arguments: {' '.join(words)}" + (f"; did you mean {alike[0]}?" if alike else "")


def underscored(word: str) -> str:
    """A flag's one spelling, --max_steps, for --max-steps too; other words are left alone."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word
