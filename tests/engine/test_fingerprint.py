"""Fingerprints of tensors: equal for equal bits, and for nothing else."""

from __future__ import annotations

import itertools

import pytest
import torch

from jaguar.optimizers import fingerprint as module
from jaguar.optimizers.fingerprint import fingerprint

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_strides_and_chunks_are_irrelevant(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.arange(24).reshape(4, 6).to(dtype), torch.ones((), dtype=dtype)
    expected = fingerprint([("a", a), ("b", b), ("empty", a[:0])])
    assert fingerprint([("empty", a[:0]), ("b", b), ("a", a)]) == expected
    wide = torch.zeros(8, 12).to(dtype)
    wide[::2, ::2] = a
    monkeypatch.setattr(module, "_CHUNK", 5)
    assert fingerprint([("b", b), ("a", wide[::2, ::2]), ("empty", a[:0])]) == expected


def test_every_bit_name_shape_and_dtype_counts() -> None:
    x = torch.arange(6, dtype=torch.int16)
    flipped = [x ^ (torch.arange(6) == i).short() * (1 << bit) for i in range(6) for bit in range(15)]
    others = [[("y", x)], [("x", x.reshape(2, 3))], [("x", x.view(torch.bfloat16))], [("x", x), ("y", x[:0])], []]
    found = [fingerprint(named) for named in [[("x", x)], *([("x", other)] for other in flipped), *others]]
    assert all(len(one) == 32 for one in found)
    assert all(a != b for a, b in itertools.combinations(found, 2))


def test_zeros_with_a_sign_differ() -> None:
    assert fingerprint([("x", torch.zeros(1))]) != fingerprint([("x", -torch.zeros(1))])
