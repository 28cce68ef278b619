"""Runs that end otherwise: by a signal, without a reader, beside another run, after their last step."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from helpers.runs import place as place
from helpers.runs import words
from helpers.tiny import refused
from jaguar.cli import commands as cli
from jaguar.cli.finetune import job as finetune
from jaguar.cli.finetune import outcome
from jaguar.method import rules
from jaguar.optimizers.interrupts import ENDING
from jaguar.scoring import Scorer
from jaguar.trainer import saving
from jaguar.trainer.trainer import ZOTrainer

SIGNALS = {"INT": 130, "TERM": 143, "HUP": 129}
# Where signals come: inside forward passes, between moves of parameters, while files are written and named.
TICKS = [
    (Scorer, "loss"),
    (Scorer, "scores"),
    (rules, "perturbed"),
    (rules, "sign_step"),
    (os, "fsync"),
    (os, "replace"),
]


def same(one: Path, other: Path) -> bool:
    tensors = [load_file(folder / "model.safetensors") for folder in (one, other)]
    figures = [json.loads((folder / "metrics.json").read_text())["after"] for folder in (one, other)]
    return figures[0] == figures[1] and all(bool((tensors[0][k] == tensors[1][k]).all()) for k in tensors[1])


@contextmanager
def ticking(tick: Callable[[], None]) -> Iterator[None]:
    """`tick` is called at every place of TICKS."""

    def wrapped(real: Any) -> Any:
        def call(*args: Any, **others: Any) -> Any:
            tick()
            return real(*args, **others)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in TICKS:
            patch.setattr(owner, name, wrapped(getattr(owner, name)))
        yield


def ticks_of(run: Callable[[], int]) -> int:
    count = [0]

    def tick() -> None:
        count[0] += 1

    with ticking(tick):
        assert run() == 0
    return count[0]


def ended_by(number: int, at: int, line: list[str]) -> int:
    """Exit code of a run that a signal reaches at the tick `at`."""
    left = [at]

    def tick() -> None:
        left[0] -= 1
        if not left[0]:
            signal.raise_signal(number)

    with ticking(tick):
        return cli.main(line)


def ending_law(place: Path, out: Path, capsys: Any, name: str, at: int, monkeypatch: Any) -> str:
    """The exit code tells the signal; what is said goes on to the run that was not disturbed."""
    line = words(place, out)
    monkeypatch.setattr(sys, "argv", ["jaguar", *line])
    for number in ENDING[1:]:
        signal.signal(number, signal.SIG_DFL)
    handlers = [signal.getsignal(number) for number in ENDING]
    code = ended_by(getattr(signal, f"SIG{name}"), at, line)
    assert [signal.getsignal(number) for number in ENDING] == handlers
    said = "".join(capsys.readouterr())
    assert code == SIGNALS[name] and "Traceback" not in said, (at, said)
    if "go on with:" in said:
        again = shlex.split(re.search(r"go on with: .*?(?:-m )?jaguar (finetune .*)", said)[1])
        assert cli.main(again) == 0, (at, said)
    elif not (out / "metrics.json").exists():
        shutil.rmtree(out)
        assert cli.main(line) == 0
    assert same(out, place / "whole"), (at, said)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    return said


@pytest.fixture(scope="module")
def total(place: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    return ticks_of(lambda: cli.main(words(place, tmp_path_factory.mktemp("ticks") / "out")))


@pytest.mark.filterwarnings("ignore:.*no step is taken")
@pytest.mark.parametrize("name", SIGNALS)
def test_signals_end_a_run_alike(
    place: Path, total: int, tmp_path: Path, capsys: Any, monkeypatch: Any, name: str
) -> None:
    said = ending_law(place, tmp_path / "out", capsys, name, total // 2, monkeypatch)
    assert "stopped after step" in said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no step is taken")
@pytest.mark.parametrize("instant", range(1, 11))
@pytest.mark.parametrize("name", SIGNALS)
def test_signals_at_ten_instants(
    place: Path, total: int, tmp_path: Path, capsys: Any, monkeypatch: Any, name: str, instant: int
) -> None:
    ending_law(place, tmp_path / "out", capsys, name, instant * total // 11 + SIGNALS[name] % 3, monkeypatch)


def test_ignored_signals_stay_ignored(place: Path, tmp_path: Path, capsys: Any) -> None:
    """Of nohup, and of jobs in the background of a script."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ended_by(signal.SIGHUP, 40, words(place, tmp_path / "out")) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert same(tmp_path / "out", place / "whole")


@pytest.mark.filterwarnings("always:.*enable_jit_checkpoint")
def test_sigterm_with_a_checkpoint_of_trainer_is_no_end(
    place: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    step, calls = ZOTrainer.training_step, []

    def stopped(self: Any, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(ZOTrainer, "training_step", stopped)
    assert cli.main(words(place, tmp_path / "out", "--enable_jit_checkpoint")) == 143
    said = " ".join(capsys.readouterr().out.split())
    assert "--enable_jit_checkpoint has no effect" in said and "stopped after step 2 of 4" in said
    assert not (tmp_path / "out" / "metrics.json").exists()


# -- after the last step -----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.filterwarnings("always:.*no step is taken")
@pytest.mark.parametrize("where", ["scoring", "drawing", "reading back"])
def test_a_run_that_died_after_its_last_step_is_finished(place: Path, tmp_path: Path, capsys: Any, where: str) -> None:
    owner, name = {
        "scoring": (finetune.Finetuning, "test"),
        "drawing": (outcome, "draw_curves"),
        "reading back": (finetune, "lost"),
    }[where]
    real = getattr(owner, name)

    def dies(*args: Any, **others: Any) -> Any:
        if "zero-shot" in args:
            return real(*args, **others)
        raise Killed

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, dies)
        cli.main(words(place, out))
    resume = words(place, out, "--resume_from_checkpoint", str(out / "checkpoint-4"))
    if where == "reading back":  # all is there
        assert "already holds a model" in refused(capsys, *resume)
        resume.append("--overwrite_output_dir")
    assert cli.main(resume) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "is of step 4, and the run has 4: no step is taken" in said and "tuned" in said
    assert same(out, place / "whole") and (out / "training_curves.png").is_file()
    figures = [json.loads((folder / "metrics.json").read_text()) for folder in (out, place / "whole")]
    assert figures[0]["training_forward_passes"] == figures[1]["training_forward_passes"]
    assert figures[0]["training_seconds"] > 0


# -- without a reader --------------------------------------------------------------------------------------------------


class Broken:
    """A pipe whose reader has left."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise OSError


def test_a_run_goes_on_when_nobody_reads_it(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stdout", Broken())
    monkeypatch.setattr(sys, "stderr", Broken())
    assert cli.main(words(place, tmp_path / "out")) == 0
    assert same(tmp_path / "out", place / "whole")


def test_a_stop_is_told_where_somebody_reads(
    place: Path, total: int, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "stdout", Broken())
    assert ended_by(signal.SIGTERM, total // 2, words(place, tmp_path / "out")) == 143
    assert "stopped after step" in capsys.readouterr().err


def test_a_closed_pipe(place: Path, tmp_path: Path) -> None:
    """`jaguar finetune | head -1`: the run ends well, and so does its exit code."""
    line = [sys.executable, "-m", "jaguar", *words(place, tmp_path / "out")]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr:
        error = process.stderr.read()
    assert process.wait() == 0, error
    assert "Traceback" not in error and "BrokenPipe" not in error
    assert same(tmp_path / "out", place / "whole")


# -- beside another run ------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from jaguar.trainer.saving import only_run
with only_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_folder_has_one_run_at_a_time(place: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert "another run is writing to" in refused(capsys, *words(place, out))
        assert list(out.iterdir()) == []
    finally:
        holder.kill()
        holder.communicate()
    assert cli.main(words(place, out)) == 0  # a dead run keeps nothing
    with saving.only_run(out), saving.only_run(out):  # a run and its trainer
        pass
    assert not saving._locks


def test_a_child_does_not_keep_the_folder(tmp_path: Path) -> None:
    with saving.only_run(tmp_path):
        end, own = os.pipe()
        child = os.fork()
        if not child:
            os.write(own, b"1" if saving._locks else b"0")
            os._exit(0)
        assert os.read(end, 1) == b"0"
        os.waitpid(child, 0)
        refusal = "from jaguar.trainer.saving import only_run; from pathlib import Path\nwith only_run(Path('.')): pass"
        done = subprocess.run([sys.executable, "-c", refusal], cwd=tmp_path, capture_output=True, text=True)
        assert "another run is writing" in done.stderr
