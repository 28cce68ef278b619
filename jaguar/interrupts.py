"""Ctrl-C never lands between two writes: it waits until the parameters are whole again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class HeldInterrupts:
    """Holds SIGINT back inside the `with` block, except inside `let_through()`, and delivers it at the end.

    Outside the main thread, or where SIGINT has no Python handler, there is nothing to hold and nothing is changed.
    """

    def __init__(self) -> None:
        self._old: Callable[[int, FrameType | None], Any] | None = None
        self._open = False
        self._waiting = False

    def __enter__(self) -> HeldInterrupts:
        old = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(old):
            self._old = old
            signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._old is not None:
            signal.signal(signal.SIGINT, self._old)
            self._deliver()

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Interrupts act at once in here: for the caller's own code, which may run for seconds."""
        self._deliver()
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def _deliver(self) -> None:
        if self._waiting and self._old is not None:
            self._waiting = False
            self._old(signal.SIGINT, None)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self._waiting = True
        if self._open:
            self._open = False  # a second Ctrl-C must not hit the clean-up of the first
            self._deliver()
