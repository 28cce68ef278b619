"""Parameter lists of known models, from their configurations; the weights are random."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

Named: TypeAlias = list[tuple[str, nn.Parameter]]
Shape: TypeAlias = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class ParameterList:
    """The trained tensors of a model.

    Attributes:
        name: what it is called on the command line and in results.
        title: what it is.
        shapes: name and shape of every tensor.
    """

    name: str
    title: str
    shapes: tuple[Shape, ...]

    @property
    def count(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for _, shape in self.shapes)


def _linear(name: str, out: int, into: int, bias: bool = True) -> Iterator[Shape]:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Iterator[Shape]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def opt(width: int, inner: int, layers: int, vocabulary: int = 50272, positions: int = 2050) -> tuple[Shape, ...]:
    """OPT (arXiv 2205.01068) with tied embeddings; two of the positions are its offset."""
    shapes = [
        ("model.decoder.embed_tokens.weight", (vocabulary, width)),
        ("model.decoder.embed_positions.weight", (positions, width)),
        *_norm("model.decoder.final_layer_norm", width),
    ]
    for i in range(layers):
        layer = f"model.decoder.layers.{i}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes += _linear(f"{layer}.self_attn.{projection}", width, width)
        shapes += _norm(f"{layer}.self_attn_layer_norm", width)
        shapes += _linear(f"{layer}.fc1", inner, width)
        shapes += _linear(f"{layer}.fc2", width, inner)
        shapes += _norm(f"{layer}.final_layer_norm", width)
    return tuple(shapes)


def llama(width: int, inner: int, layers: int, vocabulary: int) -> tuple[Shape, ...]:
    """Llama 2 (arXiv 2307.09288) of a size without grouped queries."""
    shapes = [*_linear("model.embed_tokens", vocabulary, width, bias=False)]
    for i in range(layers):
        layer = f"model.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes += _linear(f"{layer}.self_attn.{projection}", width, width, bias=False)
        for projection in ("gate_proj", "up_proj"):
            shapes += _linear(f"{layer}.mlp.{projection}", inner, width, bias=False)
        shapes += _linear(f"{layer}.mlp.down_proj", width, inner, bias=False)
        shapes += [(f"{layer}.{norm}.weight", (width,)) for norm in ("input_layernorm", "post_attention_layernorm")]
    return (*shapes, ("model.norm.weight", (width,)), ("lm_head.weight", (vocabulary, width)))


def roberta(width: int, inner: int, layers: int, vocabulary: int, positions: int) -> tuple[Shape, ...]:
    """RoBERTa (arXiv 1907.11692) with its masked-language-model head, whose matrix is the embedding."""
    shapes = [
        ("roberta.embeddings.word_embeddings.weight", (vocabulary, width)),
        ("roberta.embeddings.position_embeddings.weight", (positions, width)),
        ("roberta.embeddings.token_type_embeddings.weight", (1, width)),
        *_norm("roberta.embeddings.LayerNorm", width),
    ]
    for i in range(layers):
        layer = f"roberta.encoder.layer.{i}"
        for projection in ("query", "key", "value"):
            shapes += _linear(f"{layer}.attention.self.{projection}", width, width)
        shapes += _linear(f"{layer}.attention.output.dense", width, width)
        shapes += _norm(f"{layer}.attention.output.LayerNorm", width)
        shapes += _linear(f"{layer}.intermediate.dense", inner, width)
        shapes += _linear(f"{layer}.output.dense", width, inner)
        shapes += _norm(f"{layer}.output.LayerNorm", width)
    shapes += [("lm_head.bias", (vocabulary,)), *_linear("lm_head.dense", width, width)]
    return (*shapes, *_norm("lm_head.layer_norm", width))


def lora(base: Sequence[Shape], rank: int = 8) -> tuple[Shape, ...]:
    """Adapters of rank `rank` on the query and value projections of a model: A (rank, in), B (out, rank)."""
    shapes: list[Shape] = []
    for name, shape in base:
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            module = "base_model.model." + name.removesuffix(".weight")
            shapes.append((f"{module}.lora_A.default.weight", (rank, shape[1])))
            shapes.append((f"{module}.lora_B.default.weight", (shape[0], rank)))
    return tuple(shapes)


_OPT_1_3B = opt(2048, 8192, 24)
_OPT_13B = opt(5120, 20480, 40)
_LLAMA_7B = llama(4096, 11008, 32, 32000)

# In the order in which they are measured: what targets are set on first, and the big ones last.
LISTS = {
    made.name: made
    for made in (
        ParameterList("opt-1.3b", "OPT-1.3B, all parameters", _OPT_1_3B),
        ParameterList("opt-1.3b-lora", "OPT-1.3B, LoRA r=8 on q and v", lora(_OPT_1_3B)),
        ParameterList("roberta-large", "RoBERTa-large, all parameters", roberta(1024, 4096, 24, 50265, 514)),
        ParameterList("llama-2-7b-lora", "Llama-2-7B, LoRA r=8 on q and v", lora(_LLAMA_7B)),
        ParameterList("opt-13b-lora", "OPT-13B, LoRA r=8 on q and v", lora(_OPT_13B)),
        ParameterList("llama-2-7b", "Llama-2-7B, all parameters", _LLAMA_7B),
        ParameterList("opt-13b", "OPT-13B, all parameters", _OPT_13B),
    )
}


def tensors(shapes: ParameterList, device: torch.device) -> Named:
    """The tensors of a list in bf16, not filled yet."""
    return [(name, nn.Parameter(torch.empty(s, dtype=torch.bfloat16, device=device))) for name, s in shapes.shapes]


@torch.no_grad()
def fill_(named: Named) -> None:
    """N(0, 0.02**2), the same in every call: big enough that tau = 1e-3 moves all of them in bf16."""
    generators: dict[torch.device, torch.Generator] = {}
    for _, p in named:
        generator = generators.setdefault(p.device, torch.Generator(p.device).manual_seed(0))
        p.normal_(0.0, 0.02, generator=generator)


def cut(named: Named) -> list[Tensor]:
    """The corner of one tensor of every shape, at most 64 x 96: small inputs with the same values."""
    corners = {}
    for _, p in named:
        if p.shape not in corners:
            corner = p.detach()[:64] if p.dim() == 1 else p.detach()[:64, :96]
            corners[p.shape] = corner.clone(memory_format=torch.contiguous_format)
    return list(corners.values())
