"""Trainer with a scorer: batches, losses and predictions of `jaguar.tasks` examples."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from jaguar.scoring import Scorer
from jaguar.scoring.evaluation import accuracy, by_length, filled, rearranged, widest
from jaguar.scoring.metrics import row_losses


def settled(scorer: Scorer, args: TrainingArguments, others: dict[str, Any]) -> dict[str, Any]:
    """The other arguments of a trainer that has a scorer, with its collator and metric where none are given.

    Raises:
        ValueError: an argument that a scorer cannot have.
    """
    if args.torch_compile:
        raise ValueError("torch_compile=True does not see the scorer's hook on the output head; leave one out")
    if args.label_smoothing_factor or others["compute_loss_func"]:
        raise ValueError("the scorer has its own loss: leave label_smoothing_factor and compute_loss_func out")
    settings: Any = args.accelerator_config
    if settings.dispatch_batches:
        raise ValueError(
            "dispatch_batches=True cuts collated batches by rows, which the scorer's are not made of; leave it "
            "out, every process then reads its own rows"
        )
    settings.dispatch_batches = False  # accelerate's choice for streams would be True
    if others["model_init"]:
        raise ValueError("a scorer belongs to one model: leave model_init out and give the scorer's model")
    if "inputs" in args.include_for_metrics:
        raise ValueError(
            "include_for_metrics: a batch of the scorer has no row of inputs for each row of the data set; "
            "leave 'inputs' out"
        )
    args.remove_unused_columns = False
    usual: dict[str, Any] = {"data_collator": scorer.collate}
    if not args.batch_eval_metrics and others["preprocess_logits_for_metrics"] is None:
        usual["compute_metrics"] = accuracy
    return others | {name: value for name, value in usual.items() if others[name] is None}


class ByLength(LengthGroupedSampler):
    """transformers' sampler of batches of similar length, in an order that the seed and the epoch decide.

    So a run that goes on in its third epoch takes the rows that it would have taken.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        self._seed = seed
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator().manual_seed(seed))

    def set_epoch(self, epoch: int) -> None:
        """Begins the order of an epoch."""
        self.generator.manual_seed(self._seed + epoch)


class Scoring(Trainer):
    """The part of a Trainer that a scorer decides: batches, losses and predictions."""

    scorer: Scorer
    _width: int | None = None  # of the scores of the data set that is being evaluated

    def get_train_dataloader(self) -> Any:
        """Trainer's; the batches hold the tokens that the loss needs and no more."""
        usual: Any = self.data_collator
        if usual == self.scorer.collate:
            answers_only = self.scorer.objective == "answer"
            self.data_collator = functools.partial(usual, answers_only=answers_only)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = usual

    def _get_dataloader(self, dataset: Any, *args: Any, **others: Any) -> Any:
        if not isinstance(dataset, IterableDataset):
            self.scorer.trust([dataset[i] for i in range(len(dataset))])  # workers cannot
        return super()._get_dataloader(dataset, *args, **others)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        strategy, args = self.args.train_sampling_strategy, self.args
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if strategy not in ("group_by_length", "batch_rebalance"):
            return super()._get_train_sampler(train_dataset)
        lengths = [dataset[i].length for i in range(len(dataset))]
        if strategy == "group_by_length":
            return ByLength(args.train_batch_size, lengths, args.seed if args.data_seed is None else args.data_seed)
        return BatchRebalanceSampler(
            lengths=lengths,
            effective_batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            dp_size=args.world_size,
            grad_accum=args.gradient_accumulation_steps,
            rank=args.process_index,
            drop_last=args.dataloader_drop_last,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The scorer's loss of a batch."""
        total, weight = self.scorer.loss(inputs, model)
        return (total / weight, None) if return_outputs else total / weight

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if "input_ids" in inputs:  # its masks say who sees whom, where there are any
            ids = inputs["input_ids"]
            inputs = {"input_ids": ids, "attention_mask": (ids != self.scorer.reading.pad_id).long()}
        super()._track_num_input_tokens(inputs)  # type: ignore[no-untyped-call]

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if not self._by_length(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        return by_length(eval_dataset)  # rows of similar length share a batch

    def _by_length(self, dataset: Any) -> bool:
        """True if evaluation takes rows by length: not streams, batches shown one by one, or with rows left out."""
        args = self.args
        whole = args.eval_do_concat_batches and not args.batch_eval_metrics and not args.dataloader_drop_last
        return whole and not isinstance(dataset, IterableDataset)

    def evaluation_loop(self, dataloader: Any, *args: Any, **others: Any) -> Any:
        """Trainer's; metrics, predictions and labels see the rows in the order of the data set."""
        self._width = None
        if not self._by_length(dataloader.dataset):
            return super().evaluation_loop(dataloader, *args, **others)
        place = np.argsort(by_length(dataloader.dataset))
        metrics = self.compute_metrics

        def in_order(found: EvalPrediction) -> Any:
            assert metrics is not None
            shown = found.predictions, found.label_ids, found.inputs, found.losses
            return metrics(EvalPrediction(*(rearranged(value, place) for value in shown)))

        self.compute_metrics = in_order if metrics is not None else None
        try:
            output = super().evaluation_loop(dataloader, *args, **others)
        finally:
            self.compute_metrics = metrics
        return output._replace(
            predictions=rearranged(output.predictions, place), label_ids=rearranged(output.label_ids, place)
        )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Mean loss of the rows, option scores (rows, options) and labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            scores = self.scorer.scores(inputs, model)
        loss = row_losses(scores, inputs["labels"], self.scorer.objective).mean()
        if prediction_loss_only:
            return loss, None, None
        loader: Any = self.callback_handler.eval_dataloader
        if self._width is None:
            is_stream = isinstance(loader.dataset, IterableDataset)  # which is read once
            known = 0 if is_stream else widest(loader.dataset)
            self._width = max(known, scores.shape[1])  # a classifier has one choice, and as many scores as classes
        if scores.shape[1] > self._width:
            raise ValueError(
                f"a row of a streaming data set has {scores.shape[1]} options, the first ones had {self._width} at "
                "most; evaluate questions of unequal numbers of options from a data set with a length"
            )
        return loss, filled(scores, self._width), inputs["labels"]
