"""The Triton backend: the launches of the reference, each in one kernel for the whole list of tensors."""

from jaguar.fused.coordinate import CoordinateSteps
from jaguar.fused.dense import DenseSteps
from jaguar.fused.matrix import MatrixSteps
from jaguar.fused.newton_schulz import TritonProducts

__all__ = ["CoordinateSteps", "DenseSteps", "MatrixSteps", "TritonProducts"]
