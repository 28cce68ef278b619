"""The optimizers: thin named classes over one base, `ZerothOrder`; resolved on first use, so names need no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaguar.optimizers.names import HOME

if TYPE_CHECKING:
    from jaguar.optimizers.names import *  # noqa: F403

__all__ = sorted(HOME)


def __getattr__(name: str) -> Any:
    if name in HOME:
        return getattr(importlib.import_module(HOME[name]), name)
    raise AttributeError(f"module 'jaguar.optimizers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
