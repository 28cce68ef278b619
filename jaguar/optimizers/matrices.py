"""Which tensors Newton-Schulz moves and which the sign rule: `jaguar.param_groups`, and how that is shown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from jaguar.directions import matrix_shape
from jaguar.params import Slot, identity

# How a group's tensors with two or more dimensions are read.
NS = (True, False, "flatten")
_FACTOR = re.compile(r"\.lora_(?:embedding_)?[AB]\b")


def param_groups(model: nn.Module, weight_decay: float | None = None) -> list[dict[str, Any]]:
    """The parameter groups of JAGUAR Muon: hidden matrices for Newton-Schulz, everything else for the sign rule.

    Newton-Schulz (`ns=True`) gets what has two dimensions (three: a batch of matrices), LoRA factors included;
    convolutions (`ns="flatten"`) are read as (first, rest). The sign rule (`ns=False`) gets embeddings, what is tied to
    one, the output head (`get_output_embeddings()`, and modules outside a transformers model's `base_model`), vectors
    (adapters' rows and columns of scales too) and scalars. As usual, weight decay spares vectors and
    scalars.

    Args:
        model: any module; frozen parameters may be among its own.
        weight_decay: decoupled, multiplied by lr; None: the optimizer's.

    Returns:
        Group dicts with `params` as (name, tensor) and `ns`; no group is empty.

    Raises:
        TypeError: `model` is no module.

    Source: arXiv 2506.04430, section on Muon; K. Jordan, Muon, 2024.
    Equivalent to: `[{"params": hidden_matrices, "ns": True}, {"params": everything_else, "ns": False}]`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups takes a torch.nn.Module, got {type(model).__name__}")
    outside = _outside(model)
    apart, flat = set(outside), set()
    seen: dict[Any, Any] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if "Embedding" in type(module).__name__ or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                apart.add(_key(parameter))
            if isinstance(module, _ConvNd):
                flat.add(_key(parameter))
            if isinstance(module, nn.ParameterDict) and parameter.dim() == 2 and min(parameter.shape) == 1:
                apart.add(_key(parameter))  # adapters' vectors that are stored as rows or columns
    groups: dict[tuple[Any, bool], list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = _key(parameter)
        is_factor = bool(_FACTOR.search(name))
        ns: Any = parameter.dim() >= 2 and (is_factor or key not in apart)
        if ns and (key in flat or parameter.dim() > 3):
            ns = "flatten"
        # A tie has one path, whatever its names: that of an embedding, if it is one.
        ns = seen.setdefault(key, ns)
        groups.setdefault((ns, parameter.dim() >= 2), []).append((name, parameter))
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    return [
        {"params": entries, "ns": ns} | (decay if decays else {"weight_decay": 0.0})
        for (ns, decays), entries in groups.items()
    ]


def _key(parameter: Tensor) -> Any:
    return identity(parameter) if parameter.numel() and not parameter.is_meta else id(parameter)


def _outside(model: nn.Module) -> set[Any]:
    """Parameters of output heads, in transformers' terms: of `get_output_embeddings()` and around `base_model`.

    Of every model inside, because wrappers (DDP, PEFT, a module of the user's own) do not pass these names on.
    """
    found: set[Any] = set()
    for inner in model.modules():
        # Looked up on the class: PEFT's wrappers answer for the model inside, with a `base_model` of another meaning.
        if not callable(getattr(type(inner), "get_output_embeddings", None)):
            continue
        try:
            head = inner.get_output_embeddings()  # type: ignore[operator]
        except (NotImplementedError, AttributeError):  # a model without one
            head = None
        if isinstance(head, nn.Module):
            found |= {_key(parameter) for parameter in head.parameters()}
        base = getattr(inner, "base_model", None)
        if isinstance(base, nn.Module) and base is not inner:
            found |= {_key(p) for p in inner.parameters()} - {_key(p) for p in base.parameters()}
    return found


def matrix_shapes(slot: Slot, ns: Any) -> tuple[int, int]:
    """Rows and columns of the matrix (or of each matrix of a batch) that Newton-Schulz sees."""
    shape = slot.shape[1:] if ns != "flatten" and len(slot.shape) == 3 else slot.shape
    return matrix_shape(torch.Size(shape))


def collapsed(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, str, int]]:
    """Names with their numbers as "*", shape and count: 24 layers in one line."""
    counts: dict[tuple[str, str], int] = {}
    for name, tensor in tensors:
        # Of unnamed parameters the numbers are all there is, and all that differs.
        pattern = "#*" if name.startswith("#") else re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        counts[pattern, shape] = counts.get((pattern, shape), 0) + 1
    for (pattern, shape), count in counts.items():
        yield pattern, shape, count


def listed(slots: Sequence[Slot]) -> str:
    """`collapsed` as text."""
    lines = collapsed((slot.name, slot.tensor) for slot in slots)
    return (
        "; ".join((f"{count} of " if count > 1 else "") + f"{name} ({shape})" for name, shape, count in lines) or "none"
    )
