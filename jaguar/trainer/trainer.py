"""`ZOTrainer`: transformers' Trainer with forward passes only; `ScoringTrainer`: the same with a scorer's losses.

Trainer's loop runs as it is. Its `training_step` measures the step into a record, its `optimizer.step()` applies the
record; so schedules, callbacks, evaluation, checkpoints, resuming and logging are Trainer's own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import _global_optimizer_pre_hooks
from transformers import EvalPrediction, PreTrainedModel, TrainerCallback

from jaguar.models.facts import running_statistics
from jaguar.optimizers.base import ZerothOrder
from jaguar.optimizers.common import keywords
from jaguar.optimizers.guards import NonFiniteLoss
from jaguar.optimizers.parameter_groups import param_groups
from jaguar.record import Record
from jaguar.scoring import Scorer
from jaguar.trainer.arguments import WHOLE_MODELS, ZOTrainingArguments
from jaguar.trainer.attempts import Attempt
from jaguar.trainer.logs import figures
from jaguar.trainer.micro_batches import Grain, MicroBatches, each, mean
from jaguar.trainer.model_card import card_arguments
from jaguar.trainer.optimizer import decay_groups, unwrap
from jaguar.trainer.replicas import ReplicatedTrainer, begin_alike
from jaguar.trainer.scoring import Scoring, settled


class ZOTrainer(ReplicatedTrainer):
    """Trains with two (or `n_directions + 1`, ...) forward passes a step and no backward pass; otherwise a Trainer.

        rho = (f(x + tau e) - f(x - tau e)) / (2 tau),   f: the loss over all micro-batches of the step

    The model is in evaluation mode (no dropout) while it is measured. Non-finite losses skip their step. On several
    processes the losses are averaged (or directions shared: `direction_parallel`), and every process takes the same
    step, which is compared every `check_replicas_steps` steps; the model is not wrapped in DDP.
    `args.optim_zo="fo-sgd"` trains with backward passes instead, as Trainer does.

    Args:
        model: any module that Trainer takes; parameters with `requires_grad` train, so PEFT models work.
        args: `ZOTrainingArguments`.
        optimizers: a zeroth-order optimizer and a scheduler of your own, in place of what `args` say.
        scorer: makes it a `ScoringTrainer`; None: the loss is the model's own.

    The other arguments are Trainer's.

    Raises:
        TypeError: `args` or the optimizer are of another kind.
        ValueError: the launcher's settings ask for gradients (DeepSpeed, FSDP, fp16 mixed precision).

    Source: step protocol of this package; MeZO (arXiv 2305.17333) for evaluation mode and accumulation-free steps.
    Equivalent to: `Trainer` with `loss = optimizer.step(lambda: compute_loss(model, batch))`.
    """

    args: ZOTrainingArguments

    def __new__(cls, *given: Any, scorer: Scorer | None = None, **others: Any) -> ZOTrainer:
        """Makes a `ScoringTrainer` where a scorer is given."""
        return super().__new__(ScoringTrainer if cls is ZOTrainer and scorer is not None else cls)

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: ZOTrainingArguments | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        scorer: Scorer | None = None,
    ) -> None:
        args = ZOTrainingArguments("tmp_trainer") if args is None else args
        if not isinstance(args, ZOTrainingArguments):
            raise TypeError(
                f"args is a {type(args).__name__}; ZOTrainer takes jaguar.ZOTrainingArguments, which has the same "
                "fields"
            )
        self._attempt: Attempt | None = None
        self._window: list[Any] = []
        self._logged: list[Record] = []
        self._measured = self._skipped = 0  # steps of this call of `train`
        self.forward_passes = 0  # of all steps, evaluations aside
        given = {
            "data_collator": data_collator,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
            "model_init": model_init,
            "compute_loss_func": compute_loss_func,
            "compute_metrics": compute_metrics,
            "callbacks": callbacks,
            "optimizers": optimizers,
            "optimizer_cls_and_kwargs": optimizer_cls_and_kwargs,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }
        own = optimizers[0], (optimizer_cls_and_kwargs or (None,))[0]
        kinds = [kind if isinstance(kind, type) else type(kind) for kind in own if kind is not None]
        self._has_own = any(issubclass(kind, ZerothOrder) for kind in kinds)
        if kinds and not self._has_own and not args.first_order:
            raise TypeError(
                f"a {kinds[0].__name__} needs gradients; ZOTrainer takes optimizers of jaguar, and any other with "
                "optim_zo='fo-sgd'"
            )
        super().__init__(model, args, **self._settled(args, given, scorer))
        if not self._loss_heeds_items:
            self.model_accepts_loss_kwargs = False

    # Else inspect and help would show the arguments of a ZOTrainer as `*given, **others`.
    __new__.__signature__ = inspect.signature(__init__)  # type: ignore[attr-defined]

    def _settled(self, args: ZOTrainingArguments, given: dict[str, Any], scorer: Scorer | None) -> dict[str, Any]:
        """Sets `args` as forward passes need them; returns Trainer's other arguments."""
        if scorer is not None:
            raise TypeError(f"{type(self).__name__} takes no scorer: derive it from jaguar.ScoringTrainer")
        if (self._has_own or not args.first_order) and args.n_gpu > 1:
            args._n_gpu = 1  # DataParallel would copy the perturbed weights to every GPU in every evaluation
            warnings.warn("one process uses one GPU; for several, start one process each with torchrun", stacklevel=4)
        return given

    @property
    def _loss_heeds_items(self) -> bool:
        """True if a loss that takes num_items_in_batch divides by it; many heads take it as **kwargs and drop it."""
        return bool(self._loss_shifts_labels)

    # -- setting up ------------------------------------------------------------------------------------------------

    @property
    def _zeroth_order(self) -> bool:
        return self._has_own or not self.args.first_order  # a hyperparameter search may change the latter

    @property
    def zeroth_order(self) -> ZerothOrder:
        """The optimizer, out of accelerate's wrapper.

        Raises:
            TypeError: there is none yet, or it is the first-order baseline.
        """
        inner = unwrap(self.optimizer)
        if not isinstance(inner, ZerothOrder):
            raise TypeError(f"the optimizer is a {type(inner).__name__}; create_optimizer() comes first")
        return inner

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer that `args.optim_zo` names; with `by_role`, of groups from `jaguar.param_groups`."""
        if self.optimizer is None:
            model = self.model if model is None else model
            if self.optimizer_cls_and_kwargs and not self._zeroth_order:
                return super().create_optimizer(model)
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            decay = self.args.weight_decay
            if getattr(kind, "by_role", False):
                groups = param_groups(model, decay)
            else:
                groups = decay_groups(model, decay, set(self.get_decay_parameter_names(model)))
            if "model" in keywords(kind):  # one that watches the modules
                options["model"] = model
            if self._shares_directions:
                options["direction_group"] = dist.group.WORLD
            self.optimizer = kind(groups, **options)
        return self.optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: ZOTrainingArguments, model: Any = None) -> tuple[Any, dict[str, Any]]:  # type: ignore[override]
        """The class that `args.optim_zo` names and its options.

        Raises:
            ValueError: the optimizer does not know one of them.
        """
        args.check_options()
        return args.optimizer_class, args.optimizer_options()

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's accelerator, without the parts that only gradients need."""
        super().create_accelerator_and_postprocess()
        if not self._zeroth_order:
            return
        if self.is_deepspeed_enabled:
            raise ValueError("the launcher's configuration enables deepspeed, which forward-only training cannot use")
        if self.is_fsdp_enabled:
            raise ValueError(f"the launcher's configuration enables fsdp: {WHOLE_MODELS}")
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
        if self._zeroth_order and (still := running_statistics(self.model)):
            warnings.warn(
                f"the running statistics of {len(still)} modules ({still[0]}{', ...' * (len(still) > 1)}) do not move: "
                "the model is measured in evaluation mode, where they are constants",
                stacklevel=2,
            )
        if self._zeroth_order:
            begin_alike(self.zeroth_order, self.args)
        return prepared

    # -- a step ----------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **others: Any) -> Any:
        """Trainer's.

        Raises:
            NonFiniteLoss: no step of the run had a finite loss, or `max_skipped` in a row had none.
        """
        self._attempt = None
        output = super().train(*args, **others)
        if self._measured and self._skipped == self._measured:
            raise NonFiniteLoss(
                f"no step was taken: the loss was not finite in any of {self._measured} steps; the model is as it was"
            )
        return output

    def _inner_training_loop(self, *args: Any, **others: Any) -> Any:
        """Trainer's; a further attempt of `auto_find_batch_size` begins where the first one began."""
        if self._zeroth_order and self.args.auto_find_batch_size:
            if self._attempt is None:
                self._attempt = Attempt(self)
            else:
                self._attempt.restore(self)
        self._window, self._logged = [], []
        self._measured = self._skipped = 0
        autocast, share = self.accelerator.mixed_precision != "no", getattr(self, "loss_is_scaled_for_ga", None)
        assert self.model is not None
        self._micro_batches = MicroBatches.of(self.model, share, autocast, self.args.torch_compile)
        self._grain = Grain()
        try:
            return super()._inner_training_loop(*args, **others)
        finally:
            # Something may have stopped a step between its losses and its update.
            if isinstance(optimizer := unwrap(self.optimizer), ZerothOrder):
                with contextlib.suppress(RuntimeError):  # of one that is broken nothing can be taken back
                    optimizer.discard_()

    @property
    def _is_watched(self) -> bool:
        """True if somebody may look at the model between the losses of a step and its update."""
        hooks = self.zeroth_order._optimizer_step_pre_hooks or _global_optimizer_pre_hooks
        if hooks or type(self).training_step is not ZOTrainer.training_step:
            return True
        looks = [callback.on_pre_optimizer_step for callback in self.callback_handler.callbacks]
        return any(getattr(look, "__func__", look) is not TrainerCallback.on_pre_optimizer_step for look in looks)

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
        recorded = self._recorded()
        self._window.append(None if recorded else self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        # What a stream left over at its end is no part of the next window.
        window, self._window = self._window[-self.current_gradient_accumulation_steps :], []
        record = self._take() if recorded else self._measure(window, model, num_items_in_batch)
        self._logged.append(record)
        self._measured, self._skipped = self._measured + 1, self._skipped + record.skipped
        self.forward_passes += len(window) * self.zeroth_order.method.estimator.evaluations(record.losses)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        # Not torch.tensor, whose copy to a GPU waits for what runs there.
        return torch.full((), self.zeroth_order.loss(record), device=self.args.device)

    def _measure(self, window: Sequence[Any], model: nn.Module, num_items_in_batch: Any) -> Record:
        model.eval()  # unequal dropout masks would drown the difference of the losses
        optimizer = self.zeroth_order
        self._check_replicas(window)
        if self._shares_directions:
            self._micro_batches.settle(window, num_items_in_batch, functools.partial(self._raw_loss, model))
        measure = optimizer.measure if self._is_watched else optimizer.measure_
        return measure(lambda: self._loss_of(window, model, num_items_in_batch))

    def _loss_of(self, window: Sequence[Any], model: nn.Module, num_items_in_batch: Any) -> Tensor:
        """The loss over the micro-batches of a step, and over all processes, as of one large batch.

        With an automatic step it is a vector with that mean.
        """
        parts = self._parts(window, model, num_items_in_batch)
        if self.zeroth_order.estimates is not None:
            return each(parts, self.accelerator)
        return mean(parts, self.accelerator, self.args.row_processes)

    def _parts(self, window: Sequence[Any], model: nn.Module, num_items_in_batch: Any) -> list[tuple[Tensor, Tensor]]:
        """Numbers, or one for each row, that each micro-batch adds to the loss and to its divisor."""
        return self._micro_batches.parts(
            window,
            num_items_in_batch,
            functools.partial(self._raw_loss, model),
            processes=self.args.row_processes,
            spanned=self.args.world_size if self.args.average_tokens_across_devices else 1,
        )

    def _raw_loss(self, model: nn.Module, batch: Any, num_items_in_batch: Any) -> Tensor:
        """The loss of a micro-batch, by `compute_loss`."""
        # Trainer would multiply the loss by the processes, which DDP's mean takes back.
        kept, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:
            loss: Tensor = self.compute_loss(model, dict(batch), num_items_in_batch=num_items_in_batch)  # type: ignore[assignment]
        finally:
            self.args.average_tokens_across_devices = kept
        if loss.numel() != 1:
            raise ValueError(f"the loss must be one number, got a tensor of shape {tuple(loss.shape)}; take its mean")
        self.zeroth_order.watch_dtype(self._grain.dtype(loss))
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return None if self._zeroth_order else super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return None if self._zeroth_order else super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """2 operations a parameter and token in each forward pass; Trainer's 6 count a backward pass."""
        counted = super().floating_point_ops(inputs)
        return counted // 3 * self.zeroth_order.method.estimator.n_losses if self._zeroth_order else counted

    # -- logs and evaluation ---------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's logs, with the root mean square of rho, the steps skipped, and the mean of the losses.

        Losses that are not finite are left out of the mean, unless `logging_nan_inf_filter` is False.
        """
        if self._zeroth_order and "loss" in logs and self._logged:
            logs |= figures(self.zeroth_order, self._logged, self.args.logging_nan_inf_filter)
            self._logged = []
        if self._zeroth_order and ("loss" in logs or "train_loss" in logs) and self.zeroth_order.n_skipped:
            logs["skipped_steps"] = self.zeroth_order.n_skipped
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **others: Any) -> None:
        """Trainer's, with the optimizer that ran and its learning rate."""
        kept = self.args
        self.args = card_arguments(kept, unwrap(self.create_optimizer()))
        try:
            super().create_model_card(*args, **others)
        finally:
            self.args = kept


class ScoringTrainer(Scoring, ZOTrainer):
    """A `ZOTrainer` of data sets of `jaguar.tasks` examples: batches, losses and predictions are a scorer's.

    Args:
        scorer: a `jaguar.Scorer` of the model.

    The other arguments are those of `ZOTrainer`.

    Raises:
        TypeError: there is no scorer.
        ValueError: `args` ask for something that a scorer cannot have.

    Example:

        task, encode = jaguar.tasks.SST2(), jaguar.tasks.Encoder(tokenizer, "causal", limit=2048)
        rows = jaguar.tasks.rows.read_rows("train.csv", task.columns)
        examples = encode([task.question(row, masked=False) for row in rows])
        scorer = jaguar.Scorer(model, tokenizer.pad_token_id, "causal", task.objective)
        jaguar.ScoringTrainer(model, args, scorer=scorer, train_dataset=examples).train()
    """

    def _settled(self, args: ZOTrainingArguments, given: dict[str, Any], scorer: Scorer | None) -> dict[str, Any]:
        if scorer is None:
            raise TypeError("a ScoringTrainer needs scorer=; for a model's own loss there is jaguar.ZOTrainer")
        self.scorer = scorer
        return super()._settled(args, settled(scorer, args, given), None)

    @property
    def _loss_heeds_items(self) -> bool:
        return False

    def _parts(self, window: Sequence[Any], model: nn.Module, num_items_in_batch: Any) -> list[tuple[Tensor, Tensor]]:
        by_row = self.zeroth_order.estimates is not None
        read = self.scorer.losses if by_row else self.scorer.loss
        parts = [read(batch, model) for batch in window]
        self.zeroth_order.watch_dtype(self._grain.dtype(parts[0][0]))
        return [(loss.double(), weight.double()) for loss, weight in parts]
