"""The flags of the command line and their help; names are those of transformers' TrainingArguments."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any, NoReturn

from rich.markup import escape
from rich_argparse import RawDescriptionRichHelpFormatter

import jaguar
from jaguar.choices import METHODS, TRAINABLE

FINETUNE = """\
Fine-tunes a causal LM or a sequence classifier on labelled text with forward passes only.

The model is a folder in Hugging Face form or a hub name; the data are CSV files with a header line or JSONL files with
an object a line. A causal LM reads the prompt (--template) and is scored on one token per class (--verbalizers); a
classifier is scored on its classes. Options of an optimizer that are left out keep the optimizer's own defaults.

  jaguar finetune --model ./SmolLM2-135M --train_file train.csv --test_file test.csv --output_dir tuned \\
      --template 'Review: {text}\\nSentiment:' --verbalizers ' negative' ' positive' \\
      --train norm --tau 1e-2 --learning_rate 4e-4 --coordinates 1.0 --max_steps 200
"""

EVAL = """\
Scores a model on labelled text: accuracy with its standard error, AUC for two classes, loss.

A model that jaguar fine-tuned remembers its prompt; for any other causal LM give --template and --verbalizers.

  jaguar eval --model tuned --test_file test.csv
"""

INFO = """\
Shows versions, devices, the backends that can run here, why the others cannot, and what 'auto' chooses.

With --model, also which tensors of a model Newton-Schulz moves under JAGUAR Muon, and which the sign rule.
"""


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser; the chosen command's name is in `args.command`."""
    parser = _Parser(
        prog="jaguar",
        formatter_class=RawDescriptionRichHelpFormatter,
        description="Fine-tuning of language models with forward passes only.",
    )
    parser.add_argument("--version", action="version", version=f"jaguar {jaguar.__version__}")
    commands = parser.add_subparsers(
        required=True, metavar="finetune | eval | info", dest="command", parser_class=_Parser
    )
    usual = "--model DIR --train_file FILE --test_file FILE --output_dir DIR [options]"
    for name, short, text, add, usage in (
        ("finetune", "train a model on labelled text", FINETUNE, _add_finetune, usual),
        ("eval", "score a model on labelled text", EVAL, _add_eval, "--model DIR --test_file FILE [options]"),
        ("info", "versions, devices and backends", INFO, _add_info, "[--model DIR]"),
    ):
        sub = commands.add_parser(
            name,
            help=short,
            description=escape(text),
            usage=f"jaguar {name} {usage}",
            formatter_class=RawDescriptionRichHelpFormatter,
        )
        add(sub)
    return parser


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="folder in Hugging Face form, or a name on the hub")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", required=True, metavar="DIR", help="folder in Hugging Face form, or a name on the hub"
    )
    model.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="precision of the weights; auto: as saved (default: %(default)s)",
    )
    model.add_argument("--use_cpu", action="store_true", help="stay on the CPU even if there is a GPU")
    data = parser.add_argument_group("data")
    data.add_argument("--test_file", required=True, metavar="FILE", help="held-out rows, .csv or .jsonl")
    data.add_argument("--text_column", default="text", metavar="NAME", help="column of the text (default: %(default)s)")
    data.add_argument(
        "--label_column", default="label", metavar="NAME", help="column of the label (default: %(default)s)"
    )
    data.add_argument(
        "--template",
        metavar="PROMPT",
        type=_unescaped,
        help=r"prompt; {text} stands for the text, \n for a new line "
        "(default: as saved beside the model, else '{text}')",
    )
    data.add_argument(
        "--verbalizers",
        nargs="+",
        metavar="WORD",
        help="one-token answers of a causal LM, in the order of the sorted labels, "
        "with their leading blank (default: as saved beside the model, else the labels)",
    )
    data.add_argument(
        "--max_length",
        type=_positive,
        default=512,
        metavar="N",
        help="tokens of a prompt; longer texts lose their end (default: %(default)s)",
    )
    data.add_argument(
        "--per_device_eval_batch_size",
        type=_positive,
        default=32,
        metavar="N",
        help="rows per forward pass when scoring (default: %(default)s)",
    )


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    _add_eval(parser)
    more = parser.add_argument_group("training data and output")
    more.add_argument("--train_file", required=True, metavar="FILE", help="rows to train on, .csv or .jsonl")
    more.add_argument(
        "--output_dir", required=True, metavar="DIR", help="gets the tuned model, training_curves.png and metrics.json"
    )
    more.add_argument(
        "--overwrite_output_dir", action="store_true", help="allow an output folder that already holds a model"
    )
    more.add_argument(
        "--resume_from_checkpoint", metavar="DIR", help="go on from a checkpoint that Ctrl-C or --save_steps left"
    )
    more.add_argument(
        "--save_steps",
        type=_natural,
        default=0,
        metavar="N",
        help="save a checkpoint every N steps; 0: only on Ctrl-C (default: %(default)s)",
    )
    run = parser.add_argument_group("training")
    run.add_argument(
        "--method",
        "--optim-zo",
        "--optim_zo",
        choices=tuple(METHODS),
        default="jaguar-signsgd",
        dest="method",
        help="optimizer (default: %(default)s)",
    )
    run.add_argument(
        "--train",
        choices=TRAINABLE,
        default="all",
        help="parameters that are trained; norm: weights and biases of the normalisation layers (default: %(default)s)",
    )
    run.add_argument(
        "--max_steps",
        type=_positive,
        default=100,
        metavar="N",
        help="steps, two forward passes each unless --estimator or --n_directions say otherwise (default: %(default)s)",
    )
    run.add_argument(
        "--per_device_train_batch_size",
        type=_positive,
        default=16,
        metavar="N",
        help="rows per step (default: %(default)s)",
    )
    run.add_argument(
        "--lr_scheduler_type",
        choices=("linear", "constant", "cosine", "constant_with_warmup"),
        default="linear",
        help="linear and cosine fall to 0 over the run (default: %(default)s)",
    )
    run.add_argument(
        "--warmup_steps",
        type=_natural,
        default=0,
        metavar="N",
        help="steps over which lr rises from 0 (default: %(default)s)",
    )
    run.add_argument(
        "--eval_steps",
        type=_natural,
        default=0,
        metavar="N",
        help="score the held-out rows every N steps; 0: before and after only (default: %(default)s)",
    )
    run.add_argument(
        "--logging_steps",
        type=_positive,
        default=10,
        metavar="N",
        help="a line every N steps where there is no terminal (default: %(default)s)",
    )
    run.add_argument(
        "--seed",
        type=_natural,
        default=0,
        metavar="N",
        help="of directions, rounding noise and batch order (default: %(default)s)",
    )
    zo = parser.add_argument_group("optimizer", "what is left out keeps the default of the optimizer")
    zo.add_argument("--learning_rate", type=float, dest="lr", metavar="X", help="length of a step")
    zo.add_argument("--tau", type=float, metavar="X", help="length of the perturbation")
    zo.add_argument("--weight_decay", type=float, metavar="X", help="decoupled, multiplied by the learning rate")
    zo.add_argument("--beta", type=float, metavar="X", help="momentum factor of the jaguar methods")
    zo.add_argument("--momentum", type=float, metavar="X", help="momentum factor of zo-sgd and zo-signsgd")
    zo.add_argument(
        "--coordinates",
        type=_coordinates,
        metavar="K|P",
        help="perturbed coordinates: 100 is a number over the whole set, 0.01 a "
        "fraction of every tensor (1 is one, 1.0 is all)",
    )
    zo.add_argument("--layout", help="uniform or block")
    zo.add_argument("--signs", help="rademacher or ones")
    zo.add_argument("--update", help="sampled: the sign step moves the sampled coordinates; all: every one")
    zo.add_argument("--ns_steps", type=int, metavar="N", help="Newton-Schulz iterations of jaguar-muon")
    zo.add_argument("--ns_coefficients", help="cubic, quintic or polar_express")
    zo.add_argument("--ns_dtype", type=_dtype, metavar="DTYPE", help="of Newton-Schulz: bfloat16, float32 or float64")
    zo.add_argument(
        "--ns_period", type=int, metavar="R", help="orthogonalise 1/R of the matrices in each step, which move by R lr"
    )
    zo.add_argument(
        "--vector_lr", type=float, metavar="X", help="step of what Newton-Schulz does not move (a hundredth of lr)"
    )
    zo.add_argument("--adjust_lr", help="original or match_rms_adamw: lr by the shape of the matrix")
    zo.add_argument("--released", action="store_const", const=True, help="what the authors' released code computes")
    zo.add_argument("--distribution", help="gaussian or rademacher direction of zo-sgd and zo-signsgd")
    zo.add_argument("--restore", help="how zo-sgd and zo-signsgd get back to their parameters: copy, module or walk")
    zo.add_argument("--n_directions", type=int, metavar="N", help="directions per step")
    zo.add_argument("--estimator", help="two-sided or one-sided")
    zo.add_argument("--rho_clip", type=float, metavar="X", help="bound on the directional derivative")
    zo.add_argument("--momentum_dtype", type=_dtype, metavar="DTYPE", help="float32, bfloat16 or float8_e5m2")
    zo.add_argument("--rounding", help="stochastic or nearest, for weights stored in less than float32")
    zo.add_argument("--backend", help="auto, or a name that `jaguar info` lists")


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


def _dtype(text: str) -> Any:
    import torch

    names = ("float64", "float32", "bfloat16", "float8_e5m2")
    if text not in names:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(names)}")
    return getattr(torch, text)
