"""Runs whose bits are recorded: every public optimizer with every option, and what their parameters and state become.

A row says what is run: the optimizer's arguments, and

    dtype       of the parameters; "mixed": of different tensors
    model       which parameters: "odd", "square", "large" or "tables"
    groups      whether parameter groups have numbers of their own
    how         what happens besides `step(closure)`

Losses are made of exact or correctly rounded operations in fp64 and summed by `math.fsum`, and so do not depend on the
machine, on threads or on the order of sums.
"""

from __future__ import annotations

import copy
import hashlib
import io
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import jaguar
from helpers.tensors import bits

Row = dict[str, Any]

DTYPES = {
    "fp32": [torch.float32],
    "bf16": [torch.bfloat16],
    "fp16": [torch.float16],
    "fp64": [torch.float64],
    "mixed": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
}
STEPS = {"reference": 5, "triton": 2}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "odd": {
        "matrix": (12, 17),
        "empty": (0, 4),
        "transposed": (6, 11),
        "vector": (133,),
        "cube": (3, 4, 5),
        "scalar": (),
        "convolution": (5, 2, 3),
        "tall": (19, 3),
        "last": (3,),
    },
    "square": {
        "first": (4, 4),
        "second": (4, 4),
        "cube": (3, 4, 4),
        "convolution": (4, 2, 2),
        "vector": (5,),
        "last": (4, 4),
    },
    "large": {"vector": (2**15 + 300,), "wide": (5, 8200), "last": (3,)},  # more than is done at once
}
TAU = 0.07  # above the spacing of bf16 below 1; at 0.002 some perturbations are lost, whose momentum is not entered
USUAL: dict[str, Row] = {
    "JaguarSignSGD": {"lr": 0.011},
    "JaguarMuon": {"lr": 0.03, "vector_lr": 0.007},
    "ZOSGD": {"lr": 3e-4, "restore": "copy"},
    "ZOSignSGD": {"lr": 0.011, "restore": "copy"},
}
# What a second and a third parameter group have of their own, beside the first one with the optimizer's numbers.
OWN: dict[str, list[Row]] = {
    "JaguarSignSGD": [{"lr": 0.003, "beta": 0.3, "weight_decay": 0.7}, {"tau": 0.11, "beta": 0.0}],
    "JaguarMuon": [{"lr": 0.01, "vector_lr": 0.02, "beta": 0.3, "weight_decay": 0.7}, {"tau": 0.11, "beta": 0.0}],
    "ZOSGD": [{"lr": 1e-4, "momentum": 0.5, "weight_decay": 0.7}, {"tau": 0.11, "momentum": 0.0}],
    "ZOSignSGD": [{"lr": 0.003, "momentum": 0.5, "weight_decay": 0.7}, {"tau": 0.11, "momentum": 0.0}],
}


# -- models and losses -------------------------------------------------------------------------------------------------


def numbers(count: int, turn: int = 0) -> Tensor:
    """Multiples of 1/512 in [-1, 1], in fp64."""
    return ((torch.arange(count, dtype=torch.float64) * 389 + turn * 97) % 1021 - 510) / 512


class Term(nn.Module):
    """One tensor, read in its module's forward."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(tensor)

    def forward(self) -> Tensor:
        return self.x.clone()


class Model(nn.Module):
    """Tensors, and a smooth loss that every one of their elements reaches."""

    def __init__(self, kind: str, dtype: str, strided: bool) -> None:
        super().__init__()
        self.kind, self._dtypes, self._count = kind, DTYPES[dtype], 0
        if kind in SHAPES:
            tensors = {name: self._values(*shape) for name, shape in SHAPES[kind].items()}
            if "transposed" in tensors and strided:
                tensors["transposed"] = tensors["transposed"].t().contiguous().t()
            self.terms = nn.ModuleDict({name: Term(tensor) for name, tensor in tensors.items()})
        else:
            self.padded = nn.Embedding(9, 8, padding_idx=3)
            self.hidden = nn.Linear(8, 6, bias=False)
            self.bias = Term(self._values(7))
            self.tied = nn.Embedding(10, 8, padding_idx=1)
            self.head = nn.Linear(8, 10, bias=False)
            for module in (self.padded, self.hidden, self.tied):
                module.weight = nn.Parameter(self._values(*module.weight.shape))
            self.head.weight = self.tied.weight

    def _values(self, *shape: int) -> Tensor:
        self._count += 1
        dtype = self._dtypes[self._count % len(self._dtypes)]
        return numbers(math.prod(shape), self._count).reshape(shape).to(dtype)

    def tensors(self) -> Iterator[Tensor]:
        """What the forwards of the modules make of the parameters, without a rounding."""
        if self.kind in SHAPES:
            yield from (term() for term in self.terms.values())
            return
        yield self.padded(torch.arange(9))
        yield self.hidden(torch.eye(8, dtype=self.hidden.weight.dtype))
        yield self.bias()
        yield self.tied(torch.arange(10))
        yield self.head(torch.eye(8, dtype=self.head.weight.dtype))

    def forward(self) -> Tensor:
        terms: list[float] = []
        for i, tensor in enumerate(self.tensors()):
            x = tensor.detach().to(torch.float64).reshape(-1)
            off = x - numbers(x.numel(), 1000 + i)
            terms += (off * off * (1.0 + torch.arange(x.numel()) % 7 / 4)).tolist()
        return torch.tensor(math.fsum(terms), dtype=torch.float64)

    def parts(self) -> list[Row]:
        """Three groups of the parameters, and what JAGUAR Muon reads of them."""
        if self.kind == "tables":
            groups = jaguar.param_groups(self)
            assert len(groups) == 3
            return groups
        named = dict(self.named_parameters())
        flat = {name: p for name, p in named.items() if "convolution" in name}
        signed = {name: p for name, p in named.items() if p.dim() < 2 or "transposed" in name}
        rest = {name: p for name, p in named.items() if name not in flat | signed}
        kinds = ((rest, True), (signed, False), (flat, "flatten"))
        return [{"params": list(some.items()), "ns": ns} for some, ns in kinds]


# -- one run -----------------------------------------------------------------------------------------------------------


def made(row: Row, model: Model, backend: str) -> Any:
    """The optimizer of a row."""
    options = {k: v for k, v in row.items() if k not in ("optimizer", "dtype", "model", "groups", "how")}
    name, released = row["optimizer"], row.get("released", False)
    usual = USUAL[name] | {"tau": TAU, "seed": 12345, "backend": backend}
    if released:
        usual.pop("vector_lr", None)
    params: Any = model.named_parameters()
    if row.get("how") == "unnamed":
        params = list(model.parameters())
    if row.get("groups") or (name == "JaguarMuon" and not released):
        own: list[Row] = [{}, *OWN[name]] if row.get("groups") else [{}, {}, {}]
        if released:
            own = [{k: v for k, v in values.items() if k not in ("beta", "vector_lr")} for values in own]
        params = [part | values for part, values in zip(model.parts(), own, strict=True)]
        if row.get("how") == "unnamed":
            params = [part | {"params": [p for _, p in part["params"]]} for part in params]
        if name != "JaguarMuon" or released:
            params = [{k: v for k, v in part.items() if k != "ns"} for part in params]
    return getattr(jaguar, name)(params, **(usual | options))


def saved_and_loaded(row: Row, model: Model, optimizer: Any, backend: str) -> Any:
    """Another optimizer that goes on where this one is."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = made(row, model, backend)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def fingerprint(row: Row, backend: str = "reference") -> str:
    """Three digests after some steps: of the parameters, of the state and of the records."""
    model = Model(row.get("model", "odd"), row["dtype"], strided=backend == "reference")
    start = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of skipped steps, and of few coordinates: not what is recorded here
        optimizer, records = stepped(row, model, backend)
        if row.get("how") == "replay":
            model = copy.deepcopy(start)
            optimizer = made(row, model, backend)
            for record in records:
                optimizer.apply_(record)
    assert optimizer.steps_done == STEPS[backend]
    moved = [bits(a) != bits(b) for a, b in zip(start.parameters(), model.parameters(), strict=True)]
    assert any(moved), "nothing moved"
    parameters, state = hashlib.sha256(), hashlib.sha256()
    for name, parameter in model.named_parameters():
        parameters.update(_described(name, parameter))
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            state.update(_described(f"{name} {key}", value))
    numbers = hashlib.sha256(b"".join(record.pack() for record in records))
    return " ".join(digest.hexdigest()[:16] for digest in (parameters, state, numbers))


def stepped(row: Row, model: Model, backend: str) -> tuple[Any, list[Any]]:
    """The optimizer of a row after its steps, and their records."""
    optimizer, how, records = made(row, model, backend), row.get("how"), []
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k)) if how == "schedule" else None
    for step in range(STEPS[backend]):
        closure: Callable[[], Tensor] = model
        if how == "skip" and step == 1:
            closure = partial(_infinite, model)
        if how == "freeze" and step in (1, 3):
            for parameter in list(model.parameters())[1::2]:
                parameter.requires_grad_(step == 3)
        if how == "save" and step == STEPS[backend] // 2:
            optimizer = saved_and_loaded(row, model, optimizer, backend)
        if how in ("measure", "discard"):
            record = optimizer.measure(closure)
        if how == "discard":
            optimizer.discard_()
        if how == "measure":
            optimizer.apply_(record)
        else:
            optimizer.step(closure)
        records.append(optimizer.last_record)
        if scheduler is not None:
            scheduler.step()
    return optimizer, records


def _infinite(model: Model) -> Tensor:
    return model() + math.inf


def _described(name: str, value: Any) -> bytes:
    if isinstance(value, Tensor):
        return f"{name} {value.dtype} {tuple(value.shape)}\n".encode() + bits(value)
    return f"{name} {value!r}\n".encode()
