"""The one place that launches kernels, and the options that all launches share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton import knobs

# Whether the kernels of this process were made for Triton's interpreter, which runs them on CPU tensors.
INTERPRETED = bool(knobs.runtime.interpret)

# Bits are the interface: no contraction of a product and a sum into one rounding.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

# Strata per program of `sparse`, and strata at a time in a program of `tiles`.
STRATA = 512
# Elements per program; per inner tile. Bigger tiles share a call for Rademacher signs among more elements of a thread,
# and need more registers where there is momentum and noise.
BLOCK = 8192
TILES = {"tiles": 1024, "move": {"gaussian": 1024, "rademacher": 4096}, "step": {"gaussian": 1024, "rademacher": 2048}}


def launch(kernel: Any, n_programs: int, *arguments: Tensor | int | float, **constants: Any) -> None:
    """Runs `n_programs` programs of a kernel on the device of its first argument, on that device's current stream."""
    first = arguments[0]
    assert isinstance(first, Tensor)
    with torch.cuda.device(first.device if first.is_cuda else -1):
        kernel[(n_programs,)](*arguments, **constants, **OPTIONS)
