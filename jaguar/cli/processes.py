"""Process group of a command under torchrun, which ends with the command."""

from __future__ import annotations

import gc
import sys


def has_group() -> bool:
    """Tells whether there is a default process group, without an import of torch."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def end_group(failed: bool = False) -> None:
    """Destroys the default process group, if there is one, and ends its threads.

    Interpreters that end with a group race its threads, which give back tensors: a run that had finished could be
    aborted ("terminate called without an active exception", pytorch/pytorch#190489), and torchrun called it failed.
    The threads end with the last object that refers to the group, which may be garbage in a cycle.

    Args:
        failed: this process failed, perhaps not the others: only a group of gloo is destroyed, as NCCL's would wait
            for operations that never come to an end.
    """
    if not has_group():
        return
    from torch import distributed

    if not failed or distributed.get_backend() == "gloo":
        gc.collect()
        distributed.destroy_process_group()
