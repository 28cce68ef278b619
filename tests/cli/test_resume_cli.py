"""`jaguar finetune` goes on from exactly what was saved; what decides nothing may be written otherwise."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MixtralConfig, MixtralForCausalLM

from helpers import tiny
from helpers.tiny import refused
from jaguar.cli import commands as cli
from jaguar.cli.finetune import job as finetune
from jaguar.cli.finetune.run import STATE
from jaguar.models.load import load
from jaguar.trainer import weights

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models, rows, and a run with checkpoints at steps 2 and 4 of 4."""
    folder = tmp_path_factory.mktemp("resume")
    tiny.causal_lm(folder / "lm")
    torch.manual_seed(0)
    mixtral = MixtralConfig(**SIZES, num_local_experts=4, num_key_value_heads=2)
    for name, model in (("neox", GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))), ("moe", MixtralForCausalLM(mixtral))):
        model.save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    for name, count, seed in (("train", 64, 1), ("test", 24, 2), ("dev", 24, 3)):
        tiny.write_csv(folder / f"{name}.csv", tiny.sentences(count, seed))
    assert cli.main(words(folder, "out")) == 0
    return folder


def words(place, out, *more, model="lm", train="train.csv"):
    files = ["--train_file", str(place / train), "--test_file", str(place / "test.csv")]
    steps = ["--max_steps", "4", "--save_steps", "2", "--save_total_limit", "5", "--per_device_train_batch_size", "8"]
    options = ["--learning_rate", "1e-2", "--coordinates", "0.5", "--tau", "1e-2", "--use_cpu"]
    template = ["--template", tiny.TEMPLATE]
    return ["finetune", "--model", str(place / model), "--output_dir", str(place / out), *files, *steps, *options,
            *template, *more]  # fmt: skip


def resume(place, step=2, out="out"):
    return ["--resume_from_checkpoint", str(place / out / f"checkpoint-{step}")]


def same(one, other):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "more",
    [
        ["--seed", "0"],
        ["--optim_zo", "jaguar-signsgd"],
        ["--weight_decay", "0.0", "--beta", "0.9"],
        ["--train_set_seed", "0", "--n_directions", "1"],
        ["--lr_scheduler_type", "linear", "--logging_steps", "1"],
    ],
    ids=lambda more: more[0],
)
def test_an_explicit_default_is_the_same_run(place, tmp_path, more):
    assert cli.main(words(place, tmp_path / "again", *more, *resume(place))) == 0
    assert same(place / "out", tmp_path / "again")


def test_names_of_folders_decide_nothing(place, tmp_path, monkeypatch):
    moved = tmp_path / "elsewhere"
    shutil.copytree(place, moved)
    monkeypatch.chdir(moved)
    line = words(place, tmp_path / "again")
    line = [word.replace(f"{place}/", "") for word in line]  # relative, of another folder
    line[line.index("lm")] = "lm/"
    assert cli.main([*line, "--resume_from_checkpoint", os.path.join("out", "checkpoint-2/")]) == 0
    assert same(place / "out", tmp_path / "again")


CHANGED = {
    "seed": (["--seed", "1"], "seed = 0, this run has 1"),
    "batch": (["--per_device_train_batch_size", "4"], "per_device_train_batch_size = 8, this run has 4"),
    "schedule": (["--lr_scheduler_type", "cosine"], "lr_scheduler_type = 'linear', this run has 'cosine'"),
    "option": (["--tau", "1e-3"], "tau = 0.01, this run has 0.001"),
    "default option": (["--beta", "0.5"], "beta = 0.9, this run has 0.5"),
    "parameters": (["--train", "norm"], "train = 'all', this run has 'norm'"),
    "template": (["--template", "{text}"], "training rows are not those .*--template was"),
    "rows": (["--num_train", "32"], "training rows are not those .*--num_train was None, is 32"),
    "held-out rows": (["--num_eval", "8"], "held-out rows are not those .*--num_eval was None, is 8"),
    "dtype": (["--dtype", "bfloat16"], "dtype = 'auto', this run has 'bfloat16'"),
    "adapter": (["--lora"], "kind = 'none', this run has 'lora'"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_decides_the_run_is_compared(place, tmp_path, capsys, case):
    more, message = CHANGED[case]
    line = words(place, tmp_path / "again")
    if more[0] in line:
        line[line.index(more[0]) + 1] = more[1]
        more = []
    assert re.search(message, refused(capsys, *line, *more, *resume(place)))


def test_a_file_that_changed_under_its_name_is_noticed(place, tmp_path, capsys):
    rows = tiny.sentences(64, 1)
    text, label = rows[40]
    tiny.write_csv(tmp_path / "train.csv", [*rows[:40], (text, label), *rows[41:]])
    own = words(place, tmp_path / "again")
    own[own.index("--train_file") + 1] = str(tmp_path / "train.csv")
    assert cli.main([*own, *resume(place)]) == 0  # the same rows in another file
    tiny.write_csv(tmp_path / "train.csv", [*rows[:40], (text, "negative" if label == "positive" else "positive"),
                                            *rows[41:]])  # fmt: skip
    error = refused(capsys, *own, "--overwrite_output_dir", *resume(place))
    assert "the training rows are not those" in error


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth",
                                  "model.safetensors"])  # fmt: skip
def test_a_missing_file_is_one_line(place, tmp_path, capsys, file):
    folder = shutil.copytree(place / "out" / "checkpoint-2", tmp_path / "checkpoint-2")
    (folder / file).unlink()
    assert file in refused(capsys, *words(place, tmp_path / "again"), "--resume_from_checkpoint", str(folder))


def test_another_number_of_processes_and_settings_of_old_are_one_line(place, tmp_path, capsys):
    folder = shutil.copytree(place / "out" / "checkpoint-2", tmp_path / "checkpoint-2")
    state = torch.load(folder / STATE, weights_only=True)
    state["settings"]["values"]["processes"] = 2
    torch.save(state, folder / STATE)
    record = json.loads((folder / "jaguar_checkpoint.json").read_text())
    record["files"][STATE] = (folder / STATE).stat().st_size
    (folder / "jaguar_checkpoint.json").write_text(json.dumps(record))
    line = [*words(place, tmp_path / "again"), "--resume_from_checkpoint", str(folder)]
    assert "processes = 2, this run has 1" in refused(capsys, *line)
    torch.save({"run": {}}, folder / STATE)
    record["files"][STATE] = (folder / STATE).stat().st_size
    (folder / "jaguar_checkpoint.json").write_text(json.dumps(record))
    assert "has no settings" in refused(capsys, *line)


def test_another_model_is_one_line(place, tmp_path, capsys):
    line = words(place, tmp_path / "again")
    line[line.index(str(place / "lm"))] = str(place / "neox")
    error = refused(capsys, *line, *resume(place))
    assert "the run was started with" in error


def test_save_only_model_is_one_line(place, tmp_path, capsys):
    assert cli.main(words(place, tmp_path / "only", "--save_only_model")) == 0
    capsys.readouterr()
    line = words(place, tmp_path / "again", "--resume_from_checkpoint", str(tmp_path / "only" / "checkpoint-2"))
    assert "no optimizer.pt, scheduler.pt, rng_state.pth (save_only_model" in refused(capsys, *line)


@pytest.mark.parametrize("model", ["neox", "moe"])
def test_the_output_is_the_best_checkpoint_and_resuming_ends_there(place, tmp_path, capsys, model):
    """Steps that are far too long: the best model is an early one, and not one of `--save_steps`."""
    more = ["--dev_file", str(place / "dev.csv"), "--eval_steps", "1"]
    line, outs = words(place, tmp_path / "whole", *more, model=model), [tmp_path / "whole", tmp_path / "again"]
    for flag, value in (("--learning_rate", "0.5"), ("--max_steps", "6"), ("--save_steps", "3")):
        line[line.index(flag) + 1] = value
    assert cli.main(line) == 0
    again = [*line, *resume(tmp_path, 3, "whole")]
    again[again.index(str(outs[0]))] = str(outs[1])
    assert cli.main(again) == 0
    assert same(*outs)
    figures = [json.loads((out / "metrics.json").read_text()) for out in outs]
    assert figures[0]["best_step"] == figures[1]["best_step"] not in (3, 6)
    assert figures[0]["after"] == figures[1]["after"]
    capsys.readouterr()
    assert cli.main(["eval", "--model", str(outs[0]), "--test_file", str(place / "dev.csv"), "--use_cpu"]) == 0
    printed = capsys.readouterr().out
    assert f"{figures[0]['best_value']:.4f}" in printed, printed


def test_an_output_that_does_not_come_back_is_no_success(place, tmp_path, capsys, monkeypatch):
    original = finetune.write_model

    def forgetful(folder, model, tokenizer):
        original(folder, model, tokenizer)
        stored = load_file(folder / "model.safetensors")
        save_file({name: tensor + (name == "model.norm.weight") for name, tensor in stored.items()},
                  folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip

    monkeypatch.setattr(finetune, "write_model", forgetful)
    error = refused(capsys, *words(place, tmp_path / "out"), code=1)
    assert "is not the tuned one: model.norm.weight does not come back" in error


@pytest.mark.parametrize("adapter", ["lora", "prefix_tuning", "prompt_tuning"])
def test_adapters_are_read_back(place, tmp_path, capsys, monkeypatch, adapter):
    assert cli.main(words(place, tmp_path / "out", f"--{adapter}")) == 0
    model = load(str(tmp_path / "out"), use_cpu=True).model
    assert weights.lost(model, tmp_path / "out") == []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.requires_grad)
    assert weights.lost(model, tmp_path / "out")


def test_what_a_killed_process_left_is_put_back_and_said(place, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(place / "out", out)
    (out / "checkpoint-4").rename(out / ".checkpoint-4.old")
    shutil.copytree(out / ".checkpoint-4.old", out / ".checkpoint-4.saving" / "checkpoint-4")
    (out / ".checkpoint-3.removed").mkdir()
    (out / ".saving-abc").mkdir()
    assert cli.main([*words(place, out, "--overwrite_output_dir"), *resume(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-4 is as it was before a process was killed" in printed
    assert ".saving-abc: a process was killed while it saved there" in printed
    assert ".checkpoint-3.removed: a process was killed while it removed checkpoint-3" in printed
    assert not list(out.glob(".*")) and same(place / "out", out)
