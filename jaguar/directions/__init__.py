"""Directions e of a zero-order step: dense (Gaussian, Rademacher) or a few signed coordinates.

A direction is never stored: it is a pure function of the step key and the logical element index. Dense directions
give their values for a range of elements; coordinate directions give the chosen elements and their signs.
"""

from jaguar.directions.base import Dense, Direction, Sparse
from jaguar.directions.coordinates import Coordinates, ReleasedBlock, matrix_shape
from jaguar.directions.distributions import DENSE, Gaussian, Rademacher, dense
from jaguar.directions.layers import Layers
from jaguar.directions.mixed import Mixed
from jaguar.directions.orthonormal import Orthonormal
from jaguar.directions.sphere import Sphere

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
