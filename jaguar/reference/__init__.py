"""The reference backend: every launch in plain torch, on any device; what the kernels are checked against."""

from jaguar.reference.coordinate import CoordinateSteps
from jaguar.reference.dense import DenseSteps
from jaguar.reference.matrix import MatrixSteps
from jaguar.reference.newton_schulz import multiplies_bf16, newton_schulz

__all__ = ["CoordinateSteps", "DenseSteps", "MatrixSteps", "multiplies_bf16", "newton_schulz"]
