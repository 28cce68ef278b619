"""Questions of a task: a prompt, options and the right one; and the same as tokens for a model."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

_JOINER = "\u200d"


@dataclass(frozen=True)
class Question:
    """A row as text.

    Attributes:
        prompt: the text before the options.
        options: the texts that may follow, leading blank included.
        label: number of the right option.
        where: the row, for errors.
        suffix: the text after any option. A causal LM is scored on it together with the option; a masked LM sees it.
        text: the part of the prompt that may lose its end where a prompt is too long; empty: none.
        around: the text's surroundings in the prompt, and in the suffix; None: it is in the prompt, once.
    """

    prompt: str
    options: tuple[str, ...]
    label: int
    where: str
    suffix: str = ""
    text: str = ""
    around: tuple[Sequence[str], Sequence[str]] | None = None

    def with_text(self, text: str) -> Question:
        """The same question about another text."""
        before, after = self.around or (self.prompt.split(self.text, 1), (self.suffix,))
        return replace(self, prompt=text.join(before), suffix=text.join(after), text=text, around=(before, after))


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


@dataclass(frozen=True)
class Tokens:
    """A text as tokens, without those that close a sequence; `spans`: the place of each in the text."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] | None

    def first_past(self, end: int) -> int:
        """Number of the first token that has a character at or behind `end`; characters may share a token."""
        assert self.spans is not None
        return next((i for i, (_, stop) in enumerate(self.spans) if stop > end), len(self.ids))


class Encoder:
    """Questions as tokens, for one kind of model.

    An option begins where its characters do: a token that has one of them is the option's, also where it takes the
    blank that ends the prompt with it.

    Args:
        tokenizer: the model's.
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
        while made.length > limit:
            if self.max_length is not None and question.text:
                question = self._shorter(question, made.length - limit)
            if self.max_length is None or not question.text:
                advice = (
                    f"--max_length {limit} is too short for the rest of the prompt"
                    if self.max_length is not None
                    else f"shorten it, or cut texts with --max_length {self.limit}"
                )
                raise ValueError(
                    f"{question.where}: the prompt has {made.length} tokens, the model takes {limit}; {advice}"
                )
            made = self._encoded(question)
        return made

    def _shorter(self, question: Question, excess: int) -> Question:
        """The question about a text that has lost at least a character, and about `excess` tokens where it occurs."""
        text, tokens = question.text, self._read(question.text, special=False)
        times = sum(len(pieces) - 1 for pieces in question.around) if question.around else 1
        kept = max(0, len(tokens.ids) - -(-excess // max(1, times)))
        if tokens.spans is None:
            end = len(text) * kept // max(1, len(tokens.ids))
        else:  # several tokens may be of one character
            end = min(tokens.spans[kept - 1][1], tokens.spans[kept][0]) if 0 < kept < len(tokens.ids) else 0
        end = min(end, len(text) - 1)
        return question.with_text(text[: _whole(text, end) or end])

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
        full = self._read(question.prompt + option + question.suffix)
        first = self._first(full, question.prompt, question.where)
        if first == len(full.ids):
            raise ValueError(f"{question.where}: the option {option!r} adds no token to the prompt")
        if not first:
            raise ValueError(f"{question.where}: the prompt is no token, so nothing predicts the option")
        return Choice(full.ids[:-1], tuple(range(first - 1, len(full.ids) - 1)), full.ids[first:])

    def _first(self, full: Tokens, prompt: str, where: str) -> int:
        """Number of the option's first token."""
        if full.spans is not None:
            return full.first_past(len(prompt))
        for text in (prompt, prompt.removesuffix(" ")):
            ids = self._read(text).ids
            if full.ids[: len(ids)] == ids:
                first = len(ids)
                while text != prompt and first < len(full.ids) and not self.tokenizer.decode([full.ids[first]]).strip():
                    first += 1  # the blank alone is the prompt's
                return first
        raise ValueError(
            f"{where}: a {type(self.tokenizer).__name__} joins the prompt's end {prompt[-10:]!r} with the option and "
            "does not say where tokens begin; end the prompt with a word and begin the options with a blank, or use a "
            "fast tokenizer"
        )

    def _read(self, text: str, special: bool = True) -> Tokens:
        if not getattr(self.tokenizer, "is_fast", False):
            ids = tuple(self.tokenizer(text, add_special_tokens=special).input_ids)
            closing = {self.tokenizer.eos_token_id, self.tokenizer.sep_token_id}
            return Tokens(ids[:-1] if special and len(ids) > 1 and ids[-1] in closing else ids, None)
        made = self.tokenizer(
            text, add_special_tokens=special, return_offsets_mapping=True, return_special_tokens_mask=True
        )
        n = len(made.input_ids)
        while n > 1 and made.special_tokens_mask[n - 1]:
            n -= 1
        return Tokens(tuple(made.input_ids[:n]), tuple(made.offset_mapping[:n]))

    def _within(self, question: Question, option: str) -> Choice:
        targets = self._targets(question.prompt, option)
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

    def _targets(self, prompt: str, option: str) -> tuple[int, ...]:
        """The option's tokens as they stand after the prompt, unless one of them has a part of its last word."""
        full = self._read(prompt + option)
        if full.spans is not None:
            first = full.first_past(len(prompt))
            if first < len(full.ids) and not prompt[full.spans[first][0] :].strip():
                return full.ids[first:]
        return self._read(option, special=False).ids


def _whole(text: str, end: int) -> int:
    """The last place up to `end` that does not part a letter from its marks, or what a joiner joins."""
    while end > 0 and (unicodedata.category(text[end])[0] == "M" or _JOINER in text[end - 1 : end + 1]):
        end -= 1
    return end
