"""Process group of a command under torchrun, which ends with the command."""

from __future__ import annotations

import contextlib
import gc
import sys


def end_group(failed: bool = False) -> None:
    """Destroys the default process group, if there is one, and ends its threads.

    Interpreters that end with a group race its threads, which give back tensors: a run that had finished could be
    aborted ("terminate called without an active exception", pytorch/pytorch#190489), and torchrun called it failed.
    The threads end with the last object that refers to the group, which may be garbage in a cycle.

    Args:
        failed: this process did not come to its end, perhaps not the others: only a group of gloo is destroyed, as
            NCCL's would wait for operations that never end.
    """
    distributed = sys.modules.get("torch.distributed")  # no import of torch for commands that do without
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if not failed or distributed.get_backend() == "gloo":
        gc.collect()
        with contextlib.suppress(RuntimeError):  # all is written, and said
            distributed.destroy_process_group()
