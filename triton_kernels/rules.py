"""`jaguar.rules` in registers: every product and every sum rounded on its own (kernels are compiled without fusion).

Kernels are compiled for the functions of a rule, which are looked up here by the names that they have there.
"""

import triton
import triton.language as tl


@triton.jit
def perturbed(x, e, scale):
    """x + scale e."""
    return x + e * scale


@triton.jit
def heavy_ball(m, g, momentum):
    """momentum m + g."""
    return m * momentum + g


@triton.jit
def sgd_step(x, m, decay, lr):
    """(1 - lr wd) x - lr m."""
    return x * decay - m * lr


@triton.jit
def sign_step(x, m, decay, lr):
    """(1 - lr wd) x - lr sign(m), sign(0) = 0."""
    return x * decay - tl.where(m > 0, lr, tl.where(m < 0, -1.0 * lr, 0.0))
