"""--config: every value is the text in the file, and passes the checks of the command line."""

from __future__ import annotations

import json

import pytest

from helpers.flags import settled  # noqa: F401
from helpers.tiny import refused
from jaguar.cli import settings_file
from jaguar.tasks.presets import presets

BASE = "model: lm\noutput_dir: out\nuse_cpu: true\n"


@pytest.fixture
def run_of(settled, tmp_path):  # noqa: F811
    """The run of a file of settings."""

    def run(text, name="run.yaml", base=BASE):
        path = tmp_path / name
        path.write_text(base + text, encoding="utf-8")
        return settled(["finetune", "--config", str(path)])

    return run


@pytest.fixture
def error_of(settled, tmp_path, capsys):  # noqa: F811
    """The line that refuses a file of settings."""

    def error(text, name="run.yaml", base=BASE):
        path = tmp_path / name
        path.write_text(base + text, encoding="utf-8")
        return refused(capsys, "finetune", "--config", str(path))

    return error


# What YAML 1.1 takes for booleans, null, octals, times, dates, infinities, binaries and numbers with underscores.
WORDS = "no yes on off y n No YES On OFF true False 010 12:30 1_000 2024-01-01 1e-4 .5 0x10 0b11 .inf -.INF .nan 1.0 "
WORDS += "190:20:30 1e3 +1 -0 0o17 ~ null NULL Null = << 685.230_15e+03 2001-12-14T21:59:43Z"
WORDS = WORDS.split()


@pytest.mark.parametrize("word", WORDS)
def test_a_word_means_itself(run_of, word):
    run = run_of(f"verbalizers: [{word}, ' {word}', \"{word}\"]\ntemplate: '{word}: {{text}}'\n")
    assert run.data.verbalizers == (word, f" {word}", word) and run.data.template == f"{word}: {{text}}"
    assert run_of(f"text_column: '{word}'\n").data.text_column == word
    if word not in ("~", "null", "NULL", "Null"):
        assert run_of(f"text_column: {word}\n").data.text_column == word
        assert run_of(f"choice_columns:\n- {word}\n- b\n").data.choice_columns == (word, "b")


@pytest.mark.parametrize("word", ["~", "null", "NULL", "Null", ""])
def test_null_is_left_out(run_of, word):
    assert run_of(f"text_column: {word}\nmax_steps: {word}\nlora: {word}\n") == run_of("")


NUMBERS = {
    "seed": [("010", 10), ("1", 1)],
    "max_steps": [("12", 12)],
    "warmup_steps": [("0.1", 0.1), ("3", 3)],
    "learning_rate": [("1e-4", 1e-4), (".5", 0.5), ("1_0", 10.0), ("1E-3", 1e-3)],
    "coordinates": [("1", 1), ("1.0", 1.0), ("1e-2", 0.01)],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_those_of_the_command_line(run_of, settled, name):  # noqa: F811
    for word, value in NUMBERS[name]:
        found = run_of(f"{name}: {word}\n").arguments[name]
        assert (found, type(found)) == (value, type(value))
        line = ["finetune", "--model", "lm", "--output_dir", "out", "--use_cpu", f"--{name}", word]
        assert settled(line) == run_of(f"{name}: {word}\n") == run_of(f"{name.replace('_', '-')}: {word}\n")


@pytest.mark.parametrize(
    "text", ["seed: 12:30", "max_steps: 1_000", "seed: 0x10", "max_steps: 1e3", "tau: 2024-01-01", "lora: maybe"]
)
def test_what_the_command_line_refuses_is_refused(error_of, text):
    name, _, value = text.partition(": ")
    assert f"--{name}: '{value}' is" in error_of(text)


@pytest.mark.parametrize("word", ["true", "True", "yes", "on", "Y", "1", "'true'"])
def test_switches(run_of, word):
    assert run_of(f"lora: {word}\n").adapter.kind == "lora"
    assert run_of(f"bf16: {word}\n").arguments["bf16"] is True
    off = {"true": "false", "True": "False", "yes": "no", "on": "off", "Y": "n", "1": "0", "'true'": '"false"'}[word]
    assert run_of(f"lora: {off}\n").adapter.kind == "none"
    assert run_of(f"bf16: {off}\n").arguments["bf16"] is False


def test_mappings_have_types(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "k: {a: 1, b: 1e-4, c: true, d: no, e: 'true', f: ~, g: [0x10, .5, 010], h: {i: x}}"
    )
    assert settings_file.read(str(tmp_path / "a.yaml")) == {
        "k": {"a": 1, "b": 1e-4, "c": True, "d": "no", "e": "true", "f": None, "g": [16, 0.5, 10], "h": {"i": "x"}}
    }


def test_mappings_reach_trainer(run_of, error_of):
    text = "lr_scheduler_type: cosine_with_restarts\nlr_scheduler_kwargs: {num_cycles: 2}\n"
    run = run_of(text + "accelerator-config:\n  even_batches: false\n")
    assert run.arguments["lr_scheduler_kwargs"] == {"num_cycles": 2}
    assert json.loads(run.arguments["accelerator_config"]) == {"even_batches": False}
    assert "lr_scheduler_kwargs: 'x' is not a JSON object" in error_of("lr_scheduler_kwargs: x\n")
    assert "put text that begins with a brace in quotes" in error_of("template: {text}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 1\n", "seed is given twice (line 5)"),
        ("max_steps: 1\nmax-steps: 2\n", "max_steps is given twice (line 5)"),
        ("method: zo-sgd\noptim-zo: zo-sgd\n", "method and optim_zo: give one of them"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}\n", "a is given twice (line 4)"),
        ("learning_rat: 1e-4\n", "unrecognized arguments: --learning_rat=1e-4"),
        ("--seed: 1\n", "unrecognized arguments: --__seed=1"),
        ("config: other.yaml\n", "config is for the command line"),
        ("help: true\n", "help is for the command line"),
        ("seed: [1, 2]\n", "unrecognized arguments: 2"),
        ("verbalizers: []\n", "expected at least one argument"),
        ("verbalizers: [[a], b]\n", "a list of settings has words (line 4)"),
        ("? [a, b]\n: c\n", "the name of a setting is a word (line 4)"),
        ("seed: 1\n\t tau: 2\n", "--config "),
        ("a: &x [*x]\n", "the alias *x stands for more than a word"),
        ("---\nseed: 1\n", "--config "),
        ("seed: !!python/object/apply:os.system [x]\n", "argument --seed: 'x' is not a whole number"),
    ],
)
def test_mistakes_are_named(error_of, text, message):
    assert message in error_of(text)


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b", "[]", "3", "null"])
def test_what_is_no_file_of_settings_is_refused(error_of, text):
    for name in ("run.yaml", "run.json"):
        assert "--config " in error_of(text, name=name, base="")


def test_json_means_what_it_says(run_of, error_of):
    base = {"model": "lm", "output_dir": "out", "use_cpu": True}
    more = {"verbalizers": ["no", " \U0001f600"], "learning-rate": 1e-4, "lora": False, "num_dev": None}
    more |= {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}}
    text = json.dumps(base | more, indent="\t")  # tabs and surrogates, which are not YAML
    run = run_of(text, name="run.json", base="")
    assert run.data.verbalizers == ("no", " \U0001f600") and run.data.num_dev is None and run.adapter.kind == "none"
    assert run.arguments["learning_rate"] == 1e-4 and run.arguments["lr_scheduler_kwargs"] == {"num_cycles": 2}
    assert run_of(text, name="run.yaml", base="") == run  # whatever its name
    assert "seed is given twice" in error_of('{"seed": 1, "seed": 2}', name="run.json", base="")
    assert run_of(json.dumps(base)[:-1] + ", seed: 010}", base="").arguments == run_of("seed: 10").arguments


def test_values_may_look_like_flags(run_of):
    run = run_of("verbalizers: ['--lora', -no, '-1']\nlabel_column: --x\n")
    assert run.data.verbalizers == ("--lora", "-no", "-1") and run.data.label_column == "--x"
    assert run.adapter.kind == "none"


def test_the_command_line_wins(settled, tmp_path):  # noqa: F811
    (tmp_path / "run.yaml").write_text(BASE + "seed: 3\nmethod: zo-sgd\nlora: true\nmax-steps: 7\n", encoding="utf-8")
    words = ["--seed=4", "--optim-zo", "jaguar-signsgd", "--lora", "no"]
    run = settled(["finetune", "--config", str(tmp_path / "run.yaml"), *words])
    assert run.arguments["seed"] == 4 and run.arguments["optim_zo"] == "jaguar-signsgd"
    assert run.adapter.kind == "none" and run.arguments["max_steps"] == 7


def test_anchors_blocks_and_a_byte_order_mark(run_of, tmp_path):
    run = run_of(
        "template: |-\n  Review: {text}\n  Sentiment:\ntext_column: &a no\nlabel_column: *a\n", base="\ufeff" + BASE
    )
    assert run.data.template == "Review: {text}\nSentiment:" and run.data.label_column == "no"


@pytest.mark.parametrize("preset", presets(), ids=lambda p: f"{p.model}-{p.task}-{p.method}-{p.adapter}")
def test_presets_arrive_as_they_are_in_their_files(settled, preset):  # noqa: F811
    adapter = {"none": [], "lora": ["--lora"], "prefix": ["--prefix_tuning"], "prompt": ["--prompt_tuning"]}
    words = ["--model", preset.model, "--task", preset.task, "--method", preset.method, *adapter[preset.adapter]]
    run = settled(["finetune", *words, "--output_dir", "out", "--use_cpu"])
    found = vars(run) | vars(run.data) | vars(run.adapter) | run.arguments
    found |= {"lora_r": run.adapter.r, "lora_alpha": run.adapter.alpha}
    for name, value in preset.settings.items():
        assert (found[name], type(found[name])) == (value, type(value)), name
    assert preset.source in run.settings
