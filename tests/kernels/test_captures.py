"""CUDA graphs: what one must not contain is refused while it is captured, and what its replays read is kept."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from helpers.laws import make

pytest.importorskip("triton")
from torch import Tensor

from helpers.kernels import DIRECTIONS, Form, Twins, coordinate_twins, dense_twins, interpreted, method_of
from helpers.launches import bag_of, everything
from jaguar.backends import triton as fused
from jaguar.backends import uploads
from jaguar.backends.polar import triton as newton_schulz
from jaguar.method.params import Slot
from jaguar.method.rules import AveragedSign

pytestmark = interpreted

REFUSED = pytest.raises(RuntimeError, match=r"a CUDA graph is being captured.* run the step once before")
KINDS: dict[str, Callable[[], Twins]] = {
    "coordinate": lambda: coordinate_twins([Form((300,), torch.float32)], DIRECTIONS["fraction"], special=False),
    "dense": lambda: dense_twins([Form((300,), torch.float32)], "rademacher", special=False),
    "module": lambda: dense_twins([Form((300,), torch.float32)], "rademacher", restore="module", special=False),
}


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> dict[int, object]:
    """What is kept for replays meanwhile."""
    kept: dict[int, object] = {}
    monkeypatch.setattr(uploads, "_FOR_REPLAYS", kept)
    return kept


@contextlib.contextmanager
def capture() -> Iterator[None]:
    """As if everything in here went into a graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads, "capturing", lambda device: True)
        yield


def test_the_stream_of_the_device_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[torch.device] = []
    graph = torch.device("cuda:1")

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        inside.append(wanted)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: inside == [graph])
    assert uploads.capturing(graph) and not uploads.capturing(torch.device("cuda:0"))
    assert not uploads.capturing(torch.device("cpu")), "which torch without CUDA is not asked about"


@pytest.mark.parametrize("copy", [uploads.uploaded, uploads.staged])
def test_copies_from_the_host_are_refused(copy: Callable[[Any, torch.device], Any]) -> None:
    host, device = torch.arange(3), torch.device("cpu")
    with capture(), REFUSED:
        copy(host, device)
    assert torch.equal(copy(host, device), host)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_new_tables_are_refused_and_old_ones_launch(kind: str) -> None:
    twins = KINDS[kind]()
    steps = twins.steps[1]
    with capture(), REFUSED:
        steps.numbers.fill(twins.inputs(1))
    with capture(), REFUSED:  # of tables
        steps.launches.prepare(twins.inputs(1))
    twins.probes(1)
    with capture():
        steps.launches.prepare(twins.inputs(1))
        (probe,) = steps.launches.probes(twins.inputs(1))
        probe.to(1.0), probe.abort()


def step(twins: Twins) -> None:
    """A step's launches in kernels."""
    steps = twins.steps[1]
    for rho in ([], [0.5]):
        steps.launches.prepare(twins.inputs(1, rho=rho))
    (probe,) = steps.launches.probes(twins.inputs(1))
    probe.to(1.0), probe.abort()
    steps.update_(twins.inputs(1, rho=[0.5]))


@contextlib.contextmanager
def tables_made() -> Iterator[list[weakref.ref[Tensor]]]:
    """The tables that plans upload meanwhile."""
    seen: list[weakref.ref[Tensor]] = []

    def uploaded(host: Tensor, device: torch.device) -> Tensor:
        table = uploads.uploaded(host, device)
        seen.append(weakref.ref(table))
        return table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaguar.backends.triton.plan.uploaded", uploaded)
        yield seen


@pytest.mark.parametrize("kind", KINDS)
def test_what_replays_read_outlives_its_launches(kind: str, replays: dict[int, object]) -> None:
    """Tables are made anew when a tensor moves, launches when one is frozen; a graph still has the old addresses."""
    twins = KINDS[kind]()

    with tables_made() as tables:
        step(twins)
    assert tables and not replays, "outside of a capture nothing is kept"
    with capture():
        step(twins)
    numbers = weakref.ref(twins.steps[1].numbers)
    del twins
    gc.collect()
    assert numbers() is not None and all(table() is not None for table in tables)
    replays.clear()
    gc.collect()
    assert numbers() is None and not any(table() is not None for table in tables)


def test_tables_along_matrices_outlive_other_matrices(replays: dict[int, object]) -> None:
    slots = [Slot("x", torch.zeros(6, 8), 1, 0, torch.Size((6, 8)))]
    method = method_of(DIRECTIONS["fraction"], AveragedSign())
    moves = fused.MatrixLaunches(method, fused.DeviceScalars(slots, method))
    one, other = torch.ones(6, 8), torch.ones(6, 8)
    with capture(), REFUSED:
        moves.move_(slots, [one], None)
    with tables_made() as tables:
        moves.move_(slots, [one], None)
    for factors in ([one], [other]):
        with capture() if factors[0] is one else contextlib.nullcontext():
            moves.move_(slots, factors, None)
    gc.collect()
    assert tables and all(table() is not None for table in tables)


def test_tables_of_newton_schulz_are_refused_and_kept(
    monkeypatch: pytest.MonkeyPatch, replays: dict[int, object]
) -> None:
    monkeypatch.setattr(newton_schulz, "TABLES", 2)
    products, cpu = newton_schulz.TritonProducts(), torch.device("cpu")
    with capture(), REFUSED:
        products._table(cpu, torch.int64, [1])
    captured, eager = (weakref.ref(products._table(cpu, torch.int64, [n])) for n in (1, 2))
    with capture():
        products._table(cpu, torch.int64, [1])
    for n in range(3, 8):  # an eager run of other matrices
        products._table(cpu, torch.int64, [n])
    gc.collect()
    assert captured() is not None and eager() is None
    assert len(products._tables) == 2


@pytest.mark.parametrize("config", ["fraction", "gaussian-copy", "muon"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_steps_are_refused_and_nothing_is_lost(config: str, backend: str) -> None:
    """Numbers of a step would be those of every replay: as arguments of torch's kernels too."""
    bag = bag_of(torch.float32)
    opt = make(config, bag.named_parameters(), backend=backend)
    record = opt.measure(bag)
    before = everything(bag, opt)
    for call in (lambda: opt.apply_(record), opt.step):
        with capture(), REFUSED:
            call()
        assert everything(bag, opt) == before
    opt.apply_(record)
    assert opt.steps_done == 1 and everything(bag, opt) != before
    for call in (lambda: opt.measure(bag), lambda: opt.step(bag)):
        with capture(), REFUSED:
            call()
    opt.step(bag)
    assert opt.steps_done == 2
