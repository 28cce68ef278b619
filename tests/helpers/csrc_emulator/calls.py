"""One call of each kernel with numpy matrices, and the same in float64 with a bound on what rounding may change."""

from __future__ import annotations

import ctypes

import numpy as np

from jaguar.method.schemes import ridge

from .harness import (
    CANARY,
    FP16,
    PARTS,
    UNIT,
    Operand,
    Padded,
    PrepareArgs,
    ProductArgs,
    SmallArgs,
    decode,
    encode,
    storage,
)

Coefficients = list[tuple[float, float, float]]


def product(
    library: ctypes.CDLL,
    m: int,
    n: int,
    k: int,
    *,
    batch: int = 1,
    b_transposed: bool = True,
    c: str = "none",
    d_transposed: bool = False,
    d_format: int = FP16,
    triangle: bool = False,
    alpha: float = 0.75,
    beta: float = -1.5,
) -> np.ndarray:
    """Runs one product and compares it with float64; D's bits.

    A triangle gets a product that is not symmetric: the part above the diagonal then shows where it came from.
    """
    rng = np.random.default_rng([m, n, k, batch])
    a = encode(rng.standard_normal((batch, m, k)), FP16)
    b = encode(rng.standard_normal((batch, k, n)), FP16)
    of_c = encode(rng.standard_normal((batch, m, n)), FP16)
    stored_a, stored_b = Operand(a), Operand(b.transpose(0, 2, 1) if b_transposed else b)
    d = Padded(batch, *((n, m) if d_transposed else (m, n)), storage(d_format))
    stored_c: Operand | Padded = Operand(of_c)
    if c == "alias":
        d.view[:] = of_c
        stored_c = d
    has_c = c != "none"
    args = ProductArgs(batch, m, n, k, stored_a.address, stored_a.batch, stored_a.row)
    args.b, args.b_batch, args.b_row, args.b_transposed = stored_b.address, stored_b.batch, stored_b.row, b_transposed
    args.c, args.c_batch, args.c_row = stored_c.address if has_c else 0, stored_c.batch, stored_c.row
    args.d, args.d_batch, args.d_row, args.d_transposed = d.address, d.batch, d.row, d_transposed
    args.d_format, args.alpha, args.beta, args.triangle = d_format, alpha, beta, triangle
    code = library.jaguar_product(args, 0)
    assert code == 0, library.jaguar_error(code)

    a64, b64, c64 = a.astype(np.float64), b.astype(np.float64), of_c.astype(np.float64) * has_c
    expected = alpha * (a64 @ b64) + beta * c64
    size = abs(alpha) * (abs(a64) @ abs(b64)) + abs(beta * c64)
    if triangle:
        expected, size = (np.tril(x) + np.tril(x, -1).transpose(0, 2, 1) for x in (expected, size))
    got = decode(d.view)
    got = got.transpose(0, 2, 1) if d_transposed else got
    # one rounding to the format, and fp32 sums: each of the k / 16 accumulations and two more roundings, 2^-24 each
    bound = UNIT[d_format] * abs(expected) + (k / 16 + 3) * 2.0**-24 * size + 2.0**-25
    assert np.isfinite(got).all()
    assert (abs(got - expected) <= bound).all(), abs(got - expected).max()
    assert d.untouched_outside()
    return d.view.copy()


def prepare(library: ctypes.CDLL, matrices: list[np.ndarray], kind: int, transposed: bool, scale: float) -> np.ndarray:
    """X for matrices given as values; what the launches leave outside of X is checked here."""
    stored = [Operand(encode(g, kind).reshape(1, 1, -1)) for g in matrices]
    rows, cols = matrices[0].shape[::-1] if transposed else matrices[0].shape
    x = Padded(len(matrices), rows, cols, np.float16)
    statistics = Padded(1, 1, len(matrices) * 2 * PARTS, np.float32)
    args = PrepareArgs(len(matrices), rows, cols, transposed, kind)
    args.g[: len(matrices)] = [g.address for g in stored]
    args.x, args.x_batch, args.x_row, args.statistics, args.scale = x.address, x.batch, x.row, statistics.address, scale
    code = library.jaguar_prepare(args, 0)
    assert code == 0, library.jaguar_error(code)
    assert x.untouched_outside()
    assert statistics.untouched_outside()
    assert not (statistics.view.view(np.uint8) == CANARY).all(axis=-1).any()
    return x.view.copy()


def check_prepared(x: np.ndarray, g: np.ndarray, kind: int, transposed: bool, scale: float) -> None:
    values = decode(encode(g, kind)).astype(np.float64)
    values = values.T if transposed else values
    if not np.isfinite(values).all():
        assert np.isnan(x).all()
        return
    norm = np.sqrt((values**2).sum())
    expected = scale * values / norm if norm else values
    # fp32 work costs a few units of 2^-24, the sum of squares no more than a relative 1e-6; then one rounding to fp16
    assert (abs(x.astype(np.float64) - expected) <= abs(expected) * (UNIT[FP16] + 2e-6) + 2.0**-25).all()


def newton_schulz(g: np.ndarray, coefficients: Coefficients) -> np.ndarray:
    """The iteration in float64 on X itself."""
    x = g / np.linalg.norm(g)
    for a, b, c in coefficients:
        r = x @ x.T
        x = a * x + (b * r + c * r @ r) @ x
    return x


def rounded(g: np.ndarray) -> np.ndarray:
    """As the kernel reads G: scaled by a power of two to magnitudes below 2, in fp16."""
    exponent = np.frexp(abs(g).max())[1] - 1
    return np.ldexp(g, -exponent).astype(np.float32).astype(np.float16).astype(np.float64)


def small(
    library: ctypes.CDLL,
    matrices: list[np.ndarray],
    coefficients: Coefficients,
    kind: int,
    o_kind: int,
    transposed: list[bool],
    dense: bool = False,
) -> list[np.ndarray]:
    """O for matrices (n, m), each stored as given or, transposed, as (m, n)."""
    inputs, outputs, table = [], [], []
    for g, flipped in zip(matrices, transposed, strict=True):
        values = encode(g.T if flipped else g, kind)[None]
        stored, out = Operand(values, dense), Padded(1, *values.shape[1:], storage(o_kind), dense)
        inputs.append(stored)
        outputs.append(out)
        assert stored.row == out.row
        strides = (1, stored.row) if flipped else (stored.row, 1)
        table.append([stored.address, out.address, *g.shape, *strides])
    items = np.array(table, np.int64)
    args = SmallArgs(items.ctypes.data, len(table), max(g.shape[0] for g in matrices), kind, o_kind, len(coefficients))
    args.scale, args.ridge = 1.0, ridge(coefficients)
    for field, values in zip("abc", zip(*coefficients, strict=True), strict=True):
        getattr(args, field)[: len(values)] = values
    code = library.jaguar_small(args, 0)
    assert code == 0, library.jaguar_error(code)
    assert all(out.untouched_outside() for out in outputs)
    return [decode(o.view[0].T if f else o.view[0]) for o, f in zip(outputs, transposed, strict=True)]


def check_small(o: np.ndarray, g: np.ndarray, coefficients: Coefficients, kind: int, o_kind: int) -> None:
    values = decode(encode(g, kind)).astype(np.float64)
    expected = newton_schulz(rounded(values), coefficients)
    # fp32 rounding of R (2^-24 n, relative to its norm) is amplified like any change of R: by at most the slope of the
    # whole polynomial at zero, 58 (cubic) and 485 (quintic); Q's two halves keep 22 bits: 3e-4 covers both with room
    assert (abs(o - expected) <= UNIT[o_kind] * abs(expected) + 3e-4).all(), abs(o - expected).max()
