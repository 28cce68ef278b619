"""Slow independent oracles (plain ints, numpy) and the small models that the tests share."""

from __future__ import annotations

import hashlib
import os
import signal
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"  # the hub's client would try for half a minute where there is no network
if not torch.cuda.is_available():  # before anything of jaguar is imported: it is read when the kernels are made
    os.environ.setdefault("TRITON_INTERPRET", "1")

from laws import CONFIGS as CONFIGS
from laws import TAU as TAU
from laws import make as make

from jaguar import ZerothOrder

torch.set_num_threads(1)

# Shells start jobs in the background with SIGINT ignored, and Python then has no KeyboardInterrupt to test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

M32 = 0xFFFFFFFF
CLOSURE, DIRECTION, COORDINATES, ROWS, COLUMNS, LAYERS, ROUND, ROUND_STATE = range(8)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


# Rows of the table of laws that the default suite tries in fp16 too, which shares all but its rounding with bf16; the
# others' are in test-full.
IN_FP16 = {"fraction", "all", "gaussian-copy", "muon", "signs"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        fp16 = given.get("dtype") is torch.float16 or given.get("storage") == "fp16"
        if fp16 and given.get("config", "" if "storage" in given else "fraction") not in IN_FP16:
            item.add_marker(pytest.mark.slow)


def dtype_id(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def philox_ints(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10 in plain ints, from the paper."""
    k0, k1 = key
    c = list(counter)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & M32, (a >> 32) ^ c[3] ^ k1, a & M32]
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return c[0], c[1], c[2], c[3]


def step_key_ints(seed: int, step: int, direction: int, purpose: int) -> tuple[int, int]:
    return philox_ints((seed & M32, seed >> 32), (step & M32, direction, purpose, step >> 32))[:2]


def words_ints(key: tuple[int, int], group: int, stream: int, purpose: int) -> tuple[int, int, int, int]:
    return philox_ints(key, (group & M32, group >> 32, stream, purpose))


def stream_ints(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def sign_at(key: tuple[int, int], stream: int, i: int) -> float:
    word = words_ints(key, i // 128, stream, DIRECTION)[i % 128 // 32]
    return -1.0 if word >> (i % 32) & 1 else 1.0


def noise_at(key: tuple[int, int], stream: int, i: int, purpose: int) -> int:
    return words_ints(key, i // 8, stream, purpose)[i % 8 // 2] >> (16 * (i % 2)) & 0xFFFF


def stratum_ints(key: tuple[int, int], j: int, stream: int, size: int, purpose: int = COORDINATES) -> tuple[int, float]:
    """(place in [0, size), sign) of stratum j."""
    w0, w1, w2, _ = words_ints(key, j, stream, purpose)
    return ((w1 << 32 | w0) * size) >> 64, -1.0 if w2 >> 31 else 1.0


def fraction_ints(seed: int, step: int, stream: int, total: int, size: int, direction: int = 0) -> dict[int, float]:
    """{logical index: sign} of the sampled coordinates of one tensor, strata of `size` elements."""
    key = step_key_ints(seed, step, direction, COORDINATES)
    places = {}
    for j in range(-(-total // size)):
        place, sign = stratum_ints(key, j, stream, size)
        if j * size + place < total:
            places[j * size + place] = sign
    return places


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor's values in logical order."""
    return tensor.detach().contiguous().clone().reshape(-1).view(torch.uint8).numpy().tobytes()


def all_bits(params: list[Tensor]) -> list[bytes]:
    return [bits(p) for p in params]


def state_bits(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> list[bytes]:
    return [bits(m) for p in params for _, m in sorted(optimizer.state.get(p, {}).items())]


class Log:
    """What a test writes down in an evaluation; the contents of plain lists would be put back."""

    def __init__(self) -> None:
        self.seen: list[Any] = []


class Bag(nn.Module):
    """Parameters of any form, a smooth loss that every one of their elements reaches, and what each evaluation saw."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.log = Log()
        for i, tensor in enumerate(tensors):
            self.register_parameter(f"p{i}", nn.Parameter(tensor))

    @property
    def seen(self) -> list[list[Tensor]]:
        return self.log.seen

    def forward(self) -> Tensor:
        wide = torch.float64 if any(p.dtype == torch.float64 for p in self.parameters()) else torch.float32
        self.log.seen.append([p.detach().clone() for p in self.parameters()])
        loss = torch.zeros((), dtype=wide)
        for p in self.parameters():
            x = p.to(wide).reshape(-1)
            loss = loss + ((x - torch.linspace(-1, 1, x.numel(), dtype=wide, device=x.device)) ** 2).sum()
        return loss


def weights(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """N(0, 0.3^2), rounded to dtype."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.3).to(dtype)


FORMS = {
    "contiguous": lambda d: weights(d, 12, 17),
    "transposed": lambda d: weights(d, 17, 12).t(),
    "slice": lambda d: weights(d, 9, 40)[2:7, 3:31],
    "one": lambda d: weights(d, 1),
    "empty": lambda d: weights(d, 0, 4),
    "cube": lambda d: weights(d, 3, 4, 5),
}


def every_form(dtype: torch.dtype) -> Bag:
    return Bag([make(dtype) for make in FORMS.values()])


def numpy_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).numpy().copy()


def skipping() -> Any:
    """Around steps that are skipped for the first, or the 2^k-th time."""
    return pytest.warns(UserWarning, match=r"was skipped, because .*: nothing moved\.")


def warned(opt: ZerothOrder, closure: object, steps: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            opt.step(closure)
    return [str(w.message) for w in caught]


@pytest.fixture(autouse=True)
def _fixed_generators() -> None:
    torch.manual_seed(0)


# Elements around whatever kernels write to in a test: a program that masks nothing writes less than 8192 too many.
BAND = 8192 + 64


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Buffers of saved values begin as NaN, between bands that nothing may write to; numpy computes silently."""
    from jaguar.backends.triton.plan import Plan

    real, buffers = Plan.saved, []

    def saved(self: Plan, *args: object) -> Tensor:
        inner = real(self, *args)
        outer = torch.full(((len(inner) + 2 * BAND) * inner.itemsize,), 255, dtype=torch.uint8, device=inner.device)
        buffers.append(outer.view(inner.dtype))
        return buffers[-1][BAND:-BAND]

    monkeypatch.setattr(Plan, "saved", saved)
    with np.errstate(all="ignore"):  # the interpreter's casts overflow where a GPU's do
        yield
    for buffer in buffers:
        for band in (buffer[:BAND], buffer[-BAND:]):
            assert bool((band.view(torch.uint8) == 255).all())


@pytest.fixture(autouse=True, scope="session")
def _data_sets_leave_no_cache(tmp_path_factory):
    """`datasets` keeps a copy of everything it reads; the tests' goes with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield
