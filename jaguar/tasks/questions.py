"""What a task asks: a prompt, options, which is right; and what a model reads of it as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Question:
    """A row as text.

    Attributes:
        prompt: what stands before the options.
        options: what may follow, leading blank included.
        label: number of the right option.
        where: the row, for errors.
        suffix: what follows any option. A causal LM is scored on it together with the option; a masked LM sees it.
        text: the part of the prompt that may lose its end where a prompt is too long; empty: none.
    """

    prompt: str
    options: tuple[str, ...]
    label: int
    where: str
    suffix: str = ""
    text: str = ""

    def without_end(self, text: str) -> Question:
        """The same question with a shorter text."""
        return replace(self, prompt=self.prompt.replace(self.text, text, 1), text=text)


@dataclass(frozen=True)
class Choice:
    """One option as a model reads it.

    Attributes:
        ids: the input; a causal LM's ends before the last token of the option, which nothing is asked after.
        positions: places of `ids` whose logits are read.
        targets: the option's tokens, one for each position.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()


@dataclass(frozen=True)
class Example:
    """A question as token ids; a sequence classifier has one choice without targets, its classes being the options."""

    choices: tuple[Choice, ...]
    label: int
    where: str = ""

    @property
    def length(self) -> int:
        """Tokens of the longest choice."""
        return max(len(choice.ids) for choice in self.choices)


class Encoder:
    """Questions as tokens, for one kind of model.

    Args:
        tokenizer: of the model.
        kind: "causal": the option follows the prompt; "masked": mask tokens stand in its place, as many as it has
            tokens; "classifier": the prompt alone.
        limit: tokens that the model takes.
        max_length: longer texts lose their end; None: too long a prompt is an error.
    """

    def __init__(self, tokenizer: Any, kind: str, limit: int, max_length: int | None = None) -> None:
        self.tokenizer, self.kind = tokenizer, kind
        self.limit, self.max_length = limit, max_length
        if kind == "masked" and tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer of this masked language model has no mask token")

    def __call__(self, questions: Sequence[Question]) -> list[Example]:
        """Every question as tokens.

        Raises:
            ValueError: an option is empty, two are equal, or a prompt is too long; the row is named.
        """
        return [self._example(question) for question in questions]

    def _example(self, question: Question) -> Example:
        made, limit = self._encoded(question), min(self.limit, self.max_length or self.limit)
        text = self._ids(question.text) if self.max_length is not None and question.text else []
        while made.length > limit:
            if not text:
                advice = (
                    f"--max_length {limit} is too short for the rest of the prompt"
                    if self.max_length is not None
                    else f"shorten it, or cut texts with --max_length {self.limit}"
                )
                raise ValueError(
                    f"{question.where}: the prompt has {made.length} tokens, the model takes {limit}; {advice}"
                )
            text = text[: min(len(text) - 1, len(text) - (made.length - limit))]
            question = question.without_end(self.tokenizer.decode(text))
            made = self._encoded(question)
        return made

    def _encoded(self, question: Question) -> Example:
        if self.kind == "classifier":
            choices: tuple[Choice, ...] = (Choice(tuple(self.tokenizer(question.prompt).input_ids)),)
        else:
            choices = tuple(
                (self._after if self.kind == "causal" else self._within)(question, o) for o in question.options
            )
            if len({(choice.ids, choice.targets) for choice in choices}) < len(choices):
                raise ValueError(
                    f"{question.where}: two of the options {question.options} are the same for this tokenizer"
                )
        return Example(choices, question.label, question.where)

    def _after(self, question: Question, option: str) -> Choice:
        prompt, full = (self._open(text) for text in (question.prompt, question.prompt + option + question.suffix))
        # As the benchmark counts them: a tokenizer may join prompt and option otherwise.
        count = len(full) - len(prompt)
        if count < 1:
            raise ValueError(f"{question.where}: the option {option!r} adds no token to the prompt")
        if not prompt:
            raise ValueError(f"{question.where}: the prompt is no token, so nothing predicts the option")
        first = len(full) - count
        return Choice(full[:-1], tuple(range(first - 1, len(full) - 1)), full[first:])

    def _open(self, text: str) -> tuple[int, ...]:
        """The tokens of a text that goes on: without what a tokenizer closes a sequence with."""
        ids = tuple(self.tokenizer(text).input_ids)
        closing = {self.tokenizer.eos_token_id, self.tokenizer.sep_token_id}
        return ids[:-1] if len(ids) > 1 and ids[-1] in closing else ids

    def _within(self, question: Question, option: str) -> Choice:
        targets = tuple(self._ids(option))
        if not targets:
            raise ValueError(f"{question.where}: the option {option!r} is no token")
        mask = self.tokenizer.mask_token
        blank = " " if option[0] == " " else ""
        text = question.prompt + blank + mask * len(targets) + question.suffix
        ids = tuple(self.tokenizer(text).input_ids)
        positions = tuple(i for i, token in enumerate(ids) if token == self.tokenizer.mask_token_id)
        if len(positions) != len(targets):
            raise ValueError(f"{question.where}: the text itself has the mask token {mask!r}")
        return Choice(ids, positions, targets)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids
