"""Several processes on the CPU, with a group of gloo, that run one function each and hand back what it returns."""

from __future__ import annotations

import gc
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(function: Callable[..., Any], world: int, folder: Path, *given: Any) -> list[Any]:
    """function(rank, *given) of every rank, in order; a process that fails ends all, with its traceback.

    The function is one of a module, and what it returns can be pickled.
    """
    mp.start_processes(_work, (function, world, str(folder), given), nprocs=world, start_method="spawn")
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(world)]


def _work(rank: int, function: Callable[..., Any], world: int, folder: str, given: tuple[Any, ...]) -> None:
    gc.freeze()  # what was imported; an optimizer looks among all objects for the modules of its tensors
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    # A file and not a port: another process may take a port that is free now.
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = function(rank, *given)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.barrier()
    # Not the interpreter's way: threads of groups that something refers to would be aborted (`jaguar.cli.processes`).
    os._exit(0)
