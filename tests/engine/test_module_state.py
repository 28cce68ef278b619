"""Everything that an evaluation changes in modules is put back; in steady state torch.compile compiles nothing."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import gc
import itertools
import pickle
import random
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import jaguar.optimizers.module_state
from helpers.laws import CONFIGS, make
from helpers.tensors import Log, bits, weights
from jaguar import ZOSGD, JaguarSignSGD


def plain(value: Any, depth: int = 9) -> Any:
    """Something that compares, contents and all."""
    if depth == 0:
        return "deep inside"
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.dtype, bits(value))
    if isinstance(value, nn.Module):
        return everything(value)
    if isinstance(value, types.SimpleNamespace):
        return plain(vars(value), depth)
    if isinstance(value, (Record, SlottedRecord, FrozenRecord)):
        return [plain(getattr(value, field.name), depth - 1) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        return {key: plain(v, depth - 1) for key, v in value.items()}
    if isinstance(value, (list, tuple, collections.deque)):
        return [plain(v, depth - 1) for v in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, torch.Generator):
        return bits(value.get_state())
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return plain(value.get_state())
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, set):
        return sorted(value)
    return value if isinstance(value, (int, float, str, bytes, type(None))) else "object"


def everything(model: nn.Module) -> dict[str, Any]:
    """What a model is, but for its parameters."""
    form = set(nn.Module().__dict__) - {"training", "_non_persistent_buffers_set"}
    found: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        own = {k: v for k, v in module.__dict__.items() if k not in form}
        for key, value in (own | dict(module._buffers) | dict.fromkeys(module._modules)).items():
            found[f"{prefix}.{key}"] = plain(value)
    return found


class Changing(nn.Module):
    """A linear layer whose output depends on a state that its forward changes, from the `since`-th call on."""

    def __init__(self, begin: Callable[[nn.Module], None], change: Callable[[nn.Module], Any], since: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights(torch.float32, 8))
        self._begin, self._change = begin, change
        self.log = Log()  # an object of no known kind: left alone
        self.since = since
        begin(self)

    def forward(self) -> Tensor:
        self.log.seen.append(None)
        shift = self._change(self) if len(self.log.seen) > self.since else 0.0
        return (self.weight * self.weight).sum() + float(shift)


def counted(m: Any) -> Any:
    m.calls += 1
    return m.calls


def rebound_mean(m: Any) -> Any:
    m.mean = 0.9 * m.mean + 1.0
    return m.mean.sum()


def rebound_buffer(m: Any) -> Any:
    m.steps = m.steps + 1
    return m.steps.sum()


def in_place(m: Any) -> Any:
    return m.mean.add_(1.0).sum()


def lazy(m: Any) -> Any:
    if not hasattr(m, "cache"):
        m.cache = torch.zeros(2)
    m.cache += 1
    return m.cache.sum()


def lazy_buffer(m: Any) -> Any:
    if not hasattr(m, "cache"):
        m.register_buffer("cache", torch.zeros(2), persistent=False)
    return m.cache.add_(1).sum()


def lazy_module(m: Any) -> Any:
    if not hasattr(m, "inner"):
        m.inner = nn.BatchNorm1d(2)
    m.inner(torch.arange(6.0).view(3, 2))
    return m.inner.running_mean.sum()


def deleted(m: Any) -> Any:
    if hasattr(m, "first"):
        del m.first
        return 1.0
    return 2.0


def deleted_buffer(m: Any) -> Any:
    if m._buffers.pop("first", None) is not None:
        return 1.0
    return 2.0


def appended(m: Any) -> Any:
    m.rows.append(torch.ones(1))
    return len(m.rows)


def nested(m: Any) -> Any:
    m.load["experts"][1] += 1
    m.load.setdefault("seen", []).append(3)
    m.load["counts"].add_(1)
    return m.load["experts"][1] + m.load["counts"].sum() + len(m.load["seen"])


def popped(m: Any) -> Any:
    return m.queue.popleft()


def in_array(m: Any) -> Any:
    m.counts[0] += 1
    return m.counts[0]


def added(m: Any) -> Any:
    m.lengths.add(len(m.lengths))
    return len(m.lengths)


def in_tuple(m: Any) -> Any:
    return m.state[0].mul_(2).sum()


def grown(m: Any) -> Any:
    m.cache.resize_(m.cache.numel() + 1).fill_(1.0)
    return m.cache.sum()


@dataclasses.dataclass
class Record:
    calls: int = 0
    seen: list[int] = dataclasses.field(default_factory=lambda: [0])
    cache: Any = None


@dataclasses.dataclass(slots=True)
class SlottedRecord:
    calls: int = 0
    seen: list[int] = dataclasses.field(default_factory=lambda: [0])
    cache: Any = None


@dataclasses.dataclass(frozen=True)
class FrozenRecord:
    counts: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(2))


def in_record(m: Any, direct: bool = False) -> Any:
    record = m if direct else m.record
    record.calls += 1
    record.seen[0] += 1
    record.cache = torch.zeros(2) if record.cache is None else record.cache + 1
    return record.calls + record.seen[0] + record.cache.sum()


def trained(m: Any) -> Any:
    was = m.training
    m.train(not was)
    return float(was)


def cyclic(m: Any) -> Any:
    m.knot[0][1].append(1)
    return len(m.knot[0][1])


def tie(m: Any) -> None:
    m.knot = [[None, []]]
    m.knot[0][0] = m.knot


def setter(**values: Any) -> Callable[[nn.Module], None]:
    def begin(m: nn.Module) -> None:
        for name, value in copy.deepcopy(values).items():
            m.register_buffer(name, value) if name in ("steps", "first_b") else setattr(m, name, value)

    return begin


STATES = {
    "a counter": (setter(calls=0), counted),
    "a running mean, bound anew": (setter(mean=torch.zeros(2)), rebound_mean),
    "a buffer, bound anew": (setter(steps=torch.zeros((), dtype=torch.int64)), rebound_buffer),
    "a plain tensor, in place": (setter(mean=torch.zeros(2)), in_place),
    "a plain tensor, resized": (setter(cache=torch.ones(2)), grown),
    "a lazy attribute": (setter(), lazy),
    "a lazy buffer": (setter(), lazy_buffer),
    "a lazy submodule": (setter(), lazy_module),
    "an attribute deleted": (setter(first=1), deleted),
    "a buffer deleted": (lambda m: m.register_buffer("first", torch.ones(2)), deleted_buffer),
    "a list": (setter(rows=[torch.ones(1)]), appended),
    "a dict of lists and tensors": (setter(load={"experts": [0, 0], "counts": torch.zeros(2)}), nested),
    "a queue": (setter(queue=collections.deque(range(100))), popped),
    "an array": (setter(counts=np.zeros(3)), in_array),
    "a set": (setter(lengths={0}), added),
    "a tuple of tensors": (setter(state=(torch.ones(3), 1)), in_tuple),
    "fields of a dataclass, bound in place": (setter(record=Record()), in_record),
    "fields of a dataclass with slots, bound in place": (setter(record=SlottedRecord()), in_record),
    "a namespace, bound in place": (setter(record=types.SimpleNamespace(calls=0, seen=[0], cache=None)), in_record),
    "a dict of dataclasses": (setter(load={"a": Record()}), lambda m: in_record(m.load["a"], direct=True)),
    "a frozen dataclass, in place": (setter(record=FrozenRecord()), lambda m: m.record.counts.add_(1).sum()),
    "the mode": (setter(), trained),
    "a list that holds itself": (tie, cyclic),
}
# What only a comparison of values shows; later on that happens in every 64th step.
IN_PLACE = {name for name in STATES if any(w in name for w in ("place", "resized", "a list", "dict", "queue"))}
IN_PLACE |= {"an array", "a set", "a tuple of tensors"}


@pytest.mark.parametrize("since", [0, 11], ids=["at once", "later"])
@pytest.mark.parametrize("name", STATES)
def test_what_an_evaluation_changes_is_put_back(name: str, since: int) -> None:
    """Each evaluation begins with the same state, its neighbour's loss differs by the perturbation only."""
    if since and name in IN_PLACE:
        pytest.skip("seen at the next look")
    model = Changing(*STATES[name], since=since)
    before = everything(model)
    opt = ZOSGD(model.parameters(), lr=0.0, tau=1e-3)
    met = []

    def closure() -> Tensor:
        met.append(everything(model))
        return model()

    for _ in range(12):
        record = opt.measure(closure)
        # The state adds at least 1 to a loss; the perturbation, less than 0.1. One call may begin to change it.
        assert abs(record.losses[0] - record.losses[1]) < 0.1 or len(model.log.seen) - 1 == since
        assert everything(model) == before
        opt.apply_(record)
    assert all(state == before for state in met)


@pytest.mark.parametrize("name", sorted(IN_PLACE))
def test_what_begins_to_change_in_place_later_is_found_by_a_look(name: str) -> None:
    model = Changing(*STATES[name], since=12)  # from step 6 on
    opt = ZOSGD(model.parameters(), lr=0.0, tau=1e-3)
    for step in range(12):
        before = everything(model)
        record = opt.measure(model)
        if step >= 8:
            assert everything(model) == before and abs(record.losses[0] - record.losses[1]) < 0.1
        opt.apply_(record)


GENERATORS = {
    "torch": (lambda: torch.Generator().manual_seed(3), lambda g: torch.randn((), generator=g).item()),
    "python": (lambda: random.Random(3), lambda g: g.gauss(0.0, 1.0)),
    "numpy": (lambda: np.random.default_rng(3), lambda g: g.normal()),
    "numpy, old": (lambda: np.random.RandomState(3), lambda g: g.normal()),
}


@pytest.mark.parametrize("inside", [False, True], ids=["attribute", "in a list"])
@pytest.mark.parametrize("name", GENERATORS)
def test_generators_of_modules_draw_the_same_within_a_step_only(name: str, inside: bool) -> None:
    begin, draw = GENERATORS[name]
    generator, drawn = begin(), []

    def change(m: Any) -> Any:
        drawn.append(draw(generator))
        return drawn[-1]

    model = Changing(lambda m: setattr(m, "generator", [generator] if inside else generator), change)
    before = plain(generator)
    opt = ZOSGD(model.parameters(), lr=0.0)
    for _ in range(8):
        opt.step(model)
        assert plain(generator) == before
    assert drawn[0::2] == drawn[1::2] and len(set(drawn)) == 8


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


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.fixture
def frames() -> Iterator[Callable[[], int]]:
    """The number of frames that were compiled; nothing of this outlives the test."""
    torch._dynamo.reset()
    gc.collect()
    counter = itertools.count()
    compiled: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        compiled.append(next(counter))
        return graph.forward

    yield backend, compiled
    torch._dynamo.reset()


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.norm(self.first(x))))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, momentum=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).tanh()


COMPILED = ["a wrapper", "in place", "a layer", "the closure", "the forward"]


@pytest.mark.parametrize(("how", "config"), [(how, "fraction") for how in COMPILED] + [("a wrapper", "gaussian-copy")])
def test_nothing_is_compiled_after_the_first_step(how: str, config: str, frames: Any) -> None:
    backend, compiled = frames
    model, twin = Norm(), Norm()
    x = torch.randn(9, 4)

    def closure() -> Tensor:
        return call(x).square().mean()

    call: Any = model
    run = closure
    if how == "a wrapper":
        call = torch.compile(model, backend=backend)
    elif how == "in place":
        model.compile(backend=backend)
    elif how == "a layer":
        model.block.compile(backend=backend)
    elif how == "the forward":
        call = torch.compile(model.forward, backend=backend)
    else:
        run = torch.compile(closure, backend=backend)
    before = [bits(b) for b in model.buffers()]
    opt, other = make(config, model.named_parameters()), make(config, twin.named_parameters())
    opt.step(run)
    n = len(compiled)
    assert n > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(20):
            opt.step(run)
            assert [bits(b) for b in model.buffers()] == before
    assert len(compiled) == n
    for _ in range(21):
        other.step(lambda: twin(x).square().mean())
    assert [bits(p) for p in model.parameters()] == [bits(p) for p in twin.parameters()], "nor do the results differ"


def test_counters_of_compiled_modules(frames: Any) -> None:
    backend, compiled = frames
    model = Changing(setter(steps=torch.zeros((), dtype=torch.int64)), lambda m: 0.0)

    class Counts(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 1)
            self.calls, self.mean = 0, torch.zeros(1)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.mean = 0.9 * self.mean + x.mean()
            return super().forward(x) * self.calls + self.mean

    model = Counts()
    run = torch.compile(model, backend=backend)
    opt = JaguarSignSGD(model.parameters(), coordinates=0.5)
    opt.step(lambda: run(torch.ones(3, 4)).mean())
    n = len(compiled)
    for _ in range(9):
        opt.step(lambda: run(torch.ones(3, 4)).mean())
        assert model.calls == 0 and model.mean.tolist() == [0.0]
    assert len(compiled) == n
