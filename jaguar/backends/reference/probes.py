"""Probes of dense directions: three ways to move all trained tensors along e and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from jaguar.backends.reference.pieces import Piece
from jaguar.method.params import Slot, identity

# move(piece, scale, origin): x <- origin (None: x) + scale e, rounded to nearest.
Move: TypeAlias = Callable[..., None]
Work: TypeAlias = Sequence[tuple[Piece, float]]


class CopyProbe:
    """Restores from a copy of all trained tensors.

    Args:
        work: pieces with their lengths tau.
        move: moves a piece.
    """

    def __init__(self, work: Work, move: Move) -> None:
        self._work, self._move = work, move
        self._saved: list[Tensor] = []

    def to(self, scale: float) -> None:
        """x <- x + scale tau e, from the copies, which the first call makes."""
        first = not self._saved
        for k, (piece, tau) in enumerate(self._work):
            if first:
                self._saved.append(piece.read(piece.tensors))
            self._move(piece, scale * tau, self._saved[k])

    def finish(self) -> None:
        """x <- the copies; pieces that a failed `to` did not reach have none."""
        for (piece, _), saved in zip(self._work, self._saved, strict=False):
            piece.write_(piece.tensors, saved)
        self._saved.clear()

    abort = finish


class ModuleProbe:
    """Moves the parameters of a module when its forward begins and restores them when it ends.

    Exact, and needs a copy of the modules in flight only. The parameters must be used inside the forward of the
    module that owns them; one that no module used during an evaluation is an error, not a silent zero.
    """

    def __init__(self, slots: Sequence[Slot], taus: Sequence[float], move: Callable[[Slot, float], None]) -> None:
        self._by_identity = {identity(slot.tensor): (slot, tau) for slot, tau in zip(slots, taus, strict=True)}
        self._move = move
        self._scale = 0.0
        self._saved: dict[Slot, Tensor] = {}
        self._depth: dict[Slot, int] = {}
        self._hooks: list[Any] = []

    def to(self, scale: float) -> None:
        """Lets modules run with x + scale tau e from now on."""
        if self._hooks:
            self._check_all_used()
        else:
            self._hooks = [
                register_module_forward_pre_hook(self._enter),
                register_module_forward_hook(self._leave, always_call=True),
            ]
        self._scale = scale

    def finish(self) -> None:
        """Modules run with x again."""
        self._check_all_used()
        self.abort()

    def abort(self) -> None:
        """Modules run with x again, also after a failure inside one of them."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for slot in list(self._saved):
            self._put_back(slot)
        self._depth.clear()

    def _check_all_used(self) -> None:
        unused = sorted(slot.name for slot, _ in self._by_identity.values() if slot.count and slot not in self._depth)
        self._depth.clear()
        if unused:
            raise RuntimeError(
                f"restore='module': no module's forward used {', '.join(unused[:3])}"
                f"{' and others' if len(unused) > 3 else ''} during the closure, so it would not have been "
                "perturbed; pass restore='copy' or freeze it"
            )

    def _owned(self, module: nn.Module) -> list[tuple[Slot, float]]:
        keys = [identity(p) for p in module._parameters.values() if p is not None]
        return [self._by_identity[key] for key in keys if key in self._by_identity]

    def _enter(self, module: nn.Module, _inputs: Any) -> None:
        for slot, tau in self._owned(module):
            if self._depth.setdefault(slot, 0) == 0:
                with torch.no_grad():
                    self._saved[slot] = slot.tensor.detach().clone()
                    self._move(slot, self._scale * tau)
            self._depth[slot] += 1

    def _leave(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        for slot, _ in self._owned(module):
            if self._depth.get(slot, 0) == 0:  # `_enter` failed before it came to this one
                continue
            self._depth[slot] -= 1
            if self._depth[slot] == 0:
                self._put_back(slot)

    def _put_back(self, slot: Slot) -> None:
        with torch.no_grad():
            slot.tensor.copy_(self._saved[slot])
        del self._saved[slot]


class WalkProbe:
    """Steps +tau, -2 tau and, later, +tau, each rounded: no memory, and parameters that are not quite restored.

    `finish` leaves the parameters where the last evaluation was; `abort` walks back. The next probe of the step, or
    the update, walks back first, so that a replay which does the same walks meets the same bits.
    """

    def __init__(self, work: Work, move: Move, before: WalkProbe | None) -> None:
        self._work, self._move, self._before = work, move, before
        self._at = [0.0] * len(self._work)

    def to(self, scale: float) -> None:
        """x <- x + (scale - where it is) tau e, after the walk back of the direction before."""
        if self._before is not None:
            self._before.abort()
        self._walk(scale)

    def finish(self) -> None:
        """Nothing: the parameters stay moved."""

    def abort(self) -> None:
        """x <- x + tau e (or x - tau e): back, but for the roundings."""
        self._walk(0.0)

    def _walk(self, to: float) -> None:
        for i, (piece, tau) in enumerate(self._work):
            if self._at[i] != to:
                self._move(piece, (to - self._at[i]) * tau)
                self._at[i] = to
