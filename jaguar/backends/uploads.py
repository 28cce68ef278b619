"""Copies from the host to a device without waiting; and CUDA graphs, whose replays would make such a copy again."""

from __future__ import annotations

import torch
from torch import Tensor

# Tensors that captured launches read: a graph owns none of its arguments, and nothing says when a graph is gone.
_FOR_REPLAYS: dict[int, object] = {}


def capturing(device: torch.device) -> bool:
    """Tells whether work for a device goes into a CUDA graph now, instead of running."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device) -> None:
    """Raises RuntimeError while a CUDA graph is captured on a device.

    What the host gives would be frozen in the graph, or copied again from memory that is long somebody else's.
    """
    if capturing(device):
        raise RuntimeError(
            "a CUDA graph is being captured, and this needs numbers from the host, which a replay would not have: run "
            "the step once before the capture, on the same stream and with the same tensors, and fill its numbers "
            "before the capture too"
        )


def for_replays(device: torch.device, *read: object) -> None:
    """Keeps what launches on a device read for good if a CUDA graph is captured there: its replays read it too."""
    if capturing(device):
        _FOR_REPLAYS.update((id(one), one) for one in read)


def uploaded(host: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor's copy on a device, queued on the current stream; itself where the device is the CPU.

    Equivalent to: `host.to(device)`.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    return staged(host, device).to(device, non_blocking=True)


def staged(host: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor in memory from which the host's copy to `device` does not wait for what the device has to do yet.

    Equivalent to: `host`.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    refuse_capture(device)
    return host.pin_memory() if device.type == "cuda" else host
