"""Output of the command line: lines of text, and files that nobody reads any more."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any, cast

from jaguar.models.errors import printable

if TYPE_CHECKING:
    from rich.console import Console


class Outlet:
    """A text file that may be written to when nobody reads it any more: a pipe into `head`, a terminal that was closed.

    Attributes:
        lost: nobody does; what is written goes nowhere.
    """

    def __init__(self, file: Any) -> None:
        # Python has none where it was closed from the beginning.
        self._file, self.lost = io.StringIO() if file is None else file, file is None

    def write(self, text: str) -> int:
        """Writes, or does nothing."""
        self._try(lambda: self._file.write(text))
        return len(text)

    def flush(self) -> None:
        """Flushes, or does nothing."""
        self._try(self._file.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def _try(self, work: Callable[[], object]) -> None:
        try:
            if not self.lost:
                work()
        except OSError:
            self.lost = True
            to_nowhere(self._file)


def to_nowhere(file: Any) -> None:
    """Lets what is written to a file from now on, and what Python still holds of it, go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def say(console: Console, text: str, style: str | None = None) -> None:
    """Prints a line as it is: paths are not markup, and a command stays one line that can be copied."""
    console.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)


def complain(text: str) -> None:
    """Prints an error, if anybody is there to read it; the exit code says it too."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(text), file=sys.stderr)


@contextlib.contextmanager
def outlets() -> Iterator[None]:
    """Printing in here raises no error when nobody reads."""
    out, error = (cast(IO[str], Outlet(file)) for file in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            yield
        finally:
            out.flush()
            error.flush()
