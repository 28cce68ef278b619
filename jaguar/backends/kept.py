"""Rows that stay as they are: written back after every move of their tensors, on any backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from jaguar.method.params import identity
from jaguar.method.probe import Probe


class Rows:
    """Rows of tensors, and what they held when this was made; a closure may give a tensor another storage."""

    def __init__(self, rows: Sequence[tuple[Tensor, int]]) -> None:
        self._rows = rows
        self._values = [tensor.detach()[row].clone() for tensor, row in rows]

    def put_back(self) -> None:
        """The rows hold it again."""
        with torch.no_grad():
            for (tensor, row), value in zip(self._rows, self._values, strict=True):
                tensor.detach()[row].copy_(value)


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

    def to(self, scale: float) -> None:
        """Parameters become x + scale tau e."""
        first = self._saved is None
        if first:
            self._saved = Rows(self.rows)
        self.probe.to(scale)
        if first and self.in_modules:  # after the probe's own hook
            self._tables = {identity(tensor) for tensor, _ in self.rows}
            self._hooks.append(register_module_forward_pre_hook(self._enter))
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
