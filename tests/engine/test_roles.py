"""Two-dimensional tensors that are no matrices: stacked biases, tokens, tables, scales; tiny models without values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList
from transformers.models.auto import modeling_auto

import jaguar


def found(model: nn.Module) -> dict[str, Any]:
    """name -> ns; what is no matrix has no weight decay, embeddings and heads apart."""
    groups = jaguar.param_groups(model, weight_decay=0.1)
    for group in groups:
        assert not group["ns"] or group["weight_decay"] == 0.1
    return {name: group["ns"] for group in groups for name, _ in group["params"]}


def decays(model: nn.Module) -> set[str]:
    groups = jaguar.param_groups(model, weight_decay=0.1)
    return {name for group in groups if group["weight_decay"] for name, _ in group["params"]}


SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
IMAGE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
IMAGE |= {"image_size": 8, "patch_size": 4}
EXPERTS = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
PER_HEAD = {"vocab_size": 60, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}
FUNNEL = {"vocab_size": 60, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 4, "d_head": 8}
GRIFFIN = SMALL | {"lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3, "intermediate_size": 96}
# model, options, last parts of names under Newton-Schulz, and of names that have two dimensions and are none of it
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], set[str]]] = {
    "GptOss": (
        "ForCausalLM",
        EXPERTS | {"head_dim": 8},
        {"gate_up_proj": True, "down_proj": True, "router.weight": True},
        {"gate_up_proj_bias", "down_proj_bias"},
    ),
    "Mamba": ("ForCausalLM", SMALL, {"in_proj.weight": True, "dt_proj.weight": True}, {"A_log", "conv1d.weight"}),
    "XLNet": ("LMHeadModel", PER_HEAD, dict.fromkeys("qkvor", "flatten"), {"r_w_bias", "seg_embed", "mask_emb"}),
    "Funnel": ("ForMaskedLM", FUNNEL, {"r_kernel": "flatten", "q_head.weight": True}, {"r_s_bias", "seg_embed"}),
    "RecurrentGemma": (
        "ForCausalLM",
        GRIFFIN,
        {"input_gate_weight": True, "recurrent_gate_weight": True},
        {"input_gate_bias", "recurrent_gate_bias", "conv_1d.weight"},
    ),
    "Cohere": ("ForCausalLM", EXPERTS | {"use_qk_norm": True}, {"q_proj.weight": True}, {"q_norm.weight"}),
    "ViT": (
        "ForImageClassification",
        IMAGE,
        {"projection.weight": "flatten", "q_proj.weight": True},
        {"cls_token", "position_embeddings"},
    ),
    "Swin": (
        "ForImageClassification",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 4},
        {"q_proj.weight": True},
        {"relative_position_bias_table"},
    ),
    "Beit": ("ForImageClassification", IMAGE, {"q_proj.weight": True}, {"cls_token"}),
    "IBert": (
        "ForMaskedLM",
        SMALL | {"intermediate_size": 48, "max_position_embeddings": 20},
        {"query.weight": True},
        {"word_embeddings.weight"},
    ),
    "Dinov2": ("ForImageClassification", IMAGE | {"mlp_ratio": 2}, {"fc1.weight": True}, {"mask_token", "cls_token"}),
}


@pytest.mark.parametrize("family", MODELS)
def test_models_whose_tables_look_like_matrices(family: str) -> None:
    head, options, matrices, tables = MODELS[family]
    with torch.device("meta"):
        config = getattr(transformers, f"{family}Config")(**options)
        model = getattr(transformers, f"{family}{head}")(config)
    ns = found(model)
    for end, expected in matrices.items():
        assert {value for name, value in ns.items() if f".{name}".endswith(f".{end}")} == {expected}, end
    for end in tables:
        of_end = {name for name in ns if f".{name}".endswith(f".{end}")}
        assert of_end and not any(ns[name] for name in of_end), end
        assert bool(of_end & decays(model)) == end.endswith("word_embeddings.weight")


class Own(nn.Module):
    """A user's module with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.ones(4, 6, 5)), nn.Parameter(torch.ones(4, 5))
        self.router = nn.Parameter(torch.ones(4, 6))
        self.W = nn.Parameter(torch.ones(6, 6))
        self.pos_proj = nn.Parameter(torch.ones(6, 6))
        self.memory = nn.Parameter(torch.ones(1, 3, 6))
        self.row, self.column = nn.Parameter(torch.ones(1, 6)), nn.Parameter(torch.ones(6, 1))
        self.clsToken, self.headScales = nn.Parameter(torch.ones(2, 6)), nn.Parameter(torch.ones(3, 6))
        self.frame = nn.Parameter(torch.ones(2, 3, 4, 4))
        self.pos_tables = nn.ParameterList([torch.ones(3, 6), torch.ones(2, 6)])
        self.mixers = nn.ParameterDict({"in": torch.ones(3, 6), "bias": torch.ones(3, 6)})
        self.norm, self.prelu = nn.LayerNorm((3, 6)), nn.PReLU(6)
        self.mean = nn.MultiheadAttention(6, 2, add_bias_kv=True)
        self.lstm, self.cell = nn.LSTM(6, 6, proj_size=3), nn.GRUCell(6, 5)
        self.depthwise, self.grouped = nn.Conv1d(6, 12, 3, groups=6), nn.Conv2d(6, 12, 3, groups=2)
        self.normed = parametrizations.weight_norm(nn.Conv1d(6, 5, 3))
        self.turned = parametrizations.orthogonal(nn.Linear(6, 5))


MATRICES = {
    "w1": True,
    "router": True,
    "W": True,
    "pos_proj": True,
    "mixers.in": True,
    "mean.in_proj_weight": True,
    "mean.out_proj.weight": True,
    "lstm.weight_ih_l0": True,
    "lstm.weight_hh_l0": True,
    "lstm.weight_hr_l0": True,
    "cell.weight_ih": True,
    "cell.weight_hh": True,
    "grouped.weight": "flatten",
    "normed.parametrizations.weight.original1": "flatten",
    "turned.parametrizations.weight.original": True,
}


def test_parameters_of_a_module_of_ones_own() -> None:
    model = Own()
    assert {name: ns for name, ns in found(model).items() if ns} == MATRICES
    assert decays(model) == set(MATRICES)


def test_the_default_moves_a_stacked_bias_as_other_biases() -> None:
    model = Own()
    opt = jaguar.JaguarMuon(jaguar.param_groups(model), lr=1e-2, coordinates=1.0, ns_dtype=torch.float32)
    opt.step(lambda: (model.b1 * model.w1.sum(1)).sum() + (model.W * model.W).sum())
    assert torch.allclose((model.b1 - 1).abs(), torch.tensor(1e-4), rtol=1e-3)
    assert (model.W - 1).norm() > 1e-3  # ones of rank one: a polar factor of norm near 1
    assert "b1 (4 x 5)" in repr(opt).split("the sign rule moves")[1]


peft_warns = pytest.mark.filterwarnings("ignore::FutureWarning")


@peft_warns
def test_adapters() -> None:
    peft = pytest.importorskip("peft")
    config = transformers.LlamaConfig(**SMALL, intermediate_size=48)

    def made(**options: Any) -> dict[str, Any]:
        model = peft.get_peft_model(transformers.LlamaForCausalLM(config), options["config"])
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        return {name: ns for name, ns in found(model).items() if name in trained}

    lora = made(config=peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], use_dora=False))
    assert {name.split("lora_")[1].split(".")[0] for name, ns in lora.items() if ns} == {"A", "B", "embedding_B"}
    assert [ns for name, ns in lora.items() if "lora_embedding_A" in name] == [False]
    dora = made(config=peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    assert {ns for name, ns in dora.items() if "magnitude" in name} == {False} and True in dora.values()
    for other in (
        peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
        peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 3]),
        peft.VeraConfig(target_modules=["q_proj"], r=2),
    ):
        assert set(made(config=other).values()) == {False}, other
    loha = made(config=peft.LoHaConfig(target_modules=["q_proj"], r=2))
    assert set(loha.values()) == {True}


# Parameters outside linear, convolution, embedding, expert and router modules of transformers that are multiplied by.
MULTIPLIED = {
    ("HyperConnection", "fn"),
    ("HyperHead", "hc_fn"),
    ("MultiheadAttention", "in_proj_weight"),
    ("MultiModalProjector", "mm_input_projection_weight"),
    ("RelativeLogits", "proj"),
    ("GRUCell", "weight_ih"),
    ("GRUCell", "weight_hh"),
    ("LSTM", "weight_ih_l0"),
    ("LSTM", "weight_hh_l0"),
    ("LSTM", "weight_ih_l1"),
    ("LSTM", "weight_hh_l1"),
    ("ZambaMambaMixer", "dt_proj_weight"),
    ("ZambaMambaMixer", "x_proj_weight"),
    ("RecurrentGemmaRglru", "input_gate_weight"),
    ("RecurrentGemmaRglru", "recurrent_gate_weight"),
    ("FunnelRelMultiheadAttention", "r_kernel"),
    ("QuantLinear", "weight"),
    *(("XLNetRelativeAttention", name) for name in "qkvor"),
}
PLAIN = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd, transformers.pytorch_utils.Conv1D, ParametrizationList)


def shrink(config: Any, depth: int = 0) -> None:
    for key in ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "n_layers"):
        if isinstance(getattr(config, key, None), int) and getattr(config, key) > 2:
            setattr(config, key, 2)
    for value in vars(config).values():
        if depth < 2 and isinstance(value, transformers.PretrainedConfig):
            shrink(value, depth + 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["CAUSAL_LM", "MASKED_LM", "SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION"])
def test_all_architectures(task: str) -> None:
    """Of everything that transformers can build at this task, just what is listed is multiplied by."""
    mapping, seen = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING"), 0
    for kind in mapping:
        try:
            config = kind()
            shrink(config)
            with torch.device("meta"):
                model = mapping[kind](config)
        except Exception:  # no default configuration, or a library is missing
            continue
        ns, seen = found(model), seen + 1
        for path, module in model.named_modules():
            if isinstance(module, PLAIN) or type(module).__name__.endswith(("Experts", "Router")):
                continue
            for name, _ in module.named_parameters(recurse=False):
                if ns[f"{path}.{name}" if path else name]:
                    of = type(module).__name__
                    assert any(of.endswith(k) and name == n for k, n in MULTIPLIED), (kind.__name__, of, name)
    assert seen > 20
