"""The reference backend: every launch in plain torch, on any device; what the kernels are checked against."""

from jaguar.reference.coordinate import CoordinateLaunches
from jaguar.reference.dense import DenseLaunches
from jaguar.reference.matrix import MatrixLaunches
from jaguar.reference.mixed import MixedLaunches
from jaguar.reference.newton_schulz import most_bytes, multiplies_bf16, newton_schulz

__all__ = [
    "CoordinateLaunches",
    "DenseLaunches",
    "MatrixLaunches",
    "MixedLaunches",
    "most_bytes",
    "multiplies_bf16",
    "newton_schulz",
]
