"""Forward-mode derivatives: the parameters of a module are dual numbers while it runs, and numbers again afterwards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from jaguar.method.params import Slot, identity

_SAID: set[str] = set()


class Tangents:
    """While it is open, every trained parameter is x + epsilon z inside the forward of the modules that own it.

    A module's tangents are made when its forward begins and dropped when it ends, so that only those of the modules in
    flight are in memory. A parameter that is an operand elsewhere (in another module, as the output projection of
    `nn.MultiheadAttention`, or in the closure) is noticed, since its derivative is missing: `plain`. There all tangents
    must be held: `hold=True`.

    Args:
        slots: the trained tensors.
        tangent: z of a slot, in its shape.
        model: its modules are watched; None: every module that runs.
        hold: the parameters of `model` are dual numbers the whole time.

    Attributes:
        plain: names of the parameters that were operands without a tangent.
        elsewhere: there were some in another process.

    Source: Baydin, Pearlmutter, Syme, Wood, Torr, "Gradients without backpropagation", arXiv 2202.08587.
    """

    def __init__(
        self, slots: Sequence[Slot], tangent: Callable[[Slot], Tensor], model: nn.Module | None, hold: bool = False
    ) -> None:
        self._slots = {identity(slot.tensor): slot for slot in slots}
        self._tangent, self._model, self._hold = tangent, model, hold
        self.plain: set[str] = set()
        self.elsewhere = False
        self._used = self._making = False
        # The values that modules had in the place of the dual numbers, and how deep each is in its own forward.
        self._own: dict[nn.Module, dict[str, nn.Parameter]] = {}
        self._depth: dict[nn.Module, int] = {}

    def __enter__(self) -> Tangents:
        self._stack = ExitStack()
        try:
            self._stack.callback(self._put_back)
            self._stack.callback(_OPEN.remove, self)
            _OPEN.append(self)
            self._stack.enter_context(_Watch(self))
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
        """The derivative of a loss: 0 where no parameter was used.

        Raises:
            RuntimeError: parameters were used, and the loss has lost its derivative.
        """
        tangent = forward_ad.unpack_dual(loss).tangent
        if tangent is None and self._used and not self.plain:
            raise RuntimeError(
                "the closure's loss has no derivative, although the model ran: it was made from .item(), in "
                "torch.inference_mode or from detached tensors. Return the loss as the model computes it"
            )
        return 0.0 if tangent is None else float(tangent)

    def seen(self, operands: Iterable[Any]) -> None:
        """Notices trained parameters among the operands of an operation."""
        for operand in () if self._making else operands:
            if isinstance(operand, nn.Parameter) and identity(operand) in self._slots:
                self.plain.add(self._slots[identity(operand)].name)
            elif isinstance(operand, (list, tuple)):
                self.seen(operand)

    def _open(self) -> None:
        if self._hold:
            assert self._model is not None
            for module in self._model.modules():
                self._enter(module)
        elif self._model is not None:
            for module in self._model.modules():
                if any(identity(p) in self._slots for p in module._parameters.values() if p is not None):
                    self._stack.callback(module.register_forward_pre_hook(self._enter, prepend=True).remove)
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
            self._used = self._making = True  # what makes a tangent is no use of the parameter
            try:
                module._parameters[name] = forward_ad.make_dual(p.detach(), self._tangent(slot))  # type: ignore[assignment]
            finally:
                self._making = False

    def _leave(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        depth = self._depth.get(module, 0)
        if depth == 1:
            module._parameters.update(self._own[module])  # before it is forgotten: Ctrl-C may come between
            del self._own[module]
        self._depth[module] = max(0, depth - 1)

    def _put_back(self) -> None:
        for module, own in self._own.items():
            module._parameters.update(own)
        self._own.clear()


# Tangents that are open now.
_OPEN: list[Tangents] = []
# Attributes that are asked of a parameter without using its value in the loss.
_HARMLESS = {Tensor.detach, Tensor.requires_grad_, *(vars(torch._C.TensorBase)[n].__get__ for n in ("data", "grad"))}


class _Watch(TorchFunctionMode):
    """Shows every operation's operands where its result is a tensor of real numbers."""

    def __init__(self, tangents: Tangents) -> None:
        super().__init__()
        self._tangents = tangents

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _HARMLESS and _is_real(result):
            self._tangents.seen((*args, *(kwargs or {}).values()))
        return result


def _is_real(result: Any) -> bool:
    if isinstance(result, (list, tuple)):
        return any(map(_is_real, result))
    return isinstance(result, Tensor) and result.is_floating_point()


def summed(values: Tensor) -> Tensor:
    """The sum over all processes; of dual numbers, that of their derivatives too."""
    primal, tangent = forward_ad.unpack_dual(values) if _is_open() else (values, None)
    primal = primal.clone()
    dist.all_reduce(primal)
    if not _is_open():
        return primal
    tangent = torch.zeros_like(primal) if tangent is None else tangent.clone()  # every process has to ask
    missing = torch.tensor([float(any(one.plain for one in _OPEN))], device=primal.device)
    dist.all_reduce(tangent), dist.all_reduce(missing)
    for one in _OPEN:
        one.elsewhere |= bool(missing)
    both: Tensor = forward_ad.make_dual(primal, tangent)
    return both


def _is_open() -> bool:
    return bool(forward_ad._current_level >= 0)


def say_once(message: str) -> None:
    """An information for the log, once per process."""
    if message not in _SAID:
        _SAID.add(message)
        logging.getLogger("jaguar").info(message)
