"""Every method from the command line, all weights and LoRA: interrupted, it goes on to the bits of the whole run."""

import json
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file

from helpers import synthetic, tiny
from helpers.tiny import refused
from jaguar.cli import commands as cli
from jaguar.optimizers.names import METHODS
from jaguar.trainer.trainer import ZOTrainer

# What makes four steps show what a method has: searches, a schedule, Algorithm 4 too.
OPTIONS = {
    "dizo": ["--zo_options", "every=2", "search_steps=2"],
    "zo-adamu": ["--zo_options", "warmup=1", "total=4"],
    "jaguar-signsgd": ["--coordinates", "0.5"],
    "jaguar-muon": ["--coordinates", "0.5"],
}
# A quarter of them in the default suite, all in test-full.
CASES = [
    pytest.param(method, lora, marks=[] if i % 4 == 2 * lora else pytest.mark.slow)
    for i, method in enumerate(METHODS)
    for lora in (0, 1)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    tiny.saved(folder / "opt", "opt")
    synthetic.write(folder / "train.jsonl", synthetic.ROWS["sst2"](44, 0))
    synthetic.write(folder / "test.csv", synthetic.ROWS["sst2"](15, 1))
    return folder


def words(folder, out, method, *more):
    files = ["--train_file", str(folder / "train.jsonl"), "--test_file", str(folder / "test.csv"), "--num_dev", "12"]
    model = ["--model", str(folder / "opt"), "--task", "sst2", "--output_dir", str(out), "--use_cpu"]
    steps = ["--max_steps", "4", "--per_device_train_batch_size", "8", "--eval_steps", "2"]
    sizes = ["--learning_rate", "1e-3"] + ([] if method == "fo-sgd" else ["--tau", "1e-2"])
    return ["finetune", *model, *files, *steps, *sizes, "--method", method, *OPTIONS.get(method, []), *more]


@pytest.mark.parametrize(("method", "lora"), CASES)
def test_an_interrupted_run_ends_with_the_bits_of_a_whole_one(folder, tmp_path, monkeypatch, capsys, method, lora):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--lora"] * lora
    assert cli.main(words(folder, whole, method, *more)) == 0
    real, steps = ZOTrainer.training_step, []

    def pressed(self, *args, **others):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(self, *args, **others)

    line = words(folder, parts, method, *more)
    monkeypatch.setattr(sys, "argv", ["jaguar", *line])
    with monkeypatch.context() as patch:
        patch.setattr(ZOTrainer, "training_step", pressed)
        assert cli.main(line) == 130
    assert "stopped after step 3 of 4" in capsys.readouterr().out
    assert cli.main([*line, "--resume_from_checkpoint", str(parts / "checkpoint-3")]) == 0
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    one, other = (load_file(out / file) for out in (whole, parts))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    if not lora:
        before = load_file(folder / "opt" / "model.safetensors")
        assert any(not torch.equal(one[key], before[key]) for key in one), "it trained"
    figures = [json.loads((out / "metrics.json").read_text()) for out in (whole, parts)]
    assert figures[0]["after"] == figures[1]["after"]
    assert figures[0]["training_forward_passes"] == figures[1]["training_forward_passes"]


WRONG = {
    ("acc-zom", "n_directions=2"): "n_directions=2: the two estimates that momentum subtracts share one direction",
    ("acc-zom", "c=40"): "no a_t may exceed 1: lower c or k, or raise m0",
    ("fzoo", "n_directions=1"): "a standard deviation takes at least 2 directions",
    ("fzoo", "scale=mine"): "scale='mine': choose 'paper', or 'released'",
    ("zo-muon", "algorithm=5"): "algorithm=5: choose 3 or 4",
    ("zo-adamu", "alpha=2"): "alpha=2: give a number in [0, 1]",
    ("zo-adamu", "n_directions=2"): "is one direction a step",
    ("dizo", "bounds=(1.1,1.2)"): "bounds=(1.1, 1.2): give two multiples of the way around 1",
    ("dizo", "serch_steps=3"): "dizo has no argument serch_steps; it has lr, momentum",
    ("forward-grad", "model=3"): "forward-grad has no argument model; it has lr",
    ("forward-grad", "restore=walk"): "forward mode perturbs nothing; leave it out",
    ("zo-signsgd", "scalar_sign=1"): "scalar_sign=1: choose True or False",
}


@pytest.mark.parametrize(("method", "option"), WRONG, ids="-".join)
def test_options_that_make_no_sense_are_named(folder, tmp_path, capsys, method, option):
    line = words(folder, tmp_path / "out", method)
    line = line[: len(line) - len(OPTIONS.get(method, []))]
    said = refused(capsys, *line, "--zo_options", option)
    assert WRONG[method, option] in " ".join(said.split())
