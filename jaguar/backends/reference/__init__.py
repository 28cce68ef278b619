"""The reference backend: every launch in plain torch, on any device; what the kernels are checked against."""

from jaguar.backends.reference.coordinate import CoordinateLaunches
from jaguar.backends.reference.dense import DenseLaunches
from jaguar.backends.reference.matrix import MatrixLaunches
from jaguar.backends.reference.mixed import MixedLaunches

__all__ = ["CoordinateLaunches", "DenseLaunches", "MatrixLaunches", "MixedLaunches"]
