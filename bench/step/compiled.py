"""torch.compile of the reference's dense sign step, with its rounding noise: rules and numbers are jaguar's own."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from jaguar.method import rng, rounding, rules
from jaguar.method.params import stream_of
from jaguar.method.rng import Draw, Purpose
from step.parity import expect_bits
from step.peers import LR
from step.shapes import Named, cut


class TooSlow(BaseException):
    """A compilation took longer than it may; no Exception, because the compiler turns those into its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooSlow in the main thread when the block takes longer; a compiler knows no limit of its own."""

    def stop(*_: object) -> None:
        raise TooSlow(f"took more than {seconds:.0f} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def _sign_step_(x: Tensor, m: Tensor, k0: Tensor, k1: Tensor, stream: Tensor) -> None:
    """The reference's sign step on a flat tensor; keys and stream are tensors, so that they are not compiled in."""
    value = rules.sign_step(x.to(torch.float32), m.to(torch.float32), 1.0, LR)
    noise = rng.noise16((k0, k1), stream, 0, x.numel(), Purpose.ROUND, x.device)  # type: ignore[arg-type]
    x.copy_(rounding.store(value, x.dtype, noise))


class CompiledSign:
    """The dense sign step alone, compiled once for all sizes and called tensor by tensor."""

    name, what = "sign step, torch.compile of the reference", "apply_"
    seconds = 60.0
    _gave_up = False

    def __init__(self, named: Named, closure: Any, lr: float = LR) -> None:
        self._work = []
        for name, p in named:
            x = p.detach().view(-1)
            stream = torch.tensor(stream_of(name), dtype=torch.int64, device=p.device)
            self._work.append((x, torch.randn_like(x), stream))
        self._key = [torch.tensor(word, device=named[0][1].device) for word in Draw(0, 0).key(Purpose.ROUND)]
        self._compiled = torch.compile(_sign_step_, dynamic=True)

    @torch.no_grad()
    def __call__(self) -> None:
        """x <- x - lr sign(m), stored stochastically."""
        for x, m, stream in self._work:
            self._compiled(x, m, *self._key, stream)

    @classmethod
    def check(cls, named: Named) -> None:
        """Raises Mismatch unless the compiled step has the bits of the same code run eagerly, TooSlow if it is."""
        if cls._gave_up:
            raise TooSlow("took too long before")
        cls._gave_up = True  # until it has gone well
        with time_limit(cls.seconds), torch.no_grad():
            small = [(str(i), corner) for i, corner in enumerate(cut(named))]
            step = cls(small, None)
            before = [x.clone() for x, _, _ in step._work]
            step()
            for (name, p), x, (_, m, stream) in zip(small, before, step._work, strict=True):
                _sign_step_(x, m, *step._key, stream)
                expect_bits(p.view(-1), x, name)
        cls._gave_up = False
