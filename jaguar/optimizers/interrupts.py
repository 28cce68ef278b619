"""Signals that end a program: they never land between two writes, and they all end a program alike."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType
from typing import Any

# Ctrl-C; what schedulers send; what a terminal sends that is closed. Not every system has all of them.
ENDING = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__)

Handler = Callable[[int, FrameType | None], Any]


class Terminated(KeyboardInterrupt):
    """A KeyboardInterrupt that is SIGTERM or SIGHUP.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def number_of(interrupt: KeyboardInterrupt) -> int:
    """The signal behind it; a program that it ends has 128 + this for its exit code."""
    return interrupt.number if isinstance(interrupt, Terminated) else int(signal.SIGINT)


def interrupt(number: int, frame: FrameType | None = None) -> None:
    """A handler: KeyboardInterrupt for SIGINT, `Terminated` for the others."""
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)


@contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """`handler` takes the ending signals while it is open, but for those that are ignored (nohup, background jobs).

    Outside the main thread nothing is changed.
    """
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in ENDING:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: somebody's in C, which could not be put back
                    signal.signal(number, handler)
                    stack.callback(signal.signal, number, before)
        yield


class HeldInterrupts:
    """Holds ending signals back inside the `with` block, except inside `let_through()`, and delivers them at the end.

    Outside the main thread, or where a signal has no Python handler, there is nothing to hold and nothing is changed.
    """

    def __init__(self) -> None:
        self._old: dict[int, Handler] = {}
        self._open = False
        self._waiting: list[int] = []

    def __enter__(self) -> HeldInterrupts:
        if threading.current_thread() is threading.main_thread():
            for number in ENDING:
                old = signal.getsignal(number)
                if callable(old):
                    self._old[number] = old
                    signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
        self._deliver()

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Signals act at once in here: for the caller's own code, which may run for seconds."""
        self._deliver()
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def _deliver(self) -> None:
        while self._waiting:
            number = self._waiting.pop(0)
            self._old[number](number, None)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number not in self._waiting:
            self._waiting.append(number)
        if self._open:
            self._open = False  # a second Ctrl-C must not hit the clean-up of the first
            self._deliver()
