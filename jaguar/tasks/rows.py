"""Rows of labelled data: from CSV and JSONL files, with errors that name the line, or from the hub by `datasets`."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaguar.models.errors import said

# How libraries print what is not there; as text (in a CSV file, or in quotes) these are words.
_MISSING = ("none", "nan", "nat", "<na>", "inf", "infinity")


@dataclass(frozen=True)
class Row:
    """The fields of one row as stripped text, as written in its file, and where it stands: "train.csv, line 7"."""

    fields: Mapping[str, str]
    where: str

    def __getitem__(self, field: str) -> str:
        return self.fields[field]


def read_rows(path: str | Path, columns: Mapping[str, str], hint: str = "") -> list[Row]:
    """The rows of a .csv (with a header line) or .jsonl file (an object a line).

    Args:
        path: the file.
        columns: field of a row -> column of the file.
        hint: how to name other columns; ends the error for one that is missing.

    Raises:
        ValueError: the file is missing, of another kind, corrupt, or has no rows; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data file {path} does not exist")
    readers = {".csv": _csv_objects, ".jsonl": _json_objects, ".json": _json_objects}
    if path.suffix.lower() not in readers:
        raise ValueError(f"data file {path} must end in .csv or .jsonl")
    try:
        lines = readers[path.suffix.lower()](path)
        rows = [_row(entry, columns, f"{path}, line {line}", hint) for line, entry in lines]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file: {error}") from None
    if not rows:
        raise ValueError(f"data file {path} has no rows")
    return rows


def hub_rows(dataset: str, config: str | None, splits: Sequence[str], columns: Mapping[str, str]) -> list[list[Row]]:
    """The rows of each split of a data set on the hub, or in a folder that `datasets.load_dataset` can read.

    Raises:
        ValueError: `datasets` is not installed, or the data set cannot be loaded or lacks a split or a column.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"reading {dataset!r} needs the package datasets: pip install datasets, or give files of your "
            "own with --train_file and --test_file"
        ) from None
    local = Path(dataset).is_dir()
    try:
        loaded = load_dataset(dataset, None if local else config, trust_remote_code=False)
    except Exception as error:  # the hub client and the builders raise nearly everything
        raise ValueError(
            f"could not load the data set {dataset!r}: {said(error)} (give a folder or files of your own with "
            "--dataset or --train_file and --test_file, or check the network)"
        ) from error
    found = []
    for split in splits:
        if split not in loaded:
            raise ValueError(f"the data set {dataset!r} has no split {split!r} (there is: {', '.join(loaded)})")
        where = f"{dataset}, {split}, row "
        found.append([_row(entry, columns, f"{where}{i}", "") for i, entry in enumerate(loaded[split])])
    return found


def _row(entry: Mapping[str, Any], columns: Mapping[str, str], where: str, hint: str) -> Row:
    return Row({field: _value(entry, column, field, where, hint) for field, column in columns.items()}, where)


def _value(entry: Mapping[str, Any], column: str, field: str, where: str, hint: str) -> str:
    if column not in entry:
        raise ValueError(f"{where}: no column {column!r} (there is: {', '.join(map(str, entry))}){hint and '; '}{hint}")
    value = entry[column]
    if isinstance(value, (list, tuple, dict, bytes)):
        raise ValueError(f"{where}: the column {column!r} holds a {type(value).__name__} instead of a {field}")
    if not isinstance(value, str) and str(value).lower().lstrip("-") in _MISSING:
        raise ValueError(f"{where}: the column {column!r} holds nothing ({value}) instead of a {field}")
    if isinstance(value, bool):
        value = json.dumps(value)
    text = str(value).strip()
    if not text:
        raise ValueError(f"{where}: empty {field}")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{where}: the {field} has half of a surrogate pair, which is no character")
    return text


def _csv_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file, _long_fields():
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


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Lifts Python's limit of 131,072 characters a field."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                entry = json.loads(text, parse_int=str, parse_float=str, object_pairs_hook=_fields)
            except _Repeated as error:
                raise ValueError(f"{path}, line {line}: {error}") from None
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                raise ValueError(
                    f"{path}, line {line}: not JSON ({reason}); a .jsonl file has one object a line"
                ) from None
            if not isinstance(entry, dict):
                raise ValueError(
                    f"{path}, line {line}: a {type(entry).__name__} instead of an object with named fields"
                )
            yield line, entry


class _Repeated(ValueError):
    """Two fields of an object have the same name."""


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Repeated(f"two fields are called {twice!r}")
    return fields
