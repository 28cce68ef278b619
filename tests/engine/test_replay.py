"""Replay: records from a journal give the same bits as the run that wrote them, for every class of the table."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jaguar
from helpers import laws
from jaguar import Journal, ZerothOrder
from jaguar.optimizers.replay import mark_of, replay

DTYPES = [torch.float32, torch.bfloat16]


class Small(nn.Module):
    """Four layers of matrices and vectors, in two of which names are numbered."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator).to(dtype) / 2
        self.register_buffer("x", torch.randn(5, 6, generator=generator).to(dtype))

    def loss(self) -> Tensor:
        h: Any = self.x
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return h.float().square().mean()


def started(config: str, dtype: torch.dtype) -> tuple[Small, ZerothOrder]:
    model = Small(dtype)
    optimizer = laws.make(config, model.named_parameters())
    return model, optimizer


def states(optimizer: ZerothOrder) -> list[Any]:
    """Counters, and by name the tensors and what is kept of each; groups may have them in another order."""
    kept = {slot.name: (slot.tensor, dict(optimizer.state.get(slot.tensor, {}))) for slot in optimizer.slots}
    return copy.deepcopy([optimizer.state_dict()["jaguar"], kept])


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    elif isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b)
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[key], b[key])
    else:
        assert a == b


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", laws.CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_training_replay_and_replay_from_the_middle_give_the_same_bits(
    config: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, optimizer = started(config, dtype)
    path = tmp_path / "run.jaguar"
    with Journal.follow(optimizer, path) as journal:
        kept = []
        for step in range(7):
            if step == 5:  # a loss that is not finite, among them
                optimizer.step(lambda: model.loss() * torch.nan)
            elif step % 2:
                optimizer.apply_(optimizer.measure(model.loss))
            else:
                optimizer.step(model.loss)
            kept.append((copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())))
            if step in (2, 6):
                mark = mark_of(optimizer, chosen=step == 6)
                assert mark is not None
                journal.mark(mark)
    end = states(optimizer)

    again = Small(dtype)
    replayed = replay(again, path)
    assert type(replayed) is type(optimizer) and replayed.method == optimizer.method
    assert_same(states(replayed), end)
    assert_same(model.state_dict(), again.state_dict())

    for step in (1, 4, 7):
        other, resumed = started(config, dtype)
        other.load_state_dict(kept[step - 1][1])
        resumed.load_state_dict(kept[step - 1][0])
        replay(resumed, path)
        assert_same(states(resumed), end)
    # And training goes on from a replay as from the run itself.
    for o, m in ((optimizer, model), (replayed, again)):
        o.__dict__.pop("_model", None) if config == "forward-grad" else None
        for _ in range(3):
            o.step(m.loss)
    assert_same(states(replayed), states(optimizer))
    early = Small(dtype)
    assert_same(replay(early, path, steps=2).state_dict()["jaguar"], kept[1][0]["jaguar"])
    assert_same(dict(early.state_dict()), dict(kept[1][1]))


def test_automatic_steps_replay_and_go_on(tmp_path: Path) -> None:
    model = Small(torch.float32)
    optimizer = jaguar.JaguarSignSGD(model.named_parameters(), lr="auto", tau="auto", n_directions=2)

    def rows(m: Small) -> Tensor:
        h: Any = m.x
        for layer in m.layers:
            h = torch.tanh(layer(h))
        return h.square().mean(1)

    with Journal.follow(optimizer, tmp_path / "j"):
        for _ in range(60):
            optimizer.step(lambda: rows(model))
    again = Small(torch.float32)
    replayed = replay(again, tmp_path / "j")
    for o, m in ((optimizer, model), (replayed, again)):
        for _ in range(20):
            o.step(lambda m=m: rows(m))
    assert_same(states(replayed), states(optimizer))


def test_a_late_worker_joins_from_the_journal(tmp_path: Path) -> None:
    """It replays what is there while the run goes on, and then takes the same records as everybody."""
    first, second = Small(torch.bfloat16), Small(torch.bfloat16)
    optimizer = laws.make("all", first.named_parameters())
    with Journal.follow(optimizer, tmp_path / "j") as journal:
        for _ in range(5):
            optimizer.step(first.loss)
        late = replay(second, tmp_path / "j")
        for _ in range(5):
            record = optimizer.measure(first.loss)
            optimizer.apply_(record)
            late.apply_(record)
        assert_same(states(late), states(optimizer))
        assert [record.step for record in journal.since(late.steps_done - 2)] == [8, 9]
