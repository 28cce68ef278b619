"""ZO-SignSGD (Liu, Chen, Chen, Hong, ICLR 2019)."""

from __future__ import annotations

from typing import ClassVar

from jaguar.optimizers.zo_sgd import ZOSGD
from jaguar.rule import Rule
from jaguar.rules import Sign


class ZOSignSGD(ZOSGD):
    """ZO-SignSGD: the sign of a two-point estimate along dense random directions, every coordinate moves by lr.

        g = mean over directions of rho z;   m <- momentum m + g;   x <- (1 - lr wd) x - lr sign(m)

    (m = g without momentum.) With one direction and no momentum sign(g) = sign(rho) sign(z). The public codes multiply
    z by sign(rho) and keep its magnitudes, which is ZO-SGD with |rho| = 1.

    Args:
        params: as `ZOSGD`, and all further arguments too.
        lr: length of every coordinate's step.

    Raises:
        ValueError: an argument is out of range; the message names what would be right.

    Source: Liu, Chen, Chen, Hong, "signSGD via zeroth-order oracle", ICLR 2019, Algorithm 1.
    Equivalent to: `g = rho * z; m = momentum * m + g; x -= lr * m.sign()`.
    """

    _rule: ClassVar[Rule] = Sign()
