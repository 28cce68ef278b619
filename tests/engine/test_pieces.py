"""Small tensors go through a launch together and large samples in parts: same bits, fewer calls, little memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.tensors import DTYPES, dtype_id
from jaguar import ZOSGD, JaguarMuon, JaguarSignSGD, ZOSignSGD
from jaguar.method.directions import Coordinates, ReleasedBlock
from jaguar.method.params import Slot
from jaguar.method.rng import Draw, Elements, Purpose, noise16, noise16_of, normals, normals_of, runs, signs, signs_of

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from scoring.allocations import Allocations


class Crowd(nn.Module):
    """Scalars, empty tensors, vectors, matrices, transposed ones, and two dtypes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = [(), (0,), (1,), (7,), (130,), (13, 11), (3, 5, 4), (9, 14), (8,), (8,), (257,)]
        g = torch.Generator().manual_seed(3)
        made = [torch.randn(shape, generator=g).mul(0.3) for shape in shapes]
        self.many = nn.ParameterList([x.t() if x.shape == (9, 14) else x for x in made]).to(dtype)
        self.other = nn.Parameter(torch.ones(5))

    def forward(self) -> torch.Tensor:
        return sum((p.double().sin() * (i + 1)).sum() for i, p in enumerate(self.parameters())).float()  # type: ignore


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gaussian": (ZOSGD, {"restore": "copy", "momentum": 0.9, "n_directions": 2}),
    "rademacher": (ZOSignSGD, {"distribution": "rademacher", "momentum": 0.9, "momentum_dtype": torch.float8_e5m2}),
    "walk": (ZOSGD, {"restore": "walk", "weight_decay": 0.1}),
    "fraction": (JaguarSignSGD, {"coordinates": 0.1}),
    "two": (JaguarSignSGD, {"coordinates": 0.5, "n_directions": 2, "momentum_dtype": torch.float8_e5m2}),
    "everything": (JaguarSignSGD, {"coordinates": 1.0, "update": "all"}),
    "count": (JaguarSignSGD, {"coordinates": 50}),
    "block": (JaguarSignSGD, {"coordinates": 0.25, "layout": "block"}),
    "released": (JaguarMuon, {"released": True}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("config", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:tau is too small")
def test_together_is_apart(config: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options = OPTIMIZERS[config]
    seen, pieces = [], []
    for small in (-1, 5, 1 << 14):
        monkeypatch.setattr("jaguar.backends.reference.pieces._SMALL", small)
        net = Crowd(dtype)
        opt = kind(net.named_parameters(), lr=1e-3, seed=5, backend="reference", **options)
        for _ in range(3):
            opt.step(net)
        pieces.append(len(opt._launches().parts[0][1].pieces))
        values = [p for p in net.parameters()] + [opt.state[p].get("momentum") for p in net.parameters()]
        bits = [x.detach().contiguous().view(-1).view(torch.uint8).tolist() for x in values if x is not None]
        seen.append((bits, opt.last_record, opt.lost_share))
    assert seen[0] == seen[1] == seen[2] and 12 == pieces[0] > pieces[1] > pieces[2]


def test_elements_of_several_streams() -> None:
    spans = [(5, 0, 3), (9, 126, 300), (7, 2**40 + 5, 0), (5, 2**40 + 3, 17), (2**32 - 1, 1, 1)]
    key = (3, 4)
    for joint, single in ((normals_of, normals), (signs_of, signs)):
        assert torch.equal(joint(key, Elements(spans)), torch.cat([single(key, *span) for span in spans]))
    noise = [noise16(key, *span, Purpose.ROUND) for span in spans]
    assert torch.equal(noise16_of(key, Elements(spans), Purpose.ROUND), torch.cat(noise))
    stream, index = Elements(spans).at(torch.tensor([0, 2, 3, 302, 303, 319, 320]))
    assert stream.tolist() == [5, 5, 9, 9, 5, 5, 2**32 - 1]  # type: ignore[union-attr]
    assert index.tolist() == [0, 2, 126, 425, 2**40 + 3, 2**40 + 19, 1]


def test_runs() -> None:
    assert runs(torch.tensor([5, 0, 9]), torch.tensor([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]


LARGE = {"one": Coordinates(1.0), "half": Coordinates(0.5), "tenth": Coordinates(0.1), "rare": Coordinates(1 / 300)}
LARGE |= {"grid": Coordinates(0.25, "block"), "ones": Coordinates(1.0, signs="ones"), "released": ReleasedBlock()}


@pytest.mark.parametrize("direction", LARGE.values(), ids=LARGE)
def test_parts_of_a_large_sample_are_the_sample(direction: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts and packed, or as one list; of a whole tensor and of a shard."""
    whole = Slot("w", torch.empty(37, 211), 7, 0, torch.Size((37, 211)))
    shard = Slot("w", torch.empty(5000), 7, 0, torch.Size((37, 211)), start=1234)
    for slot in (whole, shard):
        found = []
        for part in (1 << 20, 16):
            monkeypatch.setattr("jaguar.method.samples.PART", part)
            (chosen,) = direction.choose(Draw(1, 2), [slot], [[0]])
            parts = list(chosen.parts())
            assert chosen.count == sum(place.numel() for place, _ in parts)
            found.append([torch.cat(values) for values in zip(*parts, strict=True)])
            assert len(parts) > 1 or part > 16
        assert all(map(torch.equal, *found)) and (found[0][0].diff() > 0).all()


class Calls(TorchDispatchMode):
    """Counts what torch is asked to do."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", ["gaussian", "rademacher", "walk", "fraction", "count", "block"])
def test_a_small_tensor_more_costs_little(config: str) -> None:
    """MeZO's loop makes about 17 calls per tensor and step; one by one this were 500 to 1500."""
    kind, options = OPTIMIZERS[config]
    counts = []
    for number in (100, 300):
        params = [nn.Parameter(torch.ones(8)) for _ in range(number)]
        opt = kind(params, backend="reference", **options)
        opt.step(lambda: torch.tensor(0.5))
        with Calls() as calls:
            opt.step(lambda: torch.tensor(0.5))
        counts.append(calls.count)
    assert (counts[1] - counts[0]) / 200 < 40


@pytest.mark.parametrize("layout", ["uniform", "block"])
def test_memory_of_all_coordinates(layout: str) -> None:
    """A copy to restore from, the momentum, and temporaries of one piece; once it was ten times the tensor."""
    p = nn.Parameter(torch.full((4096, 2048), 0.1))
    opt = JaguarSignSGD([p], coordinates=1.0, layout=layout, backend="reference")
    with Allocations() as trace:
        opt.step(lambda: torch.tensor(0.5))
    size = p.numel() * p.itemsize
    assert 2 * size < trace.peak < 2.1 * size
    assert size <= trace.live < 1.01 * size  # the momentum
