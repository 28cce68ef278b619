"""Launches of directions that are mixed with momentum, in Triton kernels; `backends.reference.mixed` defines them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from jaguar.backends.launches import State
from jaguar.backends.triton.dense import DenseLaunches
from jaguar.backends.triton.plan import Launch, Options, alignment
from jaguar.method.params import Slot
from jaguar.method.rule import state_dtype
from jaguar.triton_kernels import mixed as kernels
from jaguar.triton_kernels import tables as T
from jaguar.triton_kernels.launch import BLOCK, TILE


class MixedLaunches(DenseLaunches):
    """Directions that read the momentum: their moves are given state, and are not the same before there is some."""

    _kernels: ClassVar[Any] = kernels

    def _constants(self) -> tuple[dict[str, Any], dict[str, Any]]:
        common = {"TWO_SIDED": self._method.estimator.two_sided, "STOCHASTIC": self._method.stochastic}
        return common, common

    def _moving_tables(self, state: State) -> Launch:
        return replace(self._plan.launch(BLOCK, state, self._moved, tiles=True), state=[])  # which moves only read

    def _moved(self, slot: Slot, own: tuple[Tensor, ...]) -> Options:
        (buffer,) = self._method.rule.state({})
        m = own[0].dtype if own else state_dtype(slot.tensor.dtype, buffer, self._method.momentum_dtype)
        held = T.FORMATS[m]
        found = {"X_FORMAT": T.FORMATS[slot.tensor.dtype], "S0": held if own else "none", "M_FORMAT": held}
        return found | alignment(slot, own) | {"TILE": TILE}

    _stepped = _moved
