"""Errors of other libraries, in plain words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Damaged(ValueError):
    """A saved file that cannot be gone on with; the message names it."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns any error over a saved file into one line that names it: its content may be anything.

    Raises:
        Damaged: something went wrong; refusals that were put into words keep them.
    """
    try:
        yield
    except (Damaged, MemoryError):
        raise
    except RuntimeError as error:
        if "out of memory" in str(error):  # torch's is one
            raise
        raise Damaged(f"{path} is damaged: {said(error)}") from error
    except ValueError as error:
        raise Damaged(str(error) if str(path) in str(error) else f"{path}: {said(error)}") from error
    except Exception as error:
        raise Damaged(f"{path} is damaged: {said(error)}") from error


def said(error: BaseException) -> str:
    """An error's message in one line: libraries put the reason behind a heading and a line break."""
    text = " ".join(str(error).split())
    if "weights_only" in text:  # torch goes on with how to run what it has just refused to run
        called = re.search(r"GLOBAL (\S+)", text)
        text = f"it would call {called[1]}, which was not run" if called else "it holds no tensors and plain values"
    if not text or isinstance(error, (KeyError, AssertionError)):
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 300 else f"{text[:300]}..."


def printable(text: str) -> str:
    """The text without control characters, which a terminal would obey: names and labels from files may be anything."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)
