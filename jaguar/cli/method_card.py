"""Card of a method for `jaguar info --method`, read from its class and from an optimizer of a tiny model."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from jaguar import optimizers
from jaguar.backends import availability, ops
from jaguar.optimizers.common import keywords
from jaguar.optimizers.names import METHODS

_DTYPES = (torch.float32, torch.bfloat16)
_COST = re.compile(r"^ *evaluations per step: (.+), state: (.+) bytes per parameter", re.MULTILINE)
# In torch's docstring it is a table in TeX.
_SGD = "g = grad f(x) + wd x;   m <- momentum m + g;   x <- x - lr m        (m = g without momentum)"


def facts(name: str) -> dict[str, str]:
    """Facts about a method of the command line, by heading."""
    row = METHODS[name]
    if row.cls is None:
        return _of_sgd(name)
    kind: type = getattr(optimizers, row.cls)
    made = [_made(kind, dtype) for dtype in _DTYPES]
    costs = [_cost(optimizer) for optimizer in made]
    return {
        "method": f"{name}, jaguar.{row.cls}",
        "name": _first_line(kind),
        "equation": _equation(kind),
        "evaluations per step": costs[0][0],
        "state": _per_parameter(state for _, state in costs),
        "source": _source(kind),
        "backends": "\n".join(f"{backend}: {_verdict(backend, made[0])}" for backend in availability.NAMES[1:]),
        "defaults": "\n".join(_defaults(kind, row.lr)),
    }


def _of_sgd(name: str) -> dict[str, str]:
    """Facts about the baseline with gradients, whose class is torch's."""
    kind = torch.optim.SGD
    held, gradients = zip(*map(_held_by_sgd, _DTYPES), strict=True)
    return {
        "method": f"{name}, torch.optim.SGD",
        "name": _first_line(kind),
        "equation": _SGD,
        "evaluations per step": "1, and a backward pass",
        "state": f"{_per_parameter(held)}; gradients: {_per_parameter(gradients)}",
        "source": f"torch {torch.__version__}; the first-order baseline, through the same trainer",
        "backends": "torch's own, on any device",
        "defaults": "\n".join(_defaults(kind, METHODS[name].lr)),
    }


def _per_parameter(sizes: Iterable[str]) -> str:
    full, half = sizes
    return f"{full} bytes per parameter in fp32, {half} in bf16"


# -- its docstring -----------------------------------------------------------------------------------------------------


def _paragraphs(kind: type) -> list[str]:
    return re.split(r"\n\s*\n", inspect.getdoc(kind) or "")


def _first_line(kind: type) -> str:
    return " ".join(_paragraphs(kind)[0].split())


def _equation(kind: type) -> str:
    """The indented blocks above the arguments."""
    blocks = []
    for paragraph in _paragraphs(kind):
        if paragraph.startswith("Args:"):
            break
        if all(line.startswith(" ") for line in paragraph.splitlines()):
            blocks.append(textwrap.dedent(paragraph))
    return "\n\n".join(blocks)


def _source(kind: type) -> str:
    found = re.search(r"\nSource: (.*?)(?=\n\n|\nEquivalent to:|\Z)", inspect.getdoc(kind) or "", re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def _shared(kind: type) -> set[str]:
    """The words of the docstring about `common`, among which are the shared arguments that the method has."""
    found = re.search(r"^    common: (.*(?:\n     .*)*)", inspect.getdoc(kind) or "", re.MULTILINE)
    return set(re.findall(r"\w+", found[1].partition("as `ZOSGD`")[0])) if found else set()


# -- its signature -----------------------------------------------------------------------------------------------------


def _defaults(kind: type, lr: str) -> Iterator[str]:
    """Arguments and their defaults; of those that all methods share, which are documented there, as in `ZOSGD`."""
    own, usual = inspect.signature(kind).parameters, inspect.signature(optimizers.ZOSGD).parameters
    shared = _shared(kind)
    for name in keywords(kind):
        parameter = own.get(name) or (usual.get(name) if name in shared else None)
        if parameter is None:
            continue
        if parameter.default is parameter.empty:
            yield f"{name}: must be given"
        else:
            yield f"{name}={parameter.default!r}" + f" ({lr})" * (name == "lr" and parameter.default is None)


# -- one of a tiny model -----------------------------------------------------------------------------------------------


def _tiny(dtype: torch.dtype) -> nn.Module:
    """A layer of two matrices and two vectors, under the names of transformers."""
    # Not initialised: that would draw from torch's generator.
    parts = {name: nn.utils.skip_init(nn.Linear, 16, 16, dtype=dtype) for name in ("q_proj", "v_proj")}
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict(parts)])})


def _made(kind: type, dtype: torch.dtype) -> Any:
    """An optimizer with its defaults."""
    model = _tiny(dtype)
    group: dict[str, Any] = {"params": list(model.named_parameters())}
    if getattr(kind, "by_role", False):
        group["ns"] = True
    asked = inspect.signature(kind).parameters.get("model")
    return kind([group], **({"model": model} if asked and asked.default is asked.empty else {}))


def _cost(optimizer: torch.optim.Optimizer) -> tuple[str, str]:
    """Evaluations, and bytes per parameter, as its repr has them."""
    found = _COST.search(repr(optimizer))
    assert found, "a repr has both"
    return found[1], found[2]


def _held_by_sgd(dtype: torch.dtype) -> tuple[str, str]:
    """Bytes per parameter that a step leaves in the state, and of the gradients."""
    parameters = list(_tiny(dtype).parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(parameters)
    optimizer.step()
    count = sum(parameter.numel() for parameter in parameters)
    state = [value for held in optimizer.state.values() for value in held.values() if isinstance(value, torch.Tensor)]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    held, slopes = (sum(t.numel() * t.itemsize for t in tensors) / count for tensors in (state, gradients))
    return f"{held:.4g}", f"{slopes:.4g}"


def _verdict(backend: str, optimizer: Any) -> str:
    """Tells whether a backend has the method, and whether that can run here."""
    reason = availability.unavailable().get(backend)
    try:
        ops.require(backend, optimizer.method, [], optimizer.param_groups)  # no tensors: the machine does not matter
    except availability.Unavailable as error:
        return f"no: {error}"
    except ImportError:  # without Triton there are no kernels to look at
        return f"not here: {reason}"
    return f"yes, but not here: {reason}" if reason else "yes"
