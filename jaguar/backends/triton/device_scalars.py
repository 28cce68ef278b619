"""Keys, scalars and flags of a step in device memory: one buffer per device for all launches of an optimizer."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from jaguar.backends.launches import StepInputs
from jaguar.backends.uploads import staged
from jaguar.method.directions import Coordinates, Dense, Mixed, ReleasedBlock
from jaguar.method.method import Method
from jaguar.method.params import Kind, Slot
from jaguar.method.rng import STATE_PURPOSES, Draw, Purpose
from jaguar.method.rule import Rule
from jaguar.triton_kernels import rules as kernels
from jaguar.triton_kernels import tables as T


def n_buffers(rule: Rule) -> int:
    """Number of state buffers that the entry of a rule takes: its arguments before g and its own numbers."""
    if type(rule).entry is Rule.entry:
        return 0
    return len(signature(rule.entry).parameters) - 1 - rule.widths[0]


def arithmetic(rule: Rule) -> dict[str, Any]:
    """Compile-time constants of a rule: its Triton functions, and how many numbers of its own they take.

    Raises:
        RuntimeError: there is no such function, or it has more state than a kernel can move.
    """
    if n_buffers(rule) > len(STATE_PURPOSES):
        raise RuntimeError(f"{rule.name} has {n_buffers(rule)} state buffers, and kernels move {len(STATE_PURPOSES)}")
    step = _function(rule.step)
    # The entry of a rule that keeps no state now may have no kernel, and is not called.
    entry = getattr(kernels, rule.entry.__name__, step) if n_buffers(rule) else step
    return {"ENTRY": entry, "STEP": step, "N_ENTRY": rule.widths[0], "N_STEP": rule.widths[1]}


def _function(reference: Any) -> Any:
    name = reference.__name__
    if not hasattr(kernels, name):
        raise RuntimeError(f"jaguar.triton_kernels.rules has no {name}; backend='auto' uses the reference for it")
    return getattr(kernels, name)


class DeviceScalars:
    """Keys, scalars and flags of a step, in the memory of every device that has some of the tensors.

    The buffers stay where they are: a CUDA graph that captured launches (not `fill`, which copies from the host) reads
    the numbers that were written last.

    Args:
        slots: all tensors that kernels move, on the positions of `StepInputs.active`.
    """

    def __init__(self, slots: Sequence[Slot], method: Method) -> None:
        self.n_directions = method.estimator.n_directions
        self._direction = method.direction
        self._width = int(T.OWN.value) + sum(method.rule.widths) + self.n_directions + method.direction.width
        self._kinds = list(dict.fromkeys(slot.kind for slot in slots))
        self._rows = {kind: i * self._width for i, kind in enumerate(self._kinds)}
        self._flags = {slot.stream: i for i, slot in enumerate(slots)}
        self._purposes = _purposes(method)
        # Even, so that all parts of the buffer are as aligned as the buffer is.
        self._n_scalars = -(-len(self._kinds) * self._width // 2) * 2
        self._n_keys = self.n_directions * int(T.KEYS.value)
        self._words: dict[Draw, list[int]] = {}
        self._keyed: tuple[Draw, ...] | None = None
        size = self._n_keys + self._n_scalars + len(slots)
        with torch.inference_mode(False):  # made in inference mode they could not be written to outside it
            self._buffers = {
                device: torch.ones(size, dtype=torch.int64, device=device)
                for device in dict.fromkeys(slot.tensor.device for slot in slots)
            }

    def row(self, kind: Kind) -> int:
        """Offset of the scalars of a kind."""
        return self._rows[kind]

    def flag(self, slot: Slot) -> int:
        """Position of a slot's flag."""
        return self._flags[slot.stream]

    def keys(self, device: torch.device, k: int = 0) -> Tensor:
        """Two words for each purpose of each direction, from the k-th direction on: int64."""
        return self._views[device][0][k]

    def scalars(self, device: torch.device) -> Tensor:
        """Per kind (fp64): tau, decay, lr, the rule's numbers for its entry and its step, weights, the direction's."""
        return self._views[device][1]

    def active(self, device: torch.device) -> Tensor:
        """1 for each slot that takes part in the step, 0 for the others: int64."""
        return self._views[device][2]

    @cached_property
    def _views(self) -> dict[torch.device, tuple[list[Tensor], Tensor, Tensor]]:
        a, b = self._n_keys, self._n_keys + self._n_scalars
        return {
            device: (
                [buffer[k * T.KEYS.value : a] for k in range(self.n_directions)],
                buffer[a:b].view(torch.float64),
                buffer[b:],
            )
            for device, buffer in self._buffers.items()
        }

    def fill(self, inputs: StepInputs) -> None:
        """Puts a step's numbers where its launches read them; weights that are not known yet are 0."""
        scalars: list[float] = []
        own = self._direction.numbers(inputs.draws[0].step)
        for kind in self._kinds:
            s = inputs.scalars[kind]
            scalars += [s.tau, s.decay, s.lr, *s.entry, *s.step, *(s.weights or (0.0,) * self.n_directions), *own]
        scalars += [0.0] * (self._n_scalars - len(scalars))
        if self._keyed is inputs.draws:  # keys and flags are those of the step's first call
            self._write(self._n_keys, struct.pack(f"={self._n_scalars}d", *scalars))
            return
        words: list[int] = []
        for draw in inputs.draws:
            words += self._words_of(draw)
        # Flags are 1 from the beginning; a method that has a mask has one in every step.
        flags = inputs.active or ()
        self._write(0, struct.pack(f"={self._n_keys}q{self._n_scalars}d{len(flags)}q", *words, *scalars, *flags))
        self._keyed = inputs.draws

    def _write(self, first: int, packed: bytes) -> None:
        if not packed:  # there is no tensor at all
            return
        together = torch.frombuffer(bytearray(packed), dtype=torch.int64)
        for device, buffer in self._buffers.items():
            buffer[first : first + len(together)].copy_(staged(together, device), non_blocking=True)

    def _words_of(self, draw: Draw) -> list[int]:
        """The keys of a direction, made once a step."""
        if draw not in self._words:
            self._words = {d: w for d, w in self._words.items() if d.step == draw.step}
            own = self._words[draw] = [0] * T.KEYS.value
            for purpose in self._purposes:
                own[2 * purpose : 2 * purpose + 2] = draw.key(purpose)
        return self._words[draw]


def _purposes(method: Method) -> list[Purpose]:
    """Purposes that kernels draw random numbers for; listed coordinates are chosen by the host."""
    direction, found = method.direction, []
    mixed = isinstance(direction, Mixed)
    if isinstance(direction, Dense):
        found = [Purpose.DIRECTION, *([Purpose.DIRECTION_1] if mixed else [])]
    elif isinstance(direction, Coordinates) and direction.layout == "block":
        found = [Purpose.ROWS, Purpose.COLUMNS]
    elif not isinstance(direction, ReleasedBlock):
        found = [Purpose.COORDINATES]
    if method.stochastic:
        found += [Purpose.ROUND, *STATE_PURPOSES[: 1 if mixed else n_buffers(method.rule)]]
    return found
