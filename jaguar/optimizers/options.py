"""The options that all zero-order optimizers share: what may be given, and how it is written into a checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from jaguar import rng
from jaguar.estimators import ESTIMATORS

_MOMENTUM_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e5m2)


def common_options(
    *,
    estimator: str,
    n_directions: int,
    rho_clip: float | None,
    rounding: str | None,
    momentum_dtype: torch.dtype | None,
    maximize: bool,
) -> dict[str, Any]:
    """The options as plain values.

    Raises:
        ValueError: one is out of range; the message names what would be right.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r}: choose {' or '.join(map(repr, ESTIMATORS))}")
    if not is_int(n_directions) or not 1 <= n_directions <= 1000:
        raise ValueError(f"n_directions={n_directions!r}: give an int from 1 to 1000")
    if rho_clip is not None and not (isinstance(rho_clip, (int, float)) and rho_clip > 0):
        raise ValueError(f"rho_clip={rho_clip!r}: give a positive bound, or None for no clipping")
    if rounding not in (None, "stochastic", "nearest"):
        raise ValueError(f"rounding={rounding!r}: choose 'stochastic' (the default) or 'nearest'")
    if momentum_dtype is not None and momentum_dtype not in _MOMENTUM_DTYPES:
        raise ValueError(
            f"momentum_dtype={momentum_dtype}: choose one of {', '.join(map(str, _MOMENTUM_DTYPES))}, "
            "or None for the parameters' precision"
        )
    if not isinstance(maximize, bool):
        raise ValueError(f"maximize={maximize!r}: choose True, to make the loss larger, or False")
    return {
        "rng": rng.TAG,
        "estimator": estimator,
        "n_directions": n_directions,
        "rho_clip": rho_clip,
        "rounding": rounding or "stochastic",
        "momentum_dtype": str(momentum_dtype) if momentum_dtype else None,
        "maximize": maximize,
    }


def checked_seed(seed: Any) -> int:
    """`seed`, if it is a uint64.

    Raises:
        ValueError: it is not.
    """
    if not is_int(seed) or not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed!r}: give an int in [0, 2**64)")
    return int(seed)


def is_int(value: Any) -> bool:
    """Whether `value` is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)
