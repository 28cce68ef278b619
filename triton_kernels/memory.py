"""Reading and writing: typed pointers from addresses, scalars of the step, tiles of 8 elements a row."""

import triton
import triton.language as tl

from jaguar.triton_kernels import rng
from jaguar.triton_kernels.rounding import nearest, noisy, stochastic


@triton.jit
def pointer(address, FORMAT: tl.constexpr, HINT: tl.constexpr):
    """An int64 address as a pointer; HINT promises that it is a multiple of 16."""
    if FORMAT == "fp64":
        p = address.to(tl.pointer_type(tl.float64))
    elif FORMAT == "fp32":
        p = address.to(tl.pointer_type(tl.float32))
    elif FORMAT == "fp16":
        p = address.to(tl.pointer_type(tl.float16))
    elif FORMAT == "bf16":
        p = address.to(tl.pointer_type(tl.uint16))
    else:
        tl.static_assert(FORMAT == "e5m2")
        p = address.to(tl.pointer_type(tl.uint8))
    if HINT:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def scalar(address, FORMAT: tl.constexpr):
    """A scalar of the step (fp64, rounded by the host) in the compute dtype of parameters stored as FORMAT."""
    v = tl.load(address)
    if FORMAT != "fp64":
        v = v.to(tl.float32)
    return v


@triton.jit
def scalars_at(address, N: tl.constexpr, FORMAT: tl.constexpr):
    """N scalars in a row: a tuple."""
    found = ()
    for i in tl.static_range(N):
        found += (scalar(address + i, FORMAT),)
    return found


@triton.jit
def rows(TILE: tl.constexpr):
    """Offsets of a tile's elements: [TILE / 8, 8], so that a thread's 8 elements share loads and random words."""
    return tl.arange(0, TILE // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def load(p, j, rest, FULL: tl.constexpr):
    """A tile, or the first `rest` elements of one; a mask would break 16-byte accesses up, so full tiles have none."""
    if FULL:
        return tl.load(p + j)
    else:
        return tl.load(p + j, mask=j < rest, other=0)


@triton.jit
def prefetch(p, rest, N: tl.constexpr):
    """Asks for the N elements from `p` on, of which there are `rest`, to be in L2 when this program reads them."""
    SIZE: tl.constexpr = p.dtype.element_ty.primitive_bitwidth // 8
    lines = tl.arange(0, N * SIZE // 128) * 128
    address = p.to(tl.int64) + tl.maximum(tl.minimum(lines, rest * SIZE - 1), 0)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32,
                              is_pure=False, pack=1)  # fmt: skip


@triton.jit
def store(p, j, rest, v, FULL: tl.constexpr):
    """Writes what `load` read."""
    if FULL:
        tl.store(p + j, v)
    else:
        tl.store(p + j, v, mask=j < rest)


@triton.jit
def as_stored(v, j, k, first, stream, FORMAT: tl.constexpr, PURPOSE: tl.constexpr, STOCHASTIC: tl.constexpr,
              GROUPED: tl.constexpr):  # fmt: skip
    """The logical elements first + j rounded to FORMAT, with the noise of key `k` where that takes noise."""
    if noisy(FORMAT, STOCHASTIC):
        if GROUPED:
            noise = rng.noise16_rows(k, first >> 3, stream, PURPOSE, j.shape[0])
        else:
            noise = rng.noise16_at(k, first + j, stream, PURPOSE)
        return stochastic(v, noise, FORMAT)
    else:
        return nearest(v, FORMAT)
