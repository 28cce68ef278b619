"""Errors of the libraries below, for people."""

from __future__ import annotations


def said(error: BaseException) -> str:
    """What an error says, in one line: libraries put the reason behind a heading and a line break."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, (KeyError, AssertionError)):
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 300 else f"{text[:300]}..."
