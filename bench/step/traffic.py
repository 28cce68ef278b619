"""Bytes that each launch has to move through device memory at least: the floor of its time.

Dense launches count what they read and write once. Sampled coordinates lie too far apart to share a 32-byte sector,
so each of them costs a sector read and one written, of the parameter and of the momentum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SIZES = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2, "e5m2": 1, "none": 0}
_SECTOR = 32


def per_parameter(kernel: str, options: Mapping[str, Any], p: float) -> tuple[float, str]:
    """Bytes per parameter of one launch, and how they were counted.

    Args:
        kernel: "sparse", "tiles", "move" or "step".
        options: the launch's compile-time options.
        p: fraction of the coordinates that is sampled.
    """
    x = SIZES[options.get("X_FORMAT", options.get("FORMAT"))]
    m = sum(SIZES[state] for state in _state(options))
    if kernel == "sparse":
        return _sparse(options["JOB"], x, p)
    if kernel == "tiles":
        back = x if options["RESTORE"] else 0
        saved = f" + {back} saved" if back else ""
        return m + 2 * x + p * (_SECTOR + back), f"{m} m + {2 * x} x + p ({_SECTOR} m{saved})"
    if kernel == "move":
        times = {"walk": 2, "flip": 2, "restore": 2, "save": 3}[options["JOB"]]
        return times * x, f"{times} x {x}"
    if kernel == "step":
        return 2 * x + 2 * m, f"2 x {x}" + (f" + 2 x {m} m" if m else "")
    raise ValueError(f"no floor is known for the kernel {kernel!r}")


def _sparse(job: str, x: int, p: float) -> tuple[float, str]:
    sectors, saved = {"perturb": (2, x), "flip": (2, x), "restore": (2, x), "update": (4, 0), "fused": (4, x)}[job]
    return p * (sectors * _SECTOR + saved), f"p ({sectors} x {_SECTOR}" + (f" + {saved} saved)" if saved else ")")


def _state(options: Mapping[str, Any]) -> list[str]:
    """The formats of the state buffers that a launch reads."""
    return [state for state in (options.get(name, "none") for name in ("S0", "S1", "S2")) if state != "none"]


def label(kernel: str, options: Mapping[str, Any]) -> str:
    """What a launch is called in tables."""
    job, momentum = options.get("JOB", ""), "".join(f", m {state}" for state in _state(options))
    if kernel == "tiles":
        return f"tiles {'restore + step' if options['RESTORE'] else 'step'}{momentum}"
    if kernel == "sparse":
        return f"{job}{momentum}" if job in ("update", "fused") else job
    if kernel == "move":
        return f"{job}, {options['DISTRIBUTION']}"
    rule = options["STEP"].__name__.removesuffix("_step")
    return f"step {job}, {rule}, {options['DISTRIBUTION']}{momentum}"
