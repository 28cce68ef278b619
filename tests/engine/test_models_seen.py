"""Models and objects that a closure reaches: found, put back where they must be, and let go of."""

from __future__ import annotations

import copy
import functools
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import jaguar.optimizers.module_state
from helpers.changing import Changing, counted, everything, setter
from helpers.laws import CONFIGS, make
from helpers.tensors import bits, weights
from jaguar import ZOSGD, JaguarSignSGD


class Entered(nn.Module):
    """A model with methods of its own that are closures' ways in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights(torch.float32, 8))
        self.inner = nn.Linear(2, 2)
        self.calls = 0

    def training_step(self, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return scale * (self.weight * self.weight).sum() + self.calls

    forward = training_step


class Algorithm:
    def __init__(self, model: Any) -> None:
        self.parts = {"policy": [model]}

    def loss(self) -> Tensor:
        return self.parts["policy"][0].training_step()

    __call__ = loss


def helped(model: Any) -> Callable[[], Tensor]:
    def helper(scale: float) -> Tensor:
        return model.training_step(scale)

    return lambda: helper(1.0)


WAYS: dict[str, Callable[[Any], Callable[[], Tensor]]] = {
    "a method": lambda model: lambda: model.training_step(),
    "forward": lambda model: model.forward,
    "partial": lambda model: functools.partial(model.training_step, scale=1.0),
    "a default": lambda model: lambda m=model: m.training_step(),
    "a helper": helped,
    "an object's method": lambda model: Algorithm(model).loss,
    "a callable object": Algorithm,
    "a wrapper": lambda model: (lambda wrapper: lambda: wrapper[0].training_step())(nn.Sequential(model)),
    "a list": lambda model: lambda models=(None, [model]): models[1][0].training_step(),
}


@pytest.mark.parametrize("way", WAYS)
def test_models_that_are_entered_by_other_methods(way: str) -> None:
    """No hook tells of them; the closure does."""
    model = Entered()
    closure = WAYS[way](model)
    opt = ZOSGD(model.parameters(), lr=0.0)
    for _ in range(6):
        record = opt.measure(closure)
        assert abs(record.losses[0] - record.losses[1]) < 0.1 and model.calls == 0
        opt.apply_(record)


def test_a_global_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "entered", Entered())
    exec("def closure():\n    return entered.training_step()", globals())
    opt = ZOSGD(globals()["entered"].parameters())
    opt.step(globals().pop("closure"))
    assert globals()["entered"].calls == 0


def test_what_has_no_trained_tensors_and_is_not_called_keeps_what_it_is_told() -> None:
    """A metric is no part of the function that is minimised."""
    model, metric = Entered(), Entered()

    def closure() -> Tensor:
        metric.calls += 1
        return model.training_step()

    ZOSGD(model.parameters()).step(closure)
    assert model.calls == 0 and metric.calls == 2


def dynamic(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        rope_scaling={"rope_type": "dynamic", "factor": 2.0}
        if kind == "dynamic"
        else {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 16,
            "factor": 2.0,
        },
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_caches_do_not_grow(kind: str) -> None:
    """The longest row comes in step 3, which looks at nothing; transformers' `dynamic_rope_update` sets new buffers."""
    model = dynamic(kind)
    lengths = [10, 12, 14, 40, 20, 10, 50, 10]
    rows = [torch.arange(n)[None] % 50 for n in lengths]
    opt = JaguarSignSGD(model.named_parameters(), lr=1e-3, coordinates=0.1)
    before = everything(model)
    for row in rows:
        fresh = copy.deepcopy(model)
        twin = JaguarSignSGD(fresh.named_parameters(), lr=1e-3, coordinates=0.1)
        twin.load_state_dict(opt.state_dict())
        record = opt.measure(lambda: model(input_ids=row, labels=row).loss)  # noqa: B023
        assert everything(model) == before
        assert record == twin.measure(lambda: fresh(input_ids=row, labels=row).loss), "as if no row had come before"  # noqa: B023
        opt.apply_(record)


def test_a_model_that_is_trained_later_is_looked_at_then() -> None:
    """BatchNorm writes in place from step 5 on, where train() is called."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)).eval()
    opt = JaguarSignSGD(model.parameters(), coordinates=0.5)
    x = torch.randn(9, 4)
    before = [bits(b) for b in model.buffers()]
    for step in range(12):
        model.train(step >= 5)
        opt.step(lambda: model(x).square().mean())
        assert [bits(b) for b in model.buffers()] == before


def test_frozen_parameters_that_follow_the_trained_ones() -> None:
    """A momentum encoder: its first change is noticed when it is done, and no other follows."""

    class Follows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online, self.target = nn.Linear(4, 2), nn.Linear(4, 2).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                for p, q in zip(self.target.parameters(), self.online.parameters(), strict=True):
                    p.lerp_(q, 0.1)
            return (self.online(x) - self.target(x)).square().mean()

    model, x = Follows(), torch.randn(3, 4)
    opt = JaguarSignSGD(model.online.parameters(), coordinates=0.5)
    opt.step(lambda: model(x))
    before = [bits(p) for p in model.target.parameters()]
    met = []

    def closure() -> Tensor:
        met.append([bits(p) for p in model.target.parameters()])
        return model(x)

    for _ in range(10):
        opt.step(closure)
        assert [bits(p) for p in model.target.parameters()] == before
    assert all(m == before for m in met)
    model.target.weight.fill_(3.0)  # what its user writes stays
    opt.step(lambda: model(x))
    assert bool((model.target.weight == 3.0).all())


def test_frozen_parameters_that_keep_still_are_never_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be most of the memory; not even when their user loads others."""
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 1))
    opt = JaguarSignSGD(model[1].parameters(), coordinates=0.5)
    saved: list[Any] = []
    monkeypatch.setattr(jaguar.optimizers.module_state, "SavedTensor", lambda t: saved.append(t))
    for _ in range(10):
        opt.step(lambda: model(torch.ones(2, 4)).mean())
        model[0].load_state_dict(nn.Linear(4, 4).state_dict())
    assert not saved


def test_what_changes_between_steps_stays() -> None:
    model = Changing(setter(calls=0, mean=torch.zeros(2)), counted)
    opt = ZOSGD(model.parameters(), lr=0.0)
    for step in range(10):
        model.calls, model.mean = 10 * step, model.mean + 1
        model.rows = [step]
        opt.step(model)
        assert model.calls == 10 * step and model.rows == [step] and model.mean.tolist() == [step + 1.0] * 2


@pytest.mark.parametrize("config", CONFIGS)
def test_a_state_that_shares_memory_with_trained_weights_is_left_to_the_probe(config: str) -> None:
    model = nn.Linear(12, 17)
    model.register_buffer("view", model.weight.detach().view(-1))
    model.flat = [model.weight.detach(), model.weight]
    before = bits(model.weight)
    opt = make(config, model.named_parameters())
    for _ in range(3):
        record = opt.measure(lambda: model(torch.ones(2, 12)).square().mean())
        assert bits(model.weight) == before and record.losses[0] != record.losses[-1]


def test_objects_that_cannot_be_compared_or_copied() -> None:
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise ArithmeticError

        __hash__ = None  # type: ignore[assignment]

        def __deepcopy__(self, memo: object) -> None:
            raise ArithmeticError

    def change(m: Any) -> float:
        m.odd, m.pair = Odd(), torch.zeros(2) + m.pair
        return 0.0

    with torch.inference_mode():
        inference = torch.ones(3)
    model = Changing(setter(pair=torch.zeros(2)), change)
    model.odd = kept = Odd()
    model.sparse = torch.eye(3).to_sparse()
    model.meta = torch.ones(3, device="meta")
    model.inference = inference
    model.register_buffer("wide", torch.ones(1).expand(4))
    model.register_buffer("nothing", None)
    opt = ZOSGD(model.parameters(), lr=0.0)
    for _ in range(6):
        opt.step(model)
        assert model.odd is kept


def test_functions_made_on_the_way_stay() -> None:
    """A kernel that was loaded, a function that was compiled: no state, and dear."""

    def change(m: Any) -> float:
        m.made = getattr(m, "made", None) or (lambda: 0.0)
        return m.made()

    model = Changing(setter(), change)
    opt = ZOSGD(model.parameters(), lr=0.0)
    opt.step(model)
    first = model.made
    opt.step(model)
    assert model.made is first


def test_scripted_modules() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)))
    before = [bits(b) for b in model.buffers()]
    opt = JaguarSignSGD(model.parameters(), coordinates=0.5)
    for _ in range(6):
        opt.step(lambda: model(torch.arange(12.0).view(3, 4)).square().mean())
        assert [bits(b) for b in model.buffers()] == before


def test_several_models_and_one_that_comes_later() -> None:
    def norm() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))

    models = [norm(), norm(), norm()]
    x = torch.randn(9, 4)
    opt = JaguarSignSGD(models[0].parameters(), coordinates=0.5)
    before = [[bits(b) for b in m.buffers()] for m in models]
    for step in range(10):
        used = models if step >= 8 else models[:2]
        opt.step(lambda: sum(m(x).square().mean() for m in used))  # noqa: B023
        assert [[bits(b) for b in m.buffers()] for m in models] == before


def test_models_die_when_they_are_dropped() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
    frozen = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    opt = JaguarSignSGD(model.parameters(), coordinates=0.5)
    for _ in range(3):
        opt.step(lambda: model(frozen(torch.ones(3, 4))).mean())  # noqa: F821
    gone = [weakref.ref(frozen), weakref.ref(frozen[0].weight)]
    del frozen
    assert [ref() for ref in gone] == [None, None]
    for _ in range(3):
        opt.step(lambda: model(torch.ones(3, 4)).mean())


def test_an_optimizer_that_has_looked_is_copied_and_pickled_without_models() -> None:
    model = Changing(setter(calls=0), counted)
    model.log.fails = lambda: None  # cannot be pickled
    opt = ZOSGD(model.parameters(), lr=0.0)
    opt.step(model)
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        other.step(lambda: other.param_groups[0]["params"][0].sum())  # noqa: B023
        assert other.steps_done == 2


def test_steady_state_has_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    hooked: list[int] = []
    register = jaguar.optimizers.module_state.register_module_forward_pre_hook
    opt = ZOSGD((model := nn.Linear(3, 1)).parameters(), lr=0.0)

    def noted(hook: Any) -> Any:
        hooked.append(opt.steps_done)
        return register(hook)

    monkeypatch.setattr(jaguar.optimizers.module_state, "register_module_forward_pre_hook", noted)
    for _ in range(130):
        opt.step(lambda: model(torch.ones(2, 3)).sum())
    assert hooked == [0, 1, 2, 4, 8, 16, 32, 64, 128]
