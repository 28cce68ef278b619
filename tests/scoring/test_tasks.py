"""Data, samples and prompts: what is read and asked, and every refusal with the row it is about."""

import numpy as np
import pytest

from helpers import synthetic, tiny
from helpers.tiny import TEXT, write
from jaguar.cli.finetune.data import Data, class_names
from jaguar.models.load import Loaded
from jaguar.tasks import COPA, SST2, TASKS, Encoder, MultipleChoice, Question, TextClassification, WinoGrande, described
from jaguar.tasks.rows import Row, hub_rows, read_rows
from jaguar.tasks.sampling import drawn, k_shot, train_and_dev


def row(**fields):
    return Row(fields, "a.csv, line 7")


def test_csv_and_jsonl_give_the_same_rows(tmp_path):
    rows = [*tiny.sentences(5, 0), ('with, a comma and "quotes"', "positive"), ("two\nlines", "negative")]
    a = read_rows(tiny.write_csv(tmp_path / "a.csv", rows), TEXT)
    b = read_rows(tiny.write_jsonl(tmp_path / "b.jsonl", rows), TEXT)
    assert [(r["text"], r["label"]) for r in a] == [(r["text"], r["label"]) for r in b] == rows
    assert a[1].where == f"{tmp_path / 'a.csv'}, line 3"


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
        read_rows(write(tmp_path / name, text), TEXT, "name others with --text_column")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_rows(tmp_path / "none.csv", TEXT)


def test_class_names_sort_as_numbers_where_they_are():
    assert class_names([row(label=label) for label in ("10", "9", "2")]) == ["2", "9", "10"]
    assert class_names([row(label=label) for label in ("b", "a", "b")]) == ["a", "b"]


# -- data sets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["sst2", "copa", "winogrande"])
def test_a_folder_of_the_hubs_form_is_read_through_datasets(tmp_path, task):
    made = synthetic.ROWS[task](30, 0)
    synthetic.write(tmp_path / "train.jsonl", made)
    synthetic.write(tmp_path / "validation.jsonl", synthetic.ROWS[task](10, 1))
    data = Data(task=task, dataset=str(tmp_path), num_dev=5)
    splits = data.splits("some/model")
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (25, 5, 10)
    read = {r.where: r for r in (*splits.train, *splits.dev)}
    for i, entry in enumerate(made):
        found = read[f"{tmp_path}, train, row {i}"]
        assert all(found[field] == str(entry[field]).strip() for field in TASKS[task].columns)


def test_a_data_set_that_cannot_be_loaded_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"could not load the data set .*--train_file and --test_file"):
        hub_rows(str(tmp_path / "none"), None, ("train",), {})
    synthetic.write(tmp_path / "train.jsonl", synthetic.sst2(3, 0))
    with pytest.raises(ValueError, match=r"has no split 'validation' \(there is: train\)"):
        Data(task="sst2", dataset=str(tmp_path)).splits("m")
    with pytest.raises(ValueError, match=r"row 0: no column 'premise'"):
        hub_rows(str(tmp_path), None, ("train",), COPA.columns)
    with pytest.raises(ValueError, match="--test_file is missing"):
        Data(task="sst2", train_file="a.csv").splits("m")
    with pytest.raises(ValueError, match="text-classification has no data set of its own"):
        Data().splits("m")


# -- samples -----------------------------------------------------------------------------------------------------------


def test_the_benchmarks_sample():
    """One permutation under numpy's seed; of the first num_train + num_dev the last num_dev are dev rows."""
    rows = list(range(2000))
    np.random.seed(3)
    order = np.random.permutation(2000).tolist()
    train, dev = train_and_dev(rows, 1000, 500, 3)
    assert train == order[:1000] and dev == order[1000:1500]
    assert drawn(rows, 872, 3) == order[:872] and drawn(rows, None, 3) == rows
    train, dev = train_and_dev(rows[:400], 1000, 100, 0)  # COPA
    assert len(train) == 300 and len(dev) == 100 and sorted(train + dev) == rows[:400]
    train, dev = train_and_dev(rows, None, 100, 0)
    assert len(train) == 1900 and not set(train) & set(dev)
    assert train_and_dev(rows, None, 0, 0) == (rows, [])
    with pytest.raises(ValueError, match="--num_dev 500 leaves nothing to train on: there are 60"):
        train_and_dev(rows[:60], 1000, 500, 0)


def test_k_shot_takes_k_of_each_label_for_train_and_for_dev():
    rows = [(i, i % 3 == 0) for i in range(90)]
    train, dev = k_shot(rows, lambda r: str(r[1]), 10, seed=13)
    for part in (train, dev):
        assert sum(label for _, label in part) == 10 and len(part) == 20
    assert not set(train) & set(dev) and k_shot(rows, lambda r: str(r[1]), 10, seed=21)[0] != train
    with pytest.raises(ValueError, match=r"--num_k_shot 16 needs 32 training rows of every label .* label True has 30"):
        k_shot(rows, lambda r: str(r[1]), 16, seed=0)


def test_sizes_are_the_benchmarks_unless_others_are_given(tmp_path):
    pool = synthetic.write(tmp_path / "pool.jsonl", synthetic.sst2(1700, 0))
    test = synthetic.write(tmp_path / "test.jsonl", synthetic.sst2(1100, 1))
    files = {"train_file": str(pool), "test_file": str(test)}
    splits = Data(task="sst2", **files).splits("m")
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (1000, 500, 1000)
    splits = Data(task="sst2", num_train=20, num_dev=0, num_eval=7, **files).splits("m")
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (20, 0, 7)
    splits = Data(task="sst2", dev_file=str(test), num_dev=30, **files).splits("m")
    assert (len(splits.train), len(splits.dev)) == (1000, 30) and "test.jsonl" in splits.dev[0].where
    splits = Data(task="sst2", num_k_shot=16, **files).splits("m")
    assert (len(splits.train), len(splits.dev)) == (32, 32)
    assert Data(task="sst2", **files).splits("m") != Data(task="sst2", train_set_seed=1, **files).splits("m")


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_prompts_are_the_benchmarks():
    asked = SST2().question(row(sentence="a fine film", label="1"), masked=False)
    assert (asked.prompt, asked.options, asked.label) == ("a fine film It was", (" terrible", " great"), 1)
    assert SST2().question(row(sentence="a fine film", label="0"), masked=True).suffix == " ."
    premise = {"premise": "My body cast a shadow.", "choice1": "The sun rose.", "choice2": "I cut the grass."}
    asked = COPA().question(row(**premise, question="cause", label="0"), masked=False)
    assert asked.prompt == "My body cast a shadow because"
    assert asked.options == (" the sun rose.", " I cut the grass.")
    assert COPA().question(row(**premise, question="effect", label="1"), False).prompt.endswith("shadow so")
    sentence = "Ann gave Bob a book because _ was kind."
    asked = WinoGrande().question(row(sentence=sentence, option1="Ann", option2="Bob", answer="2"), masked=False)
    assert (asked.prompt, asked.options, asked.suffix) == (
        "Ann gave Bob a book because",
        (" Ann", " Bob"),
        " was kind.",
    )
    assert asked.label == 1


def test_prompts_of_ones_own():
    task = TextClassification("Review: {text} It was {mask} .", ("n", "p"), (" bad", " good"))
    asked = task.question(row(text="fine", label="p"), masked=True)
    assert (asked.prompt, asked.suffix, asked.label) == ("Review: fine It was", " .", 1)
    with pytest.raises(ValueError, match=r"goes on after \{mask\}; a causal language model answers at the end"):
        task.question(row(text="fine", label="p"), masked=False)
    task = MultipleChoice("{text} Answer:", ("a", "b", "c"))
    choices = {"choice 0": "3", "choice 1": "four", "choice 2": "five"}
    asked = task.question(row(text="2 + 2?", **choices, label="1"), masked=False)
    assert (asked.prompt, asked.options, asked.label) == ("2 + 2? Answer:", (" 3", " four", " five"), 1)
    assert task.question(row(text="2 + 2?", **choices, label="five"), False).label == 2


def test_columns_of_choices_may_be_called_like_other_fields(tmp_path):
    path = synthetic.write(tmp_path / "a.csv", [{"q": "2 + 2?", "text": "3", "label": "4", "gold": "1"}] * 3)
    files = {"train_file": str(path), "test_file": str(path)}
    data = Data(task="multiple-choice", text_column="q", choice_columns=("text", "label"), label_column="gold", **files)
    asked = MultipleChoice("{text}", data.choice_columns).question(data.splits("m").train[0], masked=False)
    assert (asked.prompt, asked.options, asked.label) == ("2 + 2?", (" 3", " 4"), 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "sst2", "text_column": "t"}, "--text_column is for --task text-classification and multiple-choice"),
        ({"choice_columns": ("a", "b")}, "--choice_columns is for --task multiple-choice; --task text-class"),
        ({"task": "sst2", "dataset": "d", "train_file": "a.csv"}, "--dataset and files of your own"),
        ({"task": "sst2", "num_k_shot": 4, "num_dev": 3}, "leave --num_train and --num_dev out"),
    ],
)
def test_what_would_not_be_looked_at_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Data(**given).splits("m")


def test_a_task_comes_back_from_its_description():
    for task in (SST2(), COPA(), WinoGrande(), MultipleChoice("{text}", ("a", "b"))):
        assert described(task.description()) == task
    task = TextClassification("{text}:", ("n", "p"), (" bad", " good"))
    assert described(task.description()) == task
    with pytest.raises(ValueError, match="there is no task 'glue'"):
        described({"task": "glue"})
    with pytest.raises(ValueError, match="no description of text-classification"):
        described({"task": "text-classification", "temper": 1})


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_tokens_of_an_option_are_counted_as_the_benchmark_does():
    tokenizer = tiny.tokenizer_of("opt")
    (example,) = Encoder(tokenizer, "causal", 128)([Question("a film It was", (" great", " terrible cast"), 0, "r")])
    prompt = tokenizer("a film It was").input_ids
    for choice, option in zip(example.choices, (" great", " terrible cast"), strict=True):
        full = tokenizer("a film It was" + option).input_ids
        assert list(choice.ids) == full[:-1] and list(choice.targets) == full[len(prompt) :]
        assert [choice.ids[p] for p in choice.positions[1:]] == list(choice.targets[:-1])


def test_what_closes_a_sequence_is_not_scored():
    """A tokenizer that ends every text with </s> would have it asked for after any option."""
    closing = tiny.tokenizer_of("roberta")
    (example,) = Encoder(closing, "causal", 128)([Question("a film It was", (" great", " terrible"), 0, "r")])
    assert [closing.decode(choice.targets) for choice in example.choices] == [" great", " terrible"]


def test_a_masked_lm_sees_as_many_masks_as_the_option_has_tokens():
    tokenizer = tiny.tokenizer_of("roberta")
    asked = Question("a film It was", (" great", " the old railway"), 0, "row 3", suffix=" .")
    (example,) = Encoder(tokenizer, "masked", 128)([asked])
    for choice, option in zip(example.choices, asked.options, strict=True):
        assert list(choice.targets) == tokenizer(option, add_special_tokens=False).input_ids
        assert [choice.ids[p] for p in choice.positions] == [tokenizer.mask_token_id] * len(choice.targets)
        assert tokenizer.decode(choice.ids[choice.positions[-1] + 1 :]) == " .</s>"
    with pytest.raises(ValueError, match="row 3: the text itself has the mask token"):
        Encoder(tokenizer, "masked", 128)([Question("a <mask> film", (" a", " b"), 0, "row 3")])


def test_a_long_text_loses_its_end_and_keeps_the_question():
    tokenizer = tiny.tokenizer()
    task = TextClassification("Review: {text} Sentiment:", ("n", "p"), (" negative", " positive"))
    long = task.question(row(text="lovely " + "film " * 50, label="p"), False)
    (example,) = Encoder(tokenizer, "causal", 64, max_length=12)([long])
    ids = example.choices[0].ids
    assert len(ids) == 12
    assert tokenizer.decode(ids).startswith("Review : lovely") and tokenizer.decode(ids).endswith("Sentiment :")
    with pytest.raises(ValueError, match=r"line 7: the prompt has .* tokens, the model takes 3; --max_length 3 is too"):
        Encoder(tokenizer, "causal", 64, max_length=3)([task.question(row(text="film", label="p"), False)])
    with pytest.raises(ValueError, match=r"line 7: the prompt has 55 tokens, the model takes 20; .* --max_length 20"):
        Encoder(tokenizer, "causal", 20)([long])  # unasked, nothing is cut


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        (SST2(), {"sentence": "a", "label": "2"}, "line 7: the label '2' is not one of 0, 1"),
        (SST2(), {"sentence": "a", "label": "-1"}, "line 7: the label '-1' is not one of 0, 1"),
        (COPA(), {"premise": "a", "choice1": "b", "choice2": "c", "question": "why", "label": "0"}, "line 7: .*'why'"),
        (WinoGrande(), {"sentence": "a", "option1": "b", "option2": "c", "answer": "1"}, "line 7: .* has 0 blanks"),
        (WinoGrande(), {"sentence": "_ or _", "option1": "b", "option2": "c", "answer": "1"}, "line 7: .*2 blanks"),
        (WinoGrande(), {"sentence": "a _", "option1": "b", "option2": "c", "answer": "0"}, "line 7: .*'0' is not one"),
        (
            MultipleChoice("{text}", ("a", "b")),
            {"text": "t", "choice 0": "x", "choice 1": "y", "label": "2"},
            "line 7: the label '2'",
        ),
    ],
)
def test_a_row_that_does_not_fit_its_task_is_named(task, fields, message):
    with pytest.raises(ValueError, match=message):
        task.question(row(**fields), False)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: TextClassification("no place", ("a", "b")), r"no \{text\}"),
        (lambda: TextClassification("{text} {mask} {mask}", ("a", "b")), r"more than one \{mask\}"),
        (lambda: TextClassification("{text}", ("a",)), "one label only"),
        (lambda: TextClassification("{text}", ("a", "b"), (" x",)), "1 verbalizers for the 2 labels"),
        (lambda: TextClassification("{text}", ("a", "b"), (" x", " x")), "are the same"),
        (lambda: MultipleChoice("{text}", ("a",)), "give two or more different columns"),
        (lambda: MultipleChoice("{text}", ("a", "a")), "give two or more different columns"),
    ],
)
def test_a_task_that_cannot_work_is_refused(made, message):
    with pytest.raises(ValueError, match=message):
        made()


def test_options_that_are_no_options_are_refused():
    encoder = Encoder(tiny.tokenizer_of("opt"), "causal", 64)
    with pytest.raises(ValueError, match="row 5: the option '' adds no token"):
        encoder([Question("a film", (" great", ""), 0, "row 5")])
    with pytest.raises(ValueError, match=r"row 5: two of the options .* are the same for this tokenizer"):
        encoder([Question("a film", (" great", " great"), 0, "row 5")])
    tokenizer = tiny.tokenizer_of("opt")
    with pytest.raises(ValueError, match="has no mask token"):
        Encoder(tokenizer, "masked", 64)


def test_a_task_and_a_model_that_do_not_fit_are_refused():
    model = type("BertForSequenceClassification", (), {"config": None})()
    classifier, causal = (Loaded(model, None, kind, 0, 64) for kind in ("classifier", "causal"))
    with pytest.raises(ValueError, match="--task copa needs a causal or masked language model; a BertFor"):
        Data(task="copa").make_task("m", classifier, [])
    with pytest.raises(ValueError, match="--verbalizers are for --task text-classification"):
        Data(task="sst2", verbalizers=(" a", " b")).make_task("m", causal, [])
    with pytest.raises(ValueError, match="--task sst2 has a prompt of its own"):
        Data(task="sst2", template="{text}").make_task("m", causal, [])
