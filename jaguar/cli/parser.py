"""The command line's parser: commands, files of settings, and errors of one line."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from rich.markup import escape
from rich_argparse import RawDescriptionRichHelpFormatter

import jaguar
from jaguar.cli import flags as groups
from jaguar.cli import values
from jaguar.models.choices import ADAPTERS
from jaguar.models.errors import printable
from jaguar.optimizers.names import METHOD

if TYPE_CHECKING:
    from jaguar.cli import settings_file

COMMANDS = ("finetune", "eval", "replay", "journal", "info")

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

REPLAY = """\
Rebuilds a tuned model from its base model and the journal of the run, without data and without forward passes.

Every step of `jaguar finetune` is a record of some 50 bytes in journal.jaguar. Applied one after the other to the base
model they give the weights of any step, bit for bit; the fingerprints that the run noted are compared on the way.

  jaguar replay --journal tuned/journal.jaguar --out rebuilt
  jaguar replay --base ./opt-1.3b --journal journal.jaguar --out rebuilt --steps 500
"""

JOURNAL = """\
Shows, verifies or draws the journal of a run; needs neither the model nor torch.

  jaguar journal show tuned/journal.jaguar
  jaguar journal verify tuned/journal.jaguar
  jaguar journal plot tuned/journal.jaguar --out steps.png
"""

INFO = """\
Shows versions, devices, the backends that can run here, why the others cannot, and what 'auto' chooses.

With --model, also which tensors of a model Newton-Schulz moves under JAGUAR Muon, and which the sign rule.

With --method, instead: what that method computes, its evaluations per step, state, source, backends and defaults.

  jaguar info
  jaguar info --model facebook/opt-1.3b
  jaguar info --method zo-adamm
"""


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line and no abbreviations: half a name could be another flag's tomorrow."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **({"allow_abbrev": False} | options))

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        self.exit(2, f"{self.prog}: error: {printable(' '.join(message.split()))} (see {self.prog} --help)\n")

    def _parse_optional(self, arg_string: str) -> Any:
        return (
            None if isinstance(arg_string, Written) or _is_number(arg_string) else super()._parse_optional(arg_string)
        )


class Written(str):
    """A value from a file, which no look of it makes a flag."""

    __slots__ = ()


def _is_number(word: str) -> bool:
    """Tells whether a word is a number; to argparse, -1e-4 would be a flag."""
    with contextlib.suppress(ValueError):
        float(word)
        return True
    return False


class _HelpAll(argparse.Action):
    """Like --help, and then what TrainingArguments has."""

    def __call__(self, parser: argparse.ArgumentParser, *others: Any) -> NoReturn:
        from jaguar.cli import trainer_flags

        parser.print_help()
        print("\nEvery other flag of transformers.TrainingArguments, with the defaults of this command\n")
        print(trainer_flags.help_text())
        parser.exit()


def make_parser() -> Parser:
    """The parser; the chosen command's name is in `args.command`, and what was not given is not in `args`."""
    parser = Parser(
        prog="jaguar",
        formatter_class=RawDescriptionRichHelpFormatter,
        description="Fine-tuning of language models with forward passes only.",
    )
    parser.add_argument("--version", action="version", version=f"jaguar {jaguar.__version__}")
    commands = parser.add_subparsers(required=True, metavar=" | ".join(COMMANDS), dest="command", parser_class=Parser)
    for name, short, text, sections, usage in (
        (
            "finetune",
            "train a model",
            FINETUNE,
            groups.FINETUNE,
            "--model DIR --output_dir DIR [--task NAME] [options]",
        ),
        ("eval", "score a model", EVAL, groups.EVAL, "--model DIR [--task NAME | --test_file FILE] [options]"),
        ("replay", "rebuild a tuned model", REPLAY, groups.REPLAY, "--journal FILE --out DIR [--base DIR] [options]"),
        ("journal", "show, verify or draw a run", JOURNAL, groups.JOURNAL, "show|verify|plot FILE [options]"),
        ("info", "versions, devices and backends; a method", INFO, groups.INFO, "[--model DIR | --method NAME]"),
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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments as given; `trainer` has the fields of TrainingArguments that have no flag of ours.

    Settings come from the preset of the chosen model, task, method and adapter, then from the file of --config, then
    from the command line; later ones win.
    """
    words = [groups.underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    parser = make_parser()
    if words[:1] not in [[word] for word in (*COMMANDS, "-h", "--help", "--version")]:
        wrong = f"{words[0]!r} is no command" if words else "a command is missing"
        parser.error(f"{wrong}; there is: {', '.join(COMMANDS)}")
    _refuse_two_values(words)
    preset = None
    if words[:1] == ["finetune"]:
        words = ["finetune", *_from_file(words[1:]), *words[1:]]
        given, _ = parser.parse_known_args(words)
        preset = _preset(given)
        if preset is not None:
            fixed = groups.RELEASED_FIXES if "released" in given else set()
            if any(word.startswith("--num_train_epochs") for word in words):
                fixed = fixed | {"max_steps"}
            settings = {
                key: v if isinstance(v, dict) else str(v) for key, v in preset.settings.items() if key not in fixed
            }
            words = ["finetune", *_words(settings), *words[1:]]
    args, rest = parser.parse_known_args(words)
    args.preset_found, args.trainer = preset, {}
    if rest and args.command == "finetune":
        from jaguar.cli import trainer_flags

        args.trainer = trainer_flags.parsed(rest, functools.partial(_refuse, args.command))
    elif rest:
        known = {"eval": groups.EVAL, "replay": groups.REPLAY, "journal": groups.JOURNAL}.get(args.command, groups.INFO)
        _refuse(args.command, groups.unrecognized(rest, groups.named(known)))
    return args


def _refuse(command: str, message: str) -> NoReturn:
    Parser(prog=f"jaguar {command}").error(message)


def _refuse_two_values(words: Sequence[str]) -> None:
    """Nobody knows which of two values of a flag was meant."""
    aliases = groups.named(groups.FINETUNE)
    parts: list[list[str]] = []
    for word in words[1:]:
        if word.startswith("--"):
            parts.append([word])
        elif parts:
            parts[-1].append(word)
    first: dict[str, tuple[list[str], list[str]]] = {}
    for part in parts:
        flag, equals, value = part[0].partition("=")
        values = [*[value] * bool(equals), *part[1:]] or ["true"]
        if flag not in aliases and flag.startswith("--no_"):  # how a field of TrainingArguments is switched off
            flag, values = f"--{flag[5:]}", ["false"]
        before, said = first.setdefault(aliases.get(flag, flag), (values, part))
        if before != values:
            _refuse(words[0], f"{' '.join(said)} and {' '.join(part)}: give one of them")


def _from_file(words: list[str]) -> list[str]:
    """The settings of --config as words of a command line, so that they pass the same checks."""
    finder = Parser(add_help=False, prog="jaguar finetune")
    finder.add_argument("--config", type=values.filled)
    path = finder.parse_known_args(words)[0].config
    if path is None:
        return []
    from jaguar.cli import settings_file

    own = groups.named(groups.FINETUNE)
    given: dict[str, str] = {}
    try:
        settings = settings_file.read(path)
        for name, value in settings.items():
            flag = f"--{name}"
            if name in ("config", "help", "help_all", "h"):
                raise ValueError(f"{name} is for the command line")
            if (other := given.setdefault(own.get(flag, flag), name)) != name:
                raise ValueError(f"{other} and {name}: give one of them")
            if isinstance(value, dict) and flag in own and flag != "--zo_options":
                raise ValueError(f"{name}: put text that begins with a brace in quotes")
    except ValueError as error:
        _refuse("finetune", f"--config {path}: {error}")
    return _words(settings)


def _words(settings: Mapping[str, settings_file.Setting]) -> list[str]:
    words = []
    for key, value in settings.items():
        if isinstance(value, list):
            words += [f"--{key}", *map(Written, value)]
        elif isinstance(value, dict):
            words.append(f"--{key}={json.dumps(value)}")
        elif value is not None:
            words.append(f"--{key}={value}")
    return words


def _preset(given: argparse.Namespace) -> Any:
    from jaguar.tasks import presets

    said = vars(given)
    if said.get("no_preset") or "task" not in said:
        return None
    adapter = next((kind for kind, flag in ADAPTERS.items() if said.get(flag)), "none")
    if "train" in said:
        return None  # published settings are of all parameters, or of an adapter
    return presets.find(said["model"], said["task"], said.get("optim_zo", METHOD), adapter)
