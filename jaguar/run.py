"""What decides a run of `jaguar finetune`, and what must be the same when it goes on from a checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME

from jaguar.adapters import Adapter
from jaguar.data import Data
from jaguar.flag_groups import DEFAULTS, EVAL_BATCH, RELEASED_FIXES
from jaguar.training_args import ZOTrainingArguments

STATE = "jaguar_run.pt"
# What may differ between a run and the run that continues it.
_FREE = {"output_dir", "resume_from_checkpoint", "overwrite_output_dir", "use_cpu", "logging_steps", "save_steps"}
_FREE |= {"save_total_limit", "report_to"}


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
    resume_from_checkpoint: str | None = None
    overwrite_output_dir: bool = False
    settings: str = ""

    def comparable(self) -> dict[str, Any]:
        """The settings that a continued run must share, as plain values."""
        values = asdict(self)
        flat = {**values, **values.pop("data"), **values.pop("adapter"), **values.pop("arguments")}
        plain: dict[str, Any] = json.loads(json.dumps(flat, default=str))
        return {key: value for key, value in plain.items() if key not in _FREE | {"data", "adapter", "arguments"}}

    def trainer_arguments(self) -> ZOTrainingArguments:
        """Trainer's arguments: what was given, and what a run of this command takes else.

        Raises:
            ValueError: they contradict each other, or the optimizer does not know them; the flag is named.
        """
        given = dict(self.arguments)
        defaults: dict[str, Any] = dict(DEFAULTS) | {"per_device_eval_batch_size": EVAL_BATCH, "report_to": "none"}
        if "num_train_epochs" in given:
            if "max_steps" in given:
                raise ValueError("--max_steps and --num_train_epochs: give one of them")
            del defaults["max_steps"]
        if "optim" in given:
            raise ValueError("--optim is of Trainer's own optimizers; choose one of jaguar's with --method")
        metric = str(given.get("metric_for_best_model", "loss")).removeprefix("eval_")
        if metric not in ("loss", "accuracy"):
            raise ValueError(f"--metric_for_best_model {metric}: there is loss and accuracy")
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
        defaults |= {"save_total_limit": 1, "disable_tqdm": True}
        defaults["dataloader_pin_memory"] = torch.cuda.is_available()  # else torch warns that it cannot
        if given.get("released") and (fixed := RELEASED_FIXES & given.keys()):
            raise ValueError(f"--released fixes sampling, beta and update, so --{min(fixed)} cannot be given with it")
        args = ZOTrainingArguments(self.output_dir, **(defaults | given))
        if str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) == "constant" and args.warmup_steps:
            raise ValueError("--lr_scheduler_type constant has no warm-up; choose constant_with_warmup")
        return args

    def state(self) -> dict[str, Any]:
        """What `jaguar finetune` put into the checkpoint that this run goes on from.

        Raises:
            ValueError: it is no such checkpoint, of other settings, or of the last step; the message says which.
        """
        folder = Path(self.resume_from_checkpoint or "")
        path = folder / STATE
        if not path.is_file():
            raise ValueError(f"{str(folder)!r} is not a checkpoint of jaguar finetune: it has no {STATE}")
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
        except Exception as error:  # torch.load has no exception of its own for a damaged file
            raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
        progress = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        if progress["global_step"] >= progress["max_steps"]:
            raise ValueError(
                f"{str(folder)!r} is of the last step, so nothing is left to train; score it with jaguar eval --model "
                f"{folder}"
            )
        if not isinstance(state, dict) or not isinstance(state.get("run"), dict):
            raise ValueError(f"{path} was not written by jaguar finetune")
        own = self.comparable()
        for key in {**own, **state["run"]}:
            if state["run"].get(key) != own.get(key):
                raise ValueError(
                    f"the checkpoint was made with {key} = {state['run'].get(key)!r}, this run has {own.get(key)!r}; "
                    "give the same options to continue it"
                )
        return state
