"""The reference backend: every launch in plain torch, on any device; what the kernels are checked against."""

from jaguar.reference.coordinate import CoordinateSteps
from jaguar.reference.dense import DenseSteps

__all__ = ["CoordinateSteps", "DenseSteps"]
