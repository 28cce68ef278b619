"""`JournaledTrainer`: a Trainer whose steps are in a journal, so that a run that was stopped at any instant goes on.

A run that goes on begins at its last checkpoint. Its loop runs as ever (rows, schedules, callbacks, evaluations), but
steps that the journal has are not measured: their records are applied again, without a forward pass.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from jaguar.optimizers.base import ZerothOrder
from jaguar.optimizers.identity import fingerprint_of_rest
from jaguar.optimizers.replay import check_frozen, check_same, check_weights, mark_of, ran_elsewhere
from jaguar.record import JOURNAL, DamagedJournal, Journal, Record
from jaguar.record.files import lock
from jaguar.trainer.arguments import ZOTrainingArguments
from jaguar.trainer.exact_trainer import ExactTrainer
from jaguar.trainer.saving import reason, unsaved
from jaguar.trainer.staging import of as checkpoints_of


class JournalUnfit(ValueError):
    """A run cannot go on with the journal in its folder; the message says why, and what can be done."""


_LOG = logging.getLogger(__name__)
# The journal that was in the folder when another run began there.
BEFORE = "journal-before.jaguar"


class JournaledTrainer(ExactTrainer):
    """An `ExactTrainer` that appends the record of every zeroth-order step to `output_dir/journal.jaguar`.

    Attributes:
        journal: the journal, while the run trains; None in other processes than the first, and without one.
        base: facts of the base model for the header, beside its name and fingerprints.
        came_to_its_end: tells when a run has returned whether it is over; None: it is.
    """

    args: ZOTrainingArguments
    journal: Journal | None = None
    base: dict[str, Any] | None = None
    came_to_its_end: Callable[[], bool] | None = None
    _in_loop = _opened = False
    _hook: RemovableHandle | None = None
    _wrote: Path | None = None  # the journal of an earlier attempt, or call of `train`
    _other_rates = False  # that records have other learning rates than the schedule was said
    _attempts = 0  # of this call of `train`
    _goes_on = False
    # Records of steps that a run before this one has finished, and the step after them.
    _records: Iterator[Record] = iter(())
    _until = 0

    @property
    def zeroth_order(self) -> ZerothOrder:
        """The optimizer."""
        raise NotImplementedError

    def _check_replicas(self, window: Sequence[Any]) -> None:
        """Compares the processes of a run, before a step and, with no window, before the journal notes the end."""

    @property
    def _journals(self) -> bool:
        """True if the run's steps are kept in a journal."""
        return bool(self.args.journal) and self._zeroth_order

    @property
    def _zeroth_order(self) -> bool:
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **others: Any) -> Any:
        """Trainer's; a run that goes on takes the steps of its journal as they were taken.

        With `resume_from_checkpoint=True` and no checkpoint it begins with the model as it is, and the journal's steps.
        """
        self._goes_on, self._attempts, self._other_rates = bool(resume_from_checkpoint), 0, False
        return super().train(resume_from_checkpoint, *args, **others)

    def _newest(self, parent: Path) -> Path | None:
        try:
            return super()._newest(parent)
        except ValueError as error:
            if not self._journals or steps_of(parent) is None:
                raise
            if checkpoints_of(parent):
                warnings.warn(f"going on with the steps of {JOURNAL} alone: {error}", stacklevel=3)
            return None

    def _inner_training_loop(self, *args: Any, **others: Any) -> Any:
        self._attempts, self._in_loop = self._attempts + 1, True
        try:
            output = super()._inner_training_loop(*args, **others)  # type: ignore[no-untyped-call]
            self._check_replicas(())
            if self._journals:
                self._end_journal()
        except BaseException:
            with suppress(OSError):  # a second error of a full disk would hide what is saved
                self._close_journal()
            raise
        self._close_journal()
        return output

    def _close_journal(self) -> None:
        journal, self.journal, self._until = self.journal, None, 0
        self._in_loop = self._opened = False
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if journal is not None:
            with _explained(journal):
                journal.close()

    # -- a step ----------------------------------------------------------------------------------------------------

    def _recorded(self) -> bool:
        """Tells whether the journal has the coming step.

        A step outside of `train` is in none: nobody would close it, and it is not the run's.
        """
        if self._journals and self._in_loop and not self._opened:
            self._open_journal()
        return self.zeroth_order.steps_done < self._until

    def _take(self) -> Record:
        """The journal's record of the coming step, which the optimizer's next step applies."""
        record, optimizer = next(self._records), self.zeroth_order
        rates = tuple(float(group["lr"]) for group in optimizer.param_groups)
        auto = optimizer.method.step_size is not None and optimizer.method.step_size.lr
        if rates != record.lrs and not auto and not self._other_rates:
            self._other_rates = True
            warnings.warn(
                f"step {record.step + 1} is taken with the learning rate that it had, {record.lrs[0]:g}; this run's "
                f"schedule has {rates[0]:g} there, and decides from step {self._until + 1} on",
                stacklevel=2,
            )
        optimizer.take(record)
        return record

    def _keep(self, optimizer: ZerothOrder, record: Record) -> None:
        """Appends a record that was applied; of one that stood there, compares the weights if they are noted."""
        journal = self.journal
        if journal is None:
            return
        if record.step < self._until:
            try:
                check_weights(optimizer, journal)
            except ValueError as error:
                raise JournalUnfit(f"{error}; remove that file to measure its steps again") from None
            return
        with _explained(journal):
            journal.append(record)

    # -- the file --------------------------------------------------------------------------------------------------

    def _open_journal(self) -> None:
        """Opens the journal of the run, or begins one at the step where it is; all processes get its records."""
        optimizer, leads = self.zeroth_order, self.args.process_index == 0
        shared = self.args.world_size > 1
        told: list[Any] = [None, 0, []]  # an error, the step after the last record, the records
        if leads:
            try:
                found = self._found()
                journal = self.journal = self._begun() if found is None else found  # one without records is false
                told[1] = 0 if journal is None else journal.next_step
                if shared and journal is not None:
                    told[2] = [record.pack() for record in journal.since(optimizer.steps_done)]
            except Exception as error:  # the other processes wait to hear of it
                told[0] = JournalUnfit(str(error)) if type(error) is ValueError else error
        if shared:
            sent = [told]
            dist.broadcast_object_list(sent)
            told = sent[0]
        if told[0] is not None:
            raise told[0]
        self._until, self._opened = told[1], True
        if shared:
            self._records = map(Record.unpack, told[2])
        elif self.journal is not None:
            self._records = self.journal.since(optimizer.steps_done)
        if self.journal is not None:
            self._wrote = self.journal.path
            self._hook = optimizer.register_record_hook(self._keep)

    def _found(self) -> Journal | None:
        """The journal that the run goes on with; None: there is none that fits, which is said."""
        path = self._journal_path
        if not path.exists():
            return None
        if not self._goes_on or self._attempts > 1 or self.args.ignore_data_skip:
            # Whoever asked for it, or has called `train` of this trainer again, knows of that run.
            known = self._goes_on or self._wrote == path
            _put_aside(path, "" if known else _unfinished(path))
            return None
        try:
            journal = Journal.resume(path, sync_every=self.args.journal_sync_steps)
        except DamagedJournal as error:
            if self._resumed is None:
                raise JournalUnfit(str(error)) from None
            _put_aside(path, str(error))
            return None
        try:
            why = self._unfit(journal)
        except BaseException:
            journal.close()
            raise
        if why:
            journal.close()
            if self._resumed is None:
                raise JournalUnfit(f"cannot go on with {str(path)!r}: {why}")
            _put_aside(path, why)
            return None
        if journal.dropped:
            warnings.warn(f"{path}: the last {journal.dropped} bytes were no whole step", stacklevel=2)
        if (there := journal.next_step) > (done := self.zeroth_order.steps_done):
            _LOG.warning(
                f"steps {done + 1} to {there} are taken as {path} has them, without forward passes"
                f"{ran_elsewhere(self.zeroth_order, journal)}; to measure them again, remove that file"
            )
        return journal

    def _unfit(self, journal: Journal) -> str:
        """The reason why a run cannot go on with a journal; empty: it can."""
        optimizer = self.zeroth_order
        done = optimizer.steps_done
        if not journal.first <= done <= journal.next_step:
            return f"it leads from {journal.first} finished steps to {journal.next_step}, and the run is at {done}"
        if self._resumed is None and done != journal.first:
            return f"this trainer has taken {done} steps already: make a new one, with the model as it was at first"
        if self._resumed is not None and journal.noted(done) is None:
            return f"it notes no weights of step {done}, as one does that was there when the checkpoint was saved"
        saved = journal.header.get("run", {})
        other = [
            f"{key.replace('_', ' ')} {saved.get(key)} then, {value} now"
            for key, value in self._facts.items()
            if saved.get(key) != value
        ]
        if other:
            return f"its steps are of other rows: {'; '.join(other)}"
        try:
            check_same(optimizer, journal)
            check_frozen(optimizer, self._bare_model, journal)
            check_weights(optimizer, journal)
        except ValueError as error:
            return str(error)
        return ""

    def _begun(self) -> Journal | None:
        path = self._journal_path
        try:
            header = self.zeroth_order.header(run=self._facts, base=self._base)
        except TypeError as error:
            warnings.warn(f"there is no journal: the optimizer has a part of your own, and {error}", stacklevel=3)
            return None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return Journal.create(path, header, sync_every=self.args.journal_sync_steps)
        except OSError as error:
            raise unsaved(path, reason(error, path.parent), "no step was taken") from error

    @property
    def _journal_path(self) -> Path:
        return Path(self._get_output_dir(self._trial)) / JOURNAL

    @property
    def _facts(self) -> dict[str, Any]:
        """Settings that decide which rows a step has; the batch is the one that fits in memory, where it is sought."""
        facts = self._run_facts
        return facts | ({"batch": self._train_batch_size} if facts["rows_per_step"] is None else {})

    @property
    def _base(self) -> dict[str, Any]:
        """Facts of the base model."""
        model: nn.Module = self._bare_model
        name = getattr(getattr(model, "config", None), "_name_or_path", "")
        own = {"model": str(name), "frozen": fingerprint_of_rest(model, self.zeroth_order)}
        return own | (self.base or {})

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.journal is not None:
            self._mark()
        super()._save_checkpoint(model, trial)

    def _end_journal(self) -> None:
        """Notes the step whose model the run ends with."""
        if not self._opened:  # there was no step to take
            self._open_journal()
        # Where a run was stopped its last checkpoint has noted the weights, in whose place the best ones may be now.
        if self.journal is not None and (self.came_to_its_end is None or self.came_to_its_end()):
            self._mark(chosen=True)

    def _mark(self, chosen: bool = False) -> None:
        """Notes the fingerprint of the weights as they are."""
        journal, optimizer, state = self.journal, self.zeroth_order, self.state
        assert journal is not None
        loaded = chosen and self.args.load_best_model_at_end and state.best_global_step is not None
        back = state.global_step - state.best_global_step if loaded and state.best_global_step is not None else 0
        mark = mark_of(optimizer, chosen, back)
        known = mark is not None and journal.noted(mark.step) == mark.fingerprint and not chosen
        if mark is not None and journal.first <= mark.step and not known:
            with _explained(journal):
                journal.mark(mark)


@contextmanager
def _explained(journal: Journal) -> Iterator[None]:
    """Says of a write that fails what was not saved, and what is."""
    try:
        yield
    except OSError as error:
        still = f"the first {journal.next_step} steps are there, and a run goes on after them"
        raise unsaved(journal.path, reason(error, journal.path.parent), still) from error


def steps_of(folder: Path) -> int | None:
    """Number of steps in the journal of a folder, which may have none yet; None: there is none to go on from.

    Raises:
        DamagedJournal: it is damaged; the message says how far it is whole.
    """
    if not (folder / JOURNAL).is_file():
        return None
    with Journal.read(folder / JOURNAL) as journal:
        return len(journal) if len(journal) or not journal.first else None  # else it goes on after a checkpoint


def _unfinished(path: Path) -> str:
    """Says so if a run that has not come to its end wrote a journal."""
    try:
        with Journal.read(path) as journal:
            over = journal.ended or not len(journal)
            return "" if over else f"a new run begins, and that one had come to step {journal.next_step}"
    except (OSError, DamagedJournal):
        return ""


def _put_aside(path: Path, why: str = "") -> None:
    """Gives the journal of a run before this one another name; one that has it already is lost."""
    aside = path.with_name(BEFORE)
    with open(path, "rb", buffering=0) as file:
        lock(file, path)
        os.replace(path, aside)
    if why:
        warnings.warn(f"the steps of {path}, which is {aside.name} now, are not taken again: {why}", stacklevel=2)
