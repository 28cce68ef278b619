"""Facts of `nn.Embedding` about its table are honoured: padding rows stay, `max_norm` is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import jaguar
from jaguar.optimizers.embeddings import slots_of

PAD = 3
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "fraction": ("JaguarSignSGD", {"coordinates": 0.5}),
    "all": ("JaguarSignSGD", {"coordinates": 0.5, "update": "all", "n_directions": 2}),
    "one-sided": ("JaguarSignSGD", {"coordinates": 0.5, "estimator": "one-sided"}),
    "count": ("JaguarSignSGD", {"coordinates": 40}),
    "block": ("JaguarSignSGD", {"coordinates": 0.25, "layout": "block"}),
    "muon": ("JaguarMuon", {"coordinates": 0.5, "ns_dtype": torch.float32}),
    "copy": ("ZOSGD", {"restore": "copy", "n_directions": 2}),
    "walk": ("ZOSGD", {"restore": "walk", "n_directions": 2}),
    "module": ("ZOSGD", {"restore": "module"}),
    "momentum": ("ZOSGD", {"restore": "copy", "momentum": 0.9}),
    "sign": ("ZOSignSGD", {"distribution": "rademacher"}),
}
BACKENDS = [(name, "reference") for name in CONFIGS] + [
    (name, "triton") for name in ("fraction", "muon", "walk", "module")
]


class Bag(nn.Module):
    """A bag of words, whose table may be a tied head."""

    def __init__(self, padding_idx: int | None, kind: Any = nn.Embedding, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = kind(9, 8, padding_idx=padding_idx, **options)
        self.head = nn.Linear(8, 2)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(9, 8))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.table(ids)
        return self.head(found if isinstance(self.table, nn.EmbeddingBag) else found.sum(1))


IDS, LABELS = torch.tensor([[0, 1, 2], [4, 5, PAD], [6, PAD, PAD], [7, 8, 1]]), torch.tensor([0, 1, 1, 0])


def closure(model: nn.Module, ids: torch.Tensor = IDS) -> Any:
    return lambda: nn.functional.cross_entropy(model(ids), LABELS)


def made(config: str, model: nn.Module, backend: str = "reference") -> Any:
    name, options = CONFIGS[config]
    params: Any = model.named_parameters()
    if name == "JaguarMuon":
        params = [{"params": list(params), "ns": True}]
    return getattr(jaguar, name)(params, lr=1e-2, weight_decay=0.1, backend=backend, seed=3, **options)


@pytest.mark.parametrize(("config", "backend"), BACKENDS)
def test_the_padding_row_stays_and_nothing_else_does(
    config: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("kernels take GPU tensors here")
    model = Bag(PAD)
    monkeypatch.setitem(CONFIGS, "muon", ("JaguarMuon", {"coordinates": 0.5, "ns_steps": 2}))  # of kernels too
    opt, before = made(config, model, backend), model.table.weight.detach().clone()
    seen: list[torch.Tensor] = []
    model.table.register_forward_pre_hook(lambda *_: seen.append(model.table.weight.detach().clone()))
    for _ in range(1 if backend == "triton" else 6):
        opt.step(closure(model))
    opt.apply_(opt.measure(closure(model)))
    assert all(torch.equal(table[PAD], before[PAD]) for table in seen) and not torch.equal(seen[0], seen[1])
    now = model.table.weight.detach()
    assert torch.equal(now[PAD], before[PAD])
    moved = [not torch.equal(now[i], before[i]) for i in range(9) if i != PAD]
    assert all(moved) if backend == "reference" else any(moved)
    momentum = opt.state[model.table.weight].get("momentum")
    assert momentum is None or (not momentum[PAD].any() and momentum.any())
    assert f"padding row {PAD} of table.weight stays" in repr(opt)


@pytest.mark.parametrize("config", sorted(set(CONFIGS) - {"muon", "block"}))
def test_other_values_have_the_bits_of_a_model_without_padding(config: str) -> None:
    """Where the row is not looked up, so that its perturbation is in no loss."""
    ids = torch.where(IDS == PAD, 0, IDS)
    kept, plain = Bag(PAD), Bag(None)
    for model in (kept, plain):
        opt = made(config, model)
        for _ in range(3):
            opt.step(closure(model, ids))
    for name, p in kept.named_parameters():
        a, b = p.detach().clone(), plain.get_parameter(name).detach().clone()
        if name == "table.weight":
            assert torch.equal(a[PAD], Bag(PAD).table.weight[PAD]) and not torch.equal(a[PAD], b[PAD])
            a[PAD] = b[PAD] = 0.0
        assert torch.equal(a, b), name


@pytest.mark.parametrize("config", ["fraction", "copy", "module"])
def test_a_failing_closure_leaves_no_trace(config: str) -> None:
    model = Bag(PAD)
    opt, before = made(config, model), copy.deepcopy(model.state_dict())
    calls = []

    def failing() -> torch.Tensor:
        calls.append(model(IDS))
        if len(calls) == 2:
            raise ZeroDivisionError
        return closure(model)()

    with pytest.raises(ZeroDivisionError):
        opt.step(failing)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    opt.step(closure(model))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("config", ["fraction", "copy", "walk", "momentum"])
def test_the_row_stays_where_a_closure_moves_the_table(config: str, backend: str) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("kernels take GPU tensors here")
    model, left, seen = Bag(PAD), [], []
    opt, row = made(config, model, backend), model.table.weight[PAD].detach().clone()

    def moving() -> torch.Tensor:
        loss = closure(model)()
        seen.append(model.table.weight[PAD].detach().clone())
        left.append(model.table.weight.data)  # the old storage stays
        model.table.weight.data = left[-1].clone()
        return loss

    for _ in range(3):
        opt.step(moving)
    assert all(torch.equal(found, row) for found in (*seen, model.table.weight[PAD]))


def rows(model: nn.Module) -> dict[str, int | None]:
    opt = jaguar.ZOSGD(model.named_parameters())
    return {slot.name: slot.kept for slot in opt.slots if slot.kept is not None}


def test_which_rows_stay() -> None:
    assert rows(Bag(PAD)) == {"table.weight": PAD} and rows(Bag(None)) == {}
    assert rows(Bag(-1)) == {"table.weight": 8}
    assert rows(Bag(PAD, nn.EmbeddingBag)) == {"table.weight": PAD}
    assert rows(nn.Sequential(nn.Sequential(Bag(PAD)))) == {"0.0.table.weight": PAD}
    assert rows(copy.deepcopy(Bag(PAD))) == {"table.weight": PAD}
    assert rows(nn.Embedding(4, 2, padding_idx=0)) == {"weight": 0}
    unnamed = Bag(PAD)
    assert [slot.kept for slot in jaguar.ZOSGD(unnamed.parameters()).slots] == [PAD, None, None]
    tied = Bag(PAD)  # the head has a gradient for every row
    tied.out = nn.Linear(8, 9, bias=False)
    tied.out.weight = tied.table.weight
    assert rows(tied) == {}
    twice = Bag(PAD)
    twice.other = nn.Embedding(9, 8, padding_idx=PAD)
    twice.other.weight = twice.table.weight
    assert rows(twice) == {"table.weight": PAD}
    twice.other.padding_idx = 0
    assert rows(twice) == {}


SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 1}
SMALL |= {"intermediate_size": 16, "max_position_embeddings": 20}


def test_models_of_transformers() -> None:
    config = transformers.RobertaConfig(**SMALL)
    ends = lambda model: {name.split(".embeddings.")[1]: row for name, row in rows(model).items()}  # noqa: E731
    both = {"word_embeddings.weight": 1, "position_embeddings.weight": 1}
    assert ends(transformers.RobertaForSequenceClassification(config)) == both
    assert ends(transformers.RobertaForMaskedLM(config)) == {"position_embeddings.weight": 1}  # words are a tied head
    opt = transformers.OPTConfig(**SMALL, ffn_dim=16, word_embed_proj_dim=16)
    assert rows(transformers.OPTForCausalLM(opt)) == {}
    assert list(rows(transformers.OPTForSequenceClassification(opt)).values()) == [1]
    model = transformers.RobertaForSequenceClassification(config)
    table = model.roberta.embeddings.word_embeddings.weight
    before, ids = table.detach().clone(), torch.tensor([[0, 4, 5, 1, 1]])
    optimizer = jaguar.JaguarSignSGD(model.named_parameters(), lr=1e-2, coordinates=0.5)
    for _ in range(3):
        optimizer.step(lambda: model(ids, attention_mask=ids != 1, labels=torch.tensor([1])).loss)
    assert torch.equal(table[1], before[1]) and not torch.equal(table[2], before[2])


def test_what_stays_is_compared() -> None:
    model = Bag(PAD)
    opt = made("fraction", model)
    opt.step(closure(model))
    saved = opt.state_dict()
    for other in (Bag(None), Bag(0)):
        with pytest.raises(ValueError, match=r"padding_rows='table\.weight\[3\]'"):
            made("fraction", other).load_state_dict(saved)
    twin = Bag(PAD)
    twin.load_state_dict(model.state_dict())
    again = made("fraction", twin)
    again.load_state_dict(saved)
    again.step(closure(twin)), opt.step(closure(model))
    assert torch.equal(twin.table.weight, model.table.weight)
    assert torch.equal(twin.table.weight[PAD], Bag(PAD).table.weight[PAD])


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm_is_refused_where_the_table_trains(kind: Any) -> None:
    model = Bag(None, kind, max_norm=1.0)
    with pytest.raises(ValueError, match=r"table\.weight .*max_norm=1\.0.* freeze it, or set max_norm to None"):
        jaguar.JaguarSignSGD(model.named_parameters())
    model.table.requires_grad_(False)
    jaguar.JaguarSignSGD(model.named_parameters(), coordinates=0.5).step(closure(model))


def test_scale_grad_by_freq_is_said_to_do_nothing() -> None:
    model = Bag(PAD, scale_grad_by_freq=True)
    with pytest.warns(UserWarning, match=r"scale_grad_by_freq of the Embedding of table\.weight has no effect") as told:
        opt = jaguar.ZOSGD(model.named_parameters())
        opt.load_state_dict(opt.state_dict())
    assert len(told) == 1


def test_sparse_means_nothing_without_gradients() -> None:
    assert rows(Bag(PAD, sparse=True)) == {"table.weight": PAD}


def test_modules_are_looked_for_only_where_an_embedding_has_options(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Embedding):
        """As transformers has them."""

    monkeypatch.setattr("jaguar.optimizers.embeddings._modules", lambda: 1 / 0)
    others = [Bag(PAD), Bag(0)]  # of another model
    assert rows(Bag(None)) == {} and rows(nn.Linear(3, 2)) == {}
    for model in (others[1], Bag(0, Scaled), Bag(0, nn.EmbeddingBag), Bag(None, Scaled, scale_grad_by_freq=True)):
        with pytest.raises(ZeroDivisionError):
            rows(model)


def test_modules_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Bag(PAD)
    opt = jaguar.ZOSGD([{"params": [("table.weight", model.table.weight)]}])
    monkeypatch.setattr("jaguar.optimizers.embeddings._modules", lambda: 1 / 0)
    assert [slot.kept for slot in slots_of(opt.param_groups, known=opt.slots)] == [PAD]
    jaguar.ZOSGD([torch.zeros(3, 4, requires_grad=True)])  # no parameter of a module
    with pytest.raises(ZeroDivisionError):
        jaguar.ZOSGD(model.named_parameters())
