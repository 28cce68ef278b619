"""Hidden matrices among the tensors: module types, output heads, ties, LoRA factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import jaguar


def paths(model: nn.Module, **options: Any) -> dict[str, Any]:
    """name -> ns, of every parameter that trains."""
    groups = jaguar.param_groups(model, **options)
    assert all(group["params"] for group in groups)
    return {name: group["ns"] for group in groups for name, p in group["params"] if p.requires_grad}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.first = nn.Linear(6, 8)
        self.conv = nn.Conv1d(3, 4, 5)
        self.image = nn.Conv2d(3, 4, 5, bias=False)
        self.norm = nn.LayerNorm(8)
        self.experts = nn.Parameter(torch.zeros(2, 4, 4))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.tied = nn.Linear(6, 12, bias=False)
        self.tied.weight = self.embed.weight


def test_a_module_of_every_kind() -> None:
    assert paths(Net()) == {
        "embed.weight": False,
        "tied.weight": False,
        "first.weight": True,
        "first.bias": False,
        "conv.weight": "flatten",
        "conv.bias": False,
        "image.weight": "flatten",
        "norm.weight": False,
        "norm.bias": False,
        "experts": True,
        "scale": False,
    }


def test_weight_decay_spares_vectors() -> None:
    for group in jaguar.param_groups(Net(), 0.1):
        assert {p.dim() >= 2 for _, p in group["params"]} == {group["weight_decay"] == 0.1}


def test_weight_decay_of_none_is_the_optimizers() -> None:
    opt = jaguar.JaguarMuon(jaguar.param_groups(Net()), weight_decay=0.1)
    for group in opt.param_groups:
        assert group["weight_decay"] == (0.1 if group["params"][0].dim() >= 2 else 0.0)


def test_frozen_parameters_are_counted_and_left_out() -> None:
    net = Net()
    net.first.requires_grad_(False)
    opt = jaguar.JaguarMuon(jaguar.param_groups(net), ns_dtype=torch.float32)
    assert "2 frozen tensors left out" in repr(opt)
    opt.step(lambda: net.first(net.embed(torch.arange(3))).sum())


def test_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got generator"):
        jaguar.param_groups(Net().parameters())


def tiny(kind: str) -> Any:
    import transformers

    common = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 20}
    bert = common | {"intermediate_size": 24, "max_position_embeddings": 20}
    classes: dict[str, tuple[Any, Any]] = {
        "opt": (transformers.OPTForCausalLM, transformers.OPTConfig(**common, ffn_dim=24, word_embed_proj_dim=16)),
        "opt-classifier": (
            transformers.OPTForSequenceClassification,
            transformers.OPTConfig(**common, ffn_dim=24, word_embed_proj_dim=16),
        ),
        "llama": (
            transformers.LlamaForCausalLM,
            transformers.LlamaConfig(**common, intermediate_size=24, tie_word_embeddings=False),
        ),
        "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)),
        "roberta": (transformers.RobertaForMaskedLM, transformers.RobertaConfig(**bert)),
        "bert-classifier": (transformers.BertForSequenceClassification, transformers.BertConfig(**bert)),
    }
    make, config = classes[kind]
    return make(config)


HIDDEN = {
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "opt-classifier": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "roberta": {"query", "key", "value", "dense"},
    "bert-classifier": {"query", "key", "value", "dense"},
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_models_of_transformers(kind: str) -> None:
    model = tiny(kind)
    found = paths(model)
    hidden = {name for name, ns in found.items() if ns}
    assert {name.split(".")[-2] for name in hidden} == HIDDEN[kind]
    assert all(name.endswith(".weight") and "embed" not in name for name in hidden)
    inside = [name for name, _ in model.base_model.named_parameters()]
    assert all(any(name.endswith(other) for other in inside) for name in hidden)  # no head among them
    assert not any(found[name] for name in found if name.endswith(("bias", "norm.weight", "score.weight")))


peft_warns = pytest.mark.filterwarnings("ignore::FutureWarning")


@peft_warns
def test_lora_factors_are_matrices_and_the_head_is_not() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny("bert-classifier"),
        peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS"),
    )
    found = paths(model)
    factors = {name: ns for name, ns in found.items() if "lora_" in name}
    assert len(factors) == 4 and all(ns is True for ns in factors.values())
    assert found and not any(ns for name, ns in found.items() if "classifier" in name)
    opt = jaguar.JaguarMuon(jaguar.param_groups(model), coordinates=0.5)
    text = repr(opt)
    assert "lora_A.default.weight (2 x 16)" in text and "classifier" in text.split("the sign rule moves")[1]
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    ids = torch.randint(0, 20, (2, 5))
    opt.step(lambda: model(input_ids=ids, labels=torch.tensor([0, 1])).loss)
    moved = {n for n, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])}
    assert {n for n in factors} <= moved


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: nn.Sequential(m)])
def test_heads_of_wrapped_models_are_heads(wrap: Any) -> None:
    found = paths(wrap(tiny("llama")))
    (head,) = [name for name in found if name.endswith("lm_head.weight")]
    assert found[head] is False and sum(ns is True for ns in found.values()) == 7


@peft_warns
def test_vectors_of_adapters_take_the_sign_rule() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny("opt"),
        peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]),
    )
    assert set(paths(model).values()) == {False}


@peft_warns
def test_prompt_tuning_is_an_embedding() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("opt"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert set(paths(model).values()) == {False}
