"""Division of tensors between Newton-Schulz and the sign rule: `jaguar.param_groups`, and how that is shown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from jaguar.method.params import Slot, identity
from jaguar.optimizers.roles import Role, is_factor, roles_of


def param_groups(model: nn.Module, weight_decay: float | None = None) -> list[dict[str, Any]]:
    """The parameter groups of JAGUAR Muon: hidden matrices for Newton-Schulz, everything else for the sign rule.

    A matrix is what its module multiplies by (`jaguar.optimizers.roles` has the rule): weights of linear layers,
    experts' weights in three dimensions (a batch of matrices), LoRA factors (`ns=True`); convolutions, but for
    depthwise ones, and attention's (hidden, heads, width), read as (first, rest) (`ns="flatten"`). The sign rule
    (`ns=False`) gets embeddings, what is tied to one, the output head (`get_output_embeddings()`, and modules outside
    a transformers model's `base_model`), vectors, scalars, and what only has the dimensions of a matrix: stacked
    biases, token rows, position and bias tables, scales per channel or head. Weight decay spares what is no matrix,
    but for the weights of embeddings and heads.

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
    roles: dict[Any, Role] = {}
    for parameter, role in roles_of(model):
        # A tie has one role, whatever its names: that of an embedding, if it is one.
        if role is Role.LOOKUP or _key(parameter) not in roles:
            roles[_key(parameter)] = role
    groups: dict[tuple[Any, bool], list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        role = roles[_key(parameter)]
        ns: Any = {Role.MATRIX: True, Role.FLATTEN: "flatten"}.get(role, False)
        if _key(parameter) in outside and not is_factor(name):
            ns = False
        groups.setdefault((ns, role is not Role.TABLE), []).append((name, parameter))
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    return [
        {"params": entries, "ns": ns} | (decay if decays else {"weight_decay": 0.0})
        for (ns, decays), entries in groups.items()
    ]


def _key(parameter: Tensor) -> Any:
    return identity(parameter) if not parameter.is_meta else id(parameter)


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


def collapsed(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, str, int]]:
    """Names with their numbers as "*", shape and count: 24 layers in one line."""
    counts: dict[tuple[str, str], int] = {}
    for name, tensor in tensors:
        # Unnamed parameters have nothing but numbers, and differ in nothing else.
        pattern = "#*" if name.startswith("#") else re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        counts[pattern, shape] = counts.get((pattern, shape), 0) + 1
    for (pattern, shape), count in counts.items():
        yield pattern, shape, count


def listed(slots: Sequence[Slot]) -> str:
    """`collapsed` as text."""
    lines = collapsed((slot.name, slot.parameter) for slot in slots)
    return (
        "; ".join((f"{count} of " if count > 1 else "") + f"{name} ({shape})" for name, shape, count in lines) or "none"
    )
