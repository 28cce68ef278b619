"""Callbacks around Trainer's steps: a bar or lines, the losses, and signals."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from jaguar.cli.finetune.report import StepBar
from jaguar.cli.output import say
from jaguar.optimizers.interrupts import handled, interrupt
from jaguar.trainer.optimizer import unwrap


class Losses(TrainerCallback):
    """The loss of every zeroth-order step, for the picture."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Remembers the step's loss."""
        optimizer = unwrap(others["optimizer"])
        record = getattr(optimizer, "last_record", None)
        if record is not None:
            self.values.append(optimizer.loss(record))


class Bar(TrainerCallback):
    """Shows the run in a terminal as a bar, elsewhere as lines."""

    def __init__(self, console: Console, losses: Losses) -> None:
        self._console, self._losses = console, losses
        self._bar: StepBar | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Starts the bar where the run starts."""
        self._bar = StepBar(self._console, state.max_steps, state.global_step, int(args.logging_steps))
        self._bar.__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Advances it."""
        if self._bar is not None:
            skipped = getattr(unwrap(others["optimizer"]), "n_skipped", 0)
            self._bar.update(state.global_step, self._losses.values, skipped)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **others: Any
    ) -> None:
        """A line with the figures."""
        figures = f"loss {metrics['eval_loss']:.4f}"
        if "eval_accuracy" in metrics:
            figures = f"accuracy {metrics['eval_accuracy']:.2%}, {figures}"
        say(self._console, f"step {state.global_step}: {figures}")

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.__exit__()
            self._bar = None


class Stop(TrainerCallback):
    """An ending signal ends the run after the current step, with a checkpoint; a second one interrupts at once.

    Of several processes all end at the step that one of them was in. There, what started them may send the signal
    again, which changes nothing.

    Attributes:
        asked: number of the signal; 0: none came.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._handled = ExitStack()

    def __enter__(self) -> Stop:
        self._handled.enter_context(handled(self._ask))
        return self

    def __exit__(self, *error: object) -> None:
        self._handled.close()

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and not dist.is_torchelastic_launched():
            interrupt(number)
        self.asked = self.asked or number

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Saves and stops; a step whose evaluation is due lets it come first, else the continued run would lack it."""
        agreed = self.asked
        if args.world_size > 1:
            asked = torch.tensor(agreed, device=args.device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            agreed = int(asked)
            self.asked = self.asked or agreed  # a signal that comes meanwhile is for the next step
        if not agreed:
            return
        if not (control.should_evaluate and args.eval_steps != 1):
            if args.save_total_limit == 1:  # at which a run ends by removing what is not the best checkpoint
                args.save_total_limit = 2
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
