"""The CUDA kernels compiled for the emulator, their arguments, and numpy arrays with canaries around them."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_uint64
from pathlib import Path

import numpy as np

EMULATOR = Path(__file__).parent
ROOT = EMULATOR.parents[2]
FLAGS = ["-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
FLAGS += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]  # a GPU does not forgive what a CPU does

FP16, BF16, FP32 = 0, 1, 2
FORMATS = {"fp16": FP16, "bf16": BF16, "fp32": FP32}
BAD_SHAPE, BAD_ALIGNMENT, NO_KERNEL = -1, -2, -3
AMPERE, HOPPER, ONE_SM, TURING = 0, 1, 2, 3  # the emulator's devices
LATE_PRODUCTS, LATE_COPIES = 0, 1
MAX_BATCH, PARTS, MAX_STEPS = 64, 64, 32
UNIT = {FP16: 2.0**-11, BF16: 2.0**-8, FP32: 2.0**-24}  # half a unit in the last place, relative
CANARY = 0x5A


class ProductArgs(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("batch", "m", "n", "k")),
        *(("a", c_uint64), ("a_batch", c_int64), ("a_row", c_int64)),
        *(("b", c_uint64), ("b_batch", c_int64), ("b_row", c_int64), ("b_transposed", c_int32)),
        *(("c", c_uint64), ("c_batch", c_int64), ("c_row", c_int64)),
        *(("d", c_uint64), ("d_batch", c_int64), ("d_row", c_int64), ("d_transposed", c_int32)),
        *(("d_format", c_int32), ("alpha", c_float), ("beta", c_float), ("triangle", c_int32)),
    ]


class PrepareArgs(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("batch", "rows", "cols", "transposed", "g_format")),
        *(("g", c_uint64 * MAX_BATCH), ("x", c_uint64), ("x_batch", c_int64), ("x_row", c_int64)),
        *(("statistics", c_uint64), ("scale", c_float)),
    ]


class SmallArgs(ctypes.Structure):
    _fields_ = [
        *(("items", c_uint64), ("count", c_int32), ("largest", c_int32), ("g_format", c_int32)),
        *(("o_format", c_int32), ("steps", c_int32), ("scale", c_float), ("ridge", c_float)),
        *((name, c_float * MAX_STEPS) for name in "abc"),
    ]


def compile_object(source: Path, folder: Path) -> Path:
    out = folder / f"{source.stem}.o"
    words = ["g++", "-x", "c++", *FLAGS, f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


def build(folder: Path) -> ctypes.CDLL:
    sources = sorted([*(ROOT / "csrc").glob("*.cu"), *EMULATOR.glob("*.cpp")])
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: compile_object(source, folder), sources))
    path = folder / "libemulated.so"
    subprocess.run(["g++", "-shared", "-o", str(path), *map(str, objects)], check=True, timeout=120)
    library = ctypes.CDLL(str(path))
    for name, kind in (("product", ProductArgs), ("prepare", PrepareArgs), ("small", SmallArgs)):
        getattr(library, f"jaguar_{name}").argtypes = [POINTER(kind), c_uint64]
    library.jaguar_error.restype = c_char_p
    library.tiles_count.argtypes = [c_int64, c_int64, c_int64, c_int]
    library.tiles_count.restype = c_int64
    library.tiles_list.argtypes = [c_int64, c_int64, c_int, c_int, c_int, c_uint64]
    library.tiles_wide.argtypes = [c_int64] * 4
    return library


def encode(values: np.ndarray, kind: int) -> np.ndarray:
    """Values rounded to a format, bf16 as uint16."""
    if kind == FP16:
        return values.astype(np.float16)
    if kind == FP32:
        return values.astype(np.float32)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def decode(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def storage(kind: int) -> type:
    return {FP16: np.float16, BF16: np.uint16, FP32: np.float32}[kind]


def before_a_forbidden_page(size: int, fill: int) -> np.ndarray:
    """`size` bytes at a 16-byte boundary, at most 15 bytes behind which reading is a segmentation fault."""
    size = (size + 15) // 16 * 16
    pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
    raw = np.frombuffer(mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE), np.uint8)
    forbidden = ctypes.c_void_p(raw.ctypes.data + pages * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(forbidden, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    memory = raw[: pages * mmap.PAGESIZE]
    memory[:] = fill
    return memory[memory.size - size :]


class Padded:
    """(batch, rows, columns) at a 16-byte boundary with rows and batches apart, or `dense` and off every boundary.

    A canary fills what is around the values and between them.
    """

    def __init__(self, batch: int, rows: int, columns: int, dtype: type, dense: bool = False) -> None:
        item = np.dtype(dtype).itemsize
        self.row = columns if dense else (columns + 7) // 8 * 8 + 8
        self.batch = self.row * (rows + 1)
        self.raw = np.full(self.batch * batch * item + 1024, CANARY, np.uint8)
        start = 256 + -self.raw.ctypes.data % 64 + dense * item
        memory = self.raw[start : start + self.batch * batch * item].view(dtype)
        self.address = memory.ctypes.data
        self.view = memory.reshape(batch, rows + 1, self.row)[:, :rows, :columns]

    def untouched_outside(self) -> bool:
        """Whether all bytes but those of the matrices are as they were."""
        kept = self.view.copy()
        self.view[:] = np.full(self.view.dtype.itemsize, CANARY, np.uint8).view(self.view.dtype)[0]
        same = bool((self.raw == CANARY).all())
        self.view[:] = kept
        return same


class Operand:
    """Values laid out as in `Padded`; all else is NaN, so that none may come from there, and the end is guarded."""

    def __init__(self, values: np.ndarray, dense: bool = False) -> None:
        batch, rows, columns = values.shape
        item, off = values.dtype.itemsize, int(dense)
        self.row = columns if dense else (columns + 7) // 8 * 8 + 8
        self.batch = self.row * (rows + 1)
        count = off + (batch - 1) * self.batch + (rows - 1) * self.row + columns
        self.memory = before_a_forbidden_page(count * item, 0xFF)
        elements = self.memory[: count * item].view(values.dtype)[off:]
        self.address = elements.ctypes.data
        strides = (self.batch * item, self.row * item, item)
        np.lib.stride_tricks.as_strided(elements, values.shape, strides)[:] = values
