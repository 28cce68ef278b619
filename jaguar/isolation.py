"""The closure's surroundings: equal for every evaluation of a step, and untouched afterwards.

A difference of two losses divided by 2 tau magnifies everything else that differs between the two evaluations by
1 / (2 tau): another dropout mask gave a derivative with 14 times its true spread, a stale autocast copy of the
weights was wrong by a factor of three.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

T = TypeVar("T")


class Isolation:
    """Runs evaluations with equal random state and equal module buffers, and leaves both as they were.

    Covers the generators of python, numpy, torch's CPU and the given CUDA devices, and the buffers (running statistics)
    of every module that is called (a closure does not name its model, so modules are seen through a forward hook; one
    whose `forward` is used without calling the module is not seen).
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        cuda = {d.index if d.index is not None else torch.cuda.current_device() for d in devices if d.type == "cuda"}
        self._generators = [torch.default_generator, *(torch.cuda.default_generators[i] for i in sorted(cuda))]
        self._buffers: dict[nn.Module, dict[str, _Snapshot]] = {}

    def __enter__(self) -> Isolation:
        self._states = [generator.get_state() for generator in self._generators]
        self._python = random.getstate()
        self._numpy = _numpy_random().get_state(legacy=False) if _numpy_random() else None
        self._hook = register_module_forward_pre_hook(self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()
        self._restore_buffers()
        torch.clear_autocast_cache()
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)
        random.setstate(self._python)
        if self._numpy is not None:
            _numpy_random().set_state(self._numpy)

    def evaluate(self, closure: Callable[[], T], seed: int) -> T:
        """closure() under no_grad, from the random state of `seed` (63 bits) and the buffers of before the step."""
        self._restore_buffers()
        for generator in self._generators:
            generator.manual_seed(seed)
        random.seed(seed)
        if _numpy_random():
            _numpy_random().seed(seed & 0xFFFFFFFF)
        torch.clear_autocast_cache()  # else low-precision copies of the weights outlive the perturbation
        with torch.no_grad():
            return closure()

    def _remember(self, module: nn.Module, _inputs: Any) -> None:
        if torch.compiler.is_compiling() or module in self._buffers:
            return
        for part in module.modules():
            if part not in self._buffers:
                self._buffers[part] = {
                    name: _Snapshot(buffer)
                    for name, buffer in part._buffers.items()
                    if buffer is not None and not buffer.is_inference()
                }

    def _restore_buffers(self) -> None:
        for module, buffers in self._buffers.items():
            for name, snapshot in buffers.items():
                module._buffers[name] = snapshot.restored()


class _Snapshot:
    """A buffer and its values; batch_norm writes without raising the version counter, so values are compared."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer, self._values = buffer, buffer.detach().clone()

    def restored(self) -> Tensor:
        if not torch.equal(self._buffer, self._values):
            with torch.no_grad():
                self._buffer.copy_(self._values)
        return self._buffer


def _numpy_random() -> Any:
    """numpy.random if something has imported numpy, else None: a closure cannot use what is not loaded."""
    numpy = sys.modules.get("numpy")
    return numpy.random if numpy else None
