"""The one place that launches kernels, and the options that all launches share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from triton import knobs

# Whether the kernels of this process were made for Triton's interpreter, which runs them on CPU tensors.
INTERPRETED = bool(knobs.runtime.interpret)

# Bits are the interface: no contraction of a product and a sum into one rounding.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

# Strata per program of `sparse`, and strata at a time in a program of `tiles`.
STRATA = 512
# Elements per program, and per inner tile.
BLOCK = 8192
TILE = 1024
# Of `sparse` and `tiles`, whose phases wait for memory one after the other: more threads wait at the same time.
WIDE = {"num_warps": 8}
WIDE_TILE = 4096
LEAST_LANES = 32 * WIDE["num_warps"]


def dense_tile(kernel: str, distribution: str, grouped: bool, more: bool = False) -> int:
    """Elements per inner tile of "move" and "step".

    Bigger ones share a call for random words among more elements of a thread, which needs more registers: not where
    words are drawn element by element, or where there is `more` in registers: several directions or state buffers.
    """
    if grouped and not more:
        return 4096 if kernel == "move" and distribution == "rademacher" else 2048
    return TILE


# hook(kernel's name, programs, compile-time constants, run): called in place of a launch, which `run()` is.
Hook: TypeAlias = Callable[[str, "int | tuple[int, int]", dict[str, Any], Callable[[], None]], None]

_hooks: list[Hook] = []


@contextmanager
def around(hook: Hook) -> Iterator[None]:
    """While it is open, `hook` is called in place of every launch; without a call of `run` there is none.

    Of several hooks the one that came last is called first, and its `run` calls the one before.
    """
    _hooks.append(hook)
    try:
        yield
    finally:
        _hooks.remove(hook)


def launch(kernel: Any, programs: int | tuple[int, int], *arguments: Tensor | int | float, **constants: Any) -> None:
    """Runs the programs of a kernel on the device of its first argument, on that device's current stream.

    `constants` are the kernel's, and options of the compiler that differ from OPTIONS.
    """
    if _hooks:
        run = partial(_run, kernel, programs, arguments, constants)
        for hook in _hooks:
            run = partial(hook, kernel.fn.__name__, programs, constants, run)
        run()
    else:
        _run(kernel, programs, arguments, constants)


def _run(kernel: Any, programs: int | tuple[int, int], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    first = arguments[0]
    assert isinstance(first, Tensor)
    with torch.cuda.device(first.device if first.is_cuda else -1):
        kernel[programs if isinstance(programs, tuple) else (programs,)](*arguments, **(OPTIONS | constants))
