"""Forward-mode derivatives: the parameters of a module are dual numbers while it runs, and numbers again afterwards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from jaguar.params import Slot, identity

_SAID: set[str] = set()


class Tangents:
    """While it is open, every trained parameter is x + epsilon z inside the forward of the modules that own it.

    A module's tangents are made when its forward begins and dropped when it ends, so that only those of the modules in
    flight are in memory. Where a parameter is used by another module than its owner (the output projection of
    `nn.MultiheadAttention`), all tangents must be held: `hold=True`.

    Args:
        slots: the trained tensors.
        tangent: z of a slot, in its shape.
        model: its modules are watched; None: every module that runs.
        hold: the parameters of `model` are dual numbers the whole time.

    Source: Baydin, Pearlmutter, Syme, Wood, Torr, "Gradients without backpropagation", arXiv 2202.08587.
    """

    def __init__(
        self, slots: Sequence[Slot], tangent: Callable[[Slot], Tensor], model: nn.Module | None, hold: bool = False
    ) -> None:
        self._slots = {identity(slot.tensor): slot for slot in slots}
        self._tangent, self._model, self._hold = tangent, model, hold
        self._used: set[Slot] = set()
        # What modules had in the place of the dual numbers, and how deep each is in its own forward.
        self._own: dict[nn.Module, dict[str, nn.Parameter]] = {}
        self._depth: dict[nn.Module, int] = {}

    def __enter__(self) -> Tangents:
        self._stack = ExitStack()
        try:
            self._stack.callback(self._put_back)
            self._stack.enter_context(forward_ad.dual_level())
            # The fused attention kernels have no forward-mode formulas, the plain one has.
            self._stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, loss: Tensor) -> float:
        """The derivative of a loss: 0 where no parameter reaches it."""
        tangent = forward_ad.unpack_dual(loss).tangent
        return 0.0 if tangent is None else float(tangent)

    @property
    def unused(self) -> list[str]:
        """Names of the parameters whose owners did not run."""
        return sorted(slot.name for slot in self._slots.values() if slot.count and slot not in self._used)

    def _open(self) -> None:
        if self._hold:
            assert self._model is not None
            for module in self._model.modules():
                self._enter(module)
        elif self._model is not None:
            for module in self._model.modules():
                if any(identity(p) in self._slots for p in module._parameters.values() if p is not None):
                    self._stack.callback(module.register_forward_pre_hook(self._enter).remove)
                    self._stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
        else:
            self._stack.callback(register_module_forward_pre_hook(self._enter).remove)
            self._stack.callback(register_module_forward_hook(self._leave, always_call=True).remove)

    def _enter(self, module: nn.Module, _inputs: Any = None) -> None:
        self._depth[module] = self._depth.get(module, 0) + 1
        if self._depth[module] > 1:
            return
        own = {name: p for name, p in module._parameters.items() if p is not None and identity(p) in self._slots}
        self._own[module] = own  # type: ignore[assignment]
        for name, p in own.items():
            slot = self._slots[identity(p)]
            self._used.add(slot)
            module._parameters[name] = forward_ad.make_dual(p.detach(), self._tangent(slot))  # type: ignore[assignment]

    def _leave(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        depth = self._depth.get(module, 0)
        if depth == 1:
            module._parameters.update(self._own.pop(module))
        self._depth[module] = max(0, depth - 1)

    def _put_back(self) -> None:
        for module, own in self._own.items():
            module._parameters.update(own)
        self._own.clear()


def summed(values: Tensor) -> Tensor:
    """The sum over all processes; of dual numbers, that of their derivatives too."""
    primal, tangent = forward_ad.unpack_dual(values) if _is_open() else (values, None)
    primal = primal.clone()
    dist.all_reduce(primal)
    if not _is_open():
        return primal
    tangent = torch.zeros_like(primal) if tangent is None else tangent.clone()  # every process has to ask
    dist.all_reduce(tangent)
    both: Tensor = forward_ad.make_dual(primal, tangent)
    return both


def _is_open() -> bool:
    return bool(forward_ad._current_level >= 0)


def say_once(message: str) -> None:
    """An information for the log, once per process."""
    if message not in _SAID:
        _SAID.add(message)
        logging.getLogger("jaguar").info(message)
