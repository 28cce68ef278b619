"""Errors of the libraries below, for people."""

from __future__ import annotations

import re


def said(error: BaseException) -> str:
    """What an error says, in one line: libraries put the reason behind a heading and a line break."""
    text = " ".join(str(error).split())
    if text.startswith("Weights only load failed"):  # torch goes on with how to run what it has just refused to run
        called = re.search(r"GLOBAL (\S+)", text)
        text = f"it would call {called[1]}, which was not run" if called else "it holds no tensors and plain values"
    if not text or isinstance(error, (KeyError, AssertionError)):
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 300 else f"{text[:300]}..."
