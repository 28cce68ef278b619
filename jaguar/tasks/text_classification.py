"""Text classification from a CSV or JSONL file: rows, labels, prompts, and the tokens that a model sees."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One labelled text; `line` is where it stands in its file."""

    text: str
    label: str
    line: int


@dataclass(frozen=True)
class Example:
    """A prompt as token ids, and the index of its class."""

    ids: tuple[int, ...]
    label: int


def read_rows(path: str | Path, text_column: str = "text", label_column: str = "label") -> list[Row]:
    """The rows of a .csv (with a header line) or .jsonl file (an object a line).

    Raises:
        ValueError: the file is missing, of another kind, corrupt, or has no rows; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data file {path} does not exist")
    readers = {".csv": _csv_objects, ".jsonl": _json_objects, ".json": _json_objects}
    if path.suffix.lower() not in readers:
        raise ValueError(f"data file {path} must end in .csv or .jsonl")
    rows = []
    try:
        for line, entry in readers[path.suffix.lower()](path):
            text, label = (
                _value(entry, column, flag, f"{path}, line {line}")
                for column, flag in ((text_column, "text"), (label_column, "label"))
            )
            rows.append(Row(text, label, line))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file: {error}") from None
    if not rows:
        raise ValueError(f"data file {path} has no rows")
    return rows


def _value(entry: dict[str, Any], column: str, what: str, where: str) -> str:
    if column not in entry:
        raise ValueError(f"{where}: no column {column!r} (there is: {', '.join(entry)}); name it with --{what}_column")
    value = entry[column]
    if value is None or isinstance(value, (list, dict)):
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"{where}: the column {column!r} holds {kind} instead of a {what}")
    text = str(value).strip()
    if not text:
        raise ValueError(f"{where}: empty {what}")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{where}: the {what} has half of a surrogate pair, which is no character")
    return text


def _csv_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise ValueError(f"{path}: two columns of the header have the same name ({', '.join(names)})")
        for entry in reader:
            if None in entry:
                raise ValueError(
                    f"{path}, line {reader.line_num}: more fields than the header has columns; quote texts with commas"
                )
            yield reader.line_num, entry


def _json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                entry = json.loads(text)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                raise ValueError(
                    f"{path}, line {line}: not JSON ({reason}); a .jsonl file has one object a line"
                ) from None
            if not isinstance(entry, dict):
                raise ValueError(
                    f"{path}, line {line}: a {type(entry).__name__} instead of an object with text and label"
                )
            yield line, entry


def class_names(rows: Sequence[Row]) -> list[str]:
    """The labels that occur, sorted: as numbers if all of them are whole numbers, else as text."""
    labels = {row.label for row in rows}
    try:
        return sorted(labels, key=lambda label: (int(label), label))
    except ValueError:
        return sorted(labels)


@dataclass(frozen=True)
class Task:
    """How a text becomes a prompt, and which tokens stand for the classes.

    Attributes:
        template: the prompt; `{text}` stands for the text.
        labels: class names as they stand in the data, in class order.
        verbalizers: for causal LMs, what the model is expected to say for each class, leading blank included; for
            sequence classifiers empty.
    """

    template: str
    labels: tuple[str, ...]
    verbalizers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if "{text}" not in self.template:
            raise ValueError(f"the template {self.template!r} has no {{text}}, so every prompt would be the same")
        if len(self.labels) < 2:
            raise ValueError(f"the data has one label only ({', '.join(self.labels)}); there is nothing to tell apart")
        if self.verbalizers and len(self.verbalizers) != len(self.labels):
            raise ValueError(
                f"{len(self.verbalizers)} verbalizers for the {len(self.labels)} labels "
                f"{', '.join(self.labels)}; give one for "
                "each, in this order"
            )

    def option_ids(self, tokenizer: Any) -> list[int]:
        """The token id of each verbalizer.

        Raises:
            ValueError: one is not exactly one token, or two are the same token.
        """
        ids = []
        for word in self.verbalizers:
            pieces = tokenizer(word, add_special_tokens=False).input_ids
            if len(pieces) != 1:
                shown = " ".join(repr(tokenizer.decode([piece])) for piece in pieces)
                raise ValueError(
                    f"the verbalizer {word!r} is {len(pieces)} tokens for this model ({shown}); choose a word "
                    "of one token, "
                    "usually with a leading blank"
                )
            ids.append(pieces[0])
        if len(set(ids)) < len(ids):
            raise ValueError(f"two of the verbalizers {self.verbalizers} are the same token")
        return ids

    def examples(self, rows: Sequence[Row], tokenizer: Any, max_length: int) -> list[Example]:
        """Every row as a prompt of at most `max_length` tokens; a text that is too long loses its end.

        Raises:
            ValueError: a label is not among the classes, or the template alone is too long; the line is named.
        """
        classes = {label: i for i, label in enumerate(self.labels)}
        examples = []
        for row in rows:
            if row.label not in classes:
                raise ValueError(f"line {row.line}: the label {row.label!r} is not one of {', '.join(self.labels)}")
            ids = tokenizer(self.template.replace("{text}", row.text)).input_ids
            text = tokenizer(row.text, add_special_tokens=False).input_ids if len(ids) > max_length else []
            while len(ids) > max_length:
                if not text:
                    raise ValueError(
                        f"line {row.line}: the template alone is longer than max_length={max_length} tokens"
                    )
                text = text[: min(len(text) - 1, len(text) - (len(ids) - max_length))]
                ids = tokenizer(self.template.replace("{text}", tokenizer.decode(text))).input_ids
            examples.append(Example(tuple(ids), classes[row.label]))
        return examples
