"""Process group of a run under torchrun, from its start to its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def group_ended() -> Iterator[None]:
    """Destroys the default process group that was started inside; one that was there before stays.

    Interpreters that end with a group race its threads, which give back tensors: a run that had finished could be
    aborted ("terminate called without an active exception", pytorch/pytorch#190489), and torchrun called it failed.

    After an error only groups of gloo are destroyed: NCCL's would wait for operations that never come to an end.
    """
    before = dist.is_initialized()
    fine = False
    try:
        yield
        fine = True
    finally:
        if not before and dist.is_initialized() and (fine or dist.get_backend() == "gloo"):
            dist.destroy_process_group()
