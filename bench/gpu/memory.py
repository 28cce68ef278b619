"""GPU memory between two jobs: whether the next one fits, and giving back what the last one had."""

from __future__ import annotations

import gc

import torch


def no_room(need: int, device: torch.device) -> str | None:
    """Why a job that needs so many bytes cannot run on the device; None: it can."""
    if device.type == "cuda" and need > (free := torch.cuda.mem_get_info(device)[0]):
        return f"needs {need / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free"
    return None


def release(device: torch.device) -> None:
    """Gives the memory of the last job back, so that the next one does not meet it in pieces."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
