"""Trained tensors: names, streams, ties, overlaps, groups, and every refusal with its reason."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from helpers.oracles import stream_ints
from helpers.tensors import every_form
from jaguar import ZOSGD, JaguarSignSGD
from jaguar.backends import availability
from jaguar.method.params import build_slots, canonical_name, check_tensor, free_bytes, stream_of


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def names_of(opt: JaguarSignSGD) -> list[str]:
    return [slot.name for slot in opt.slots]


CANONICAL = {
    "weight": "weight",
    "module.weight": "weight",
    "_orig_mod.module.a.weight": "a.weight",
    "a._orig_mod.b.weight": "a.b.weight",
    "a._fsdp_wrapped_module.b": "a.b",
    "module.module.x": "x",
    "a.module.module.b": "a.b",
    "my_module.x": "my_module.x",
    "a.submodule.x": "a.submodule.x",
    "a.module": "a.module",
    "module": "module",
}


@pytest.mark.parametrize("name", CANONICAL)
def test_canonical_name(name: str) -> None:
    assert canonical_name(name) == CANONICAL[name]
    assert stream_of(name) == stream_ints(CANONICAL[name])


def test_wrapped_models_have_the_same_streams() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    plain = JaguarSignSGD(model.named_parameters())
    wrapped = JaguarSignSGD(nn.Sequential().append(model).named_parameters(prefix="module._orig_mod"))
    assert [s.stream for s in plain.slots] == [stream_ints(n) for n in ("0.bias", "0.weight", "1.bias", "1.weight")]
    compiled = [(f"_orig_mod.{n}", p) for n, p in model.named_parameters()]
    assert [(s.name, s.stream) for s in JaguarSignSGD(compiled).slots] == [(s.name, s.stream) for s in plain.slots]
    assert names_of(wrapped) == sorted(f"0.{s.name}" for s in plain.slots)


def test_without_names_positions_serve() -> None:
    opt = JaguarSignSGD([{"params": [leaf(2), leaf(3)]}, {"params": [leaf(4)]}])
    assert [(s.name, s.stream, s.group) for s in opt.slots] == [("#0", 0, 0), ("#1", 1, 0), ("#2", 2, 1)]


def test_named_groups_are_in_canonical_order() -> None:
    opt = JaguarSignSGD([{"params": [("z", leaf(2)), ("module.b", leaf(3))]}, {"params": [("c", leaf(4))], "lr": 1.0}])
    assert [(s.name, s.group) for s in opt.slots] == [("b", 0), ("c", 1), ("z", 0)]


def test_ties_count_once_under_the_first_alias() -> None:
    shared = leaf(3, 4)
    for order in (["b.weight", "a.weight", "c.weight"], ["c.weight", "b.weight", "module.a.weight"]):
        opt = JaguarSignSGD([(name, shared) for name in order] + [("z", leaf(2))])
        assert names_of(opt) == ["a.weight", "z"]
        assert opt.slots[0].stream == stream_ints("a.weight")


def test_ties_are_seen_through_detached_aliases() -> None:
    model = nn.Linear(3, 4)
    alias = nn.Parameter(model.weight.data)
    assert names_of(JaguarSignSGD([("b", model.weight), ("a", alias)])) == ["a"]
    assert len(JaguarSignSGD([model.weight, alias]).slots) == 1


def test_empty_tensors_are_not_tied() -> None:
    assert names_of(JaguarSignSGD([("a", leaf(0)), ("b", leaf(0)), ("c", leaf(2))])) == ["a", "b", "c"]


def test_a_tie_across_groups_is_refused() -> None:
    x = leaf(3)
    with pytest.raises(ValueError, match="already in another parameter group"):
        JaguarSignSGD([{"params": [("a", x)]}, {"params": [("b", x)]}])


BASE = torch.zeros(6, 8)
OVERLAPS = {
    "suffix": lambda b: [b.view(-1)[:20], b.view(-1)[19:]],
    "whole-and-row": lambda b: [b, b[2]],
    "other-shape": lambda b: [b, b.view(8, 6)],
    "transposed": lambda b: [b[:, :6], b[:, :6].t()],
    "crossing": lambda b: [b[:, 3], b[2, :]],
    "inside-later": lambda b: [b.view(-1)[0:48:7], b[1], b[0, 1:3]],
    "other-dtype": lambda b: [b, b.view(torch.float16)],
}
DISJOINT = {
    "halves": lambda b: [b[:3], b[3:]],
    "columns": lambda b: [b[:, 0], b[:, 1], b[:, 2:]],
    "even-odd": lambda b: [b.view(-1)[::2], b.view(-1)[1::2]],
    "quarters": lambda b: [b[:3, :4], b[:3, 4:], b[3:, :4], b[3:, 4:]],
}


def leaves(views: list[torch.Tensor]) -> list[torch.Tensor]:
    return [v.detach().requires_grad_() for v in views]


@pytest.mark.parametrize("case", OVERLAPS)
def test_overlaps_are_refused(case: str) -> None:
    with pytest.raises(ValueError, match="overlap in memory"):
        JaguarSignSGD(leaves(OVERLAPS[case](BASE.clone())))


@pytest.mark.parametrize("case", DISJOINT)
def test_disjoint_views_are_accepted(case: str) -> None:
    assert len(JaguarSignSGD(leaves(DISJOINT[case](BASE.clone()))).slots) == len(DISJOINT[case](BASE))


SELF_OVERLAPS = [torch.zeros(3, 1).expand(3, 4), torch.zeros(1).expand(5), torch.zeros(9).as_strided((4, 3), (2, 1))]


@pytest.mark.parametrize("tensor", SELF_OVERLAPS, ids=["columns", "scalar", "windows"])
def test_self_overlap_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="overlaps itself"):
        JaguarSignSGD([tensor.detach().requires_grad_()])


def test_size_one_dimensions_are_no_overlap() -> None:
    JaguarSignSGD(
        [
            torch.zeros(5, 1).expand(5, 1).detach().requires_grad_(),
            torch.zeros(9).as_strided((4, 2), (2, 1)).requires_grad_(),
        ]
    )


UNTRAINABLE = {
    "meta": (lambda: torch.zeros(3, device="meta"), "meta device"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse"),
    "int": (lambda: torch.zeros(3, dtype=torch.int8), "dtype torch.int8"),
    "complex": (lambda: torch.zeros(3, dtype=torch.complex64), "dtype torch.complex64"),
    "float8": (lambda: torch.zeros(3).to(torch.float8_e5m2), "dtype torch.float8_e5m2"),
}


@pytest.mark.parametrize("case", UNTRAINABLE)
def test_untrainable_tensors(case: str) -> None:
    make, message = UNTRAINABLE[case]
    with pytest.raises(ValueError, match=message):
        check_tensor("w", make())
    if case != "int":  # an integer tensor cannot require a gradient, so it counts as frozen
        with pytest.raises(ValueError, match=f"(?s)parameter 'w'.*{message}"):
            JaguarSignSGD([("w", make().requires_grad_())])


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch deprecates its quantised tensors
def test_quantised_tensors() -> None:
    with pytest.raises(ValueError, match="quint8"):
        check_tensor("w", torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8))


def test_frozen_tensors_are_skipped_and_counted() -> None:
    frozen = torch.zeros(5)
    odd = (torch.zeros(3, dtype=torch.int64), torch.zeros(3, device="meta"))  # a quantised weight under an adapter, say
    codes, meta = (nn.Parameter(tensor, requires_grad=False) for tensor in odd)
    opt = JaguarSignSGD([("a", leaf(4)), ("b", frozen), ("c", codes), ("d", meta)])
    assert names_of(opt) == ["a"] and "1 tensors, 4 elements, 3 frozen" in repr(opt)
    opt.step(lambda: torch.zeros(()))
    assert frozen.count_nonzero() == 0


NOTHING = {
    "list": [],
    "generator": (p for p in ()),
    "frozen": [torch.zeros(3), torch.zeros(2)],
}


@pytest.mark.parametrize("other", [torch.zeros(3, dtype=torch.int64), torch.eye(3).to_sparse()], ids=["int", "sparse"])
def test_a_bare_tensor_that_cannot_train_is_refused(other: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"trainable dtypes|only dense"):
        JaguarSignSGD([leaf(4), other])


@pytest.mark.parametrize("case", NOTHING)
def test_nothing_to_train(case: str) -> None:
    with pytest.raises(ValueError, match="empty" if case in ("list", "generator") else "requires_grad=False"):
        JaguarSignSGD(NOTHING[case])


WRONG = {
    "number": 3,
    "text": "weights",
    "dict": {"a": leaf(3)},
    "list-of-numbers": [3],
    "mixed": [leaf(2), {"params": [leaf(2)]}],
    "no-params": [{"lr": 1.0}],
    "set": {leaf(2)},
}


@pytest.mark.parametrize("params", WRONG.values(), ids=WRONG)
def test_wrong_types(params: object) -> None:
    with pytest.raises(TypeError):
        JaguarSignSGD(params)


def test_names_for_some_only() -> None:
    with pytest.raises(ValueError, match="names"):
        JaguarSignSGD([("a", leaf(2)), leaf(3)])
    with pytest.raises(ValueError, match="names"):
        JaguarSignSGD([{"params": [("a", leaf(2))]}, {"params": [leaf(3)]}])


def test_one_tensor_and_a_generator() -> None:
    assert len(JaguarSignSGD(leaf(3)).slots) == 1
    assert len(JaguarSignSGD(nn.Linear(2, 2).parameters()).slots) == 2


def test_equal_canonical_names() -> None:
    with pytest.raises(ValueError, match="same canonical name"):
        JaguarSignSGD([("module.a", leaf(2)), ("a", leaf(3))])


def test_stream_collision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaguar.method.params.stream_of", lambda name: 7)
    with pytest.raises(ValueError, match=r"'a' and 'b'.*stream id"):
        JaguarSignSGD([("a", leaf(2)), ("b", leaf(3))])


@pytest.mark.parametrize("key", ["tua", "nesterov", "coordinates", "betas", "momentum"])
def test_unknown_group_option(key: str) -> None:
    with pytest.raises(ValueError, match=f"option '{key}'.*lr, tau, beta, weight_decay"):
        JaguarSignSGD([{"params": [leaf(2)], key: 0.5}])


def test_group_keys_belong_to_the_optimizer() -> None:
    with pytest.raises(ValueError, match=r"option 'beta'.*lr, tau, momentum, weight_decay"):
        ZOSGD([{"params": [leaf(2)], "beta": 0.5}])
    with pytest.raises(ValueError, match="option 'beta'"):
        JaguarSignSGD([{"params": [leaf(2)], "beta": 0.5}], released=True)


BAD = {"tau": [0.0, -1e-3, math.nan, math.inf, 1e-60, "x", None], "lr": [-1.0, math.nan, math.inf, "x"],
       "weight_decay": [-0.1, math.nan], "beta": [1.0, -0.1, 1.5, math.nan]}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in BAD.items() for v in values])
@pytest.mark.parametrize("where", ["argument", "group"])
def test_values_out_of_range(key: str, value: object, where: str) -> None:
    with pytest.raises(ValueError, match=key):
        if where == "argument":
            JaguarSignSGD([leaf(2)], **{key: value})
        else:
            JaguarSignSGD([{"params": [leaf(2)], key: value}])


OPTIONS = {
    "update": ["some"],
    "estimator": ["three-sided"],
    "n_directions": [0, True, 1.0],
    "rho_clip": [0.0, -1.0],
    "rounding": ["up"],
    "momentum_dtype": [torch.float16, torch.int8],
    "seed": [-1, 2**64, 1.5, True],
    "backend": ["tpu"],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in OPTIONS.items() for v in values])
def test_bad_options(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        JaguarSignSGD([leaf(2)], **{key: value})


@pytest.mark.parametrize(("key", "value"), [("distribution", "cauchy"), ("restore", "undo"), ("momentum", 1.0)])
def test_bad_options_of_zosgd(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        ZOSGD([leaf(2)], **{key: value})


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_named_backend_runs_or_raises(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=rf"backend='{backend}' is not available: .*available: reference"):
        JaguarSignSGD([leaf(2)], backend=backend)
    assert "backend: reference" in repr(JaguarSignSGD([leaf(2)], backend="auto"))


def test_groups_take_defaults_and_a_failed_group_changes_nothing() -> None:
    opt = JaguarSignSGD([{"params": [("a", leaf(2))], "tau": 0.5}], lr=0.25, tau=1e-2)
    opt.add_param_group({"params": [("b", leaf(3))], "lr": 1.0})
    assert [(g["lr"], g["tau"]) for g in opt.param_groups] == [(0.25, 0.5), (1.0, 1e-2)]
    before = repr(opt)
    for bad in (
        {"params": [("module.a", leaf(4))]},
        {"params": [("c", leaf(2))], "tau": 0.0},
        {"params": [("c", leaf(2))], "x": 1},
    ):
        with pytest.raises(ValueError):
            opt.add_param_group(bad)
        assert repr(opt) == before
    opt.measure(lambda: torch.zeros(()))
    with pytest.raises(RuntimeError, match="before the first measure"):
        opt.add_param_group({"params": [("c", leaf(3))]})


def test_default_learning_rates() -> None:
    assert JaguarSignSGD([leaf(2)]).defaults["lr"] == 1e-4
    assert JaguarSignSGD([leaf(2)], update="all").defaults["lr"] == 1e-6
    assert JaguarSignSGD([leaf(2)], lr=0.0).defaults["lr"] == 0.0


def test_repr_shows_fraction_memory_and_groups() -> None:
    text = repr(JaguarSignSGD(every_form(torch.float32).named_parameters(), coordinates=0.0123, beta=0.9, seed=77))
    for part in ("fraction 0.0123457", "810 steps", "seed: 77", "6 tensors", "two-sided", "lr=0.0001", "tau=0.001"):
        assert part in text
    assert "'sampled'" not in repr(JaguarSignSGD([leaf(2)], released=True))


def test_slots_of_a_logical_tensor() -> None:
    slot = build_slots([{"params": [leaf(3, 4)], "param_names": ["module.w"]}])[0]
    assert (slot.name, slot.count, slot.total, slot.start, slot.shape) == ("w", 12, 12, 0, torch.Size([3, 4]))
    assert free_bytes(torch.device("cpu")) > 0
