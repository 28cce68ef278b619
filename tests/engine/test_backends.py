"""A backend is one value: a planted one is found by every choice, and every optimizer runs on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import jaguar
from jaguar.backends import availability

REFERENCE = availability.named("reference")
OPTIMIZERS: dict[str, Any] = {
    "zo-sgd": jaguar.ZOSGD,
    "jaguar-signsgd": jaguar.JaguarSignSGD,
    "jaguar-muon": jaguar.JaguarMuon,
    "zo-muon": jaguar.ZOMuon,
    "zo-adamu": jaguar.ZOAdaMU,
}


def plant(monkeypatch: pytest.MonkeyPatch, **more: Any) -> list[str]:
    """Puts a backend in the first place; the list has a line for everything that it binds."""
    bound: list[str] = []

    def bind(*of: Any) -> Any:
        bound.append("mine")
        assert REFERENCE.bind is not None
        return REFERENCE.bind(*of)

    mine = replace(REFERENCE, name="mine", bind=bind, **more)
    monkeypatch.setattr(availability, "BACKENDS", (mine, *availability.BACKENDS))
    monkeypatch.setattr(availability, "NAMES", (*availability.NAMES, "mine"))
    return bound


def trained(kind: Any, **more: Any) -> list[torch.Tensor]:
    """Parameters after three steps; ZO-AdaMU's schedule has as many."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), torch.randn(8, 6)
    if kind is jaguar.ZOAdaMU:
        more |= {"warmup": 1, "total": 3}
    parameters = jaguar.param_groups(net) if kind.by_role else net.named_parameters()
    optimizer = kind(parameters, lr=1e-2, seed=3, **more)
    for _ in range(3):
        optimizer.step(lambda: net(x).square().mean())
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["mine", "auto"])
def test_every_optimizer_runs_on_it(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = trained(OPTIMIZERS[name], backend="reference")
    bound = plant(monkeypatch)
    found = trained(OPTIMIZERS[name], backend=backend)
    assert bound and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"missing": lambda: "it is away"}, "backend='mine' is not available: it is away; available: reference"),
        ({"refuses": lambda *_: "it is too odd"}, "backend='mine' cannot draw this: it is too odd"),
        ({"unfit": lambda slot: "is too large"}, "backend='mine' cannot take 0.bias: it is too large"),
    ],
)
def test_it_is_refused_for_its_reason_and_left_out_by_auto(
    more: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = plant(monkeypatch, **more)
    with pytest.raises(availability.Unavailable) as refused:
        trained(jaguar.ZOSGD, backend="mine")
    assert message in str(refused.value)
    trained(jaguar.ZOSGD)
    assert not bound


def test_an_emulated_one_runs_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = plant(monkeypatch, emulated=lambda: True)
    trained(jaguar.ZOSGD)
    assert not bound
    trained(jaguar.ZOSGD, backend="mine")
    assert bound


def test_products_of_its_own_make_newton_schulz(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by its name; a matrix elsewhere, or an iteration that is none of 16 bits, is refused."""

    class Asked(Exception):
        """Stands for products."""

    def products() -> Any:
        raise Asked

    plant(monkeypatch, products=products, emulated=lambda: True)
    G = torch.eye(3)
    with pytest.raises(Asked):
        jaguar.newton_schulz(G, backend="mine")
    with pytest.raises(availability.Unavailable, match=r"dtype=torch\.float32 was asked for"):
        jaguar.newton_schulz(G, dtype=torch.float32, backend="mine")
    plant(monkeypatch, products=products)
    with pytest.raises(availability.Unavailable, match="the matrix is on cpu"):
        jaguar.newton_schulz(G, backend="mine")
