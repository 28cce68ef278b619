"""All settings of a fine-tuning run, and the check that a resumed run has the same."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from jaguar.cli import trainer_flags
from jaguar.cli.finetune.data import Data
from jaguar.cli.finetune.dry_run import check
from jaguar.cli.flags import OF_THE_RUN, RELEASED_FIXES
from jaguar.models.adapters import Adapter
from jaguar.models.errors import Damaged, reading
from jaguar.optimizers.names import METHOD, METHODS
from jaguar.tasks import Example
from jaguar.trainer import checkpoints
from jaguar.trainer.arguments import OPTIONS, ZOTrainingArguments
from jaguar.trainer.literals import keyword_arguments

STATE = "jaguar_run.pt"
# Arguments that decide no bits of the training.
_FREE = {"output_dir", "run_name", "use_cpu", "report_to", "disable_tqdm", "backend", "save_steps", "save_strategy"}
_FREE |= {"save_total_limit", "save_only_model", "dataloader_num_workers", "dataloader_pin_memory", "log_level"}
_FREE |= {"journal", "journal_sync_steps"}
_FREE |= {"dataloader_prefetch_factor", "dataloader_persistent_workers", "torch_empty_cache_steps", "debug"}
_FREE |= {"check_replicas_steps"}
# Kinds of what a checkpoint holds beside Trainer's files.
KEPT = {
    "settings": {"given": [], "values": {}, "data": {}},
    "facts": {"rows": dict.fromkeys(("training", "dev", "held-out"), ""), "optimizer": {}, "model": {}},
    "losses": [],
    "passes": 0,
    "seconds": 0.0,
    "before": dict.fromkeys(("logits", "labels", "losses"), torch.empty(0)),
}
_FREE_PREFIXES = ("logging_", "hub_", "push_to_hub")


@dataclass(frozen=True)
class Run:
    """Everything that decides a fine-tuning run; `arguments` are fields of `ZOTrainingArguments`."""

    model: str
    output_dir: str
    data: Data = field(default_factory=Data)
    adapter: Adapter = field(default_factory=Adapter)
    arguments: dict[str, Any] = field(default_factory=dict)
    train: str = "all"
    dtype: str = "auto"
    in_4bit: bool = False
    trust_remote_code: bool = False
    resume_from_checkpoint: str | None = None
    overwrite_output_dir: bool = False
    settings: str = ""

    def settings_of(self, args: ZOTrainingArguments) -> dict[str, Any]:
        """Settings that decide the run besides its rows and weights, as plain values, defaults filled in."""
        names = [f.name for f in fields(args) if f.name not in {*OPTIONS, "zo_options"} and not _is_free(f.name)]
        values = {name: getattr(args, name) for name in names} | asdict(self.adapter)
        values |= {"train": self.train, "dtype": self.dtype, "in_4bit": self.in_4bit, "processes": args.world_size}
        return {"given": sorted(self.arguments), "values": _plain(values), "data": _plain(asdict(self.data))}

    def trainer_arguments(self) -> ZOTrainingArguments:
        """Trainer's arguments: what was given, and what a run of this command takes else.

        Raises:
            ValueError: they contradict each other, or the optimizer does not know them; the flag is named.
        """
        given = dict(self.arguments)
        defaults = {name: value for name, value in OF_THE_RUN.items() if value is not None}
        if "num_train_epochs" in given:
            if "max_steps" in given:
                raise ValueError("--max_steps and --num_train_epochs: give one of them")
            del defaults["max_steps"]
        for name, why in trainer_flags.REFUSED.items():
            if name in given and given[name] != TrainingArguments.__dataclass_fields__[name].default:
                raise ValueError(f"--{name} {why}")
        metric = str(given.get("metric_for_best_model", "loss")).removeprefix("eval_")
        if metric not in ("loss", "accuracy"):
            raise ValueError(f"--metric_for_best_model {metric}: there is loss and accuracy")
        if given.get("prediction_loss_only") and metric != "loss":
            raise ValueError(f"--prediction_loss_only leaves no {metric} for --metric_for_best_model")
        if given.get("dataloader_drop_last") and (given.get("eval_steps") or given.get("eval_strategy", "no") != "no"):
            raise ValueError("--dataloader_drop_last would drop rows of the evaluations too: leave one of them out")
        for name, why in trainer_flags.without_effect(given).items():
            warnings.warn(f"--{name} has no effect: {why}", stacklevel=2)
            del given[name]  # ZOTrainingArguments would say it again
        for what in ("eval", "save"):
            strategy = given.get(f"{what}_strategy", "steps")
            if given.get(f"{what}_steps") and strategy != "steps":
                raise ValueError(f"--{what}_steps and --{what}_strategy {strategy}: give one of them")
        eval_steps, save_steps = given.pop("eval_steps", 0), given.pop("save_steps", 0)
        has_dev = self.data.has_dev(self.model)
        if eval_steps:
            defaults |= {"eval_strategy": "steps", "eval_steps": eval_steps}
            if has_dev:
                defaults |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
        if given.get("load_best_model_at_end") and not (eval_steps and has_dev):
            raise ValueError("--load_best_model_at_end needs dev rows (--num_dev, --dev_file) and --eval_steps")
        defaults["save_strategy"] = "steps" if save_steps else "best" if eval_steps and has_dev else "no"
        if save_steps:
            defaults |= {"save_steps": save_steps}
        defaults |= self._automatic(given)
        defaults["dataloader_pin_memory"] = torch.cuda.is_available()  # else torch warns that it cannot
        if given.get("released") and (fixed := RELEASED_FIXES & given.keys()):
            raise ValueError(f"--released fixes sampling, beta and update, so --{min(fixed)} cannot be given with it")
        try:
            args = ZOTrainingArguments(self.output_dir, **(defaults | given))
        except TypeError as error:  # a key that AcceleratorConfig does not have, say
            raise ValueError(str(error)) from error
        if str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) == "constant" and args.warmup_steps:
            raise ValueError("--lr_scheduler_type constant has no warm-up; choose constant_with_warmup")
        check(args)
        return args

    def _automatic(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Step and perturbation from the losses, where no number was given and there are rows to compare."""
        given = {"learning_rate": None, **given, **keyword_arguments(given.get("zo_options"))}
        rows = given.get("per_device_train_batch_size", OF_THE_RUN["per_device_train_batch_size"])
        rows *= given.get("gradient_accumulation_steps", 1)
        fits = METHODS[given.get("optim_zo", METHOD)].automatic and given.get("restore") != "walk" and rows > 1
        fits = fits and not given.get("direction_parallel")  # which compares no rows
        if given["learning_rate"] is not None or "lr" in given or given.get("scalar_sign") or not fits:
            return {}
        return {name: "auto" for name in ("learning_rate", "tau") if given.get(name) is None}

    def state(self, args: ZOTrainingArguments) -> dict[str, Any]:
        """State that `jaguar finetune` put into the checkpoint from which this run goes on.

        Raises:
            ValueError: it is no such checkpoint, not whole, or of other settings; the message says which.
        """
        folder = Path(self.resume_from_checkpoint or "")
        path = folder / STATE
        if not path.is_file():
            raise ValueError(f"{str(folder)!r} is not a checkpoint of jaguar finetune: it has no {STATE}")
        with reading(path):
            state: dict[str, Any] = torch.load(path, weights_only=True)
            if isinstance(state, dict) and state and not isinstance(state.get("settings"), dict):
                raise Damaged(f"{path} was not written by this version of jaguar finetune: it has no settings")
            state = {"seconds": 0.0} | state  # which those of 0.4.0 do not have
            checkpoints.check_kind(path, state, KEPT)
        checkpoints.check_whole(folder, args.world_size)
        self.check_settings(state["settings"], args)
        return state

    def check_settings(self, saved: Mapping[str, Any], args: ZOTrainingArguments) -> None:
        """Raises ValueError at the first setting that this run has otherwise than the one it goes on with."""
        own = self.settings_of(args)
        always = own["values"].keys() - {f.name for f in fields(args)}
        compared = always | {name for name in {*saved["given"], *own["given"]} if name in own["values"]}
        compare({key: saved["values"].get(key) for key in compared}, {key: own["values"][key] for key in compared})

    def explained(self, saved: dict[str, Any]) -> str:
        """Settings of the data that differ from the saved ones, in words."""
        own = _plain(asdict(self.data))
        other = [f"--{key} was {saved.get(key)!r}, is {own[key]!r}" for key in own if saved.get(key) != own[key]]
        return "; ".join(other) or "a file was changed, or the tokenizer"


def compare(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Raises ValueError at the first setting that differs."""
    for key in sorted({**saved, **own}):
        if saved.get(key) != own.get(key):
            raise ValueError(
                f"the run was started with {key} = {saved.get(key)!r}, this run has {own.get(key)!r}; give the "
                "same options to continue it"
            )


def optimizer_settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The options of an optimizer, defaults filled in; how it gets back to its parameters decides no bits."""
    method = getattr(optimizer, "method", None)
    values = optimizer.defaults | (method.options() if method else {})
    return _plain(values | {"restore": values.get("restore") == "walk"})


def digest(examples: Sequence[Example]) -> str:
    """A hash of what a model reads of the examples, in their order."""
    hashed = hashlib.sha256()
    for example in examples:
        hashed.update(repr((example.choices, example.label)).encode())
    return hashed.hexdigest()


def model_settings(config: Any) -> dict[str, Any]:
    """A model's configuration without the names of folders and versions."""
    values = _plain(config.to_dict())
    return {key: values[key] for key in values if key not in ("_name_or_path", "transformers_version", "architectures")}


def _is_free(name: str) -> bool:
    return name in _FREE or name.startswith(_FREE_PREFIXES)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain
