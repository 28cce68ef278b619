"""LeZO: which layers take part in a step, that the others are neither read nor written, and ZO-SGD with all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jaguar
from helpers.oracles import philox_ints, step_key_ints, stream_ints
from helpers.tensors import all_bits, bits, weights
from jaguar.method.directions import Layers
from jaguar.method.rng import Draw

LAYERS, SEED = 8, 12345


class Tower(nn.Module):
    """Layers of two tensors between two tensors outside; the loss leaves out what is not finite."""

    def __init__(self, dtype: torch.dtype = torch.float32, n: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Parameter(weights(dtype, 7, 3))
        self.layers = nn.ModuleList(nn.Linear(4, 3, dtype=dtype) for _ in range(n))
        self.norm = nn.Parameter(weights(dtype, 5))

    def forward(self) -> Tensor:
        loss = torch.zeros(())
        for p in self.parameters():
            x = p.detach().float().reshape(-1)
            if bool(x.isfinite().all()):
                loss = loss + (x - torch.linspace(-1, 1, x.numel())).square().sum()
        return loss


def drawn(step: int, n: int, k: int) -> list[int]:
    """The layers of a step, from Philox in plain ints: the k smallest 63-bit words of purpose 5."""
    key = step_key_ints(SEED, step, 0, 5)
    words = {i: philox_ints(key, (0, 0, stream_ints(f"layers.{i}"), 5)) for i in range(n)}
    return sorted(sorted(range(n), key=lambda i: (words[i][1] << 32 | words[i][0]) >> 1)[:k])


def made(net: nn.Module, **options: Any) -> jaguar.LeZO:
    return jaguar.LeZO(net.named_parameters(), **({"lr": 1e-3, "tau": 2.0**-5, "seed": SEED} | options))


def changed(before: list[bytes], net: nn.Module) -> list[str]:
    return [name for (name, p), old in zip(net.named_parameters(), before, strict=True) if bits(p) != old]


WAYS = [{"restore": restore} for restore in ("copy", "walk")] + [{"backend": "triton"}, {"n_directions": 2}]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_layers_of_a_step_and_what_is_outside_move(way: dict[str, Any]) -> None:
    net = Tower()
    opt = made(net, keep=0.25, weight_decay=0.1, **way)
    for step in range(2 if "backend" in way else 4):
        before = all_bits(list(net.parameters()))
        opt.step(net)
        layers = [f"layers.{i}.{name}" for i in drawn(step, LAYERS, 2) for name in ("weight", "bias")]
        assert changed(before, net) == ["embed", "norm", *layers], "registered parameters come first"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_layers_that_take_no_part_are_neither_read_nor_written(dtype: torch.dtype, way: dict[str, Any]) -> None:
    """Poisoned with NaN they stay NaN, and the losses and every other bit are those without them."""
    nets = [Tower(dtype), Tower(dtype)]
    nets[1].load_state_dict(nets[0].state_dict())
    kept = drawn(0, LAYERS, 2)
    for i in set(range(LAYERS)) - set(kept):
        for p in nets[0].layers[i].parameters():
            p.data.fill_(math.nan)
        for p in nets[1].layers[i].parameters():
            p.data.zero_()
    records = []
    for net in nets:
        opt = made(net, **way)
        there = [p for p in net.parameters() if bool(p.isfinite().all())]
        record = opt.measure(lambda net=net: sum((p.float().square().sum() for p in there), torch.zeros(())))  # noqa: B023
        opt.apply_(record)
        records.append(record)
    # The second net's dead layers are 0, so their squares add nothing, though decay and noise would move them.
    assert records[0] == records[1] and not records[0].skipped
    for i in range(LAYERS):
        for p, q in zip(nets[0].layers[i].parameters(), nets[1].layers[i].parameters(), strict=True):
            assert bits(p) == bits(q) if i in kept else bool(p.isnan().all()) and not q.any()


@pytest.mark.parametrize("options", [{}, {"restore": "walk"}, {"n_directions": 2, "estimator": "one-sided"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_all_layers_it_is_zo_sgd(dtype: torch.dtype, options: dict[str, Any]) -> None:
    nets = [Tower(dtype), Tower(dtype)]
    nets[1].load_state_dict(nets[0].state_dict())
    common = {"lr": 1e-3, "tau": 2.0**-5, "seed": SEED, "weight_decay": 0.1} | options
    pair = [
        jaguar.LeZO(nets[0].named_parameters(), keep=1, **common),
        jaguar.ZOSGD(nets[1].named_parameters(), **common),
    ]
    for _ in range(5):
        for opt, net in zip(pair, nets, strict=True):
            opt.step(net)
    assert pair[0].last_record == pair[1].last_record
    assert all_bits(list(nets[0].parameters())) == all_bits(list(nets[1].parameters()))


@pytest.mark.parametrize(("n", "keep", "k"), [(8, 0.25, 2), (5, 0.5, 2), (3, 0.01, 1), (12, 1 / 3, 4)])
def test_every_layer_has_its_share(n: int, keep: float, k: int) -> None:
    """Chi-square over 3,000 steps, and pairs of layers are independent but for the draw without replacement."""
    slots = made(Tower(n=n)).slots
    direction, steps = Layers(keep=keep), 3000
    counts = torch.zeros(n)
    together = torch.zeros(n, n)
    for step in range(steps):
        active = direction.active(Draw(SEED, step, 0), slots)
        assert active is not None
        layers = {int(s.name.split(".")[1]) for s, on in zip(slots, active, strict=True) if on and "." in s.name}
        assert sorted(layers) == drawn(step, n, k)
        hot = torch.zeros(n)
        hot[list(layers)] = 1
        counts += hot
        together += torch.outer(hot, hot)
    expected = steps * k / n
    # Without replacement the variance of a count is smaller by (n - k) / (n - 1): the statistic is chi-square (n - 1).
    chi = float(((counts - expected) ** 2 / expected).sum()) * (n - 1) / (n - k)
    assert chi < n - 1 + 5 * math.sqrt(2 * (n - 1)), "five standard deviations"
    if k > 1:
        share = k * (k - 1) / (n * (n - 1))
        off = together[~torch.eye(n, dtype=torch.bool)] / steps
        assert (off - share).abs().max() < 5 * math.sqrt(share * (1 - share) / steps)


def test_other_names_of_layers() -> None:
    net = Tower()
    opt = made(net, layers=["layers.0", "layers.1", "layers.2", "layers.3"], keep=0.5)
    before = all_bits(list(net.parameters()))
    opt.step(net)
    moved = {name.split(".")[1] for name in changed(before, net) if "." in name}
    assert len(moved & {"0", "1", "2", "3"}) == 2 and moved >= {"4", "5", "6", "7"}, "which are outside the layers"


def test_wrappers_do_not_change_the_names_of_layers() -> None:
    given = [layer + str(i) for i in range(LAYERS) for layer in ["module.layers." if i % 2 else "_orig_mod.layers."]]
    assert made(Tower(), layers=given).method == made(Tower(), layers=[f"layers.{i}" for i in range(LAYERS)]).method


def test_its_state_is_not_zo_sgds() -> None:
    net = Tower()
    saved = made(net).state_dict()
    assert "on 2 of 8 layers in each step" in repr(made(net)) and "momentum=0" not in repr(made(net))
    assert "on 1 of 2 layers (layers.0, layers.1) in each step" in repr(made(net, layers=["layers.0", "layers.1"]))
    with pytest.raises(ValueError, match=r"saved with keep=0\.25, this optimizer has keep=None"):
        jaguar.ZOSGD(net.named_parameters()).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"saved with keep=0\.25, this optimizer has keep=0\.5"):
        made(net, keep=0.5).load_state_dict(saved)


BAD = {
    "keep": ({"keep": 0.0}, r"keep=0\.0: give the share"),
    "more": ({"keep": 1.5}, r"keep=1\.5: give the share"),
    "flag": ({"keep": True}, "keep=True: give the share"),
    "text": ({"layers": "layers"}, "layers='layers': give prefixes"),
    "number": ({"layers": 5}, "layers=5: give prefixes"),
    "numbers": ({"layers": (5,)}, r"layers=\(5,\): give prefixes"),
    "empty": ({"layers": ()}, r"layers=\(\): give prefixes"),
    "blank": ({"layers": ("layers.0", "")}, "layers=.*: give prefixes"),
    "none": ({"layers": ["decoder"]}, r"no layers among 'embed', 'layers\.0\.bias', .*layers="),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        made(Tower(), **options)


def test_without_names_there_are_no_layers() -> None:
    with pytest.raises(ValueError, match=r"no layers among '#0'.*named_parameters"):
        jaguar.LeZO(Tower().parameters())
