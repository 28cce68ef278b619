"""The scorer: option scores of a batch of examples from one forward pass of an unmodified model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from jaguar.models.adapters import adds_tokens
from jaguar.models.facts import first_position
from jaguar.scoring import layout as layouts
from jaguar.scoring.layout import Layout
from jaguar.scoring.metrics import row_losses
from jaguar.scoring.verification import Reading, first_right, full, picked, readings
from jaguar.tasks.questions import Choice, Example

LAYOUTS = ("auto", "packed", "padded")

# Attention that takes a mask of one's own, and reads it as (batch, 1, queries, keys).
_OWN_MASKS = ("sdpa", "eager")

_INPUTS = ("input_ids", "attention_mask", "position_ids")

# Names under which configurations say how far attention looks back.
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")


class Scorer:
    """Scores of the options of examples: mean log-probability of an option's tokens, in fp32.

        score(option) = 1/n sum over its tokens t_i of log p(t_i | prompt, t_1 .. t_{i-1})      (causal)
        score(option) = 1/n sum over its tokens t_i of log p(t_i | prompt with n masks)          (masked)

    What the scores do not need is not computed: no KV cache; options share the tokens of their prompt; only the hidden
    states that predict an option's tokens reach the output head. The model is not changed: its own forward runs, and
    a hook narrows what its head sees. Nothing is scored before that was compared with the whole forward of rows alone:
    `collate` and `evaluate` do it with the first examples they see, and again when longer ones come.

    Args:
        model: a causal LM, a masked LM or a sequence classifier (also a PEFT model of one).
        pad_id: token that fills short rows, on the right.
        kind: "causal", "masked" or "classifier" (scores are the logits of its classes).
        objective: "classification": cross-entropy over the options' scores, mean over rows; "answer": cross-entropy of
            the right option's tokens, mean over the tokens of the batch.
        layout: "padded": a row per question; "packed": all in one row, without padding; "auto": the cheaper of the two.

    Raises:
        ValueError: an argument is unknown, or the model has no output embeddings.

    Source: scores and losses of MeZO (arXiv 2305.17333, appendix E) as the benchmark ZO-Bench computes them.
    Equivalent to: `log_softmax(model(prompt + option).logits[:, n_prompt - 1 : -1], -1).gather(-1, option).mean()`.
    """

    def __init__(
        self,
        model: Any,
        pad_id: int,
        kind: str = "causal",
        objective: str = "classification",
        layout: str = "auto",
    ) -> None:
        for name, value, known in (
            ("kind", kind, ("causal", "masked", "classifier")),
            ("objective", objective, ("classification", "answer")),
            ("layout", layout, LAYOUTS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, known))}")
        if kind == "classifier" and objective == "answer":
            raise ValueError("a sequence classifier has classes, not answers; this task needs a language model")
        self.model, self.kind, self.objective, self.layout = model, kind, objective, layout
        self.head: nn.Module | None = None
        if kind != "classifier":
            self.head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            if not isinstance(self.head, nn.Module):
                raise ValueError(
                    f"a {type(model).__name__} has no output head for tokens (get_output_embeddings() is None); "
                    "scoring options needs a causal or masked language model"
                )
        self.readings = readings(model, kind, pad_id, _takes_own_masks(model))
        self.forward_passes = 0
        # Tokens of the longest row that was compared; 0: nothing was.
        self.verified_length: float = 0

    @property
    def reading(self) -> Reading:
        """The way in which batches are put to the model: the first that was not found wrong."""
        return self.readings[0]

    @property
    def verified(self) -> bool:
        """True once scores were compared with those of the model's whole forward."""
        return self.verified_length > 0

    # -- batches ---------------------------------------------------------------------------------------------------

    def collate(self, examples: Sequence[Example], *, answers_only: bool = False) -> dict[str, Any]:
        """A batch as tensors on the CPU, for `scores` and `loss`.

        In a worker of a data loader, which has no model to compare with, examples that are longer than all that were
        compared are left to `scores`.

        Args:
            examples: questions; their numbers of options may differ.
            answers_only: take the right option of each alone, which is all that the loss of "answer" needs.

        Raises:
            ValueError: `verify` raises it.
        """
        if get_worker_info() is not None and self._is_new(examples):
            labels = [0 if answers_only else e.label for e in examples]
            return {"labels": torch.tensor(labels), "examples": list(examples), "answers_only": answers_only}
        self.trust(examples)
        groups: list[tuple[Choice, ...]] = [e.choices for e in examples]
        labels = [e.label for e in examples]
        if answers_only:
            groups, labels = [(e.choices[e.label],) for e in examples], [0] * len(examples)
        chosen = self._arranged(groups)
        batch = {"labels": torch.tensor(labels), "input_ids": layouts.padded_ids(chosen.lines, self.reading.pad_id)}
        batch |= self._masks(chosen, batch["input_ids"].shape[1])
        if self.kind == "classifier":
            return batch
        width = max(map(len, groups))
        choices = [c for group in groups for c in [*group, *[Choice(())] * (width - len(group))]]
        places = iter(chosen.places)
        where = [next(places) if c.positions else [] for c in choices]
        number = {place: i for i, place in enumerate(sorted({p for path in where for p in path}))}
        longest = max(map(len, where))
        batch["read"] = torch.tensor(list(number))
        batch["lengths"] = torch.tensor([len(path) for path in where]).view(len(groups), width)
        batch["rows"] = torch.tensor([[number[p] for p in path] + [0] * (longest - len(path)) for path in where])
        batch["targets"] = torch.tensor([[*c.targets, *[0] * (longest - len(c.targets))] for c in choices])
        return batch

    def _arranged(self, groups: Sequence[Sequence[Choice]]) -> Layout:
        """The layout of a batch: the one asked for, as far as the model can take it."""
        deepest = max(len(choice.ids) for group in groups for choice in group)
        free = self.reading.own_masks and deepest <= _window(self.model)
        if self.kind == "causal":
            padded = layouts.trees(groups) if free else layouts.chains(groups)
            pack = layouts.packed_trees
        else:
            padded, pack = layouts.masked(groups), layouts.packed_masked
        # Eager attention holds heads x queries x keys scores: packing would cost more memory than it saves.
        may_pack = self.layout == "packed" or (self.layout == "auto" and _attention(self.model) == "sdpa")
        if not free or not may_pack or self.kind == "classifier":
            return padded
        packed = pack(groups)
        width = self.model.config.get_text_config().hidden_size
        return packed if self.layout == "packed" or packed.cost(width) < padded.cost(width) else padded

    def _masks(self, chosen: Layout, longest: int) -> dict[str, Tensor]:
        """attention_mask and position_ids, where the model's own would not do."""
        lines, causal = chosen.lines, self.kind == "causal"
        lengths = torch.tensor([len(line.ids) for line in lines])
        if causal and not any(line.branches for line in lines):
            # Padding on the right is never seen by what stands before it. Adapters that add virtual tokens lengthen
            # the mask, so they are given one.
            return {} if self.reading.own_masks else {"attention_mask": _upto(lengths, longest)}
        if not causal and all(link == 0 for line in lines for link in line.links):
            return {"attention_mask": _upto(lengths, longest)}
        seen = torch.eye(longest, dtype=torch.bool).repeat(len(lines), 1, 1)  # padding sees itself: no empty softmax
        depths = torch.zeros(len(lines), longest, dtype=torch.long)
        for row, line in enumerate(lines):
            n = len(line.ids)
            seen[row, :n, :n] = line.visible(causal)
            depths[row, :n] = torch.tensor(line.depths)
        return {"attention_mask": seen[:, None], "position_ids": depths + first_position(self.model)}

    # -- the forward pass ------------------------------------------------------------------------------------------

    def scores(self, batch: Mapping[str, Any], model: Any = None) -> Tensor:
        """fp32 (rows, options): the options' scores; -inf where a row has fewer options.

        Args:
            batch: `collate` made it; on the model's device.
            model: the model as a trainer has wrapped it; None: the scorer's own.

        Raises:
            RuntimeError: nothing was compared yet (see `verify`), so the scores might be wrong.
        """
        return self._outcome(batch, model)[0]

    def loss(self, batch: Mapping[str, Any], model: Any = None) -> tuple[Tensor, Tensor]:
        """The sum of the losses of a batch and its divisor: rows ("classification") or tokens ("answer").

        Both are 0-dim tensors; sums over several batches divided by their weights are the loss of one large batch.
        """
        losses, weights = self.losses(batch, model)
        return losses.sum(), weights.sum()

    def losses(self, batch: Mapping[str, Any], model: Any = None) -> tuple[Tensor, Tensor]:
        """Vectors (rows,): the parts of each row of a batch in the two numbers of `loss`."""
        scores, lengths = self._outcome(batch, model)
        losses = row_losses(scores, batch["labels"], self.objective)
        if self.objective == "classification":
            return losses, torch.ones_like(losses)
        tokens = lengths.gather(1, batch["labels"][:, None])[:, 0].to(losses.dtype)
        return losses * tokens, tokens

    def _outcome(self, batch: Mapping[str, Any], model: Any) -> tuple[Tensor, Tensor]:
        if "examples" in batch:
            made = self.collate(batch["examples"], answers_only=batch["answers_only"])
            batch = {key: value.to(batch["labels"].device) for key, value in made.items()}
        if not self.verified:
            raise RuntimeError(
                f"whether jaguar scores a {type(self.model).__name__} right was not looked at yet: collate with this "
                "scorer, or call its verify(examples) first"
            )
        logits = self._logits(batch, self.model if model is None else model)
        if self.kind == "classifier":
            return logits, torch.ones_like(logits)
        lengths, rows, targets = batch["lengths"], batch["rows"], batch["targets"]
        logprobs = logits[rows, targets] - logits.logsumexp(1)[rows]
        there = torch.arange(rows.shape[1], device=rows.device) < lengths.view(-1, 1)
        sums = logprobs.masked_fill(~there, 0.0).sum(1).view(lengths.shape)
        return (sums / lengths.clamp(min=1)).masked_fill(lengths == 0, -math.inf), lengths

    def _logits(self, batch: Mapping[str, Tensor], model: Any) -> Tensor:
        """fp32 (places, vocabulary) for a language model, (rows, classes) for a classifier."""
        inputs: dict[str, Any] = {key: batch[key] for key in _INPUTS if key in batch}
        mask, read = inputs.get("attention_mask"), batch.get("read")
        if self.reading.together == "padded" or mask is None or mask.dim() == 4:
            return self._forward(inputs, read, model)
        found, places = [], []
        for length, rows in _parts(mask.sum(1).tolist(), self.reading.together):
            index = torch.tensor(rows, device=mask.device)
            part, chosen = None, index
            if read is not None:
                chosen = torch.isin(read[:, 0], index).nonzero()[:, 0]
                part = torch.stack([torch.searchsorted(index, read[chosen, 0]), read[chosen, 1]], 1)
            found.append(self._forward({"input_ids": inputs["input_ids"][index, :length]}, part, model))
            places.append(chosen)
        return torch.cat(found)[torch.cat(places).argsort()]

    def _forward(self, inputs: dict[str, Any], read: Tensor | None, model: Any) -> Tensor:
        self.forward_passes += 1
        if inputs.get("attention_mask", inputs["input_ids"]).dim() == 4 and _attention(self.model) == "eager":
            inputs["attention_mask"] = _additive(inputs["attention_mask"], self.model.dtype)
        if self.kind == "causal":
            inputs["use_cache"] = False
        if self.head is None or read is None:
            return full(model(**inputs).logits)
        with _narrowed(self.head, read, inputs["input_ids"].shape[1]):
            logits = model(**inputs).logits
        if logits.shape[:-1].numel() != len(read):
            raise RuntimeError("its output head is not called as a module, so it cannot be narrowed to the options")
        return full(logits.reshape(-1, logits.shape[-1]))

    # -- checks ----------------------------------------------------------------------------------------------------

    def _is_new(self, examples: Iterable[Example]) -> bool:
        return max(example.length for example in examples) > self.verified_length

    def trust(self, examples: Sequence[Example]) -> None:
        """`verify`, if one of the examples is longer than all that were compared before.

        Raises:
            ValueError: `verify` raises it.
        """
        if self._is_new(examples):
            self.verify(examples)

    def verify(self, examples: Sequence[Example]) -> None:
        """Compares the lean scores of a few examples, short and long, with the model's whole forward of each alone.

        A model that does not heed masks and positions of one's own (linear biases, recurrences) is scored in padded
        rows from here on, and one that does not heed the padding in rows of equal length, or one by one.

        Raises:
            ValueError: even those differ, or two equal passes do; training on such scores would be silently wrong.
        """
        few, was_training = picked(examples), self.model.training
        self.model.eval()
        try:
            self.readings = self.readings[first_right(self, few) :]
        finally:
            self.model.train(was_training)
        self.verified_length = max(self.verified_length, few[-1].length)


def _parts(lengths: Sequence[int], together: str) -> Iterator[tuple[int, list[int]]]:
    """Length and numbers of the rows that share a forward pass."""
    if together == "one":
        yield from ((length, [row]) for row, length in enumerate(lengths))
        return
    for length in sorted(set(lengths)):
        yield length, [row for row, other in enumerate(lengths) if other == length]


@contextmanager
def _narrowed(head: nn.Module, read: Tensor, length: int) -> Iterator[None]:
    """While it lasts, `head` sees the hidden states at `read` (places, 2: row and column) as one row."""

    def narrow(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        virtual = hidden.shape[1] - length  # tokens that a prompt adapter has put in front
        return (hidden[read[:, 0], read[:, 1] + virtual][None], *args[1:])

    hook = head.register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        hook.remove()


def _upto(lengths: Tensor, longest: int) -> Tensor:
    return (torch.arange(longest) < lengths[:, None]).long()


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as eager attention adds it to its scores: 0 or the smallest number."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _attention(model: Any) -> str | None:
    return getattr(model.config, "_attn_implementation", None)


def _takes_own_masks(model: Any) -> bool:
    """True if the model's attention and forward are known to take masks and positions; `verify` tries it."""
    if adds_tokens(model):
        return False  # PEFT lengthens two-dimensional masks only
    inner = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    return _attention(model) in _OWN_MASKS and "position_ids" in inspect.signature(inner.forward).parameters


def _window(model: Any) -> float:
    """Tokens up to which sliding or chunked attention sees everything."""
    config = model.config.get_text_config()
    if getattr(config, "use_sliding_window", True) is False:
        return math.inf
    found = [getattr(config, name, None) for name in _WINDOWS]
    return min((w for w in found if isinstance(w, int) and w > 0), default=math.inf)
