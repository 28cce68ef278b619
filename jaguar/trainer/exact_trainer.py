"""`ExactTrainer`: transformers' Trainer whose checkpoints come back bit for bit, or are refused."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from jaguar.models.errors import Damaged, reading
from jaguar.trainer import checkpoints, staging
from jaguar.trainer.saving import only_run
from jaguar.trainer.weights import plain_state


class ExactTrainer(Trainer):
    """A Trainer that goes on from exactly what was saved.

    Trainer reads weights with `strict=False` and skips files that are not there. Here every tensor is found again when
    a checkpoint is written, and whatever is missing when it is read is an error that names it.

    Attributes:
        on_checkpoint: writes more files into the folder of every checkpoint.
    """

    on_checkpoint: Callable[[Path], None] | None = None
    _resumed: Path | None = None  # the checkpoint that the run goes on from
    _staging: Path | None = None  # where a checkpoint is being written
    _began = False  # the checkpoints in its folder are its own

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **others: Any) -> Any:
        """Trainer's; `resume_from_checkpoint=True` takes the newest checkpoint that is whole.

        Raises:
            ValueError: the checkpoint lacks something, or does not fit the model.
        """
        trial = args[0] if args else others.get("trial")
        parent = Path(self._get_output_dir(trial))
        with contextlib.ExitStack() as stack:
            if self._saves:
                stack.enter_context(only_run(parent))
                for text in staging.recover_all(parent):
                    warnings.warn(text, stacklevel=3)
                there = [] if resume_from_checkpoint or self._began else staging.of(parent)
                if there:
                    warnings.warn(
                        f"{parent} holds checkpoints of another run, the last one {there[-1].name}: they count among "
                        "save_total_limit, and resume_from_checkpoint=True would go on from the newest of all",
                        stacklevel=3,
                    )
            self._began = True
            self.accelerator.wait_for_everyone()
            if resume_from_checkpoint is True:
                newest = self._newest(parent)
                resume_from_checkpoint = None if newest is None else str(newest)
            self._resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
            return super().train(resume_from_checkpoint, *args, **others)

    def _newest(self, parent: Path) -> Path | None:
        """The checkpoint in a folder that a run goes on from; None: from its beginning.

        Raises:
            ValueError: there is nothing to go on from.
        """
        return checkpoints.newest(parent, self.args.world_size)

    @property
    def _run_facts(self) -> dict[str, Any]:
        """Settings that decide the order of rows and directions, besides the optimizer's state."""
        args = self.args
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return {
            "processes": args.world_size,
            "rows_per_step": None if args.auto_find_batch_size else rows,
            "training_rows": len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None,
            "seed": args.seed,
            "data_seed": args.data_seed,
            "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        }

    @property
    def _saves(self) -> bool:
        """True if this process writes checkpoints."""
        return bool(self.args.should_save) and self.args.save_strategy != SaveStrategy.NO

    @property
    def _bare_model(self) -> nn.Module:
        bare_model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return bare_model

    @property
    def _is_sharded(self) -> bool:  # the first-order baseline may be, by the launcher; Trainer saves and loads it
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with reading(Path(resume_from_checkpoint)):
            checkpoints.check(Path(resume_from_checkpoint), self._run_facts)
        if self._is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            checkpoints.load_weights(self._bare_model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self._is_sharded or self.state.best_model_checkpoint is None:
            super()._load_best_model()  # type: ignore[no-untyped-call]
        else:
            checkpoints.load_weights(self._bare_model, Path(self.state.best_model_checkpoint))

    def _determine_best_metric(self, *args: Any, **others: Any) -> bool:
        is_best = super()._determine_best_metric(*args, **others)
        if is_best and self.args.load_best_model_at_end:  # Trainer would forget a best step between two checkpoints
            self.control.should_save = True
        return is_best

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._is_sharded:
            return super()._load_optimizer_and_scheduler(checkpoint)
        folder, optimizer, scheduler = Path(checkpoint), cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        given = [dict(group) for group in optimizer.param_groups]
        checkpoints.check_states(folder, scheduler.state_dict())
        with reading(folder / OPTIMIZER_NAME):
            super()._load_optimizer_and_scheduler(checkpoint)
        if lacking := given[0].keys() - optimizer.param_groups[0].keys() - {"initial_lr", "param_names"}:
            raise Damaged(
                f"{checkpoint!r} is of a run with another optimizer: what it saved has no {', '.join(sorted(lacking))}"
            )
        checkpoints.say_what_stays(folder, given, optimizer.param_groups)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        with reading(Path(checkpoint or "") / f"rng_state{rank}.pth"):
            super()._load_rng_state(checkpoint)

    def _init_training_state(self, *args: Any, **others: Any) -> Any:
        if self._resumed is None:
            return super()._init_training_state(*args, **others)  # type: ignore[no-untyped-call]
        with reading(self._resumed / TRAINER_STATE_NAME):
            start = super()._init_training_state(*args, **others)  # type: ignore[no-untyped-call]
        checkpoints.find_best(self.state, self._resumed)
        if self.state.global_step < self.state.max_steps:
            return start
        warnings.warn(
            f"{str(self._resumed)!r} is of step {self.state.global_step}, and the run has {self.state.max_steps}: no "
            "step is taken",
            stacklevel=4,
        )
        return self.state.num_train_epochs, 0  # Trainer would take one more

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        made, saves = staging.staged(folder), self.args.should_save
        with staging.saving(folder) if saves else contextlib.nullcontext():
            self.accelerator.wait_for_everyone()
            self._staging, kept = made.parent, self.state.best_model_checkpoint
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging, self.state.best_model_checkpoint = None, kept
            if self.state.best_global_step:  # Trainer looks for the best one where it writes
                best = folder.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
                if best == folder or best.is_dir():
                    self.state.best_model_checkpoint = str(best)
            self.accelerator.wait_for_everyone()
            if saves:
                self.state.save_to_json(str(made / TRAINER_STATE_NAME))
                if self.on_checkpoint is not None:
                    self.on_checkpoint(made)
                checkpoints.finish(made, None if self._is_sharded else self._bare_model, self._run_facts)
        if saves:
            staging.rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(folder))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: the checkpoint is pushed once it has its final name."""

    def _finalize_training(self, trial: Any, *args: Any, **others: Any) -> Any:
        if self._saves:
            # Trainer removes all but the best from where they stand: killed there, it would leave half of one.
            parent, best = Path(self._get_output_dir(trial)), self.state.best_model_checkpoint
            limit, kept = self.args.save_total_limit, parent / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            if limit == 1 and best is not None and Path(best).parent.resolve() == parent.resolve():
                kept = Path(best)
            if kept.is_dir():  # also what a run that was killed before it came to it would have removed
                staging.rotate(kept, limit, best)
        return super()._finalize_training(trial, *args, **others)  # type: ignore[no-untyped-call]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is None and not hasattr(self._bare_model, "save_pretrained"):
            state_dict = plain_state(self._bare_model)  # of tied or transposed tensors safetensors saves no other
        super()._save(output_dir, state_dict)
