"""Steps that warn."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from jaguar import ZerothOrder


def skipping() -> Any:
    """Around steps that are skipped for the first, or the 2^k-th time."""
    return pytest.warns(UserWarning, match=r"was skipped, because .*: nothing moved\.")


def warned(opt: ZerothOrder, closure: object, steps: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            opt.step(closure)
    return [str(w.message) for w in caught]
