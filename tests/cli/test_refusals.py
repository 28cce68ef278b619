"""Bad input, full disks and folders in use: one line and exit code 2."""

import json
import subprocess
import sys

import pytest

from helpers import tiny
from helpers.command_line import folder as folder
from helpers.command_line import words
from helpers.tiny import refused
from jaguar.cli import commands as cli


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tau", "0"), "tau=0.0 of the optimizer: the length of the perturbation must be positive"),
        (("--learning_rate", "-1"), "lr=-1.0 of the optimizer must be at least 0"),
        (("--learning_rate", "much"), "'much' is neither a finite number nor 'auto'"),
        (("--beta", "1"), "beta=1.0 of the optimizer must lie in"),
        (("--coordinates", "0"), "at least 1"),
        (("--coordinates", "1.5"), "a fraction lies in (0, 1]"),
        (("--coordinates", "0.7"), "0.5 and 1"),
        (("--coordinates", "99999999"), "is more than the"),
        (("--layout", "rows"), "invalid choice: 'rows' (choose from "),
        (("--released",), "so --coordinates cannot be given with it"),
        (("--momentum", "0.9"), "jaguar-signsgd has no option momentum"),
        (("--method", "adam"), "invalid choice: 'adam'"),
        (("--backend", "cuda"), "backend='cuda' is not available: "),
        (("--backend", "magic"), "invalid choice: 'magic' (choose from "),
        (("--max_steps", "0"), "not a whole number of at least 1"),
        (("--train", "bias"), "has no such parameters"),
        (("--verbalizers", " negative"), "1 verbalizers for the 2 labels"),
        (("--verbalizers", " positive", " positive"), "are the same"),
        (("--template", "no place"), "no {text}"),
        (("--max_length", "3"), "the model takes 3; --max_length 3 is too short for the rest"),
        (("--text_column", "review"), "no column 'review'"),
        (("--train_file", "none.csv"), "none.csv does not exist"),
        (("--per_device_train_batch_size", "97"), "fewer than one batch of 97"),
        (("--per_device_train_batch_siz", "8"), "unrecognized arguments: --per_device_train_batch_siz 8"),
        (("--output_dir", "/dev/null/x"), "cannot write to the output folder '/dev/null/x'"),
        (("--model", "/none/such"), "the model folder '/none/such' does not exist"),
        (("--nonsense",), "unrecognized arguments: --nonsense"),
        (("--seed", "x"), "'x' is not a whole number from 0 to 4294967295"),
        (("--coordinates", "abc"), "neither a number of coordinates (100) nor a fraction"),
        (("--lr_scheduler_type", "constant", "--warmup_steps", "3"), "choose constant_with_warmup"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(folder, tmp_path, capsys, more, message):
    assert message in refused(capsys, *words(folder, tmp_path / "out", *more))


def test_broken_models_are_refused(folder, tmp_path, capsys):
    empty, torn, other = tmp_path / "empty", tmp_path / "torn", tmp_path / "other"
    empty.mkdir()
    assert "the folder is incomplete or damaged" in refused(
        capsys, *words(folder, tmp_path / "out", "--model", str(empty))
    )
    tiny.causal_lm(torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "could not load the model" in refused(capsys, *words(folder, tmp_path / "out", "--model", str(torn)))
    tiny.causal_lm(other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"], "model_type": "bert"}))
    assert "is a BertModel, which has no head" in refused(
        capsys, *words(folder, tmp_path / "out", "--model", str(other))
    )
    assert "is a file" in refused(capsys, *words(folder, tmp_path / "out", "--model", str(weights)))


def test_a_model_in_the_output_folder_is_not_overwritten_unasked(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(words(folder, out)) == 0
    capsys.readouterr()
    assert "already holds a model" in refused(capsys, *words(folder, out))
    assert cli.main(words(folder, out, "--overwrite_output_dir")) == 0


@pytest.mark.parametrize("limit", [2_000, 60_000], ids=["picture", "weights"])
@pytest.mark.parametrize("stop", [False, True], ids=["end", "ctrl-c"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(folder, tmp_path, stop, limit):
    out = tmp_path / "out"
    assert cli.main(words(folder, out, "--save_steps", "1")) == 0
    good = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.suffix != ".jaguar"}
    # No file of the process may grow past the limit: the kernel refuses the write as it does on a full disk.
    limited = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from jaguar.cli import commands as cli
from jaguar.trainer.trainer import ZOTrainer
step, steps = ZOTrainer.training_step, []
def limiting(self, *args):
    steps.append(args)
    if len(steps) == 6:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        if {stop}:
            signal.raise_signal(signal.SIGINT)
    return step(self, *args)
ZOTrainer.training_step = limiting
sys.exit(cli.main(sys.argv[1:]))
"""
    line = words(folder, out, "--overwrite_output_dir", "--seed", "1")
    done = subprocess.run([sys.executable, "-B", "-c", limited, *line], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "could not save" in done.stderr, done.stderr
    left = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.suffix != ".jaguar"}
    assert left == good


def test_too_little_space_is_said_before_the_training(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
    assert "only 1 MB are free" in refused(capsys, *words(folder, tmp_path / "out"))
