"""Arguments that the named optimizers share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack, get_args, get_origin, get_type_hints

import torch

from jaguar.method.estimators import Estimator
from jaguar.method.estimators import estimator as make_estimator
from jaguar.method.params import Shard
from jaguar.method.probe import RESTORES


class Common(TypedDict, total=False):
    """Keyword arguments of every zero-order optimizer.

    Attributes:
        tau: length of the perturbation, 1e-3; "auto" where lr can be.
        restore: how `measure` gets back from dense directions: "copy", "module", "walk" or None, as `jaguar.ZOSGD`.
        momentum_dtype: torch.float32, bfloat16 or float8_e5m2; None: the parameter's (bfloat16 for fp16 parameters).
        rounding: "stochastic" (the default) or "nearest", for everything stored in less than fp32.
        n_directions: directions per step, 1.
        estimator: "two-sided", or "one-sided": (f(x + tau e) - f(x)) / tau.
        rho_clip: bound on |rho|.
        maximize: make the loss larger, as in torch.optim.
        seed: key of all directions and rounding noise, in [0, 2**64).
        backend: "auto", or a name that `jaguar info` lists.
        shards: by name, the tensors that are parts of bigger ones, each a `jaguar.Shard`.
        direction_group: processes that share a step's directions, a `torch.distributed.ProcessGroup`.
    """

    tau: float | str
    restore: str | None
    momentum_dtype: torch.dtype | None
    rounding: str | None
    n_directions: int
    estimator: str
    rho_clip: float | None
    maximize: bool
    seed: int
    backend: str
    shards: Mapping[str, Shard] | None
    direction_group: Any


_NAMES = tuple(Common.__annotations__)


def parts(
    common: Common, measured_by: Callable[[int, float | None], Estimator] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the `Method`, and arguments of `ZerothOrder`, that these arguments give.

    Args:
        measured_by: (n_directions, rho_clip) -> the estimator of a method that has one of its own.

    Raises:
        TypeError: there is an argument of another name.
        ValueError: one is out of range.
    """
    for name in common:
        if name not in _NAMES:
            raise TypeError(f"unexpected keyword argument {name!r}; besides its own there are {', '.join(_NAMES)}")
    restore = common.get("restore")
    if restore is not None and restore not in RESTORES:
        raise ValueError(f"restore={restore!r}: choose {', '.join(map(repr, RESTORES))}, or None")
    n_directions, rho_clip = common.get("n_directions", 1), common.get("rho_clip")
    if measured_by is None:
        estimator = make_estimator(common.get("estimator", "two-sided"), n_directions, rho_clip)
    elif "estimator" in common:
        raise ValueError(f"estimator={common['estimator']!r}: this method has an estimator of its own; leave it out")
    else:
        estimator = measured_by(n_directions, rho_clip)
    decides = {
        "estimator": estimator,
        "rounding": common.get("rounding") or "stochastic",
        "momentum_dtype": common.get("momentum_dtype"),
        "maximize": common.get("maximize", False),
        "walk": restore == "walk",
    }
    runs = {name: common[name] for name in ("tau", "seed", "backend", "shards", "direction_group") if name in common}  # type: ignore[literal-required]
    return decides, runs | {"restore": None if restore == "walk" else restore}


def keywords(kind: type) -> tuple[str, ...]:
    """Names of the arguments of an optimizer's class besides `params`, those of `**common: Unpack[Common]` too."""
    found: list[str] = []
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            found.append(name)
            continue
        hint = get_type_hints(kind.__init__).get(name)  # type: ignore[misc]
        if get_origin(hint) is Unpack:
            found += get_type_hints(get_args(hint)[0])
    return tuple(name for name in found if name != "params")


def refuse_with_released(kind: type, released: bool, **given: Any) -> None:
    """Raises ValueError for an argument that is not its default where `released=True` decides it."""
    if not isinstance(released, bool):
        raise ValueError(f"released={released!r}: choose True or False")
    if not released:
        return
    usual = inspect.signature(kind).parameters
    for name, value in given.items():
        if value != usual[name].default:
            raise ValueError(f"released=True fixes {', '.join(given)}, so {name}={value!r} cannot be given with it")
