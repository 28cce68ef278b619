"""`requires_grad` is read in every step: frozen tensors keep still, with their state, until they thaw."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.laws import CONFIGS, TAU, built
from helpers.tensors import Bag, all_bits, bits, weights
from jaguar import ZOSGD, JaguarMuon, JaguarSignSGD, Record

SHAPES = [(12, 17), (40,), (5, 9), (30,), (1,)]
FROZEN = (1, 2)

MAKERS: dict[str, Any] = dict(CONFIGS)
MAKERS["count-all"] = (JaguarSignSGD, {"coordinates": 5, "lr": 1e-3, "update": "all", "weight_decay": 0.1})
MAKERS["muon-count"] = (JaguarMuon, {"coordinates": 5, "lr": 1e-2})
MAKERS["walk"] = (ZOSGD, {"restore": "walk", "lr": 1e-3, "weight_decay": 0.1})
makers = pytest.mark.parametrize("config", MAKERS)


class Parts(nn.Module):
    """Each tensor is used in the forward of a module of its own, as restore="module" wants it."""

    def __init__(self, shapes: list[tuple[int, ...]] = SHAPES) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Bag([weights(torch.float32, *shape, seed=i)]) for i, shape in enumerate(shapes))

    def forward(self) -> Tensor:
        return sum((part() for part in self.parts), torch.zeros(()))


def made(config: str, model: nn.Module, only: Any = None, **changes: Any) -> Any:
    cls, options = MAKERS[config]
    named = [(n, p) for n, p in model.named_parameters() if only is None or any(p is q for q in only)]
    return built(cls, named, {"tau": TAU, "seed": 12345} | options | changes)


def tensors(model: nn.Module, which: Any = None) -> list[Tensor]:
    params = list(model.parameters())
    return params if which is None else [params[i] for i in which]


def freeze(model: nn.Module, on: bool = True) -> None:
    for p in tensors(model, FROZEN):
        p.requires_grad_(not on)


def bits_of(opt: Any, params: list[Tensor]) -> list[Any]:
    return [(bits(p), bits(opt.state[p]["momentum"]) if "momentum" in opt.state.get(p, {}) else None) for p in params]


def frozen_law(config: str, steps: int = 3, **changes: Any) -> None:
    """Frozen tensors keep still, bit for bit; the others move as if these had never been in the optimizer."""
    model = Parts()
    opt = made(config, model, **changes)
    for _ in range(2):
        opt.step(model)
    freeze(model)
    twin = copy.deepcopy(model)
    others = [i for i in range(len(SHAPES)) if i not in FROZEN]
    alone = made(config, twin, tensors(twin, others), **changes)
    alone._step = opt.steps_done
    for mine, theirs in zip(tensors(model, others), tensors(twin, others), strict=True):
        alone.state[theirs] = {k: v.clone() for k, v in opt.state.get(mine, {}).items()}
    before = bits_of(opt, tensors(model, FROZEN))
    met = []

    def closure() -> Tensor:
        met.append(all_bits(tensors(model, FROZEN)))
        return model()

    with pytest.warns(
        UserWarning, match=r"2 of 5 tensors have requires_grad=False .*parts\.1\.p0, parts\.2\.p0\)"
    ) as told:
        for _ in range(steps):
            opt.step(closure)
    assert len([w for w in told if "requires_grad" in str(w.message)]) == 1
    assert bits_of(opt, tensors(model, FROZEN)) == before and all(m == [b for b, _ in before] for m in met)
    for _ in range(steps):
        alone.step(twin)
    assert bits_of(opt, tensors(model, others)) == bits_of(alone, tensors(twin, others))
    assert opt.last_record.losses == alone.last_record.losses and opt.last_record.frozen != alone.last_record.frozen
    freeze(model, False)
    for _ in range(8 if "count" in config else 2):
        opt.step(model)
    now = bits_of(opt, tensors(model, FROZEN))
    assert all(a != b for a, b in zip(now, before, strict=True)), "they take part again"
    assert "frozen now" not in repr(opt)


@makers
def test_frozen_tensors_keep_still_and_thaw(config: str) -> None:
    frozen_law(config)


@pytest.mark.parametrize("config", ["fraction", "count", "gaussian-copy", "muon"])
def test_frozen_tensors_keep_still_under_kernels(config: str) -> None:
    pytest.importorskip("triton")
    frozen_law(config, steps=2, backend="triton")


@makers
def test_what_was_frozen_never_matters_before(config: str) -> None:
    """Frozen and thawed between steps: the bits of a run that never froze; and no record says otherwise."""
    runs = []
    for froze in (False, True):
        model = Parts()
        opt = made(config, model)
        for _ in range(4):
            if froze:
                freeze(model)
                freeze(model, False)
            opt.step(model)
            assert opt.last_record.frozen == 0
        runs.append(bits_of(opt, tensors(model)))
    assert runs[0] == runs[1]


@pytest.mark.filterwarnings("ignore:.*requires_grad=False since")
@makers
def test_replay_with_freezing(config: str) -> None:
    """Records replay on a replica that freezes in the same steps, and are refused on one that does not."""
    model, other = Parts(), Parts()
    opt, replica = made(config, model), made(config, other)
    for t in range(6):
        freeze(model, 2 <= t < 4)
        record = opt.measure(model)
        assert bool(record.frozen) == (2 <= t < 4) and Record.unpack(record.pack()) == record
        if t in (2, 4):
            before = bits_of(replica, tensors(other))
            with pytest.raises(ValueError, match="other tensors frozen"):
                replica.apply_(record)
            assert bits_of(replica, tensors(other)) == before
        opt.apply_(record)
        freeze(other, 2 <= t < 4)
        replica.apply_(record)
    assert bits_of(opt, tensors(model)) == bits_of(replica, tensors(other))


@pytest.mark.filterwarnings("ignore:.*requires_grad=False since")
@makers
def test_a_step_that_has_begun_ends_as_it_began(config: str) -> None:
    """Freezing between measure and apply_ is for the next step."""
    model, twin = Parts(), Parts()
    opt, other = made(config, model), made(config, twin)
    opt.measure(model)
    freeze(model)
    opt.step()
    other.step(twin)
    assert bits_of(opt, tensors(model)) == bits_of(other, tensors(twin))
    before = bits_of(opt, tensors(model, FROZEN))
    opt.step(model)
    assert bits_of(opt, tensors(model, FROZEN)) == before


@makers
def test_all_frozen_moves_nothing_and_says_so(config: str) -> None:
    """As torch's optimizers, whose tensors then have no gradients: an adapter that is switched off."""
    model = Parts()
    opt = made(config, model)
    for p in model.parameters():
        p.requires_grad_(False)
    before = all_bits(tensors(model))
    with pytest.warns(UserWarning, match="all 5 tensors of the optimizer have requires_grad=False by now"):
        opt.step(model)
    opt.apply_(opt.measure(model))
    assert all_bits(tensors(model)) == before and opt.steps_done == 2 and opt.n_skipped == 0
    for p in model.parameters():
        p.requires_grad_()
    opt.step(model)
    assert all_bits(tensors(model)) != before


def test_fewer_coordinates_than_were_asked_for_remain() -> None:
    model = Parts([(3,), (40,)])
    opt = JaguarSignSGD(model.named_parameters(), coordinates=5)
    opt.step(model)
    tensors(model, [1])[0].requires_grad_(False)
    with pytest.raises(ValueError, match="coordinates=5 is more than the 3 there are"), pytest.warns(UserWarning):
        opt.step(model)


def test_a_number_of_coordinates_is_drawn_from_those_that_take_part() -> None:
    model = Parts()
    opt = JaguarSignSGD(model.named_parameters(), coordinates=5, lr=1e-2)
    freeze(model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match="said once"):
        opt.step(model)
    moved = [int((p != b).sum()) for p, b in zip(model.parameters(), before, strict=True)]
    assert sum(moved) == 5 and moved[1] == moved[2] == 0


def test_what_was_never_in_the_optimizer_does_not_join() -> None:
    model = Parts()
    freeze(model)
    opt = JaguarSignSGD(model.named_parameters(), coordinates=1.0, lr=1e-2)
    assert "2 frozen tensors left out" in repr(opt)
    freeze(model, False)
    before = all_bits(tensors(model, FROZEN))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            opt.step(model)
    assert all_bits(tensors(model, FROZEN)) == before and opt.last_record.frozen == 0


@pytest.mark.filterwarnings("ignore:.*requires_grad=False since")
@makers
def test_frozen_runs_are_saved_and_resumed(config: str) -> None:
    model = Parts()
    opt = made(config, model)
    for t in range(6):
        freeze(model, t >= 2)
        opt.step(model)
        if t == 3:
            twin = copy.deepcopy(model)
            again = made(config, (fresh := Parts()))
            fresh.load_state_dict(twin.state_dict())
            again.load_state_dict(opt.state_dict())
            freeze(fresh)
    for _ in range(2):
        again.step(fresh)
    assert bits_of(opt, tensors(model)) == bits_of(again, tensors(fresh))
    assert "2 of them frozen now" in repr(opt) == repr(again)


def test_unnamed_tensors_keep_their_streams() -> None:
    model, twin = Parts(), Parts()
    opt = JaguarSignSGD(model.parameters(), coordinates=0.2, lr=1e-2)
    other = JaguarSignSGD(twin.parameters(), coordinates=0.2, lr=1e-2)
    tensors(model, [0])[0].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"\(#0\)"):
        record = opt.measure(model)
    with pytest.raises(ValueError, match="then some, now none"):
        other.apply_(record)
    tensors(twin, [0])[0].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"\(#0\)"):
        other.apply_(record)
    opt.apply_(record)
    assert bits_of(opt, tensors(model)) == bits_of(other, tensors(twin))


def test_adapters_that_are_switched_off_keep_still() -> None:
    """PEFT's set_adapter freezes what it switches off; the adapter that was made later never joined."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    model = peft.get_peft_model(base, config, adapter_name="first")
    model.add_adapter("second", config)
    model.set_adapter("first")
    opt = JaguarSignSGD([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=1e-2, coordinates=1.0)
    x = torch.randn(5, 6)

    def moved() -> set[str]:
        before = {n: bits(p) for n, p in model.named_parameters()}
        opt.step(lambda: model(x).square().mean())
        return {n.split(".")[-2] for n, p in model.named_parameters() if bits(p) != before[n]}

    assert moved() == {"first"}
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="its steps move nothing"):
        assert moved() == set()
    assert moved() == set()
    model.set_adapter("first")
    assert moved() == {"first"}
