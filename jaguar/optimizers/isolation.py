"""The closure's surroundings: equal for every evaluation of a step, and untouched afterwards.

A difference of two losses divided by 2 tau magnifies everything else that differs between the two evaluations by
1 / (2 tau): another dropout mask gave a derivative with 14 times its true spread, a stale autocast copy of the
weights was wrong by a factor of three.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from jaguar.optimizers.module_state import ModuleState

T = TypeVar("T")


class Isolation:
    """Runs evaluations with equal random state and equal state of the modules, and leaves both as they were.

    Covers the generators of python, numpy, torch's CPU and the given CUDA devices, and what `ModuleState` covers.

    Args:
        closure: what will be evaluated.
        devices: whose generators closures may use.
        state: state of the modules; kept from step to step.
        step: number of the step.
        perturbed: the trained tensors.
        reshard: drops copies of them that modules hold.
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        devices: Iterable[torch.device],
        state: ModuleState,
        step: int,
        perturbed: Sequence[Tensor],
        reshard: Callable[[], None],
    ) -> None:
        cuda = {d.index if d.index is not None else torch.cuda.current_device() for d in devices if d.type == "cuda"}
        self._generators = [torch.default_generator, *(torch.cuda.default_generators[i] for i in sorted(cuda))]
        self._closure, self._modules, self._step, self._perturbed = closure, state, step, perturbed
        self._reshard = reshard

    def __enter__(self) -> Isolation:
        self._reshard()
        self._states = [generator.get_state() for generator in self._generators]
        self._python = random.getstate()
        self._modules.begin(self._closure, self._step, self._perturbed)
        self._numpy = _Numpy() if _numpy_random() else None  # last: what it changes, `__exit__` puts back
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._modules.end()
        self._reshard()
        torch.clear_autocast_cache()
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)
        random.setstate(self._python)
        if self._numpy is not None:
            self._numpy.put_back()

    def evaluate(self, closure: Callable[[], T], seed: int) -> T:
        """closure() under no_grad, from the random state of `seed` (63 bits) and the state of before the step."""
        self._modules.rewind(seed)
        for generator in self._generators:
            generator.manual_seed(seed)
        random.seed(seed)
        if _numpy_random():
            _numpy_random().seed(seed & 0xFFFFFFFF)
        torch.clear_autocast_cache()  # else low-precision copies of the weights outlive the perturbation
        self._reshard()  # else whole copies of sharded ones do
        with torch.no_grad():
            return closure()


class _Numpy:
    """The state of numpy's global functions, which get another bit generator meanwhile.

    Writing a state back costs three times as much; it is done where a normal number is held in reserve, and for numpy
    before 1.24.
    """

    _ours: Any = None

    def __init__(self) -> None:
        numpy = _numpy_random()
        self._state, self._bits = numpy.get_state(legacy=False), None
        if hasattr(numpy, "set_bit_generator"):
            if _Numpy._ours is None:
                _Numpy._ours = numpy.MT19937(0)
            self._bits = numpy.get_bit_generator()
            numpy.set_bit_generator(_Numpy._ours)

    def put_back(self) -> None:
        """As it was."""
        numpy = _numpy_random()
        if self._bits is not None:
            numpy.set_bit_generator(self._bits)
        if self._bits is None or self._state["has_gauss"]:
            numpy.set_state(self._state)


def _numpy_random() -> Any:
    """numpy.random if something has imported numpy, else None: a closure cannot use what is not loaded."""
    numpy = sys.modules.get("numpy")
    return numpy.random if numpy else None
