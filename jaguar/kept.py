"""Rows that stay as they are: launches that put them back, on any backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from jaguar.estimators import Probe
from jaguar.launches import Launches, Lost
from jaguar.params import Slot, identity
from jaguar.rng import Draw
from jaguar.rules import Scalars


def keeping(steps: Launches, slots: Sequence[Slot]) -> Launches:
    """`steps`, whose launches leave the kept rows of the slots as they are."""
    return KeptSteps(steps, slots) if any(slot.kept is not None for slot in slots) else steps


@dataclass(frozen=True)
class KeptSteps:
    """Launches that move whole tensors, after each of which the kept rows are written back.

    Attributes:
        steps: the launches.
        slots: their tensors.
    """

    steps: Launches
    slots: Sequence[Slot]

    @property
    def takes_back(self) -> bool:
        """Whether `update_` can end the last probe of a step."""
        return self.steps.takes_back

    @property
    def wrote(self) -> bool:
        """Whether the last `update_` came to write anything."""
        return self.steps.wrote

    def n_perturbed(self, draw: Draw) -> int:
        """Number of coordinates that a direction moves; those of kept rows are among them."""
        return self.steps.n_perturbed(draw)

    def probes(self, draws: Sequence[Draw], taus: Sequence[float]) -> list[Probe]:
        """What moves the parameters along each direction and back; `taus` has one length per slot."""
        return [KeptProbe(probe, self.rows(), not self.takes_back) for probe in self.steps.probes(draws, taus)]

    def lost(self, draw: Draw, taus: Sequence[float]) -> list[Lost]:
        """The perturbations that rounding swallows, per tensor."""
        return self.steps.lost(draw, taus)

    def check(self, momenta: Sequence[Tensor | None]) -> None:
        """Raises RuntimeError for tensors that `update_` could not move."""
        self.steps.check(momenta)

    def update_(
        self,
        draws: Sequence[Draw],
        scalars: Sequence[Scalars],
        momenta: Sequence[Tensor | None],
        held: Probe | None = None,
    ) -> None:
        """Moves momenta and parameters by one step, in place, but for the kept rows."""
        rows = Rows([tensor[row] for tensor, row in self.rows()])
        own = zip(self.slots, momenta, strict=True)
        entries = Rows([m[slot.kept] for slot, m in own if slot.kept is not None and m is not None])
        self.steps.update_(draws, scalars, momenta, held.probe if isinstance(held, KeptProbe) else held)
        rows.put_back()
        entries.put_back()

    def rows(self) -> list[tuple[Tensor, int]]:
        """Tensors with the row that stays."""
        return [(slot.tensor, slot.kept) for slot in self.slots if slot.kept is not None]


class Rows:
    """Views of rows, and what they held when this was made."""

    def __init__(self, views: Sequence[Tensor]) -> None:
        self._views = [view.detach() for view in views]
        self._values = [view.clone() for view in self._views]

    def put_back(self) -> None:
        """The rows hold it again."""
        with torch.no_grad():
            for view, value in zip(self._views, self._values, strict=True):
                view.copy_(value)


@dataclass
class KeptProbe:
    """A probe after whose moves the kept rows are written back.

    Attributes:
        probe: the probe.
        rows: tensors with the row that stays.
        in_modules: the probe moves parameters while their modules run.
    """

    probe: Probe
    rows: Sequence[tuple[Tensor, int]]
    in_modules: bool
    _saved: Rows | None = None
    _hooks: list[Any] = field(default_factory=list)

    def plus(self) -> None:
        """Parameters become x + tau e."""
        self._saved = Rows([tensor[row] for tensor, row in self.rows])
        self.probe.plus()
        if self.in_modules:  # after the probe's own hook
            self._tables = {identity(tensor) for tensor, _ in self.rows}
            self._hooks.append(register_module_forward_pre_hook(self._enter))
        self._saved.put_back()

    def minus(self) -> None:
        """Parameters become x - tau e."""
        self.probe.minus()
        self._put_back()

    def finish(self) -> None:
        """Parameters become x."""
        self.probe.finish()
        self._end()

    def abort(self) -> None:
        """Parameters become x, also those that were not reached."""
        self.probe.abort()
        self._end()

    def _enter(self, module: nn.Module, _inputs: Any) -> None:
        if any(p is not None and identity(p) in self._tables for p in module._parameters.values()):
            self._put_back()

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._put_back()

    def _put_back(self) -> None:
        if self._saved is not None:
            self._saved.put_back()
