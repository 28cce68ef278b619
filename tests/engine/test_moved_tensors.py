"""Closures that move tensors to other places: both backends go on from where the tensors are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import jaguar
from helpers.laws import TAU
from helpers.tensors import Bag, all_bits, weights

pytest.importorskip("triton")

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "copy": (jaguar.ZOSGD, {"restore": "copy", "momentum": 0.9}),
    "walk": (jaguar.ZOSGD, {"restore": "walk"}),
    "sampled": (jaguar.JaguarSignSGD, {"coordinates": 0.3}),
    "all": (jaguar.JaguarSignSGD, {"coordinates": 0.3, "update": "all"}),
    "several": (jaguar.JaguarSignSGD, {"coordinates": 0.3, "n_directions": 2}),
}
FORMS = {"elsewhere": 0, "misaligned": 1}


class Nomad(Bag):
    """Gives its parameters other storages in every evaluation; the old ones stay, full of what was there."""

    def __init__(self, tensors: list[Tensor], skew: int) -> None:
        super().__init__(tensors)
        self.skew = skew
        self.log.left = []  # type: ignore[attr-defined]

    def forward(self) -> Tensor:
        loss = super().forward()
        for p in self.parameters():
            self.log.left.append(p.data)  # type: ignore[attr-defined]
            room = torch.empty(p.numel() + 16, dtype=p.dtype)
            p.data = room[self.skew : self.skew + p.numel()].view(p.shape).copy_(p.data)
        return loss


@pytest.mark.parametrize(("how", "form"), [("step", "misaligned"), ("measure", "elsewhere")])
@pytest.mark.parametrize("case", CASES)
def test_tensors_that_a_closure_moves(case: str, how: str, form: str) -> None:
    kind, options = CASES[case]
    found = []
    for backend in ("reference", "triton"):
        bag = Nomad([weights(torch.bfloat16, 12, 17), weights(torch.float32, 40)], FORMS[form])
        opt = kind(bag.named_parameters(), lr=1e-2, tau=TAU, seed=12345, backend=backend, **options)
        for _ in range(2):
            if how == "step":
                opt.step(bag)
            else:
                before = all_bits(list(bag.parameters()))
                record = opt.measure(bag)
                assert all_bits(list(bag.parameters())) == before or case == "walk"
                opt.apply_(record)
        found.append(all_bits(list(bag.parameters())))
    assert found[0] == found[1]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("case", ["copy", "sampled", "several"])
def test_a_closure_that_moves_tensors_and_fails(case: str, backend: str) -> None:
    kind, options = CASES[case]
    bag = Nomad([weights(torch.bfloat16, 12, 17), weights(torch.float32, 40)], 0)
    before = all_bits(list(bag.parameters()))
    opt = kind(bag.named_parameters(), lr=1e-2, tau=TAU, seed=12345, backend=backend, **options)

    def failing() -> Tensor:
        bag()
        raise ValueError("no loss")

    for call in (opt.step, opt.measure):
        with pytest.raises(ValueError, match="no loss"):
            call(failing)
        assert all_bits(list(bag.parameters())) == before
