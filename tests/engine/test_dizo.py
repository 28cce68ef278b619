"""DiZO: bounds, what a search leaves alone, and where the way begins."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from jaguar import DiZO

BOUNDS = (0.9, 1.05)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(12, 12) for name in ("q_proj", "k_proj", "v_proj")})


def closure(model: nn.Module) -> Tensor:
    x = torch.linspace(-1, 1, 36).view(3, 12)
    return sum((m(x) - i).square().mean() for i, m in enumerate(model.values()))  # type: ignore[return-value]


def made(model: nn.Module, **more: object) -> DiZO:
    options = {"lr": 1e-2, "tau": 1e-3, "seed": 4, "every": 3, "search_steps": 4, "bounds": BOUNDS, "search_lr": 1e3}
    return DiZO(model.named_parameters(), **options | more)  # type: ignore[arg-type]


def test_a_search_leaves_every_way_within_its_bounds_and_the_others_alone() -> None:
    """From one state with lr 0: what moves is the search's doing."""
    model = net()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt, ends = made(model), set()
    for step in range(12):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        opt.param_groups[0]["lr"] = 0.0 if step and step % 3 == 0 else 1e-2
        opt.step(lambda: closure(model))
        assert len(opt.last_record.losses) == (2 + 8 if step and step % 3 == 0 else 2)
        if not step or step % 3:
            continue
        for n, p in model.named_parameters():
            if n.startswith("k_proj"):
                assert torch.equal(p, before[n])
                continue
            way, old = (x.detach().double() - start[n].double() for x in (p, before[n]))
            s = float((way * old).sum() / (old * old).sum())
            assert BOUNDS[0] - 1e-4 <= s <= BOUNDS[1] + 1e-4
            torch.testing.assert_close(way, s * old, rtol=0, atol=1e-6)  # along the way: fp32 roundings of both ends
            ends.add(round(s, 3))
    assert {0.9, 1.05} <= ends, "such long steps end at the bounds"


def test_the_way_begins_at_the_start_also_after_a_checkpoint() -> None:
    model = net()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = made(model)
    for _ in range(5):
        opt.step(lambda: closure(model))
    twin = copy.deepcopy(model)
    again = made(twin)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(5):
        opt.step(lambda: closure(model))
        again.step(lambda: closure(twin))
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        if not n.startswith("k_proj"):
            assert torch.equal(again.state[q]["start"], start[n])


def test_a_search_that_fails_leaves_no_trace() -> None:
    model = net()
    opt = made(model)
    for _ in range(3):
        opt.step(lambda: closure(model))
    before, calls = [p.detach().clone() for p in model.parameters()], []

    def failing() -> Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return closure(model)

    with pytest.raises(KeyboardInterrupt):
        opt.measure(failing)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    record = opt.measure(lambda: closure(model))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)) and len(record.losses) == 10


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"none of q_lin, q_proj, .* is a part of the names 'bias', 'weight'"):
        DiZO(nn.Linear(2, 2).named_parameters())
    with pytest.raises(ValueError, match="restore='walk' leaves x, and a search starts from it"):
        made(net(), restore="walk")
    for name, value in (("every", 0), ("search_steps", 1.5), ("search_scale", 0.0), ("search_lr", -1.0)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            made(net(), **{name: value})
