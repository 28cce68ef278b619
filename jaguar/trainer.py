"""`ZOTrainer`: transformers' Trainer with forward passes only.

Trainer's loop runs as it is. Its `training_step` measures the step into a record, its `optimizer.step()` applies the
record; so schedules, callbacks, evaluation, checkpoints, resuming and logging are Trainer's own.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import EvalPrediction, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from jaguar.adapters import adds_tokens, load_prompt
from jaguar.optimizers import JaguarMuon, param_groups
from jaguar.optimizers.base import ZerothOrder
from jaguar.record import Record
from jaguar.saving import replacing
from jaguar.scoring import Scorer
from jaguar.scoring.evaluation import by_length, filled, widest
from jaguar.scoring.figures import Scores, row_losses
from jaguar.training_args import ZOTrainingArguments


class ZOTrainer(Trainer):
    """Trains with two (or `n_directions + 1`, ...) forward passes a step and no backward pass; otherwise a Trainer.

        rho = (f(x + tau e) - f(x - tau e)) / (2 tau),   f: the loss over all micro-batches of the step

    The model is in evaluation mode (no dropout) while it is measured. Non-finite losses skip their step. On several
    processes the losses are averaged, and every process takes the same step; the model is not wrapped in DDP.
    `args.optim_zo="fo-sgd"` trains with backward passes instead, as Trainer does.

    Args:
        model: any module that Trainer takes; parameters with `requires_grad` train, so PEFT models work.
        args: `ZOTrainingArguments`.
        scorer: a `jaguar.Scorer` for data sets of `jaguar.tasks` examples; None: the loss is the model's own.
        optimizers: a zeroth-order optimizer and a scheduler of your own, in place of what `args` say.
        *more, **others: as of `transformers.Trainer`.

    Raises:
        TypeError: `args` or the optimizer are of another kind.
        ValueError: the launcher's settings ask for gradients (DeepSpeed, FSDP, fp16 mixed precision).

    Example, for a data set of `jaguar.tasks`:

        task, encode = jaguar.tasks.SST2(), jaguar.tasks.Encoder(tokenizer, "causal", limit=2048)
        rows = jaguar.tasks.rows.read_rows("train.csv", task.columns)
        examples = encode([task.question(row, masked=False) for row in rows])
        scorer = jaguar.Scorer(model, tokenizer.pad_token_id, "causal", task.objective)
        jaguar.ZOTrainer(model, args, scorer=scorer, train_dataset=examples).train()

    Source: step protocol of this package; MeZO (arXiv 2305.17333) for evaluation mode and accumulation-free steps.
    Equivalent to: `Trainer` with `loss = optimizer.step(lambda: compute_loss(model, batch))`.
    """

    args: ZOTrainingArguments

    def __init__(
        self,
        model: Any = None,
        args: ZOTrainingArguments | None = None,
        *more: Any,
        scorer: Scorer | None = None,
        **others: Any,
    ) -> None:
        others = dict(zip(list(inspect.signature(Trainer.__init__).parameters)[3:], more, strict=False)) | others
        args = ZOTrainingArguments("tmp_trainer") if args is None else args
        if not isinstance(args, ZOTrainingArguments):
            raise TypeError(
                f"args is a {type(args).__name__}; ZOTrainer takes jaguar.ZOTrainingArguments, which has the same "
                "fields"
            )
        self.scorer = scorer
        # Writes more files into the folder of every checkpoint.
        self.beside: Callable[[Path], None] | None = None
        self._window: list[Any] = []
        self._logged: list[Record] = []
        self._passes = 2  # forward passes of a step
        self.forward_passes = 0  # of all steps, evaluations aside
        self._widths: dict[int, int] = {}
        if scorer is not None:
            if args.torch_compile:
                raise ValueError("torch_compile=True does not see the scorer's hook on the output head; leave one out")
            if args.label_smoothing_factor or others.get("compute_loss_func"):
                raise ValueError("the scorer has its own loss: leave label_smoothing_factor and compute_loss_func out")
            settings: Any = args.accelerator_config
            if settings.dispatch_batches:
                raise ValueError(
                    "dispatch_batches=True cuts collated batches by rows, which the scorer's are not made of; leave it "
                    "out, every process then reads its own rows"
                )
            settings.dispatch_batches = False  # accelerate's choice for streams would be True
            others = {"data_collator": scorer.collate, "compute_metrics": accuracy} | others
            args.remove_unused_columns = False
        given = (others.get("optimizers") or (None, None))[0], (others.get("optimizer_cls_and_kwargs") or (None,))[0]
        self._zeroth_order = not args.first_order or any(given)
        for optimizer in given:
            kind = optimizer if isinstance(optimizer, type) else type(optimizer)
            if optimizer is not None and not issubclass(kind, ZerothOrder):
                raise TypeError(
                    f"a {kind.__name__} needs gradients; ZOTrainer takes optimizers of jaguar, or optim_zo='fo-sgd'"
                )
        if self._zeroth_order:
            self._settle(args)
        super().__init__(model, args, **others)
        if scorer is not None or not self._loss_shifts_labels:
            # Losses that do not heed num_items_in_batch (many heads take it as **kwargs) would be summed over
            # micro-batches.
            self.model_accepts_loss_kwargs = False

    @staticmethod
    def _settle(args: ZOTrainingArguments) -> None:
        if args.n_gpu > 1:
            args._n_gpu = 1  # DataParallel would copy the perturbed weights to every GPU in every evaluation
            warnings.warn("one process uses one GPU; for several, start one process each with torchrun", stacklevel=4)

    # -- setting up ------------------------------------------------------------------------------------------------

    @property
    def zeroth_order(self) -> ZerothOrder:
        """The optimizer, out of accelerate's wrapper.

        Raises:
            TypeError: there is none yet, or it is the first-order baseline.
        """
        inner = bare(self.optimizer)
        if not isinstance(inner, ZerothOrder):
            raise TypeError(f"the optimizer is a {type(inner).__name__}; create_optimizer() comes first")
        return inner

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer that `args.optim_zo` names; JAGUAR Muon gets its groups from `jaguar.param_groups`."""
        if self.optimizer is None:
            model = self.model if model is None else model
            chosen = self.args.optimizer_class, self.args.optimizer_options()
            kind, options = self.optimizer_cls_and_kwargs or chosen
            is_muon = issubclass(kind, JaguarMuon)
            groups = param_groups(model, self.args.weight_decay) if is_muon else self._decay_groups(model)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def _decay_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Trainer's two groups, with and without weight decay, by name; one group where there is no decay."""
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("no parameter of the model has requires_grad=True: there is nothing to train")
        decay = self.args.weight_decay
        if not decay:
            return [{"params": named, "weight_decay": 0.0}]
        decaying = set(self.get_decay_parameter_names(model))
        parts = [(n, p) for n, p in named if n in decaying], [(n, p) for n, p in named if n not in decaying]
        return [{"params": part, "weight_decay": wd} for part, wd in zip(parts, (decay, 0.0), strict=True) if part]

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's accelerator, without what only gradients need."""
        super().create_accelerator_and_postprocess()
        if not self._zeroth_order:
            return
        for name in ("deepspeed", "fsdp"):
            if getattr(self, f"is_{name}_enabled"):
                raise ValueError(f"the launcher's configuration enables {name}, which forward-only training cannot use")
        if self.accelerator.scaler is not None:
            raise ValueError(
                "the launcher's configuration has fp16 mixed precision, whose scaler needs gradients; use bf16"
            )
        prepare = self.accelerator.prepare_model
        # Autocast and compilation stay; DDP, whose buckets are for gradients, does not come.
        self.accelerator.prepare_model = lambda model, device_placement=None, evaluation_mode=False: prepare(
            model, device_placement, evaluation_mode=True
        )

    def _prepare_for_training(self, *args: Any, **others: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **others)  # type: ignore[no-untyped-call]
        if self._zeroth_order and self.args.world_size > 1:  # what DDP would have done
            for group in self.zeroth_order.param_groups:
                for parameter in group["params"]:
                    dist.broadcast(parameter.detach(), 0)
        return prepared

    # -- data ------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """Trainer's; with a scorer the batches hold what the loss needs and no more."""
        if self.scorer is None:
            return super().get_train_dataloader()
        usual: Any = self.data_collator
        if usual == self.scorer.collate:
            answers_only = self.scorer.objective == "answer"
            self.data_collator = functools.partial(usual, answers_only=answers_only)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = usual

    def _get_dataloader(self, dataset: Any, *args: Any, **others: Any) -> Any:
        if self.scorer is not None and not isinstance(dataset, IterableDataset):
            self.scorer.trust([dataset[i] for i in range(len(dataset))])  # workers cannot
        return super()._get_dataloader(dataset, *args, **others)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.scorer is None or self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [dataset[i].length for i in range(len(dataset))]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        generator = torch.Generator().manual_seed(seed)
        return LengthGroupedSampler(self.args.train_batch_size, lengths=lengths, generator=generator)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if self.scorer is None:
            return super()._get_eval_sampler(eval_dataset)
        return by_length(eval_dataset)  # rows of similar length share a batch

    # -- a step ----------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **others: Any) -> Any:
        """Trainer's."""
        self._window, self._logged = [], []
        return super().train(*args, **others)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Measures the step when its last micro-batch has come; Trainer's `optimizer.step()` then applies the record.

        Returns:
            Mean of the measured losses, or 0 for the micro-batches before the last.
        """
        if not self._zeroth_order:
            self.forward_passes += 1
            return super().training_step(model, inputs, num_items_in_batch)
        self._window.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        window, self._window = self._window, []
        model.eval()  # unequal dropout masks would drown the difference of the losses
        record = self.zeroth_order.measure(lambda: self._loss_of(window, model, num_items_in_batch))
        self._logged.append(record)
        self._passes = len(record.losses)
        self.forward_passes += len(window) * self._passes
        return torch.tensor(record.loss, device=self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The scorer's loss of a batch, or Trainer's."""
        if self.scorer is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        total, weight = self.scorer.loss(inputs, model)
        return (total / weight, None) if return_outputs else total / weight

    def _loss_of(self, window: Sequence[Any], model: nn.Module, num_items_in_batch: Any) -> Tensor:
        """The loss over the micro-batches of a step, and over all processes, as of one large batch."""
        total = weight = torch.zeros((), dtype=torch.float64, device=self.args.device)
        scaled = self._is_scaled(num_items_in_batch)
        for batch in window:
            if self.scorer is not None:
                loss, part = self.scorer.loss(batch, model)
            else:
                loss = self.compute_loss(model, dict(batch), num_items_in_batch=num_items_in_batch)
                part = torch.tensor(1.0 / len(window) if scaled else _rows(batch))
                # A loss that was divided by the items of all micro-batches is a share of the whole already.
                loss = loss if scaled else loss.double() * part
            total, weight = total + loss.double(), weight + part.to(weight)
        if self.args.world_size > 1:
            both = torch.stack([total, weight])
            dist.all_reduce(both)
            total, weight = both
        return total / weight

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether `compute_loss` divides by the items of all micro-batches; Trainer's rule."""
        said = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return bool(said)
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return None if self._zeroth_order else super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return None if self._zeroth_order else super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """2 operations a parameter and token in each forward pass; Trainer's 6 count a backward pass."""
        counted = super().floating_point_ops(inputs)
        return counted // 3 * self._passes if self._zeroth_order else counted

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        if adds_tokens(model):  # Trainer asks PEFT for a trainable prompt, which PEFT refuses to load
            load_prompt(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not self.args.should_save:
            super()._save_checkpoint(model, trial)
            return
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with replacing(folder):  # half a checkpoint would be taken for a whole one
            super()._save_checkpoint(model, trial)
            if self.beside is not None:
                self.beside(folder)

    # -- logs and evaluation ---------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's logs, with the mean of the finite losses, the root mean square of rho, and the steps skipped."""
        if self._zeroth_order and "loss" in logs and self._logged:
            finite = [record for record in self._logged if not record.skipped]
            logs["loss"] = math.fsum(r.loss for r in finite) / len(finite) if finite else math.nan
            rhos = [rho for record in finite for rho in self.zeroth_order.rho(record)]
            logs["projected_grad"] = math.sqrt(math.fsum(r * r for r in rhos) / len(rhos)) if rhos else math.nan
            if self.zeroth_order.n_skipped:
                logs["skipped_steps"] = self.zeroth_order.n_skipped
            self._logged = []
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Any, Any]:
        """With a scorer: mean loss of the rows, option scores (rows, options) and labels."""
        if self.scorer is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            scores = self.scorer.scores(inputs, model)
        loss = row_losses(scores, inputs["labels"], self.scorer.objective).mean()
        if prediction_loss_only:
            return loss, None, None
        loader: Any = self.callback_handler.eval_dataloader
        if id(loader.dataset) not in self._widths:
            is_stream = isinstance(loader.dataset, IterableDataset)  # which is read once
            self._widths[id(loader.dataset)] = scores.shape[1] if is_stream else widest(loader.dataset)
        width = self._widths[id(loader.dataset)]
        if scores.shape[1] > width:
            raise ValueError(
                f"a row of a streaming data set has {scores.shape[1]} options, the first ones had {width} at most; "
                "evaluate questions of unequal numbers of options from a data set with a length"
            )
        return loss, filled(scores, width), inputs["labels"]

    def predict(self, test_dataset: Any, *args: Any, **others: Any) -> Any:
        """Trainer's; predictions and labels are in the order of the data set."""
        output: Any = super().predict(test_dataset, *args, **others)
        if self.scorer is None or isinstance(test_dataset, IterableDataset):
            return output
        place = np.argsort(by_length(test_dataset))
        return output._replace(predictions=output.predictions[place], label_ids=output.label_ids[place])


def bare(optimizer: Any) -> Any:
    """The optimizer out of accelerate's wrapper, which hides its methods."""
    while type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    return optimizer


def accuracy(found: EvalPrediction) -> dict[str, float]:
    """Share of rows whose label has the largest score; a row with a NaN is wrong."""
    scores, labels = torch.as_tensor(found.predictions), torch.as_tensor(found.label_ids)
    return {"accuracy": Scores(scores, labels, torch.empty(0)).correct.mean().item()}


def _rows(batch: dict[str, Any]) -> float:
    """What a mean loss was divided by: labels that count, else rows."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor):
        return float(labels.ne(-100).sum())
    return float(next(len(value) for value in batch.values() if isinstance(value, Tensor)))
