"""Values in a data file: each means what was written, or is an error that names the row."""

import csv
import json
import math

import pytest

from helpers.tiny import TEXT, write
from jaguar.cli.finetune.data import Data
from jaguar.tasks.rows import hub_rows, read_rows

MISSING = ["NaN", "null", "Infinity", "-Infinity"]


@pytest.mark.parametrize("column", ["text", "label"])
@pytest.mark.parametrize("value", MISSING)
def test_a_missing_value_is_no_text_and_no_class(tmp_path, value, column):
    other = {"text": "label", "label": "text"}[column]
    lines = [f'{{"text": "a {i}", "label": "b"}}' for i in range(3)]
    path = write(tmp_path / "a.jsonl", "\n".join([*lines, f'{{"{column}": {value}, "{other}": "c"}}']))
    with pytest.raises(ValueError, match=rf"line 4: the column '{column}' holds nothing \(.*\) instead of a {column}"):
        read_rows(path, TEXT)


def test_words_for_missing_values_are_words_where_they_are_text(tmp_path):
    words = ["nan", "NaN", "NA", "null", "None", "inf", "N/A", "-"]
    path = write(tmp_path / "a.csv", "text,label\n" + "".join(f"{w},{w}\n" for w in words))
    assert [(r["text"], r["label"]) for r in read_rows(path, TEXT)] == [(w, w) for w in words]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": w, "label": w}) + "\n" for w in words))
    assert [(r["text"], r["label"]) for r in read_rows(path, TEXT)] == [(w, w) for w in words]


@pytest.mark.parametrize("line", ["a\n", "a,\n", ",b\n", '"",b\n', "a, \n"])
def test_what_a_csv_row_lacks_is_named(tmp_path, line):
    path = write(tmp_path / "a.csv", "text,label\nfine,1\n" + line)
    with pytest.raises(ValueError, match=r"a.csv, line 3: (empty (text|label)|the column 'label' holds nothing)"):
        read_rows(path, TEXT)


WRITTEN = ["true", "false", "1", "0", "-3", "1.0", "1e5", "0.10", "12345678901234567890123", "3.0000000000000000001"]


@pytest.mark.parametrize("value", [*WRITTEN, "9" * 5000])
def test_numbers_and_truths_are_read_as_they_were_written(tmp_path, value):
    (row,) = read_rows(write(tmp_path / "a.jsonl", f'{{"text": {value}, "label": {value}}}'), TEXT)
    assert row["text"] == row["label"] == value
    (row,) = read_rows(write(tmp_path / "a.csv", f"text,label\n{value},{value}\n"), TEXT)
    assert row["text"] == row["label"] == value


def test_a_name_that_stands_twice_in_an_object_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a", "label": 1}\n{"text": "a", "label": 1, "label": 0}\n')
    with pytest.raises(ValueError, match="line 2: two fields are called 'label'"):
        read_rows(path, TEXT)


def test_a_field_of_any_length_is_read_and_pythons_limit_stays(tmp_path):
    limit, text = csv.field_size_limit(), "long " * 60_000
    (row,) = read_rows(write(tmp_path / "a.csv", f'text,label\n"{text}",1\n'), TEXT)
    assert row["text"] == text.strip() and csv.field_size_limit() == limit
    with pytest.raises(ValueError, match="line 2: more fields"):
        read_rows(write(tmp_path / "a.csv", f"text,label\n{text},1,2\n"), TEXT)
    assert csv.field_size_limit() == limit


# -- by `datasets` -----------------------------------------------------------------------------------------------------


def folder(tmp_path, columns, kind="parquet"):
    import datasets

    made = datasets.Dataset.from_dict(columns)
    (made.to_parquet if kind == "parquet" else made.to_json)(str(tmp_path / f"train.{kind}"))
    return str(tmp_path)


@pytest.mark.parametrize("column", ["text", "label"])
@pytest.mark.parametrize("value", [math.nan, None, math.inf], ids=str)
def test_a_missing_number_of_a_data_set_is_named(tmp_path, value, column):
    columns = {"text": ["a", "b", "c"], "label": [0.0, 1.0, 1.0]} | {column: [1.0, value, 0.0]}
    where = folder(tmp_path, columns)
    with pytest.raises(
        ValueError, match=rf"train, row 1: the column '{column}' holds nothing .* instead of a {column}"
    ):
        hub_rows(where, None, ("train",), TEXT)


@pytest.mark.parametrize(
    ("values", "read"),
    [
        ([True, False], ["true", "false"]),
        ([1, 0], ["1", "0"]),
        ([1.0, 0.5], ["1.0", "0.5"]),
        (["nan", "None"], ["nan", "None"]),
    ],
)
def test_values_of_a_data_set_are_those_of_a_file(tmp_path, values, read):
    (rows,) = hub_rows(folder(tmp_path, {"text": ["a", "b"], "label": values}), None, ("train",), TEXT)
    assert [row["label"] for row in rows] == read
    path = write(tmp_path / "b.jsonl", "".join(json.dumps({"text": "a", "label": v}) + "\n" for v in values))
    assert [row["label"] for row in read_rows(path, TEXT)] == read


def test_bytes_and_lists_are_no_text(tmp_path):
    for value, kind in ((b"a", "bytes"), ([1, 2], "list"), ({"a": 1}, "dict")):
        where = folder(tmp_path, {"text": [value], "label": ["b"]})
        with pytest.raises(ValueError, match=f"row 0: the column 'text' holds a {kind} instead of a text"):
            hub_rows(where, None, ("train",), TEXT)


def test_a_class_is_not_made_of_a_missing_label(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": NaN}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: the column 'label' holds nothing \(nan\)"):
        Data(train_file=str(path), test_file=str(path)).splits("m")
