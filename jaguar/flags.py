"""The command line's parser: commands, files of settings, and errors of one line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from rich.markup import escape
from rich_argparse import RawDescriptionRichHelpFormatter

import jaguar
from jaguar import flag_groups as groups
from jaguar.choices import ADAPTERS, METHOD

FINETUNE = """\
Fine-tunes a language model with forward passes only: SST-2, COPA, WinoGrande, or labelled text of your own.

The model is a folder in Hugging Face form or a hub name: a causal LM (OPT, Llama, Qwen, ...), a masked LM (RoBERTa,
BERT) or a sequence classifier. Data are CSV files with a header line, JSONL files with an object a line, or a data set
of the hub. Where published settings of a (model, task, method, adapter) are known they are taken and shown; flags win.

  jaguar finetune --model facebook/opt-1.3b --task sst2 --method jaguar-signsgd --lora --output_dir tuned
  jaguar finetune --model roberta-large --task sst2 --num_k_shot 16 --output_dir tuned
  jaguar finetune --model ./SmolLM2-135M --train_file train.csv --test_file test.csv --output_dir tuned \\
      --template 'Review: {text}\\nSentiment:' --verbalizers ' negative' ' positive' --train norm --coordinates 1.0
  jaguar finetune --config run.yaml --seed 1

Every other field of transformers.TrainingArguments is a flag too (--report_to tensorboard, --bf16, ...): --help_all.
"""

EVAL = """\
Scores a model on a task: accuracy with its standard error, AUC for two options, loss.

A model that jaguar fine-tuned remembers its task and prompt; for any other give --task, or --template and
--verbalizers.

  jaguar eval --model tuned --test_file test.csv
  jaguar eval --model facebook/opt-1.3b --task copa
"""

INFO = """\
Shows versions, devices, the backends that can run here, why the others cannot, and what 'auto' chooses.

With --model, also which tensors of a model Newton-Schulz moves under JAGUAR Muon, and which the sign rule.
"""


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line and no abbreviations: half a name could be another flag's tomorrow."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **({"allow_abbrev": False} | options))

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class _HelpAll(argparse.Action):
    """Like --help, and then what TrainingArguments has."""

    def __call__(self, parser: argparse.ArgumentParser, *others: Any) -> NoReturn:
        parser.print_help()
        print("\nEvery flag of transformers.TrainingArguments\n")
        print(_trainer_parser().format_help().split("\n\n", 1)[1])
        parser.exit()


def _trainer_parser() -> Any:
    """The fields of TrainingArguments as flags without defaults: what is not given is not there."""
    from transformers import HfArgumentParser, TrainingArguments

    parser: Any = HfArgumentParser(
        cast(Any, TrainingArguments), add_help=False, prog="jaguar finetune", allow_abbrev=False
    )
    parser.error = Parser.error.__get__(parser)
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return parser


def trainer_flags(words: Sequence[str]) -> dict[str, Any]:
    """The given fields of TrainingArguments that have no flag of ours; anything else ends the program."""
    parser = _trainer_parser()
    found, unknown = parser.parse_known_args(list(words))
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    given: dict[str, Any] = vars(found)
    return given


def make_parser() -> Parser:
    """The parser; the chosen command's name is in `args.command`, and what was not given is not in `args`."""
    parser = Parser(
        prog="jaguar",
        formatter_class=RawDescriptionRichHelpFormatter,
        description="Fine-tuning of language models with forward passes only.",
    )
    parser.add_argument("--version", action="version", version=f"jaguar {jaguar.__version__}")
    commands = parser.add_subparsers(
        required=True, metavar="finetune | eval | info", dest="command", parser_class=Parser
    )
    for name, short, text, sections, usage in (
        (
            "finetune",
            "train a model",
            FINETUNE,
            groups.FINETUNE,
            "--model DIR --output_dir DIR [--task NAME] [options]",
        ),
        ("eval", "score a model", EVAL, groups.EVAL, "--model DIR [--task NAME | --test_file FILE] [options]"),
        ("info", "versions, devices and backends", INFO, groups.INFO, "[--model DIR]"),
    ):
        sub = commands.add_parser(
            name,
            help=short,
            description=escape(text),
            usage=f"jaguar {name} {usage}",
            formatter_class=RawDescriptionRichHelpFormatter,
            argument_default=argparse.SUPPRESS,
        )
        for title, note, flags in sections:
            section = sub.add_argument_group(title, note)
            for names, options in flags:
                section.add_argument(*names, **options)
        if name == "finetune":
            text = "this, and every flag of transformers.TrainingArguments"
            sub.add_argument("--help_all", action=_HelpAll, nargs=0, help=text)
    return parser


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """What was given, and the flags that are none of ours: fields of TrainingArguments, or mistakes.

    Settings come from the preset of the chosen model, task, method and adapter, then from the file of --config, then
    from the command line; later ones win.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    if words[:1] == ["finetune"]:
        words = ["finetune", *_from_file(parser, words[1:]), *words[1:]]
        given, _ = parser.parse_known_args(words)
        preset = _preset(given)
        if preset is not None:
            fixed = groups.RELEASED_FIXES if "released" in given else set()
            if any(word.startswith("--num_train_epochs") for word in words):
                fixed = fixed | {"max_steps"}
            settings = {key: value for key, value in preset.settings.items() if key not in fixed}
            words = ["finetune", *_words(settings), *words[1:]]
        args, rest = parser.parse_known_args(words)
        args.preset_found = preset
        return args, rest
    args, rest = parser.parse_known_args(words)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args, []


def _from_file(parser: Parser, words: list[str]) -> list[str]:
    """The settings of --config as words of a command line, so that they pass the same checks."""
    finder = Parser(add_help=False, prog="jaguar finetune")
    finder.add_argument("--config")
    path = finder.parse_known_args(words)[0].config
    if path is None:
        return []
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {path}: {' '.join(str(error).split())}")
    if not isinstance(found, dict):
        parser.error(f"--config {path}: a file of settings has lines like 'learning_rate: 1e-4'")
    return _words(found)


def _words(settings: dict[str, Any]) -> list[str]:
    switches = {names[0] for _, _, flags in groups.FINETUNE for names, options in flags if "action" in options}
    words = []
    for key, value in settings.items():
        flag = f"--{key}"
        if isinstance(value, list):
            words += [flag, *map(str, value)]
        elif isinstance(value, dict):
            words.append(f"{flag}={json.dumps(value)}")
        elif isinstance(value, bool) and flag in switches:
            words += [flag] * value
        elif value is not None:
            words.append(f"{flag}={value}")
    return words


def _preset(given: argparse.Namespace) -> Any:
    from jaguar import presets

    values = vars(given)
    if values.get("no_preset") or "task" not in values:
        return None
    adapter = next((kind for kind, flag in ADAPTERS.items() if values.get(flag)), "none")
    if "train" in values:
        return None  # published settings are of all parameters, or of an adapter
    return presets.find(values["model"], values["task"], values.get("optim_zo", METHOD), adapter)
