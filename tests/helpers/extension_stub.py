"""The bindings of the CUDA extension, compiled with a stub in place of the kernels."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

CSRC = Path(__file__).parents[2] / "csrc"
STREAM = 0x123456789AB  # more than 32 bits

STUB = """
#include <Python.h>
#include "newton_schulz.h"
static jaguar_product_args product;
static jaguar_prepare_args prepare;
static jaguar_small_args small_;
struct call { int32_t calls, code, gil; uint64_t stream; };
static call last;
static int record(uint64_t stream) {
    last.calls += 1; last.stream = stream; last.gil = PyGILState_Check();
    return last.code;
}
extern "C" {
int jaguar_product(const jaguar_product_args* args, uint64_t stream) { product = *args; return record(stream); }
int jaguar_prepare(const jaguar_prepare_args* args, uint64_t stream) { prepare = *args; return record(stream); }
int jaguar_small(const jaguar_small_args* args, uint64_t stream) { small_ = *args; return record(stream); }
const char* jaguar_error(int code) { return code == -3 ? "no kernel for this" : "something else"; }
int jaguar_abi_version() { return JAGUAR_ABI_VERSION; }
int jaguar_driver_version() { return 13010; }
void* stub_product() { return &product; }
void* stub_prepare() { return &prepare; }
void* stub_small() { return &small_; }
void* stub_last() { return &last; }
}
"""

I32, I64, U64, F32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_float


class Product(ctypes.Structure):
    _fields_ = [
        *((name, I32) for name in ("batch", "m", "n", "k")),
        *((name, U64 if name in "abcd" else I64) for name in ("a", "a_batch", "a_row", "b", "b_batch", "b_row")),
        ("b_transposed", I32),
        *((name, U64 if name in "abcd" else I64) for name in ("c", "c_batch", "c_row", "d", "d_batch", "d_row")),
        *((name, I32) for name in ("d_transposed", "d_format")),
        *((name, F32) for name in ("alpha", "beta")),
        ("triangle", I32),
    ]


class Prepare(ctypes.Structure):
    _fields_ = [
        *((name, I32) for name in ("batch", "rows", "cols", "transposed", "g_format")),
        ("g", U64 * 64),
        ("x", U64),
        ("x_batch", I64),
        ("x_row", I64),
        ("statistics", U64),
        ("scale", F32),
    ]


class Small(ctypes.Structure):
    _fields_ = [
        ("items", U64),
        *((name, I32) for name in ("count", "largest", "g_format", "o_format", "steps")),
        ("scale", F32),
        ("ridge", F32),
        *((name, F32 * 32) for name in "abc"),
    ]


class Last(ctypes.Structure):
    _fields_ = [("calls", I32), ("code", I32), ("gil", I32), ("stream", U64)]


class Cuda:
    """A CPU tensor that says it is on a GPU."""

    def __init__(self, tensor: Tensor, device: str = "cuda:0") -> None:
        self.tensor, self.device, self.is_cuda = tensor, torch.device(device), True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)


class Stub:
    """The module and what its kernels were called with."""

    def __init__(self, module: ModuleType, library: ctypes.CDLL) -> None:
        self.module, self._library = module, library
        self.last.calls = self.last.code = 0

    def _read(self, name: str, kind: Any) -> Any:
        return ctypes.cast(getattr(self._library, f"stub_{name}")(), ctypes.POINTER(kind)).contents

    product = property(lambda self: self._read("product", Product))
    prepare = property(lambda self: self._read("prepare", Prepare))
    small = property(lambda self: self._read("small", Small))
    last = property(lambda self: self._read("last", Last))


def half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16)


B, M, N, K = 2, 16, 24, 40


def on(device: str, *shape: int) -> Cuda:
    return Cuda(half(*shape), device)
