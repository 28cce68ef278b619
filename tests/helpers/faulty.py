"""Runs that are killed, or whose files fail, at the n-th file operation; a program that forks one child for each.

    LD_PRELOAD=faults.so python faulty.py FOLDER WHAT:N ...

WHAT is "kill", "EIO" or "ENOSPC", or "time": killed after N milliseconds. A line of JSON for each N: how the run ended,
what was there, and the digest of what a resumed run ended with. N = 0: no fault, and the number of operations.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS, EVERY = 6, 2
KINDS = {"kill": 0, "EIO": errno.EIO, "ENOSPC": errno.ENOSPC}


def forked(work: Callable[[], Any]) -> tuple[int, Any]:
    """Exit status and result of `work` in a child: -9 if it was killed."""
    end, own = os.pipe()
    child = os.fork()
    if not child:
        os.close(end)
        code = 1
        try:
            result = json.dumps(work()).encode()
            os.write(own, result)
            code = 0
        finally:
            os._exit(code)
    os.close(own)
    with os.fdopen(end, "rb") as file:
        text = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), json.loads(text) if text else None


def make(folder: Path, resume: bool | None = None) -> Any:
    from helpers.checkpoints import make as model
    from helpers.checkpoints import trainer

    return trainer(folder, model("tied", seed=int(bool(resume))), STEPS, save_steps=EVERY, save_total_limit=1, beta=0.5)


def digest(run: Any) -> str:
    """A hash of weights and momenta."""
    from helpers.checkpoints import bits

    found = [*bits(run.model).values(), *(e["momentum"] for e in run.zeroth_order.state.values())]
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in found)).hexdigest()


def fault(folder: Path, what: str, n: int) -> dict[str, Any]:
    """A run that meets a fault, and one that goes on."""
    from transformers import TrainerCallback

    lib = ctypes.CDLL(None)
    whole = folder.parent / f"{folder.name}.whole"
    whole.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)

    class Saved(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            with open(whole, "a") as file:
                file.write(f"{state.global_step}\n")

    def run() -> dict[str, Any]:
        job = make(folder)
        job.add_callback(Saved)
        if what == "time":
            signal.setitimer(signal.ITIMER_REAL, n / 1000)  # whose signal ends a process as SIGKILL does
        else:
            lib.faults_arm(f"{folder}/".encode(), ctypes.c_long(n or -1), KINDS[what])
        said = ""
        try:
            job.train()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        counted = int(lib.faults_counted())
        lib.faults_arm(b"", ctypes.c_long(-1), 0)
        return {"said": said, "counted": counted, "digest": "" if said else digest(job)}

    def go_on() -> str:
        job = make(folder, any(folder.glob("checkpoint-*")))
        try:
            job.train(resume_from_checkpoint=True)
        except ValueError as error:  # neither a checkpoint nor a whole step
            assert "No valid checkpoint" in str(error), error
            job.train()
        return digest(job)

    code, found = forked(run)
    saved = [int(line) for line in whole.read_text().split()] if whole.exists() else []
    there = sorted(path.name for path in folder.glob("checkpoint-*"))
    after, resumed = forked(go_on)
    left = sorted(path.name for path in folder.iterdir() if path.name != "runs")
    more = {"saved": saved, "there": there, "after": after, "resumed": resumed, "left": left}
    return {"what": what, "n": n, "code": code} | (found or {}) | more


def main() -> None:
    folder, *cases = sys.argv[1:]
    import torch
    import tqdm

    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # no thread that may hold a lock when a child is made
    tqdm.tqdm.set_lock(threading.RLock())  # its own is shared with children: one that is killed may hold it
    warnings.simplefilter("ignore")
    quiet = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    make(Path(folder) / "first").train()  # imports what the children need
    gc.freeze()  # which looks at all of it in every child
    for case in cases:
        what, n = case.split(":")
        os.write(quiet, (json.dumps(fault(Path(folder) / "run", what, int(n))) + "\n").encode())


if __name__ == "__main__":
    main()
