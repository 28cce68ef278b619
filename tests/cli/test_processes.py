"""`torchrun -m jaguar finetune`: one run, whatever happens to one of its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from helpers.runs import place as place
from helpers.runs import words
from jaguar import ZOTrainer
from jaguar.cli import commands as cli
from jaguar.cli.finetune.progress import Stop
from jaguar.cli.processes import end_group
from jaguar.trainer import arguments as training_args
from jaguar.trainer import checkpoints
from jaguar.trainer.replicas import ReplicasDiffer
from jaguar.trainer.staging import of

# Within which a run has ended, all of its processes: what torchrun leaves them, and what starting Python takes.
SECONDS = 90


def line(place: Path, out: Path, *more: str) -> list[str]:
    """Without --use_cpu: where there is no GPU two processes share the CPU."""
    given = [word for word in words(place, out, *more) if word != "--use_cpu"]
    given[given.index("--per_device_train_batch_size") + 1] = "4"
    return given


# What is left when the program has ended, and before the interpreter does: a group, and threads of one.
PROGRAM = """
import atexit, contextlib, sys
from pathlib import Path
import torch.distributed as dist
from jaguar.cli.commands import main

def threads():
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it ends meanwhile
            yield path.read_text().strip()

def left():
    names = [name for name in threads() if "gloo" in name]
    sys.stderr.write(f"left: {dist.is_initialized()} {names}\\n")

atexit.register(left)
sys.exit(main())
"""


def started(given: list[str], *jaguar: str) -> subprocess.Popen[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(
        [*program, *(jaguar or ("-m", "jaguar")), *given], env=env, text=True, start_new_session=True, **pipes
    )


def test_two_processes_are_one_run(place: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    process = started(line(place, tmp_path / "two"), str(script))
    said, _ = process.communicate(timeout=SECONDS * 3)
    assert process.returncode == 0, said
    assert said.count("left: False []") == 2, said
    assert said.count("tuned: accuracy") == said.count("zero-shot: accuracy") == 1
    one = line(place, tmp_path / "one", "--gradient_accumulation_steps", "2", "--use_cpu")
    assert cli.main(one) == 0
    pair = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert all(torch.equal(pair[0][key], pair[1][key]) for key in pair[0])  # the losses are summed in the same order
    assert [path.name for path in of(tmp_path / "two")] == ["checkpoint-4"]
    checkpoints.check_whole(tmp_path / "two" / "checkpoint-4", 2)


@pytest.mark.slow
def test_processes_that_share_directions_are_one_run(place: Path, tmp_path: Path) -> None:
    """`tests/trainer/test_replicas.py` has the same of a trainer."""
    more = ["--n_directions", "3"]
    process = started(line(place, tmp_path / "two", *more, "--direction_parallel"))
    said, _ = process.communicate(timeout=SECONDS * 3)
    assert process.returncode == 0, said
    assert cli.main(line(place, tmp_path / "one", *more, "--use_cpu")) == 0
    pair = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert all(torch.equal(pair[0][key], pair[1][key]) for key in pair[0])


def test_a_group_ends_with_the_process_that_started_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def started(*_: Any) -> int:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        raise cli.Failed("the group is there")

    monkeypatch.setattr(cli, "_info", started)
    monkeypatch.setattr(sys, "argv", ["jaguar", "info"])
    try:
        assert cli.main() == 1 and "the group is there" in capsys.readouterr().err
        assert not dist.is_initialized()
        assert cli.main(["info"]) == 1  # of a program that goes on
        assert dist.is_initialized()
        with monkeypatch.context() as patch:
            patch.setattr(dist, "get_backend", lambda: "nccl")
            end_group(failed=True)  # would wait for what the others never send
            assert dist.is_initialized()
            end_group()
            assert not dist.is_initialized()
    finally:
        end_group()


def test_processes_that_differ_are_one_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def differs(*_: Any) -> None:
        raise ReplicasDiffer("after 2 steps process 1 of 2 had other weights than the rest")

    monkeypatch.setattr(ZOTrainer, "_check_replicas", differs)
    assert cli.main(words(place, tmp_path / "out")) == 1
    assert "error: after 2 steps process 1 of 2 had other weights" in " ".join(capsys.readouterr().err.split())


def test_processes_that_would_each_be_a_run_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator on which accelerate starts no group."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(training_args.TrainingArguments, "__post_init__", lambda self: None)
    monkeypatch.setattr(training_args.ZOTrainingArguments, "world_size", 1)
    monkeypatch.setattr(training_args.ZOTrainingArguments, "device", "mps")
    with pytest.raises(ValueError, match="2 processes were started, and on mps each would be a run of its own"):
        training_args.ZOTrainingArguments(str(tmp_path))


def sent(process: subprocess.Popen[str], how: str) -> None:
    """A signal to all processes, to what started them, or to one of them."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    child = int(found.stdout.split()[-1])
    {
        "Ctrl-C": lambda: os.killpg(process.pid, signal.SIGINT),
        "closed terminal": lambda: os.killpg(process.pid, signal.SIGHUP),
        "SIGTERM": lambda: process.send_signal(signal.SIGTERM),
        "SIGINT to one": lambda: os.kill(child, signal.SIGINT),
        "SIGKILL of one": lambda: os.kill(child, signal.SIGKILL),
    }[how]()


@pytest.mark.slow
@pytest.mark.parametrize("instant", range(1, 11))
@pytest.mark.parametrize("how", ["Ctrl-C", "closed terminal", "SIGTERM", "SIGINT to one", "SIGKILL of one"])
def test_all_processes_end(place: Path, tmp_path: Path, how: str, instant: int) -> None:
    """At one step, with a checkpoint that is whole; a process that was killed ends the others."""
    given = line(place, tmp_path / "out", "--logging_steps", "1")
    given[given.index("--max_steps") + 1] = "100000"
    given[given.index("--save_steps") + 1] = "6"
    process = started(given)
    assert process.stdout is not None
    said = []
    for text in process.stdout:
        said.append(text)
        if text.startswith(f"step {instant}/"):
            sent(process, how)
            break
    rest, _ = process.communicate(timeout=SECONDS)
    assert process.returncode != 0 and "jaguar/cli/commands.py" not in rest  # torchrun has a traceback of its own
    assert subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).returncode == 1, "one is still there"
    found = of(tmp_path / "out")
    if how == "SIGKILL of one":
        assert bool(found) == (instant > 6) or instant == 6
    else:
        assert rest.count("stopped after step") == 1 and "go on with: torchrun --nproc_per_node 2 -m jaguar" in rest
        assert f"checkpoint-{rest.split('stopped after step ')[1].split()[0]}" == found[-1].name
    for folder in found:
        checkpoints.check_whole(folder, 2)


def test_a_signal_that_comes_while_the_processes_agree_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """It came too late for this step: all go on, and all end at the next."""
    stop, args = Stop(), SimpleNamespace(world_size=2, device="cpu", eval_steps=None, save_total_limit=None)
    state, control = TrainerState(), TrainerControl()
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, _: stop._ask(signal.SIGTERM, None))
    stop.on_step_end(args, state, control)
    assert stop.asked == signal.SIGTERM and not control.should_training_stop
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, _: None)
    stop.on_step_end(args, state, control)
    assert control.should_training_stop and control.should_save


def test_what_one_process_was_asked_all_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, args = Stop(), SimpleNamespace(world_size=2, device="cpu", eval_steps=None, save_total_limit=None)
    control = TrainerControl()
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, _: tensor.fill_(signal.SIGHUP))
    stop.on_step_end(args, TrainerState(), control)
    assert stop.asked == signal.SIGHUP and control.should_training_stop
