"""Triton's interpreter, twice as fast once this is imported."""

from __future__ import annotations

import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def _patch_once() -> None:
    """Makes the interpreter twice as fast.

    It patches triton.language anew at every call of a device function; once per launch is enough, for each set of
    language modules that such a function sees.
    """
    real, seen = interpreter._patch_lang, set()

    def patched(fn: Any) -> Any:
        found = frozenset(v.__name__ for v in fn.__globals__.values() if inspect.ismodule(v) and v in (tl, tl.core))
        if found in seen:
            return None
        scope, outermost = real(fn), not seen
        seen.add(found)
        if outermost:
            restore = scope.restore
            scope.restore = lambda: (seen.clear(), restore())
        return scope

    interpreter._patch_lang = patched


if hasattr(interpreter, "_LangPatchScope"):
    _patch_once()
