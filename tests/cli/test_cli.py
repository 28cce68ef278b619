"""The command line, run as a user runs it, on tiny models."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import jaguar
from helpers import tiny
from helpers.command_line import folder as folder
from helpers.command_line import words
from helpers.tiny import refused
from jaguar.cli import commands as cli
from jaguar.cli.finetune.data import Data
from jaguar.models.load import Loaded
from jaguar.tasks.rows import Row
from jaguar.trainer.trainer import ZOTrainer

DEMO = Path(__file__).parents[2] / "demo"


def test_finetune_then_eval(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(words(folder, out, "--eval_steps", "3")) == 0
    printed = capsys.readouterr().out
    assert "6 steps in" in printed and "12 forward passes of 8 rows" in printed and "step 6/6" in printed
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == 6 and metrics["training_forward_passes"] == 12 and metrics["test_rows"] == 40
    assert (out / "training_curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder / "lm", out))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert cli.main(["eval", "--model", str(out), "--test_file", str(folder / "test.jsonl")]) == 0
    assert f"{metrics['after']['accuracy']:.2%}" in capsys.readouterr().out  # with the prompt that was saved beside it


@pytest.mark.parametrize(
    "more",
    [
        ("--method", "zo-sgd"),
        ("--optim-zo", "jaguar-signsgd"),
        ("--coordinates", "3"),
        ("--train", "norm"),
        ("--dtype", "bfloat16"),
    ],
    ids=" ".join,
)
def test_finetune_variants(folder, tmp_path, more, monkeypatch):
    monkeypatch.setattr(
        "warnings.warn", lambda *a, **k: None
    )  # bf16 norms at 1.0 lose perturbations, as they should say
    line = words(folder, tmp_path / "out", *more)
    if "zo-sgd" in more:
        at = line.index("--coordinates")
        del line[at : at + 2]
    assert cli.main(line) == 0
    dtypes = {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16 if "bfloat16" in more else torch.float32}


def test_only_the_chosen_parameters_move(folder, tmp_path):
    assert cli.main(words(folder, tmp_path / "out", "--train", "norm")) == 0
    before, after = load_file(folder / "lm" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("norm" in name for name in moved)


def test_a_classifier_is_trained_on_its_classes(folder, tmp_path):
    assert cli.main(words(folder, tmp_path / "out", "--train", "bias", model="classifier")) == 0
    assert cli.main(["eval", "--model", str(tmp_path / "out"), "--test_file", str(folder / "test.jsonl")]) == 0


@pytest.mark.parametrize(
    ("names", "labels", "order"),
    [
        (["Positive", "Negative"], ["negative", "positive"], ("positive", "negative")),
        (["LABEL_0", "LABEL_1"], ["negative", "positive"], ("negative", "positive")),
        (["spam", "ham"], ["1", "0"], ("0", "1")),
        (["spam", "ham"], ["negative", "positive"], None),
        (["LABEL_0", "LABEL_1"], ["a", "b", "c"], None),
    ],
)
def test_classes_keep_the_models_order(names, labels, order):
    config = type("Config", (), {"num_labels": 2, "id2label": dict(enumerate(names))})
    loaded = Loaded(type("Model", (), {"config": config}), None, "classifier", 0, 64)
    rows = [Row({"text": "text", "label": label}, "line 2") for label in labels]
    if order is None:
        with pytest.raises(ValueError, match="the classes of the model are"):
            Data().make_task("", loaded, rows)
    else:
        assert Data().make_task("", loaded, rows).labels == order


def test_training_learns_the_words(folder, tmp_path):
    out = tmp_path / "out"
    assert (
        cli.main(
            words(
                folder,
                out,
                "--max_steps",
                "200",
                "--coordinates",
                "1.0",
                "--learning_rate",
                "5e-3",
                "--logging_steps",
                "50",
            )
        )
        == 0
    )
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["after"]["loss"] < metrics["before"]["loss"] - 0.1 and metrics["after"]["auc"] > 0.8


# -- interrupted runs --------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_to_the_same_bits(folder, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main(words(folder, whole, "--eval_steps", "2")) == 0
    line = words(folder, parts, "--eval_steps", "2")
    step, calls = ZOTrainer.training_step, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(sys, "argv", ["jaguar", *line])
    with monkeypatch.context() as patch:
        patch.setattr(ZOTrainer, "training_step", interrupted)
        assert cli.main(line) == 130
    message = capsys.readouterr().out
    assert "stopped after step 3 of 6" in message
    resume = shlex.split(
        message.split("-m jaguar ")[1] if "-m jaguar" in message else message.split("go on with: jaguar ")[1]
    )
    assert resume == [*line, "--resume_from_checkpoint", str(parts / "checkpoint-3")]
    assert cli.main(resume) == 0
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    figures = [json.loads((out / "metrics.json").read_text()) for out in (whole, parts)]
    assert figures[0]["after"] == figures[1]["after"] and figures[0]["paired_se"] == figures[1]["paired_se"]


def test_save_steps_leaves_checkpoints_that_continue(folder, tmp_path, capsys):
    out, more = tmp_path / "out", tmp_path / "more"
    assert cli.main(words(folder, out, "--save_steps", "4", "--save_total_limit", "2")) == 0
    assert cli.main(words(folder, more, "--resume_from_checkpoint", str(out / "checkpoint-4"))) == 0
    assert (out / "model.safetensors").read_bytes() == (more / "model.safetensors").read_bytes()
    error = refused(
        capsys,
        *words(folder, tmp_path / "x", "--resume_from_checkpoint", str(out / "checkpoint-4"), "--max_steps", "7"),
    )
    assert "max_steps = 6, this run has 7" in error
    assert "has no jaguar_run.pt" in refused(
        capsys, *words(folder, tmp_path / "x", "--resume_from_checkpoint", str(out))
    )
    (out / "checkpoint-4" / "jaguar_run.pt").write_bytes(b"torn")
    assert "damaged" in refused(
        capsys, *words(folder, tmp_path / "x", "--resume_from_checkpoint", str(out / "checkpoint-4"))
    )


def test_ctrl_c_saves_and_says_how_to_go_on(folder, tmp_path):
    line = words(folder, tmp_path / "out", "--max_steps", "100000", "--logging_steps", "1")
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "jaguar", *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for text in process.stdout:
        if text.startswith("step 3/"):
            process.send_signal(signal.SIGINT)
            break
    rest, error = process.communicate(timeout=600)
    assert process.returncode == 130 and "Traceback" not in error
    assert "stopped after step" in rest and "--resume_from_checkpoint" in rest
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert (checkpoint / "model.safetensors").is_file() and (checkpoint / "jaguar_run.pt").is_file()


def test_the_demo_waits_for_a_child_that_is_saving(tmp_path):
    """Ctrl-C reaches both processes; the child needs a while to save, and says so before the demo ends."""
    child = """
import time
try:
    print("working", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    time.sleep(1)
    print("saved")
    raise SystemExit(130)
"""
    code = f"""
import sys; sys.path.insert(0, {str(DEMO)!r})
import demo, subprocess
class Child(subprocess.Popen):
    def __init__(self, words):
        super().__init__([sys.executable, "-c", {child!r}])
    def wait(self, *more):
        print("waiting", flush=True)
        return super().wait(*more)
subprocess.Popen = Child
print("started", flush=True)
sys.exit(demo._run("jaguar-signsgd", 0, []))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    told = set()
    for line in process.stdout:
        told.add(line)
        if told >= {"working\n", "waiting\n"}:
            os.killpg(process.pid, signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=600)
    assert process.returncode == 130 and "saved" in rest


# -- help and info -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "texts"),
    [
        ((), ["finetune", "eval", "info"]),
        (("finetune",), ["--optim_zo", "--learning_rate", "number over the whole set", "default: 100"]),
        (("eval",), ["--test_file", "standard error"]),
        (("info",), ["--model", "jaguar info --method zo-adamm", "evaluations per step, state, source", "zo-sgd-cons"]),
    ],
    ids=["jaguar", "finetune", "eval", "info"],
)
def test_help_teaches(capsys, command, texts):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and all(text in printed for text in texts)


def test_info_names_backends_and_reasons(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "known answer met" in printed and "reference" in printed and "CUDA extension" in printed


def test_info_says_which_tensor_takes_which_path(folder, capsys):
    assert cli.main(["info", "--model", str(folder / "lm")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"Newton-Schulz .*model\.layers\.\*\.self_attn\.q_proj\.weight .*32 x 32 .*2", printed)
    assert re.search(r"sign rule .*model\.embed_tokens\.weight .*64 x 32 .*1", printed)
    assert "lm_head" not in printed  # tied to the embedding: one tensor, moved once
    assert cli.main(["info", "--model", str(folder / "nowhere")]) == 2


def test_info_counts_every_parameter_once(tmp_path, capsys):
    for tied in (True, False):
        tiny.saved(tmp_path / f"m{tied}", "gpt2", tie_word_embeddings=tied)
        assert cli.main(["info", "--model", str(tmp_path / f"m{tied}")]) == 0
        rows = re.findall(r"(\S+) +│ +(\d+(?: x \d+)*) +│ +(\d+)", capsys.readouterr().out)
        found = sum(math.prod(map(int, shape.split(" x "))) * int(count) for _, shape, count in rows)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"m{tied}")
        assert found == sum(p.numel() for p in model.parameters())
        assert [name for name, _, _ in rows].count("lm_head.weight") == (not tied)


def test_what_to_install_is_on_an_index():
    """The package itself is not, so its extras cannot be asked for by name."""
    sources = [path.read_text() for path in Path(jaguar.__file__).parent.rglob("*.py")]
    named = {word for text in sources for word in re.findall(r"pip install ([^\s:,;)\"]+)", text)}
    assert named >= {"peft", "triton", "datasets", "bitsandbytes"} and not [n for n in named if "jaguar" in n]


def test_muon_trains_from_the_command_line(folder, tmp_path, capsys):
    flags = ["--method", "jaguar-muon", "--ns_period", "2", "--ns_coefficients", "quintic", "--vector_lr", "1e-4"]
    assert cli.main(words(folder, tmp_path / "out", *flags)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "quintic, 5 steps, torch.bfloat16, each in 1 of 2 steps" in printed and (tmp_path / "out/config.json").exists()
    )
    assert cli.main(words(folder, tmp_path / "other", "--ns_period", "2")) == 2
    assert "jaguar-signsgd has no option ns_period" in capsys.readouterr().err
    assert cli.main(words(folder, tmp_path / "other", *flags, "--released")) == 2
    assert "--released fixes" in capsys.readouterr().err


def test_a_short_run_is_told_that_momentum_will_hardly_act(folder, tmp_path, capsys):
    assert cli.main(words(folder, tmp_path / "out", "--coordinates", "0.01")) == 0
    assert "momentum will hardly act" in " ".join(capsys.readouterr().out.split())
