"""The command line: jaguar finetune | eval | replay | journal | info."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jaguar
from jaguar.cli.flags import EVAL_BATCH
from jaguar.cli.output import complain, outlets, say, to_nowhere
from jaguar.cli.parser import parse
from jaguar.cli.processes import end_group
from jaguar.models.choices import ADAPTERS
from jaguar.optimizers.interrupts import handled, interrupt, number_of

if TYPE_CHECKING:
    from rich.console import Console


class Refused(Exception):
    """Bad input; the message is for the user."""


class Failed(Exception):
    """A run that was set up and could not be finished; the message is for the user."""


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Setting up checks every input, so a ValueError is a message to the user; later it would be a bug to be traced."""
    try:
        yield
    # Libraries raise the last two for what lacks; a backend that is missing is a RuntimeError too.
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise Refused(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code.

    0: done. 1: a run that failed. 2: bad input. 130, 143, 129: ended by SIGINT (Ctrl-C), SIGTERM, SIGHUP.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # A run is worth more than what it prints.
    with outlets() if words[:1] == ["finetune"] else contextlib.nullcontext():
        code = _main(words)
    if argv is None:  # this is the process's whole work
        end_group(failed=code != 0)
    return code


def _main(words: Sequence[str]) -> int:
    name = "jaguar"
    try:
        args = parse(words)
        from rich.console import Console  # here: parsing and --help do without

        name, console = f"jaguar {args.command}", Console()
        commands = {"finetune": _finetune, "eval": _eval, "replay": _replay, "journal": _journal, "info": _info}
        command = commands[args.command]
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        with handled(interrupt), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # libraries mean their callers, not our users
            warnings.showwarning = lambda message, *_, **__: say(console, f"warning: {message}", "yellow")
            return command(args, console)
    except KeyboardInterrupt as stop:
        complain(f"{name}: stopped")
        return 128 + number_of(stop)
    except BrokenPipeError:  # whoever read the output has left: `jaguar info | head`
        to_nowhere(sys.stdout)
        return 141
    except (Refused, Failed, OSError) as error:
        if str(error):  # else another process of the run has said it
            complain(f"{name}: error: {' '.join(str(error).split())}")
        return 2 if isinstance(error, Refused) else 1


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _split(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The given flags that are fields of a dataclass."""
    names = {f.name for f in dataclasses.fields(kind)}
    given = {key: value for key, value in vars(args).items() if key in names}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


def _adapter(args: argparse.Namespace) -> Any:
    from jaguar.models.adapters import Adapter

    chosen = [kind for kind, flag in ADAPTERS.items() if flag in args]
    if len(chosen) > 1:
        raise Refused(f"--{ADAPTERS[chosen[0]]} and --{ADAPTERS[chosen[1]]}: choose one adapter")
    kind = chosen[0] if chosen else "none"
    values: dict[str, Any] = {}
    for name, field, kinds in (
        ("lora_r", "r", ("lora",)),
        ("lora_alpha", "alpha", ("lora",)),
        ("lora_target_modules", "target_modules", ("lora",)),
        ("num_virtual_tokens", "num_virtual_tokens", ("prefix", "prompt")),
    ):
        if name not in args:
            continue
        if kind not in kinds:
            raise Refused(f"--{name} needs {' or '.join(f'--{ADAPTERS[k]}' for k in kinds)}")
        value = getattr(args, name)
        values[field] = tuple(value) if isinstance(value, list) else value
    return Adapter(kind, **values)


def _finetune(args: argparse.Namespace, console: Console) -> int:
    import torch

    from jaguar.cli.finetune.data import Data
    from jaguar.cli.finetune.job import Finetuning, Interrupted
    from jaguar.cli.finetune.run import Run
    from jaguar.models.errors import Damaged, said
    from jaguar.optimizers.guards import NonFiniteLoss
    from jaguar.trainer.arguments import ZOTrainingArguments
    from jaguar.trainer.journaling import JournalUnfit
    from jaguar.trainer.replicas import ReplicasDiffer

    _quiet_transformers()
    own = ("output_dir", "resume_from_checkpoint")
    arguments = {key: value for key, value in _split(args, ZOTrainingArguments).items() if key not in own}
    preset = args.preset_found
    run = Run(
        model=args.model,
        output_dir=args.output_dir,
        data=Data(**_split(args, Data)),
        adapter=_adapter(args),
        arguments=arguments | args.trainer,
        train=getattr(args, "train", "all"),
        dtype=getattr(args, "dtype", "auto"),
        in_4bit="load_in_4bit" in args,
        trust_remote_code="trust_remote_code" in args,
        resume_from_checkpoint=getattr(args, "resume_from_checkpoint", None),
        overwrite_output_dir="overwrite_output_dir" in args,
        settings=f"settings of {preset.source}. {preset.note}".strip() if preset else "",
    )
    with contextlib.ExitStack() as alone:
        with _refusals():
            job = Finetuning(run, console, alone)
        job.describe()
        try:
            job.train()
            if job.leads:
                job.finish()
        except Interrupted as stop:
            say(console, str(stop))
            if getattr(sys.stdout, "lost", False):
                complain(str(stop))
            return 128 + stop.number
        except (Damaged, JournalUnfit) as error:
            raise Refused(str(error)) from error
        except (NonFiniteLoss, ReplicasDiffer, torch.OutOfMemoryError) as error:
            raise Failed(str(error)) from error
        except RuntimeError as error:
            if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
                raise
            raise Failed(f"another process of this run has ended, or cannot be reached ({said(error)})") from error
    return 0


def _eval(args: argparse.Namespace, console: Console) -> int:
    from jaguar.cli.finetune.data import Data
    from jaguar.cli.finetune.evaluation import evaluate_model

    _quiet_transformers()
    with _refusals():
        evaluate_model(
            args.model,
            Data(**_split(args, Data)),
            console,
            dtype=getattr(args, "dtype", "auto"),
            use_cpu="use_cpu" in args,
            in_4bit="load_in_4bit" in args,
            trust_remote_code="trust_remote_code" in args,
            batch_size=getattr(args, "per_device_eval_batch_size", EVAL_BATCH),
        )
    return 0


def _replay(args: argparse.Namespace, console: Console) -> int:
    from jaguar.cli.rebuilding import rebuild

    _quiet_transformers()
    loading = {"dtype": args.dtype} if "dtype" in args else {}
    with _refusals():
        rebuild(
            args.journal,
            args.out,
            console,
            model=getattr(args, "base", None),
            steps=getattr(args, "steps", None),
            backend=getattr(args, "backend", "auto"),
            use_cpu="use_cpu" in args,
            trust_remote_code="trust_remote_code" in args,
            **loading,
        )
    return 0


def _journal(args: argparse.Namespace, console: Console) -> int:
    from jaguar.cli import journal

    for flag, action in (("last", "show"), ("out", "plot")):
        if flag in args and args.action != action:
            raise Refused(f"--{flag} is of jaguar journal {action}, and {args.action} has no use for it")
    with _refusals():
        if args.action == "verify":
            return journal.verify(args.file, console)
        if args.action == "plot":
            journal.plot(args.file, getattr(args, "out", f"{args.file.removesuffix('.jaguar')}.png"), console)
        else:
            journal.show(args.file, console, getattr(args, "last", 10))
    return 0


def _info(args: argparse.Namespace, console: Console) -> int:
    if "optim_zo" not in args:
        return _print_installation(args, console)
    if "model" in args:
        raise Refused("--model and --method: give one of them")
    from jaguar.cli.method_card import facts

    for heading, text in facts(args.optim_zo).items():
        below = heading in ("equation", "backends", "defaults")
        say(console, f"{heading}:\n{textwrap.indent(text, '  ')}" if below else f"{heading}: {text}")
    return 0


def _print_installation(args: argparse.Namespace, console: Console) -> int:
    import platform
    from importlib import metadata

    import torch
    from rich.table import Table

    from jaguar.backends import availability
    from jaguar.backends.polar import cuda as extension
    from jaguar.backends.polar.reference import multiplies_bf16
    from jaguar.backends.polar.run import fastest
    from jaguar.method import rng

    table = Table(show_header=False, title=f"jaguar {jaguar.__version__}", title_justify="left")
    table.add_row("python", platform.python_version())
    for package in ("torch", "transformers", "peft", "triton", "numpy"):
        try:
            table.add_row(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            table.add_row(package, "not installed")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("devices", ", ".join([f"CPU ({torch.get_num_threads()} threads)", *gpus]))
    known = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    healthy = list(rng.philox((0, 0), (0, 0, 0, 0))) == known
    table.add_row(
        "random numbers", f"{rng.TAG}, known answer {'met' if healthy else 'NOT MET: do not trust this installation'}"
    )
    table.add_row("CUDA extension", extension.note())
    reasons = availability.unavailable()
    for name in availability.NAMES[1:]:
        table.add_row(f"backend {name}", f"no: {reasons[name]}" if name in reasons else "yes")
    table.add_row(
        "backend auto",
        "triton for contiguous tensors on GPUs, reference for the rest"
        if "triton" in availability.available() and not availability.interpreted()
        else "reference",
    )
    found = [name for name in fastest() if name not in reasons and not availability.interpreted()]
    table.add_row(
        "Newton-Schulz auto", f"{found[0]} for matrices on GPUs, reference for the rest" if found else "reference"
    )
    own = "in bf16" if multiplies_bf16() else "in fp32, rounded to bf16 (this CPU has no fast products in bf16)"
    table.add_row("bf16 products on CPU", own)
    console.print(table)
    if "model" in args:
        with _refusals():
            _print_paths(args.model, "trust_remote_code" in args, console)
    return 0 if healthy else 1


def _print_paths(name: str, trust_remote_code: bool, console: Console) -> None:
    """Prints which tensors of a model take which path of JAGUAR Muon."""
    from rich.table import Table

    from jaguar.models.load import load
    from jaguar.optimizers.parameter_groups import collapsed

    _quiet_transformers()
    groups = jaguar.param_groups(load(name, use_cpu=True, trust_remote_code=trust_remote_code).model)
    seen: set[int] = set()  # a tied head is there under its own name too, and moved once
    table = Table(title=f"{name} under JAGUAR Muon", title_justify="left")
    for column in ("moved by", "tensors", "shape", "count"):
        table.add_column(column, justify="right" if column == "count" else "left", overflow="fold")
    for ns in (True, "flatten", False):
        named = []
        for group in groups:
            for n, parameter in group["params"]:
                if group["ns"] == ns and id(parameter) not in seen:
                    seen.add(id(parameter))
                    named.append((n, parameter))
        for pattern, shape, count in collapsed(named):
            table.add_row("Newton-Schulz" if ns else "sign rule", pattern, shape, str(count))
    console.print(table)
