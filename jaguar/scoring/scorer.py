"""The scorer: option scores of a batch of examples from one forward pass of an unmodified model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from jaguar.adapters import adds_tokens
from jaguar.scoring import layout as layouts
from jaguar.scoring.figures import row_losses
from jaguar.scoring.layout import Layout
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
    a hook narrows what its head sees.

    Args:
        model: a causal LM, a masked LM or a sequence classifier (also a PEFT model of one).
        pad_id: token that fills short rows, on the right.
        kind: "causal", "masked" or "classifier" (scores are the logits of its classes).
        objective: "classification": cross-entropy over the options' scores, mean over rows; "answer": cross-entropy of
            the right option's tokens, mean over the tokens of the batch.
        layout: "padded": a row per question; "packed": all in one row, without padding; "auto": what costs less.

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
        self.model, self.pad_id, self.kind, self.objective, self.layout = model, pad_id, kind, objective, layout
        self.head: nn.Module | None = None
        if kind != "classifier":
            self.head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            if not isinstance(self.head, nn.Module):
                raise ValueError(
                    f"a {type(model).__name__} has no output head for tokens (get_output_embeddings() is None); "
                    "scoring options needs a causal or masked language model"
                )
        self.own_masks = _takes_own_masks(model)
        self.forward_passes, self.verified = 0, False

    # -- batches ---------------------------------------------------------------------------------------------------

    def collate(self, examples: Sequence[Example], *, answers_only: bool = False) -> dict[str, Tensor]:
        """A batch as tensors on the CPU; what `scores` and `loss` take.

        Args:
            examples: questions; their numbers of options may differ.
            answers_only: take the right option of each alone, which is all that the loss of "answer" needs.
        """
        groups: list[tuple[Choice, ...]] = [e.choices for e in examples]
        labels = [e.label for e in examples]
        if answers_only:
            groups, labels = [(e.choices[e.label],) for e in examples], [0] * len(examples)
        chosen = self._arranged(groups)
        batch = {"labels": torch.tensor(labels), "input_ids": layouts.padded_ids(chosen.lines, self.pad_id)}
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
        """The layout of a batch: what was asked for, as far as the model can take it."""
        deepest = max(len(choice.ids) for group in groups for choice in group)
        free = self.own_masks and deepest <= _window(self.model)
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
            return {} if self.own_masks else {"attention_mask": _upto(lengths, longest)}
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

    def scores(self, batch: dict[str, Tensor], model: Any = None) -> Tensor:
        """fp32 (rows, options): the options' scores; -inf where a row has fewer options.

        Args:
            batch: of `collate`, on the model's device.
            model: the model as a trainer has wrapped it; None: the scorer's own.
        """
        return self._outcome(batch, model)[0]

    def loss(self, batch: dict[str, Tensor], model: Any = None) -> tuple[Tensor, Tensor]:
        """The sum of the losses of a batch and what to divide it by: rows ("classification") or tokens ("answer").

        Both are 0-dim tensors; sums over several batches divided by their weights are the loss of one large batch.
        """
        scores, lengths = self._outcome(batch, model)
        losses = row_losses(scores, batch["labels"], self.objective)
        if self.objective == "classification":
            return losses.sum(), torch.tensor(float(len(losses)), device=losses.device)
        tokens = lengths.gather(1, batch["labels"][:, None])[:, 0].to(losses.dtype)
        return (losses * tokens).sum(), tokens.sum()

    def _outcome(self, batch: dict[str, Tensor], model: Any) -> tuple[Tensor, Tensor]:
        logits = self._logits(batch, self.model if model is None else model)
        if self.kind == "classifier":
            return logits, torch.ones_like(logits)
        lengths, rows, targets = batch["lengths"], batch["rows"], batch["targets"]
        logprobs = logits[rows, targets] - logits.logsumexp(1)[rows]
        there = torch.arange(rows.shape[1], device=rows.device) < lengths.view(-1, 1)
        sums = logprobs.masked_fill(~there, 0.0).sum(1).view(lengths.shape)
        return (sums / lengths.clamp(min=1)).masked_fill(lengths == 0, -math.inf), lengths

    def _logits(self, batch: dict[str, Tensor], model: Any) -> Tensor:
        """fp32 (places, vocabulary) for a language model, (rows, classes) for a classifier."""
        inputs: dict[str, Any] = {key: batch[key] for key in _INPUTS if key in batch}
        self.forward_passes += 1
        if inputs.get("attention_mask", inputs["input_ids"]).dim() == 4 and _attention(self.model) == "eager":
            inputs["attention_mask"] = _additive(inputs["attention_mask"], self.model.dtype)
        if self.kind == "causal":
            inputs["use_cache"] = False
        if self.head is None:
            return _full(model(**inputs).logits)
        with _narrowed(self.head, batch["read"], inputs["input_ids"].shape[1]):
            logits = model(**inputs).logits
        if logits.shape[:-1].numel() != len(batch["read"]):
            raise RuntimeError(
                f"the output head of a {type(self.model).__name__} is not called as a module, so it cannot be narrowed "
                "to the options; this model cannot be scored by jaguar"
            )
        return _full(logits.reshape(-1, logits.shape[-1]))

    # -- checks ----------------------------------------------------------------------------------------------------

    def verify(self, examples: Sequence[Example]) -> None:
        """Compares the lean scores of a few examples, short and long, with those of the model's whole forward.

        A model that does not heed masks and positions of one's own (linear biases, recurrences) is scored in padded
        rows from here on.

        Raises:
            ValueError: even those differ; training on such scores would be silently wrong.
        """
        if self.kind == "classifier":
            return
        counted, was_training = self.forward_passes, self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                by_length = sorted(examples, key=lambda example: example.length)
                far = self._farthest([*by_length[:2], *by_length[-2:]])
        finally:
            self.model.train(was_training)
            self.forward_passes, self.verified = counted, True
        if far > self._tolerance:
            raise ValueError(
                f"scoring only the options' positions of a {type(self.model).__name__} differs from its whole forward "
                f"by {far:.2g}; this model cannot be scored by jaguar"
            )

    @property
    def _tolerance(self) -> float:
        return 1e-3 if self.model.dtype in (torch.float32, torch.float64) else 0.15

    def _farthest(self, examples: Sequence[Example]) -> float:
        """The largest difference from one-by-one scores, by masks of one's own if they can be trusted, else without."""
        device = next(self.model.parameters()).device
        plain = torch.cat([self._plainly(choice, device) for e in examples for choice in e.choices])
        if not plain.isfinite().all():  # a broken model says so itself, in every loss
            self.own_masks = False
            return 0.0
        asked, trusted, far = self.layout, self.own_masks, math.inf
        try:
            for own_masks in (True, False) if trusted else (False,):
                self.own_masks, far = own_masks, 0.0
                for layout in ("padded", "packed") if own_masks else ("padded",):
                    self.layout = layout
                    try:
                        batch = {key: value.to(device) for key, value in self.collate(examples).items()}
                        found = self.scores(batch)[batch["lengths"] > 0]
                        far = max(far, (found - plain).abs().max().item())
                    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError):
                        if not own_masks:
                            raise
                        far = math.inf
                if far <= self._tolerance:
                    break
        finally:
            self.layout = asked
        return far

    def _plainly(self, choice: Choice, device: torch.device) -> Tensor:
        logits = self.model(torch.tensor([choice.ids], device=device)).logits
        # Virtual tokens of an adapter stand before the prompt; some models answer for them too.
        logits = _full(logits[0, -len(choice.ids) :][torch.tensor(choice.positions, device=device)])
        return logits.log_softmax(1).gather(1, torch.tensor(choice.targets, device=device)[:, None]).mean()[None]


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


def _full(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _upto(lengths: Tensor, longest: int) -> Tensor:
    return (torch.arange(longest) < lengths[:, None]).long()


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What eager attention adds to its scores: 0 or the smallest number."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _attention(model: Any) -> str | None:
    return getattr(model.config, "_attn_implementation", None)


def _takes_own_masks(model: Any) -> bool:
    """Whether the model's attention and forward are known to take masks and positions; `verify` tries it."""
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


def first_position(model: Any) -> int:
    """The number that the model gives to a sequence's first position: RoBERTa's family begins after the padding id."""
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table.padding_idx + 1
    return 0
