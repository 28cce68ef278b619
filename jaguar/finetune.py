"""`jaguar finetune`: from a model and labelled text to figures, a picture and a tuned model."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import jaguar
from jaguar.choices import METHODS
from jaguar.evaluation import Data, make_scorer, peak_memory, versions
from jaguar.interrupts import HeldInterrupts
from jaguar.models import load, save_task, select_trainable
from jaguar.optimizers import JaguarMuon
from jaguar.optimizers.base import ZerothOrder
from jaguar.optimizers.coordinate_momentum import CoordinateMomentum
from jaguar.report import StepBar, draw_curves, row_bar, say, score_table
from jaguar.saving import check_space, prepare_folder, save_files, save_folder, write_model
from jaguar.scoring import Scores, batches, evaluate, paired_se
from jaguar.tasks.text_classification import Example, read_rows

_STATE = "training_state.pt"
# What may differ between a run and the run that continues it.
_FREE = (
    "output_dir",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "model",
    "logging_steps",
    "save_steps",
    "use_cpu",
)


# What the released code's step decides.
_FIXED = {"coordinates", "layout", "signs", "update", "beta", "vector_lr", "adjust_lr"}
_FIXED |= {"ns_steps", "ns_coefficients", "ns_dtype", "ns_period"}


class Interrupted(Exception):
    """Ctrl-C; carries what to tell the user."""


@dataclass(frozen=True)
class Run:
    """Everything that decides a fine-tuning run."""

    model: str
    train_file: str
    test_file: str
    output_dir: str
    data: Data = field(default_factory=Data)
    method: str = "jaguar-signsgd"
    optimizer: dict[str, Any] = field(default_factory=dict)
    train: str = "all"
    dtype: str = "auto"
    use_cpu: bool = False
    max_steps: int = 100
    batch_size: int = 16
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    eval_steps: int = 0
    logging_steps: int = 10
    save_steps: int = 0
    seed: int = 0
    resume_from_checkpoint: str | None = None
    overwrite_output_dir: bool = False

    def comparable(self) -> dict[str, Any]:
        """The settings that a continued run must share, as plain values."""
        settings = json.loads(json.dumps(asdict(self), default=str))
        return {key: value for key, value in settings.items() if key not in _FREE}


@dataclass
class History:
    """What happened so far."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    test_points: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    forward_passes: int = 0
    seconds: float = 0.0


class Finetuning:
    """One run: set up (every refusal comes here), then `train`, then `finish`."""

    def __init__(self, run: Run, console: Console) -> None:
        self.run, self.console = run, console
        self.folder = Path(run.output_dir)
        prepare_folder(self.folder)
        if (self.folder / "config.json").exists() and not run.overwrite_output_dir:
            raise ValueError(
                f"the output folder {run.output_dir!r} already holds a model; choose another or pass "
                "--overwrite_output_dir"
            )
        train_rows = read_rows(run.train_file, run.data.text_column, run.data.label_column)
        test_rows = read_rows(run.test_file, run.data.text_column, run.data.label_column)
        source = run.resume_from_checkpoint or run.model
        state = self._load_state(Path(source)) if run.resume_from_checkpoint else None
        with console.status(f"loading {source}"):
            self.loaded = load(source, dtype=run.dtype, use_cpu=run.use_cpu)
        self.task = run.data.task(source, self.loaded, train_rows)
        if self.loaded.is_classifier:
            self.loaded.model.config.id2label = dict(enumerate(self.task.labels))
            self.loaded.model.config.label2id = {label: i for i, label in enumerate(self.task.labels)}
        self.train_set, self.test_set = (
            run.data.examples(self.task, rows, self.loaded, path)
            for rows, path in ((train_rows, run.train_file), (test_rows, run.test_file))
        )
        if len(self.train_set) < run.batch_size:
            raise ValueError(
                f"{run.train_file} has {len(self.train_set)} rows, fewer than one batch of {run.batch_size}"
            )
        self.scorer = make_scorer(self.loaded, self.task, self.train_set[0])
        self.optimizer = self._make_optimizer()
        self.scheduler = self._make_scheduler()
        check_space(self.folder, self.loaded.model)
        self.history = History()
        self.before: Scores | None = None
        if state is not None:
            self._restore(state)

    def _make_optimizer(self) -> ZerothOrder:
        chosen = select_trainable(self.loaded.model, self.run.train)
        kind: type[ZerothOrder] = getattr(jaguar, METHODS[self.run.method])
        known = inspect.signature(kind).parameters
        for key in self.run.optimizer:
            if key not in known:
                options = ", ".join(f"--{name}" for name in known if name not in ("params", "seed"))
                raise ValueError(f"--method {self.run.method} has no option --{key}; it has {options}")
        fixed = _FIXED & set(self.run.optimizer)
        if self.run.optimizer.get("released") and fixed:
            raise ValueError(f"--released fixes sampling, beta and update, so --{min(fixed)} cannot be given with it")
        params: Any = chosen
        if issubclass(kind, JaguarMuon):
            params = jaguar.param_groups(self.loaded.model, self.run.optimizer.get("weight_decay", 0.0))
        return kind(params, **self.run.optimizer, seed=self.run.seed)

    def _make_scheduler(self) -> Any:
        from transformers import get_scheduler

        if self.run.lr_scheduler_type == "constant" and self.run.warmup_steps:
            raise ValueError("--lr_scheduler_type constant has no warm-up; choose constant_with_warmup")
        return get_scheduler(self.run.lr_scheduler_type, self.optimizer, self.run.warmup_steps, self.run.max_steps)

    # -- the run ---------------------------------------------------------------------------------------------------

    def describe(self) -> None:
        """Prints what will happen."""
        run, model = self.run, self.loaded.model
        count = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
        total = sum(p.numel() for p in model.parameters())
        labels = ", ".join(self.task.labels)
        self._say(f"model {run.model}: {total / 1e6:.1f} M parameters, {count:,} trained (--train {run.train})")
        self._say(f"data: {len(self.train_set):,} training and {len(self.test_set):,} held-out rows, labels {labels}")
        self._say(str(self.optimizer))
        if isinstance(self.optimizer, CoordinateMomentum) and run.max_steps * self.optimizer.fraction < 3.0:
            visits = run.max_steps * self.optimizer.fraction
            self._say(
                f"note: {run.max_steps} steps visit a coordinate {visits:.2g} times on average, fewer than 3; momentum "
                "will hardly act",
                "yellow",
            )

    def _say(self, text: str, style: str | None = None) -> None:
        say(self.console, text, style)

    def train(self) -> None:
        """The steps that are left.

        Raises:
            Interrupted: Ctrl-C; the state is saved unless nothing was done yet.
        """
        run, history = self.run, self.history
        done = self.optimizer.steps_done
        try:
            if self.before is None:
                self.before = self.test("zero-shot")
            work = islice(batches(self.train_set, run.batch_size, run.seed, done), run.max_steps - done)
            with StepBar(self.console, run.max_steps, done, run.logging_steps) as bar:
                for batch in work:
                    self._step(batch)
                    done = self.optimizer.steps_done
                    bar.update(done, history.losses, history.accuracies)
                    if run.eval_steps and done % run.eval_steps == 0 and done < run.max_steps:
                        self.test(f"step {done}")
                    if run.save_steps and done % run.save_steps == 0:
                        self.save_checkpoint()
            self.after = self.test("tuned")
        except KeyboardInterrupt:
            raise Interrupted(self._stop()) from None

    def _step(self, batch: list[Example]) -> None:
        hits: list[Tensor] = []
        labels = torch.tensor([example.label for example in batch], device=self.scorer.device)

        def closure() -> Tensor:
            logits = self.scorer(batch)
            hits.append((logits.argmax(1) == labels).float().mean())
            return F.cross_entropy(logits, labels)

        begin, before = time.monotonic(), self.scorer.forward_passes
        loss = self.optimizer.measure(closure).loss
        with HeldInterrupts():  # the step and what is remembered of it belong together
            self.optimizer.step()
            self.scheduler.step()
            self.history.forward_passes += self.scorer.forward_passes - before
            self.history.losses.append(loss)
            self.history.accuracies.append(torch.stack(hits).mean().item())
            self.history.seconds += time.monotonic() - begin

    def test(self, what: str) -> Scores:
        """Scores the held-out rows and remembers the figures."""
        bar, advance = row_bar(self.console, f"scoring held-out rows ({what})", len(self.test_set))
        with bar:
            scores = evaluate(self.scorer, self.test_set, self.run.data.eval_batch_size, advance)
        figures = scores.figures()
        self.history.test_points.append((self.optimizer.steps_done, figures))
        auc = f", AUC {figures['auc']:.4f}" if "auc" in figures else ""
        rows = len(self.test_set)
        self._say(
            f"{what}: accuracy {figures['accuracy']:.2%}{auc}, loss {figures['loss']:.4f} on {rows} held-out rows"
        )
        return scores

    def finish(self) -> dict[str, Any]:
        """Saves model, picture and figures, prints the table, and returns the figures."""
        assert self.before is not None
        run, history = self.run, self.history
        before, after = self.before.figures(), self.after.figures()
        se = paired_se(self.before, self.after)
        metrics: dict[str, Any] = {
            "method": run.method,
            "train": run.train,
            "seed": run.seed,
            "steps": self.optimizer.steps_done,
            "skipped_steps": self.optimizer.n_skipped,
            "test_rows": len(self.test_set),
            "before": before,
            "after": after,
            "accuracy_change": after["accuracy"] - before["accuracy"],
            "paired_se": se,
            "training_seconds": history.seconds,
            "training_forward_passes": history.forward_passes,
            "peak_memory_bytes": peak_memory(self.scorer.device),
            "command": shlex.join(["jaguar", *sys.argv[1:]]),
            "versions": versions(),
        }

        def write(folder: Path) -> None:
            write_model(folder, self.loaded.model, self.loaded.tokenizer)
            save_task(self.task, folder)
            draw_curves(
                folder / "training_curves.png",
                losses=history.losses,
                accuracies=history.accuracies,
                test_points=history.test_points,
                title=f"{run.method} on {Path(run.model).name}, seed {run.seed}: held-out accuracy "
                f"{before['accuracy']:.1%} to {after['accuracy']:.1%}",
            )
            (folder / "metrics.json").write_text(json.dumps(_finite(metrics), indent=2, allow_nan=False) + "\n")

        with HeldInterrupts():
            save_files(self.folder, write)
        points = 100 * metrics["accuracy_change"]
        change = {
            "accuracy": f"{points:+.2f} points, paired SE {100 * se:.2f}",
            "loss": f"{after['loss'] - before['loss']:+.4f}",
        }
        if "auc" in before:
            change["auc"] = f"{after['auc'] - before['auc']:+.4f}"
        columns = {"zero-shot": before, "tuned": after}
        self.console.print(score_table(f"{run.method}, {len(self.test_set)} held-out rows", columns, change))
        memory = metrics["peak_memory_bytes"] / 2**30
        self._say(
            f"{self.optimizer.steps_done} steps in {history.seconds:.0f} s, {history.forward_passes} forward passes of "
            f"{run.batch_size} rows, peak memory {memory:.2f} GiB"
        )
        self._say(f"model, training_curves.png and metrics.json are in {self.folder}")
        return metrics

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> Path:
        """Everything that a continued run needs, in output_dir/checkpoint-STEP; older checkpoints go."""
        assert self.before is not None
        folder = self._checkpoint_folder()
        state = {
            "run": self.run.comparable(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": asdict(self.history),
            "before": self.before.logits,
            "test_rows": len(self.test_set),
        }

        def write(staging: Path) -> None:
            write_model(staging, self.loaded.model, self.loaded.tokenizer)
            save_task(self.task, staging)
            torch.save(state, staging / _STATE)

        with HeldInterrupts():
            save_folder(folder, write)
            for other in self.folder.glob("checkpoint-*"):
                if other != folder and (other / _STATE).is_file():
                    shutil.rmtree(other, ignore_errors=True)
        return folder

    def _checkpoint_folder(self) -> Path:
        return self.folder / f"checkpoint-{self.optimizer.steps_done}"

    def _load_state(self, folder: Path) -> dict[str, Any]:
        path = folder / _STATE
        if not path.is_file():
            raise ValueError(f"{str(folder)!r} is not a checkpoint of jaguar finetune: it has no {_STATE}")
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
        except Exception as error:  # torch.load has no exception of its own for a damaged file
            raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
        if not isinstance(state, dict) or not isinstance(state.get("run"), dict):
            raise ValueError(f"{path} was not written by jaguar finetune")
        for key, value in self.run.comparable().items():
            if state["run"].get(key) != value:
                raise ValueError(
                    f"the checkpoint was made with {key} = {state['run'].get(key)!r}, this run has {value!r}; give the "
                    "same options to continue it"
                )
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        if state["test_rows"] != len(self.test_set):
            raise ValueError(
                f"the checkpoint was made with {state['test_rows']} held-out rows, {self.run.test_file} has "
                f"{len(self.test_set)}"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.history = History(**state["history"])
        self.before = Scores(state["before"], torch.tensor([example.label for example in self.test_set]))

    def _stop(self) -> str:
        if self.before is None or self.optimizer.steps_done == 0:
            return "stopped before the first step; there is nothing to save"
        self.optimizer.discard_()  # a walk may not have come back
        folder = self._checkpoint_folder()
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C is held until the first has been served
            self.save_checkpoint()
        words = [
            word
            for i, word in enumerate(sys.argv[1:], 1)
            if not word.startswith("--resume_from_checkpoint") and sys.argv[i - 1] != "--resume_from_checkpoint"
        ]
        return (
            f"stopped after step {self.optimizer.steps_done} of {self.run.max_steps}; saved in {folder}\n"
            f"go on with: {_program()} {shlex.join(words)} --resume_from_checkpoint {folder}"
        )


def _finite(value: Any) -> Any:
    """`value` with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _program() -> str:
    """How this program is called from a shell here."""
    return "jaguar" if shutil.which("jaguar") else f"{shlex.quote(sys.executable)} -m jaguar"
