"""The paper's tasks from the command line: local files, three kinds of models, full and adapter training, resuming."""

import json
import signal
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers import synthetic, tiny
from helpers.tiny import refused
from jaguar.cli import commands as cli
from jaguar.cli import flags as flag_groups
from jaguar.cli import parser
from jaguar.scoring import Scorer, evaluate, naive
from jaguar.tasks import TASKS
from jaguar.trainer.trainer import ZOTrainer

MODELS = ("opt", "llama", "roberta")
STEPS = ["--max_steps", "4", "--per_device_train_batch_size", "8", "--learning_rate", "1e-2", "--tau", "1e-2"]
# Every task with every model in the default suite, half of them with LoRA; the other halves in test-full.
CASES = [
    pytest.param(task, name, lora, marks=[] if (i + j) % 2 == lora else pytest.mark.slow)
    for i, task in enumerate(synthetic.ROWS)
    for j, name in enumerate(MODELS)
    for lora in (0, 1)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name in MODELS:
        tiny.saved(folder / name, name)
    for task, make in synthetic.ROWS.items():
        synthetic.write(folder / f"{task}.jsonl", make(44, 0))
        synthetic.write(folder / f"{task}-test.csv", make(15, 1))
    return folder


def words(folder, out, task, name, *more):
    files = ["--train_file", str(folder / f"{task}.jsonl"), "--test_file", str(folder / f"{task}-test.csv")]
    model = ["--model", str(folder / name), "--task", task, "--num_dev", "12", "--output_dir", str(out)]
    return tiny.later_wins(["finetune", *model, *files, *STEPS, "--coordinates", "0.5", *more])


@pytest.mark.parametrize(("task", "name", "lora"), CASES)
def test_a_task_runs_end_to_end_and_resumes_to_the_same_bits(folder, tmp_path, capsys, task, name, lora):
    more = ["--eval_steps", "2", "--save_steps", "2", "--save_total_limit", "3", *["--lora"] * lora]
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert cli.main(words(folder, whole, task, name, *more)) == 0
    resume = ["--resume_from_checkpoint", str(whole / "checkpoint-2")]
    assert cli.main(words(folder, again, task, name, *more, *resume)) == 0
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    for place in ("", "checkpoint-4"):
        one, other = (load_file(out / place / file) for out in (whole, again))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert ((whole / "model.safetensors").exists(), (whole / "adapter_config.json").exists()) == (not lora, bool(lora))
    figures = [json.loads((out / "metrics.json").read_text()) for out in (whole, again)]
    for key in ("before", "after", "paired_se", "evaluations", "best_value", "best_step"):
        assert figures[0][key] == figures[1][key]
    assert figures[0]["dev_rows"] == 12 and figures[0]["train_rows"] == 32 and figures[0]["test_rows"] == 15
    losses = {entry["step"]: entry["loss"] for entry in figures[0]["evaluations"]}
    assert figures[0]["best_value"] == min(losses.values()) and losses[figures[0]["best_step"]] == min(losses.values())
    capsys.readouterr()
    # With the task that was saved beside it; no flag names it.
    assert cli.main(["eval", "--model", str(whole), "--test_file", str(folder / f"{task}-test.csv")]) == 0
    assert f"{figures[0]['after']['accuracy']:.2%}" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*no step is taken")
@pytest.mark.parametrize("moment", ["step 3", "evaluation", "last step"])
def test_ctrl_c_with_dev_rows_goes_on_to_the_same_bits(folder, tmp_path, monkeypatch, capsys, moment):
    """Trainer ends by removing checkpoints that are not the best one; the one to go on from is not."""
    more = ["--eval_steps", "2", "--max_steps", "6"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main(words(folder, whole, "copa", "opt", *more)) == 0
    steps = []

    def press(original, when):
        def pressed(self, *args, **others):
            steps.append(len(steps))
            if len(steps) == when:
                signal.raise_signal(signal.SIGINT)
            return original(self, *args, **others)

        return pressed

    line = words(folder, parts, "copa", "opt", *more)
    monkeypatch.setattr(sys, "argv", ["jaguar", *line])
    with monkeypatch.context() as patch:
        name, when = {"step 3": ("training_step", 3), "evaluation": ("evaluate", 1), "last step": ("training_step", 6)}[
            moment
        ]
        patch.setattr(ZOTrainer, name, press(getattr(ZOTrainer, name), when))
        code = cli.main(line)
    printed = capsys.readouterr().out
    assert code == 130
    step = 6 if moment == "last step" else 3
    how = "before it was scored; the tuned model is in" if step == 6 else "after step 3 of 6"
    assert f"stopped {how}" in printed
    assert cli.main([*line, "--resume_from_checkpoint", str(parts / f"checkpoint-{step}")]) == 0
    one, other = (load_file(out / "model.safetensors") for out in (whole, parts))
    assert all(torch.equal(one[key], other[key]) for key in one)
    figures = [json.loads((out / "metrics.json").read_text()) for out in (whole, parts)]
    for key in ("before", "after", "evaluations", "best_step", "training_forward_passes"):
        assert figures[0][key] == figures[1][key]


@pytest.mark.filterwarnings("ignore:.*no step is taken")
def test_a_checkpoint_of_the_last_step_is_not_trained_on(folder, tmp_path, capsys):
    line = words(folder, tmp_path / "out", "sst2", "opt", "--save_steps", "4")
    assert cli.main(line) == 0
    last = str(tmp_path / "out" / "checkpoint-4")
    more = words(folder, tmp_path / "more", "sst2", "opt", "--save_steps", "4", "--resume_from_checkpoint", last)
    assert cli.main(more) == 0
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "more"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    capsys.readouterr()
    assert cli.main(["eval", "--model", last, "--test_file", str(folder / "sst2-test.csv")]) == 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("task", synthetic.ROWS)
def test_evaluation_in_batches_is_that_of_single_rows(folder, task, name):
    from jaguar.cli.finetune.data import Data
    from jaguar.models.load import load

    data = Data(task=task, test_file=str(folder / f"{task}-test.csv"))
    loaded = load(str(folder / name), use_cpu=True)
    rows = data.test_rows(str(folder / name))
    made = data.make_task(str(folder / name), loaded, rows)
    examples = data.examples(made, rows, loaded)
    scorer = Scorer(loaded.model, loaded.pad_id, loaded.kind, made.objective)
    with torch.no_grad():  # one row of one option at a time, as the benchmark evaluates
        alone = [naive.scores(loaded.model, [e], loaded.kind, loaded.pad_id, multiple=1)[0] for e in examples]
    many = evaluate(scorer, examples, 16)
    torch.testing.assert_close(torch.stack(alone), many.logits, rtol=1e-5, atol=1e-5)
    assert torch.stack(alone).argmax(1).tolist() == many.logits.argmax(1).tolist()


@pytest.mark.parametrize("flag", ["--prefix_tuning", "--prompt_tuning"])
def test_virtual_tokens_from_the_command_line(folder, tmp_path, flag):
    out = tmp_path / "out"
    assert cli.main(words(folder, out, "copa", "llama", flag, "--num_virtual_tokens", "3")) == 0
    assert (out / "adapter_config.json").exists() and json.loads((out / "metrics.json").read_text())["steps"] == 4
    # Trained on from there: the adapter of the folder, not another one on top.
    more = words(folder, tmp_path / "more", "copa", "llama")
    more[more.index("--model") + 1] = str(out)
    assert cli.main(more) == 0
    one, other = (load_file(path / "adapter_model.safetensors") for path in (out, tmp_path / "more"))
    assert one.keys() == other.keys() and any(not torch.equal(one[key], other[key]) for key in one)


def test_lora_beside_four_bit_weights(folder, tmp_path):
    pytest.importorskip("bitsandbytes", reason="4 bits are bitsandbytes'")
    out = tmp_path / "out"
    more = ["--lora", "--load_in_4bit", "--use_cpu", "--save_steps", "2"]
    assert cli.main(words(folder, out, "copa", "llama", *more)) == 0
    saved = load_file(out / "adapter_model.safetensors")
    assert saved and {t.dtype for t in saved.values()} == {torch.float32}
    after = json.loads((out / "metrics.json").read_text())["after"]
    again = cli.main(
        ["eval", "--model", str(out), "--test_file", str(folder / "copa-test.csv"), "--load_in_4bit", "--use_cpu"]
    )
    assert again == 0
    from jaguar.cli.finetune.data import Data
    from jaguar.models.load import load

    data, loaded = Data(test_file=str(folder / "copa-test.csv")), load(str(out), use_cpu=True, in_4bit=True)
    rows = data.test_rows(str(out))
    examples = data.examples(data.make_task(str(out), loaded, rows), rows, loaded)
    scores = evaluate(Scorer(loaded.model, loaded.pad_id, "causal", "answer"), examples, 32)
    # The frozen base is the same after checkpoints were saved as when it is loaded anew.
    assert scores.figures()["loss"] == pytest.approx(after["loss"], rel=1e-6)


def test_k_shot_and_a_dev_file(folder, tmp_path, capsys):
    line = words(folder, tmp_path / "shots", "sst2", "roberta", "--num_k_shot", "8", "--eval_steps", "4")
    del line[line.index("--num_dev") : line.index("--num_dev") + 2]
    assert cli.main(line) == 0
    metrics = json.loads((tmp_path / "shots" / "metrics.json").read_text())
    assert metrics["train_rows"] == metrics["dev_rows"] == 16
    line = words(folder, tmp_path / "dev", "sst2", "opt", "--dev_file", str(folder / "sst2-test.csv"))
    del line[line.index("--num_dev") : line.index("--num_dev") + 2]
    assert cli.main(line) == 0
    metrics = json.loads((tmp_path / "dev" / "metrics.json").read_text())
    assert metrics["train_rows"] == 44 and metrics["dev_rows"] == 15


def test_multiple_choice_and_the_first_order_baseline(folder, tmp_path):
    rows = [
        {"text": r["premise"], "one": r["choice1"], "two": r["choice2"], "label": r["label"]}
        for r in synthetic.copa(40, 0)
    ]
    for name in ("a.csv", "b.jsonl"):
        synthetic.write(tmp_path / name, rows)
    line = ["finetune", "--model", str(folder / "opt"), "--task", "multiple-choice", "--choice_columns", "one", "two"]
    line += ["--train_file", str(tmp_path / "a.csv"), "--test_file", str(tmp_path / "b.jsonl"), *STEPS[:4]]
    line += ["--method", "fo-sgd", "--learning_rate", "0.1", "--template", "{text} So", "--output_dir"]
    assert cli.main([*line, str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["method"] == "fo-sgd" and metrics["after"]["loss"] < metrics["before"]["loss"]


# -- files of settings, presets, Trainer's own flags -------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_file_of_settings_is_the_command_line(folder, tmp_path, suffix, capsys):
    line = words(folder, tmp_path / "flags", "sst2", "opt", "--lora", "--lora_target_modules", "q_proj", "fc1")
    settings: dict = {"lora": True, "lora_target_modules": ["q_proj", "fc1"], "prefix_tuning": False, "seed": None}
    for flag, value in zip(line[1::2], line[2::2], strict=False):
        if flag == "--lora":
            break
        settings[flag[2:]] = value if "/" in value or flag == "--task" else yaml.safe_load(value)
    settings["output_dir"] = str(tmp_path / "file")
    path = tmp_path / f"run.{suffix}"
    path.write_text(yaml.safe_dump(settings) if suffix == "yaml" else json.dumps(settings))
    assert cli.main(line) == 0
    assert cli.main(["finetune", "--config", str(path)]) == 0
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("flags", "file"))
    assert one.read_bytes() == other.read_bytes()
    assert cli.main(["finetune", "--config", str(path), "--seed", "1", "--overwrite_output_dir"]) == 0  # flags win
    assert one.read_bytes() != other.read_bytes()
    path.write_text(json.dumps({"output_dir": "o", "model": "m", "bf16": False, "lora": False, "optim_args": {"a": 1}}))
    args = parser.parse(["finetune", "--config", str(path)])
    assert args.trainer == {"bf16": False, "optim_args": '{"a": 1}'} and "lora" not in args
    path.write_text("learning_rat: 1e-4\nmodel: m\noutput_dir: o\n")
    assert "unrecognized arguments: --learning_rat=1e-4" in refused(capsys, "finetune", "--config", str(path))
    path.write_text("just words")
    assert "has lines like 'learning_rate: 1e-4'" in refused(capsys, "finetune", "--config", str(path))
    assert "none.yaml" in refused(capsys, "finetune", "--config", "none.yaml")


def test_the_tasks_of_the_command_line_are_the_registered_ones():
    assert tuple(TASKS) == flag_groups.TASKS


def test_published_settings_are_taken_and_flags_win():
    line = ["finetune", "--model", "facebook/opt-1.3b", "--task", "sst2", "--lora", "--output_dir", "o"]
    args = parser.parse([*line, "--max_steps", "7"])
    assert args.trainer == {} and args.preset_found.source and args.lr_scheduler_type == "constant"
    assert args.learning_rate == args.preset_found.settings["learning_rate"] and args.max_steps == 7
    for more in (["--no_preset"], ["--train", "norm"], ["--prompt_tuning"]):
        cut = [word for word in line if word != "--lora"] if more[0] != "--no_preset" else line
        args = parser.parse([*cut, *more])
        assert args.preset_found is None and "learning_rate" not in args
    args = parser.parse([*line, "--num_train_epochs", "3"])
    assert "max_steps" not in args and args.trainer == {"num_train_epochs": 3.0}
    args = parser.parse([*line, "--released"])
    assert args.preset_found is not None and "beta" not in args  # the released step takes none


def test_fields_of_training_arguments_are_flags(folder, tmp_path, capsys):
    line = words(folder, tmp_path / "out", "sst2", "opt", "--report_to", "tensorboard", "--logging_steps", "1")
    assert cli.main(line) == 0
    assert list((tmp_path / "out").rglob("events.out*"))
    assert "unrecognized arguments: --nonsense 3" in refused(
        capsys, *words(folder, tmp_path / "x", "sst2", "opt", "--nonsense", "3")
    )
    assert "'two' is not a whole number of at least 1" in refused(
        capsys, *words(folder, tmp_path / "x", "sst2", "opt", "--save_total_limit", "two")
    )
    assert "fp16=True is mixed precision" in refused(capsys, *words(folder, tmp_path / "x", "sst2", "opt", "--fp16"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["finetune", "--help_all"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "--tau" in printed and "--torch_empty_cache_steps" in printed


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "name", "more", "message"),
    [
        ("sst2", "opt", ("--task", "copa"), "sst2.jsonl, line 1: no column 'premise'"),
        ("sst2", "opt", ("--num_dev", "44"), "--num_dev 44 leaves nothing to train on: there are 44"),
        ("sst2", "opt", ("--num_k_shot", "30"), "leave --num_train and --num_dev out"),
        ("sst2", "opt", ("--template", "{text}"), "--task sst2 has a prompt of its own"),
        ("copa", "opt", ("--max_length", "5"), "the prompt has 18 tokens, the model takes 5"),
        ("sst2", "opt", ("--lora", "--prefix_tuning"), "--lora and --prefix_tuning: choose one adapter"),
        ("sst2", "opt", ("--lora_r", "4"), "--lora_r needs --lora"),
        ("sst2", "opt", ("--lora", "--num_virtual_tokens", "4"), "--num_virtual_tokens needs --prefix_tuning"),
        ("sst2", "opt", ("--lora", "--lora_target_modules", "nope"), "nope: a OPTForCausalLM has no module of this"),
        ("sst2", "opt", ("--lora", "--train", "norm"), "leave it out with an adapter"),
        ("sst2", "roberta", ("--prefix_tuning",), "which PEFT does for causal LMs only; use --lora"),
        ("sst2", "opt", ("--load_in_4bit",), "bitsandbytes|train an adapter beside them, with --lora"),
        ("sst2", "opt", ("--eval_steps", "3", "--save_steps", "2"), "multiple"),
        ("sst2", "opt", ("--num_train_epochs", "2"), "--max_steps and --num_train_epochs: give one of them"),
        ("sst2", "opt", ("--optim", "sgd"), "choose one of jaguar's with --method"),
        ("sst2", "opt", ("--eval_steps", "2", "--metric_for_best_model", "f1"), "there is loss and accuracy"),
        ("sst2", "opt", ("--load_best_model_at_end",), "needs dev rows (--num_dev, --dev_file) and --eval_steps"),
        ("sst2", "opt", ("--report_to", "clearml"), "ClearML"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_names_the_row_or_the_flag(folder, tmp_path, capsys, task, name, more, message):
    error = refused(capsys, *words(folder, tmp_path / "out", task, name, *more))
    assert any(part in error for part in message.split("|")), error


def test_bad_files_and_models_name_the_row_or_the_folder(folder, tmp_path, capsys):
    def line(**more):
        argv = words(folder, tmp_path / "out", "copa", "opt")
        for flag, value in more.items():
            argv[argv.index(f"--{flag}") + 1] = str(value)
        return argv

    rows = synthetic.copa(30, 0)
    for number, (key, value, message) in enumerate(
        [("choice2", "", "line 9: empty choice2"), ("label", 2, "line 9: the label '2' is not one of 0, 1")]
    ):
        bad = [dict(row) for row in rows]
        bad[8][key] = value
        path = synthetic.write(tmp_path / f"bad{number}.jsonl", bad)
        assert message in refused(capsys, *line(train_file=path))
    long = [dict(row) for row in rows]
    long[3]["premise"] = "The road leads on and on " * 40
    path = synthetic.write(tmp_path / "long.csv", long)
    error = refused(capsys, *line(test_file=path))
    assert "long.csv, line 5: the prompt has" in error and "the model takes 128" in error
    # A tokenizer that belongs to another model, and one that has nothing to pad with.
    other = tiny.saved(tmp_path / "other", "opt", vocab_size=300)
    assert "has 380 tokens, but the model embeds only 300" in refused(capsys, *line(model=other))
    bare = tiny.saved(tmp_path / "bare", "llama")
    config = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("pad_token", "eos_token", "extra_special_tokens")})
    )
    assert "neither a pad token nor an end-of-text token" in refused(capsys, *line(model=bare))
    headless = tiny.saved(tmp_path / "headless", "opt")
    config = json.loads((headless / "config.json").read_text())
    (headless / "config.json").write_text(json.dumps(config | {"architectures": ["OPTModel"]}))
    assert "is a OPTModel, which has no head that answers" in refused(capsys, *line(model=headless))
