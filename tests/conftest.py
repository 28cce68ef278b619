"""Settings and fixtures of all tests."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"  # the hub's client would try for half a minute where there is no network
if not torch.cuda.is_available():  # before anything of jaguar is imported: it is read when the kernels are made
    os.environ.setdefault("TRITON_INTERPRET", "1")


pytest.register_assert_rewrite("helpers")  # before any of them is imported

torch.set_num_threads(1)

# Shells start jobs in the background with SIGINT ignored, and Python then has no KeyboardInterrupt to test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """Takes what was imported, and what other files left, out of the garbage collector's sight.

    Optimizers look among all objects for the modules of their tensors, and Trainer collects garbage before a run: most
    of the time of a small test. So models that a test hands to an optimizer are made in its file's fixtures or later.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_generators() -> None:
    torch.manual_seed(0)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors one by one, so that something can fail between them."""
    monkeypatch.setattr("jaguar.backends.reference.pieces._SMALL", -1)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Buffers of saved values begin as NaN, between bands that nothing may write to; numpy computes silently."""
    from helpers.tensors import BAND
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
