"""The Triton backend: the launches of the reference, each in one kernel for the whole list of tensors."""

from jaguar.fused.coordinate import CoordinateLaunches
from jaguar.fused.dense import DenseLaunches
from jaguar.fused.matrix import MatrixLaunches
from jaguar.fused.mixed import MixedLaunches
from jaguar.fused.newton_schulz import TritonProducts
from jaguar.fused.numbers import Numbers

__all__ = ["CoordinateLaunches", "DenseLaunches", "MatrixLaunches", "MixedLaunches", "Numbers", "TritonProducts"]
