"""`ZOTrainingArguments`: transformers' arguments, and those of the zeroth-order optimizers."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from jaguar import optimizers
from jaguar.optimizers.common import keywords
from jaguar.optimizers.names import FIRST_ORDER, METHODS
from jaguar.trainer.literals import keyword_arguments
from jaguar.trainer.options import OptimizerOptions

_NO_GRADIENTS = "forward-only training has no gradients"
_NO_BACKWARD = "there is no backward pass whose memory it could save"
_NO_DDP = "the model is not wrapped in DistributedDataParallel"
_NAMED = "the optimizer is the one that optim_zo names, or one that is handed over with optimizers="

# Why a sharded model is refused, and what takes it.
WHOLE_MODELS = (
    "every process of a ZOTrainer has a whole model. The optimizers take models of FSDP2: fully_shard(model), and "
    "optimizer.step(closure) in a loop of your own (docs/processes.md)"
)

# Fields of transformers.TrainingArguments that the baseline with backward passes does not use either -> why.
_WITHOUT_EFFECT_ANYWHERE = {
    "optim": _NAMED,
    "optim_args": _NAMED,
    "optim_target_modules": _NAMED,
    "adam_beta1": _NAMED,
    "adam_beta2": _NAMED,
    "adam_epsilon": _NAMED,
}

# Fields that do nothing in forward-only training -> why. Those that it cannot have are refused, all others work.
WITHOUT_EFFECT = _WITHOUT_EFFECT_ANYWHERE | {
    "max_grad_norm": f"{_NO_GRADIENTS} to clip; rho_clip bounds the directional derivative",
    "neftune_noise_alpha": "the model is in evaluation mode while it is measured, and NEFTune's noise is off there",
    "activation_checkpointing": _NO_BACKWARD,
    "activation_checkpointing_kwargs": _NO_BACKWARD,
    "gradient_checkpointing": _NO_BACKWARD,
    "gradient_checkpointing_kwargs": _NO_BACKWARD,
    "ddp_find_unused_parameters": _NO_DDP,
    "ddp_bucket_cap_mb": _NO_DDP,
    "ddp_broadcast_buffers": _NO_DDP,
    "ddp_static_graph": _NO_DDP,
}


@dataclass
class ZOTrainingArguments(OptimizerOptions, TrainingArguments):  # type: ignore[misc]
    """`transformers.TrainingArguments` with an optimizer of this package; None keeps that optimizer's default.

    `learning_rate=None` (the default) is the optimizer's own, not Trainer's 5e-5. What does nothing here says so
    (`WITHOUT_EFFECT`). With `gradient_accumulation_steps` the micro-batches of a window are evaluated at the same two
    points: a step is that of one large batch. Directions are something else: `n_directions`.

    Args:
        optim_zo: the optimizer, "jaguar-signsgd" or another name that `jaguar finetune --help` lists; "fo-sgd":
            torch.optim.SGD with backward passes, the first-order baseline.
        zo_options: further arguments of the optimizer's class: a dict, a JSON object, or "key=value,key=value".
        journal: keep the record of every step in output_dir/journal.jaguar.
        journal_sync_steps: steps after which it is forced onto the disk, where a loss of power spares it; a process
            that is killed loses no step. 0: with checkpoints and at the end only.
        direction_parallel: on several processes: all have the same rows, and each evaluates its share of the
            `n_directions` of a step; else each has rows of its own, and evaluates all directions.
        check_replicas_steps: steps between comparisons of the trained tensors of all processes, which stop a run whose
            processes differ; 0: never.

    Raises:
        ValueError: an option that forward-only training cannot have (`fp16`, `deepspeed`, `fsdp`,
            `parallelism_config`), or that the optimizer does not know.

    Equivalent to: `TrainingArguments(...)`.
    """

    max_grad_norm: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bound on the norm of the gradients of fo-sgd; None: 1.0"}
    )

    journal: bool = field(
        default=True,
        metadata={"help": "keep every step in output_dir/journal.jaguar, from which a run that was killed goes on"},
    )
    journal_sync_steps: int = field(
        default=100, metadata={"help": "steps after which the journal is forced onto the disk; 0: with checkpoints"}
    )

    def __post_init__(self) -> None:
        if self.optim_zo not in METHODS:
            raise ValueError(f"optim_zo={self.optim_zo!r}: choose one of {', '.join(METHODS)}")
        if not self.first_order:
            self._refuse_what_needs_gradients()
        if isinstance(self.coordinates, str):  # from a command line: 1 is one coordinate, 1.0 is all of them
            self.coordinates = int(self.coordinates) if self.coordinates.isdecimal() else float(self.coordinates)
        for name in ("learning_rate", "tau"):
            setattr(self, name, self._number_or_auto(name))
        self.check_options()
        self._say_what_does_nothing()
        if self.max_grad_norm is None:  # unlike a default of 1.0, it tells whether the user gave one
            self.max_grad_norm = TrainingArguments.max_grad_norm
        self._check_processes()
        started = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
        if started > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # else each process is a run of its own
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.direction_parallel and self.world_size == 1:
            warnings.warn("direction_parallel has no effect: there is one process", stacklevel=3)
        if started > 1 and self.world_size == 1:
            raise ValueError(
                f"{started} processes were started, and on {self.device} each would be a run of its own, in one "
                "folder: start one, or give use_cpu=True"
            )

    def _check_processes(self) -> None:
        if self.check_replicas_steps < 0:
            raise ValueError(
                f"check_replicas_steps={self.check_replicas_steps}: give a number of steps, or 0 for never"
            )
        if not self.direction_parallel:
            return
        if self.first_order:
            raise ValueError("direction_parallel: the first-order baseline has no directions; leave it out")
        if str(self.train_sampling_strategy) == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy='batch_rebalance' spreads rows over the processes, and with "
                "direction_parallel all have the same rows: choose another one"
            )
        self.average_tokens_across_devices = False  # their labels would count several times

    @property
    def row_processes(self) -> int:
        """Number of processes over which the rows of a step are spread."""
        return 1 if self.direction_parallel else self.world_size

    def _number_or_auto(self, name: str) -> float | str | None:
        value = getattr(self, name)
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        if value == "auto" and not METHODS[self.optim_zo].automatic:
            fitting = ", ".join(name for name, row in METHODS.items() if row.automatic)
            raise ValueError(f"{name}='auto' is for {fitting}; {self.optim_zo} takes a number")
        try:
            return value if value == "auto" else float(value)
        except ValueError:
            raise ValueError(f"{name}={value!r}: give a number, or 'auto'") from None

    def _say_what_does_nothing(self) -> None:
        for name, reason in (_WITHOUT_EFFECT_ANYWHERE if self.first_order else WITHOUT_EFFECT).items():
            value = getattr(self, name, None)  # some are newer than the oldest transformers
            if value and value != type(self).__dataclass_fields__[name].default:
                warnings.warn(f"{name} has no effect: {reason}", stacklevel=4)

    def _refuse_what_needs_gradients(self) -> None:
        if self.fp16:
            raise ValueError(
                "fp16=True is mixed precision with a gradient scaler, and there are no gradients here: load the model "
                "in float16 (dtype=torch.float16), or use bf16=True"
            )
        if self.deepspeed:
            raise ValueError(
                "deepspeed shards gradients and optimizer states, which forward-only training does not have; leave "
                "it out"
            )
        if self.fsdp:
            raise ValueError(f"fsdp is not supported: {WHOLE_MODELS}")
        if self.parallelism_config is not None:
            raise ValueError(
                "parallelism_config is not supported by ZOTrainer: it shards the model or its rows; for several "
                "processes with a whole model each, leave it out"
            )

    @property
    def first_order(self) -> bool:
        """True if the baseline with backward passes was chosen."""
        return self.optim_zo == FIRST_ORDER

    @property
    def optimizer_class(self) -> type[torch.optim.Optimizer]:
        """The class that `optim_zo` names."""
        name = METHODS[self.optim_zo].cls
        return getattr(optimizers, name) if name else torch.optim.SGD

    def optimizer_options(self) -> dict[str, Any]:
        """The arguments of the optimizer that were given, besides weight decay; the others keep their defaults.

        Raises:
            ValueError: `zo_options` is not written as it should be, or a value is no dtype.
        """
        given = self._of_fields() | self._of_zo_options()
        if not self.first_order:
            given.setdefault("seed", self.seed)
        given.pop("weight_decay", None)  # the groups have it
        return given

    def _of_fields(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in OPTIONS} | {"lr": self.learning_rate}
        return {n: _of_torch(n, value) for n, value in values.items() if value is not None and value is not False}

    def _of_zo_options(self) -> dict[str, Any]:
        return {name: _of_torch(name, value) for name, value in keyword_arguments(self.zo_options).items()}

    def check_options(self) -> None:
        """Raises ValueError if the optimizer does not know an option that was given, or one has two values."""
        known = tuple(name for name in keywords(self.optimizer_class) if name != "model")  # which Trainer has
        fields_have, further = self._of_fields(), self._of_zo_options()
        for name in fields_have:
            if name not in known:
                fitting = ", ".join(option for option in OPTIONS if option in known)
                raise ValueError(f"{self.optim_zo} has no option {name}; it has {fitting}")
        fields_have |= {"seed": self.seed, "weight_decay": self.weight_decay}
        for name, value in further.items():
            if name not in known:
                raise ValueError(f"zo_options: {self.optim_zo} has no argument {name}; it has {', '.join(known)}")
            if name in fields_have and fields_have[name] != value:
                field_name = {"lr": "learning_rate"}.get(name, name)
                raise ValueError(
                    f"zo_options has {name}={value}, and {field_name} is {fields_have[name]}: say it by {field_name}"
                )


# Fields of the trainer, and not arguments of an optimizer.
_NO_OPTIONS = ("optim_zo", "zo_options", "direction_parallel", "check_replicas_steps")
OPTIONS = tuple(
    f.name
    for f in fields(OptimizerOptions)
    if f.name not in TrainingArguments.__dataclass_fields__ and f.name not in _NO_OPTIONS
)


def _of_torch(name: str, value: Any) -> Any:
    """The value, or the dtype if it is a dtype's name."""
    if not name.endswith("_dtype") or value is None:
        return value
    dtype = value if isinstance(value, torch.dtype) else getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name}={value!r} is not a dtype of torch; bfloat16 or float32, say")
    return dtype
