"""The Triton backend: the launches of the reference, each in one kernel for the whole list of tensors."""

from jaguar.backends.triton.coordinate import CoordinateLaunches
from jaguar.backends.triton.dense import DenseLaunches
from jaguar.backends.triton.device_scalars import DeviceScalars
from jaguar.backends.triton.matrix import MatrixLaunches
from jaguar.backends.triton.mixed import MixedLaunches

__all__ = ["CoordinateLaunches", "DenseLaunches", "MatrixLaunches", "MixedLaunches", "DeviceScalars"]
