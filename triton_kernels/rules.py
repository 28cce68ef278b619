"""`jaguar.method.rules` in registers: every product and sum rounded on its own (kernels are compiled without fusion).

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
def blend(z, y, share, rest):
    """share z + rest y."""
    return z * share + y * rest


@triton.jit
def momentum_step(x, m, decay, rate, v):
    """(1 - lr wd) x - (lr rho) m / sqrt(v + 1e-8), rate = lr rho."""
    return x * decay - quotient(m * rate, root(v + 1e-8))


@triton.jit
def sgd_step(x, m, decay, lr):
    """(1 - lr wd) x - lr m."""
    return x * decay - m * lr


@triton.jit
def recursive_step(x, v, decay, lr, eta):
    """(1 - lr wd) x - lr (eta v)."""
    return x * decay - (v * eta) * lr


@triton.jit
def sign_step(x, m, decay, lr):
    """(1 - lr wd) x - lr sign(m), sign(0) = 0."""
    return x * decay - tl.where(m > 0, lr, tl.where(m < 0, -1.0 * lr, 0.0))


@triton.jit
def adam(m, v, g, beta1, rest1, beta2, rest2):
    """beta1 m + (1 - beta1) g, and beta2 v + (1 - beta2) g^2."""
    return m * beta1 + g * rest1, v * beta2 + (g * g) * rest2


@triton.jit
def amsgrad(m, v, h, g, beta1, rest1, beta2, rest2):
    """`adam`, and max(h, v)."""
    m, v = adam(m, v, g, beta1, rest1, beta2, rest2)
    return m, v, tl.maximum(h, v, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def adam_step(x, m, v, decay, lr, eps, c1, c2):
    """(1 - lr wd) x - lr ((c1 m) / (sqrt(c2 v) + eps))."""
    return x * decay - quotient(m * c1, root(v * c2) + eps) * lr


@triton.jit
def amsgrad_step(x, m, v, h, decay, lr, eps, c1, c2):
    """`adam_step` with h in place of v."""
    return adam_step(x, m, h, decay, lr, eps, c1, c2)


@triton.jit
def root(v):
    """The square root, rounded correctly."""
    if v.dtype == tl.float64:
        return tl.sqrt(v)
    else:
        return tl.sqrt_rn(v)


@triton.jit
def quotient(a, b):
    """a / b, rounded correctly."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)
