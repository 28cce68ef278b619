"""`jaguar finetune`: from a model and a task to figures, a picture and a tuned model or adapter."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from transformers import PrinterCallback

from jaguar.cli.finetune import outcome
from jaguar.cli.finetune.evaluation import make_scorer
from jaguar.cli.finetune.going_on import facts_of_journal, found, go_on
from jaguar.cli.finetune.prepared import made_trainable, name_labels
from jaguar.cli.finetune.progress import Bar, Losses, Stop
from jaguar.cli.finetune.report import row_bar
from jaguar.cli.finetune.run import STATE, Run, compare, digest, model_settings, optimizer_settings
from jaguar.cli.output import say
from jaguar.method.directions import Sparse
from jaguar.models.load import configuration, is_adapter, load
from jaguar.optimizers.base import ZerothOrder
from jaguar.optimizers.interrupts import HeldInterrupts, interrupt, number_of
from jaguar.record import JOURNAL
from jaguar.scoring import Scores, evaluate
from jaguar.tasks.rows import Row
from jaguar.tasks.saved import save_task
from jaguar.trainer.arguments import ZOTrainingArguments
from jaguar.trainer.checkpoints import check_weights
from jaguar.trainer.journaling import steps_of
from jaguar.trainer.optimizer import unwrap
from jaguar.trainer.saving import check_space, only_run, prepare_folder, remove_leftovers, save_files, write_model
from jaguar.trainer.staging import of as checkpoints_of
from jaguar.trainer.staging import recover_all, step_of
from jaguar.trainer.trainer import ScoringTrainer
from jaguar.trainer.weights import lost, some

_FIGURES = "metrics.json"  # the last file that a run writes


class Interrupted(Exception):
    """A run that a signal has ended; carries what to tell the user.

    Attributes:
        number: the signal's.
    """

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number


class Finetuning:
    """One run: set up (every refusal comes here), then `train`, then `finish`.

    Args:
        alone: holds the output folder for this run, as long as it is open.
    """

    def __init__(self, run: Run, console: Console, alone: ExitStack) -> None:
        self.run, self.console, self.alone = run, console, alone
        self.folder = Path(run.output_dir)
        args = self.args = run.trainer_arguments()
        # One of several processes prints, scores and writes.
        self.leads = args.process_index == 0
        refusal = [""]
        if self.leads:
            try:
                self._take_folder()
            except ValueError as error:
                refusal = [str(error)]
        else:
            console.quiet = True
        if args.world_size > 1:
            dist.broadcast_object_list(refusal)
        if refusal[0]:
            raise ValueError(refusal[0] if self.leads else "")
        self.goes_on: str | bool | None = None
        if run.resume_from_checkpoint:
            run, self.goes_on = found(run, self.folder, args.world_size, bool(args.journal))
            self.run = run
        state = run.state(args) if isinstance(self.goes_on, str) else None
        self.settings = run.settings_of(args)
        if run.adapter.kind == "prefix" and not is_adapter(run.model):
            run.adapter.check(configuration(run.model, run.trust_remote_code))
        with console.status("reading rows"):
            rows = run.data.splits(run.model)
        with console.status(f"loading {run.model}"):
            self.loaded = load(
                run.model,
                dtype=run.dtype,
                use_cpu=args.use_cpu,
                in_4bit=run.in_4bit,
                trust_remote_code=run.trust_remote_code,
            )
        self.task = run.data.make_task(run.model, self.loaded, rows.train)
        self._set_trainable(rows.train[0])
        if self.loaded.kind == "classifier":
            name_labels(self.loaded.model, self.task)
        self.train_set, self.dev_set, self.test_set = (
            run.data.examples(self.task, part, self.loaded) for part in (rows.train, rows.dev, rows.test)
        )
        if len(self.train_set) < args.per_device_train_batch_size:
            raise ValueError(
                f"there are {len(self.train_set)} training rows, fewer than one batch of "
                f"{args.per_device_train_batch_size}"
            )
        self.scorer = make_scorer(self.loaded, self.task, self.train_set)
        self.losses = Losses()
        self.before: Scores | None = None
        self.seconds = 0.0  # spent in training before this process went on with it
        self.trainer = self._make_trainer(args)
        if self.leads:
            check_space(self.folder, self.model)
        self.facts = self._decisive()
        self.trainer.base = self.base | {"max_length": self.cut, "settings": self.settings, "facts": self.facts}
        if state is not None:
            self._restore(state)
        elif self.goes_on:
            started = facts_of_journal(self.folder)
            run.check_settings(started["settings"], args)
            self._check_facts(started["facts"], started["settings"])

    def _take_folder(self) -> None:
        """Makes the output folder this run's, and puts right what a killed one has left there."""
        run, folder = self.run, self.folder
        prepare_folder(folder)
        self.alone.enter_context(only_run(folder))
        for text in [*remove_leftovers(folder), *recover_all(folder)]:
            self._say(text, "yellow")
        given = Path(run.resume_from_checkpoint or "/").resolve()
        own = run.resume_from_checkpoint is not None and folder.resolve() in (given, given.parent)
        if own and not (folder / _FIGURES).exists():
            return  # what it holds is of this run, which was killed while it ended
        if run.overwrite_output_dir:
            return
        if any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            raise ValueError(
                f"the output folder {run.output_dir!r} already holds a model; choose another or pass "
                "--overwrite_output_dir"
            )
        if not own and (checkpoints_of(folder) or steps_of(folder)):
            raise ValueError(
                f"the output folder {run.output_dir!r} holds a run that has not come to its end: go on with "
                f"--resume_from_checkpoint {run.output_dir}, choose another folder, or pass --overwrite_output_dir"
            )

    @property
    def cut(self) -> int | None:
        """Tokens at which long texts are cut, if they are."""
        return self.run.data.max_length or self.loaded.cut

    @property
    def model(self) -> Any:
        """The model, with its adapter."""
        return self.scorer.model

    def _set_trainable(self, row: Row) -> None:
        run, model = self.run, self.loaded.model
        has_adapter = hasattr(model, "peft_config")
        if run.adapter.kind == "none" and not has_adapter:
            if run.in_4bit:
                raise ValueError("--load_in_4bit freezes the weights: train an adapter beside them, with --lora")
        elif run.train != "all":
            raise ValueError(f"--train {run.train} is of the model's own parameters; leave it out with an adapter")
        if has_adapter and run.adapter.kind != "none":
            raise ValueError(f"{run.model!r} is an adapter already: it is trained on; leave --lora and the like out")
        # Virtual tokens begin with those of a real prompt.
        with_prompt = run.adapter.kind in ("prefix", "prompt")
        asked = self.task.question(row, self.loaded.kind == "masked").prompt if with_prompt else ""
        prompt = self.loaded.tokenizer(asked).input_ids if with_prompt else []
        self.loaded = made_trainable(self.loaded, run.adapter, run.train, int(self.args.seed), prompt)
        self.base = {
            "model": str(Path(run.model).resolve()) if Path(run.model).is_dir() else run.model,
            "dtype": run.dtype,
            "in_4bit": run.in_4bit,
            "adapter": asdict(run.adapter),
            "train": run.train,
            "seed": int(self.args.seed),
            "prompt": list(prompt),
            "task": self.task.description(),
        }

    def _make_trainer(self, args: ZOTrainingArguments) -> ScoringTrainer:
        eval_set = self.dev_set or self.test_set
        trainer = ScoringTrainer(
            self.model,
            args,
            scorer=self.scorer,
            train_dataset=self.train_set,
            eval_dataset=eval_set,
            processing_class=self.loaded.tokenizer,
        )
        trainer.pop_callback(PrinterCallback)
        self.stop, self.bar = Stop(), Bar(self.console, self.losses)
        for callback in (self.losses, self.bar, self.stop):
            trainer.add_callback(callback)
        trainer.on_checkpoint = self._keep
        trainer.came_to_its_end = lambda: not self.stop.asked or trainer.state.global_step >= trainer.state.max_steps
        trainer.create_optimizer()
        return trainer

    # -- the run ---------------------------------------------------------------------------------------------------

    def describe(self) -> None:
        """Prints what will happen."""
        run, optimizer = self.run, self.trainer.create_optimizer()
        count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        total = sum(p.numel() for p in self.model.parameters())
        what = f"--train {run.train}" if run.adapter.kind == "none" else run.adapter.kind
        self._say(f"model {run.model}: {total / 1e6:.1f} M parameters, {count:,} trained ({what})")
        dev = f", {len(self.dev_set):,} dev" if self.dev_set else ""
        labels = f", labels {', '.join(self.task.classes)}" if self.task.classes else ""
        self._say(
            f"task {self.task.name}: {len(self.train_set):,} training{dev} and {len(self.test_set):,} held-out rows"
            f"{labels}"
        )
        if run.settings:
            self._say(run.settings)
        self._say(str(optimizer))
        steps = self.trainer.args.max_steps
        sparse = isinstance(optimizer, ZerothOrder) and isinstance(optimizer.method.direction, Sparse)
        if sparse and 0 < steps * optimizer.fraction < 3.0:
            self._say(
                f"note: {steps} steps visit a coordinate {steps * optimizer.fraction:.2g} times on average, fewer than "
                "3; momentum will hardly act",
                "yellow",
            )

    def _say(self, text: str, style: str | None = None) -> None:
        say(self.console, text, style)

    def train(self) -> None:
        """The steps that are left.

        Raises:
            Interrupted: Ctrl-C or another ending signal; what is saved where is said.
        """
        trainer = self.trainer
        try:
            if self.before is None and self.leads:
                self.before = self.test("zero-shot")
        except KeyboardInterrupt as stop:
            raise Interrupted("stopped before the first step; there is nothing to save", number_of(stop)) from None
        try:
            self.began = time.monotonic()
            with self.stop:
                self.result = trainer.train(resume_from_checkpoint=self.goes_on)
        except OSError as error:  # a checkpoint could not be written
            raise OSError(f"{error}; {self._last_saved()}") from error
        except KeyboardInterrupt as stop:
            text = f"stopped at once after step {trainer.state.global_step}; {self._last_saved()}"
            raise Interrupted(text, number_of(stop)) from None
        finally:
            self.bar.close()
        if self.stop.asked and trainer.state.global_step < trainer.state.max_steps:
            step, folder = trainer.state.global_step, self._checkpoint()
            text = f"stopped after step {step} of {trainer.state.max_steps}; saved in {folder}\n{go_on(folder)}"
            raise Interrupted(text, self.stop.asked)
        if self.stop.asked and not self.leads:
            raise Interrupted("stopped after the last step", self.stop.asked)

    def _checkpoint(self) -> Path:
        return self.folder / f"checkpoint-{self.trainer.state.global_step}"

    def _last_saved(self) -> str:
        step = self.trainer.state.global_step  # those of later ones are of a run before this one
        found = [path for path in checkpoints_of(self.folder) if (path / STATE).is_file() and step_of(path) <= step]
        if not found:
            steps = steps_of(self.folder) if self.args.journal else 0
            return f"{self.folder / JOURNAL} has {steps} steps\n{go_on(self.folder)}" if steps else "nothing was saved"
        last = found[-1]
        return f"the last checkpoint is {last}\n{go_on(last)}"

    def _end_with(self) -> str:
        """Advice for a run whose last step is done and whose end is missing."""
        if (self._checkpoint() / STATE).is_file():
            return f"\n{go_on(self._checkpoint())}"
        if self.args.journal:
            return f"\n{go_on(self.folder)}"
        return f"; score it with jaguar eval (--model {self.folder}, and the held-out rows)"

    def test(self, what: str) -> Scores:
        """Scores the held-out rows."""
        bar, advance = row_bar(self.console, f"scoring held-out rows ({what})", len(self.test_set))
        with bar:
            scores = evaluate(self.scorer, self.test_set, self.trainer.args.per_device_eval_batch_size, advance)
        figures = scores.figures()
        auc = f", AUC {figures['auc']:.4f}" if "auc" in figures else ""
        rows = len(self.test_set)
        self._say(
            f"{what}: accuracy {figures['accuracy']:.2%}{auc}, loss {figures['loss']:.4f} on {rows} held-out rows"
        )
        return scores

    def finish(self) -> dict[str, Any]:
        """Saves the model, scores it, draws the picture, prints the table, and returns the figures.

        Raises:
            Interrupted: an ending signal while scoring; the model is saved by then.
            OSError: what was saved is not what is read.
        """

        def write(folder: Path) -> None:
            write_model(folder, self.model, self.loaded.tokenizer)
            save_task(self.task, folder, self.cut)

        try:
            with HeldInterrupts():
                save_files(self.folder, write)
            if self.stop.asked:  # in the last step
                interrupt(self.stop.asked)
            after = self.test("tuned")
        except KeyboardInterrupt as stop:
            text = f"stopped before it was scored; the tuned model is in {self.folder}{self._end_with()}"
            raise Interrupted(text, number_of(stop)) from None
        assert self.before is not None
        metrics = outcome.metrics(self, self.before, after)

        def write_figures(folder: Path) -> None:
            outcome.draw(self, folder / "training_curves.png", metrics)
            text = json.dumps(outcome.finite(metrics), indent=2, allow_nan=False)
            (folder / _FIGURES).write_text(text + "\n", encoding="utf-8")

        with HeldInterrupts():
            save_files(self.folder, write_figures)
        try:  # last of all, because it takes the memory of a second model
            bad = lost(self.model, self.folder)
        except KeyboardInterrupt as stop:
            text = f"stopped before {self.folder} was read back to see that it holds the model"
            raise Interrupted(text, number_of(stop)) from None
        if bad:
            raise OSError(f"the model in {self.folder} is not the tuned one: {some(bad)} does not come back from there")
        outcome.show(self, metrics)
        return metrics

    # -- what goes with a checkpoint -------------------------------------------------------------------------------

    def _keep(self, folder: Path) -> None:
        assert self.before is not None
        before = {"logits": self.before.logits, "labels": self.before.labels, "losses": self.before.losses}
        so_far = {"losses": self.losses.values, "passes": self.trainer.forward_passes, "before": before}
        so_far["seconds"] = self.seconds + time.monotonic() - self.began
        torch.save({"settings": self.settings, "facts": self.facts, **so_far}, folder / STATE)
        save_task(self.task, folder, self.cut)

    def _decisive(self) -> dict[str, Any]:
        """Facts that decide the run beside its settings: rows, optimizer, configuration of the model."""
        sets = {"training": self.train_set, "dev": self.dev_set, "held-out": self.test_set}
        return {
            "rows": {name: digest(examples) for name, examples in sets.items()},
            "optimizer": optimizer_settings(unwrap(self.trainer.create_optimizer())),
            "model": model_settings(self.model.config),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self._check_facts(state["facts"], state["settings"])
        check_weights(self.model, Path(str(self.run.resume_from_checkpoint)))
        self.before = Scores(**state["before"])
        self.losses.values, self.trainer.forward_passes = list(state["losses"]), state["passes"]
        self.seconds = state["seconds"]

    def _check_facts(self, saved: dict[str, Any], settings: dict[str, Any]) -> None:
        own = self.facts
        for name, rows in own["rows"].items():
            if saved["rows"][name] != rows:
                raise ValueError(
                    f"the {name} rows are not those that the run was started with: "
                    f"{self.run.explained(settings['data'])}"
                )
        compare(saved["optimizer"], own["optimizer"])
        compare(saved["model"], own["model"])
