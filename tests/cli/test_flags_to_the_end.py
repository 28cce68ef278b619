"""Every flag in a run that goes to its end."""

from __future__ import annotations

import signal

import pytest
import torch
import transformers

from helpers import tiny
from helpers.flag_tables import KIND, KINDS, OWN, WITH, WORDS
from helpers.flags import settled as settled
from jaguar.cli import commands as cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flags")
    tiny.causal_lm(folder / "lm")
    tiny.write_csv(folder / "train.csv", tiny.sentences(24, seed=1))
    tiny.write_csv(folder / "test.csv", tiny.sentences(8, seed=2))
    return folder


@pytest.fixture
def as_before():
    """What some flags change in the whole process."""
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    yield
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False
    transformers.logging.set_verbosity_warning()


def _runs(folder, out, words):
    files = ["--train_file", str(folder / "train.csv"), "--test_file", str(folder / "test.csv")]
    line = ["finetune", "--model", str(folder / "lm"), *files, "--output_dir", str(out), "--use_cpu"]
    line += [] if "--num_train_epochs" in words else ["--max_steps", "2"]
    line += ["--per_device_train_batch_size", "4", "--template", "{text}:", "--verbalizers", " negative", " positive"]
    return cli.main(tiny.later_wins([*line, *words]))


# What means something else in a run with these rows: names of files, columns and modules.
NAMES_OF_THINGS = {*OWN["text"].split(), "task", "load_in_4bit", "max_length", "num_train"}
RUNNING = sorted((KIND.keys() | WORDS.keys()) - NAMES_OF_THINGS)
QUICK = {"save_total_limit", "eval_strategy", "dataloader_num_workers", "bf16", "lr_scheduler_type", "signs"}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNNING]
)
def test_what_is_taken_runs_to_the_end(name, folder, tmp_path, as_before):
    taken = [WORDS[name]] if name in WORDS else KINDS[KIND[name]][0]
    value = next(value for value in taken if value is not None)
    assert _runs(folder, tmp_path / "out", [*WITH.get(name, []), f"--{name}", value]) == 0
