"""Automatic steps on an NVIDIA GPU: a run's records alone give its bits, on the kernels and on a CPU. `make gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import jaguar
from jaguar.backends import availability

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or availability.interpreted(), reason="needs a GPU, compiled kernels"
    ),
]
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (jaguar.ZOSGD, {"distribution": "rademacher"}),
    "sgd-one-sided": (
        jaguar.ZOSGD,
        {"distribution": "rademacher", "estimator": "one-sided", "n_directions": 4, "momentum": 0.9},
    ),
    "jaguar": (jaguar.JaguarSignSGD, {"coordinates": 0.25}),
    "jaguar-all": (jaguar.JaguarSignSGD, {"coordinates": 0.25, "update": "all"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", KINDS)
def test_records_of_automatic_steps_replay_anywhere(case: str, dtype: torch.dtype) -> None:
    kind, options = KINDS[case]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=generator).to(dtype) for size in ((33, 48), (40, 50))]
    h = torch.rand(33 * 48 + 40 * 50, generator=generator).cuda() * 2.0

    def made(device: str, backend: str) -> tuple[list[torch.Tensor], Any]:
        named = [(f"layer.{i}", torch.nn.Parameter(x.to(device))) for i, x in enumerate(start)]
        return [x for _, x in named], kind(named, lr="auto", tau="auto", backend=backend, **options)

    tensors, optimizer = made("cuda", "triton")

    def loss() -> float:
        x = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
        return float(0.5 * (h * x * x).sum())

    before, records = loss(), []
    for step in range(60):
        noise = torch.randn(16, len(h), generator=torch.Generator().manual_seed(step)).cuda()

        def closure(noise: torch.Tensor = noise) -> torch.Tensor:
            x = torch.cat([tensor.float().flatten() for tensor in tensors])
            return 0.5 * (h * x * x).sum() + 0.5 * (noise @ x)

        optimizer.step(closure)
        records.append(optimizer.last_record)
    assert loss() < before and records[-1].lrs[0] > 0.0
    for device, backend in (("cuda", "triton"), ("cuda", "reference"), ("cpu", "reference")):
        others, again = made(device, backend)
        for record in records:
            again.apply_(jaguar.Record.unpack(record.pack()))
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(tensors, others, strict=True)), (device, backend)
        assert again.estimates == optimizer.estimates
