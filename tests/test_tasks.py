"""Data files and prompts: what is read, and every refusal with the line it is about."""

import pytest
import tiny

from jaguar.tasks.text_classification import Row, Task, class_names, read_rows


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_csv_and_jsonl_give_the_same_rows(tmp_path):
    rows = [*tiny.sentences(5, 0), ('with, a comma and "quotes"', "positive"), ("two\nlines", "negative")]
    a = read_rows(tiny.write_csv(tmp_path / "a.csv", rows))
    b = read_rows(tiny.write_jsonl(tmp_path / "b.jsonl", rows))
    assert [(r.text, r.label) for r in a] == [(r.text, r.label) for r in b] == rows


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "text,label\na,b\n", "must end in .csv or .jsonl"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "review,label\na,b\n", "line 2: no column 'text' .*review, label.*--text_column"),
        ("a.csv", "text,label\nhello\n", "line 2: the column 'label' holds nothing"),
        ("a.csv", "text,label\na,b,c\n", "line 2: more fields"),
        ("a.csv", "text,label\n  ,b\n", "line 2: empty text"),
        ("a.csv", "text,label\nfine,1\nbad,\n", "line 3: empty label"),
        ("a.csv", 'text,label\n"open,1\n', "not a CSV file"),
        ("a.csv", b"text,label\n\xff\xfe,1\n", "not UTF-8"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", "[1, 2]\n", "line 1: a list instead of an object"),
        ("a.jsonl", '{"text": "a"}\n', "line 1: no column 'label'"),
        ("a.jsonl", '{"text": null, "label": 1}\n', "line 1: the column 'text' holds nothing"),
        ("a.jsonl", '{"text": ["a"], "label": 1}\n', "line 1: the column 'text' holds a list"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', "line 1: the text has half of a surrogate"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1: not JSON"),
        ("a.csv", "text,label,text\na,b,c\n", "same name"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path / name, text))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_rows(tmp_path / "none.csv")


def test_class_names_sort_as_numbers_where_they_are():
    assert class_names([Row("", label, 1) for label in ("10", "9", "2")]) == ["2", "9", "10"]
    assert class_names([Row("", label, 1) for label in ("b", "a", "b")]) == ["a", "b"]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (("no place", ("a", "b")), r"no \{text\}"),
        (("{text}", ("a",)), "one label only"),
        (("{text}", ("a", "b"), (" x",)), "1 verbalizers for the 2 labels"),
    ],
)
def test_a_task_that_cannot_work_is_refused(task, message):
    with pytest.raises(ValueError, match=message):
        Task(*task)


def test_verbalizers_must_be_different_single_tokens():
    tokenizer = tiny.tokenizer()
    assert len(Task("{text}", ("n", "p"), (" negative", " positive")).option_ids(tokenizer)) == 2
    with pytest.raises(ValueError, match="' very dull' is 2 tokens"):
        Task("{text}", ("n", "p"), (" very dull", " positive")).option_ids(tokenizer)
    with pytest.raises(ValueError, match="same token"):
        Task("{text}", ("n", "p"), (" positive", "positive")).option_ids(tokenizer)


def test_a_long_text_loses_its_end_and_keeps_the_question():
    tokenizer = tiny.tokenizer()
    task = Task("Review: {text} Sentiment:", ("n", "p"), (" negative", " positive"))
    (example,) = task.examples([Row("lovely " + "film " * 50, "p", 2)], tokenizer, 12)
    assert len(example.ids) == 12
    assert tokenizer.decode(example.ids).startswith("Review : lovely") and tokenizer.decode(example.ids).endswith(
        "Sentiment :"
    )
    with pytest.raises(ValueError, match="line 2: the template alone"):
        task.examples([Row("film", "p", 2)], tokenizer, 3)
    with pytest.raises(ValueError, match="line 7: the label 'x' is not one of n, p"):
        task.examples([Row("film", "x", 7)], tokenizer, 12)
