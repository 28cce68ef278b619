"""Directions e of a zero-order step: dense (Gaussian, Rademacher) or a few signed coordinates.

A direction is never stored: it is a pure function of the step key and the logical element index. Dense directions
give their values for a range of elements; coordinate directions give the chosen elements and their signs.
"""

from jaguar.method.directions.base import Dense, Direction, Sparse
from jaguar.method.directions.coordinates import Coordinates, ReleasedBlock, matrix_shape
from jaguar.method.directions.distributions import DENSE, Gaussian, Rademacher, dense
from jaguar.method.directions.layers import Layers
from jaguar.method.directions.mixed import Mixed
from jaguar.method.directions.orthonormal import Orthonormal
from jaguar.method.directions.sphere import Sphere

__all__ = [
    "DENSE",
    "Coordinates",
    "Dense",
    "Direction",
    "Gaussian",
    "Layers",
    "Mixed",
    "Orthonormal",
    "Rademacher",
    "ReleasedBlock",
    "Sparse",
    "Sphere",
    "dense",
    "matrix_shape",
]
