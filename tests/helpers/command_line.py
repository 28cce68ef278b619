"""A folder with tiny models and rows, and command lines on it."""

import pytest

from helpers import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny.causal_lm(folder / "lm")
    tiny.classifier(folder / "classifier")
    tiny.write_csv(folder / "train.csv", tiny.sentences(96, seed=1))
    tiny.write_jsonl(folder / "test.jsonl", tiny.sentences(40, seed=2))
    return folder


def words(folder, out, *more, model="lm"):
    prompt = ["--template", tiny.TEMPLATE, "--verbalizers", " negative", " positive"] if model == "lm" else []
    line = [
        "finetune",
        "--model",
        str(folder / model),
        "--train_file",
        str(folder / "train.csv"),
        "--test_file",
        str(folder / "test.jsonl"),
        "--output_dir",
        str(out),
        "--per_device_train_batch_size",
        "8",
        "--max_steps",
        "6",
        "--learning_rate",
        "1e-2",
        "--tau",
        "1e-2",
        "--coordinates",
        "0.5",
        "--logging_steps",
        "2",
        *prompt,
        *more,
    ]
    return tiny.later_wins(line)
