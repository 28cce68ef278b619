"""The table of laws: what every optimizer is tried with, and the tests that each of these has to pass.

A new optimizer is a row of `CONFIGS` (or several). `test_laws.py` sees to it that every public class has one and that
no law leaves a row out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from jaguar import (
    FZOO,
    ZOSGD,
    AccZOM,
    DiZO,
    ForwardGrad,
    JaguarMuon,
    JaguarSignSGD,
    LeZO,
    Method,
    ZerothOrder,
    ZOAdaMM,
    ZOAdaMU,
    ZOMuon,
    ZOSGDCons,
    ZOSignSGD,
)
from jaguar.method import directions, rules
from jaguar.method.params import canonical_name

TAU = 2.0**-4  # far above the spacing of bf16 below 1, so that no perturbation is lost

# Class and arguments; `ZerothOrder` has a composition that no class has.
CONFIGS: dict[str, tuple[type[ZerothOrder], dict[str, Any]]] = {
    "fraction": (JaguarSignSGD, {"coordinates": 0.1, "lr": 2e-2}),
    "count": (JaguarSignSGD, {"coordinates": 7, "lr": 2e-2, "beta": 0.5}),
    "block": (JaguarSignSGD, {"coordinates": 1 / 9, "layout": "block", "lr": 2e-2}),
    "released": (JaguarSignSGD, {"released": True, "lr": 2e-2}),
    "all": (JaguarSignSGD, {"coordinates": 0.1, "update": "all", "lr": 1e-3, "weight_decay": 0.1, "n_directions": 2}),
    "gaussian-copy": (ZOSGD, {"restore": "copy", "lr": 1e-3, "momentum": 0.9}),
    "gaussian-module": (ZOSGD, {"restore": "module", "lr": 1e-3}),
    "rademacher-copy": (ZOSGD, {"restore": "copy", "distribution": "rademacher", "lr": 1e-3, "n_directions": 2}),
    "rademacher-module": (
        ZOSGD,
        {"restore": "module", "distribution": "rademacher", "lr": 1e-3, "estimator": "one-sided"},
    ),
    "muon": (JaguarMuon, {"coordinates": 0.2, "lr": 1e-2, "weight_decay": 0.1, "ns_period": 2}),
    "muon-released": (JaguarMuon, {"released": True, "lr": 2e-2}),
    "signs": (ZOSignSGD, {"restore": "copy", "lr": 1e-3, "momentum": 0.9, "n_directions": 2}),
    "scalar-signs": (ZOSignSGD, {"restore": "copy", "lr": 1e-3, "scalar_sign": True, "momentum": 0.5}),
    "fzoo": (FZOO, {"restore": "copy", "lr": 1e-4, "n_directions": 3, "weight_decay": 0.1}),
    "two-places": (AccZOM, {"restore": "copy", "lr": 1e-3, "weight_decay": 0.1}),
    "zo-muon": (ZOMuon, {"restore": "copy", "lr": 1e-2, "momentum": 0.5, "weight_decay": 0.1}),
    "zo-muon-4": (ZOMuon, {"restore": "copy", "lr": 1e-2, "algorithm": 4, "weight_decay": 0.1}),
    "dizo": (DiZO, {"restore": "copy", "lr": 1e-3, "momentum": 0.5, "every": 2, "search_steps": 2}),
    "mixed": (ZOAdaMU, {"restore": "copy", "lr": 1e-3, "weight_decay": 0.1, "warmup": 1, "total": 4}),
    "forward-grad": (ForwardGrad, {"lr": 1e-3, "weight_decay": 0.1, "n_directions": 2}),
    "adamm": (ZOAdaMM, {"restore": "copy", "lr": 1e-2, "weight_decay": 0.1, "bias_correction": True}),
    "adam": (ZOAdaMM, {"restore": "copy", "lr": 1e-2, "betas": (0.5, 0.9), "amsgrad": False, "n_directions": 2}),
    "layers": (LeZO, {"restore": "copy", "lr": 1e-3, "weight_decay": 0.1, "keep": 0.5}),
    "cons": (ZOSGDCons, {"restore": "copy", "lr": 3e-4, "weight_decay": 0.1}),
    "composed": (
        ZerothOrder,
        {"method": Method(directions.Rademacher(), rules.AveragedSign()), "lr": 1e-3, "beta": 0.9, "restore": "copy"},
    ),
}

# Rows whose methods have one direction a step.
ONE_DIRECTION = {"two-places", "mixed"}

# The tests of each law: parametrised by all rows, and by fp32, bf16 and fp16.
LAWS: dict[str, list[str]] = {
    "restore": ["test_measure.test_measure_restores_every_form", "test_measure.test_measure_restores_one_tensor"],
    "replay, and schedules": ["test_optimizers.test_replay_gives_the_same_bits"],
    "step is measure and apply_": ["test_measure.test_step_is_measure_and_apply"],
    "order": ["test_optimizers.test_strides_and_order_of_parameters_are_irrelevant"],
    "shard": ["test_optimizers.test_shards_take_the_steps_of_the_whole", "test_shards.test_in_every_dtype"],
    "save and load in the middle": ["test_state_dict.test_continuing_in_every_configuration"],
    "groups": ["test_laws.test_groups_with_equal_values_are_one", "test_laws.test_values_of_a_group_are_its_own"],
    "skipped step": ["test_guards.test_a_non_finite_loss_skips_the_step"],
    "failing closure": ["test_measure.test_a_failing_closure_leaves_no_trace"],
    "reference = interpreter": ["test_kernel_steps.test_step_is_measure_and_apply_on_both_backends"],
}


def every_second(params: Iterable[Any]) -> tuple[str, ...]:
    """Names of the tensors that are layers by themselves: those with an even number; the others are outside."""
    entries = [e for group in params for e in (group["params"] if isinstance(group, dict) else [group])]
    names = [canonical_name(e[0]) if isinstance(e, tuple) else f"#{i}" for i, e in enumerate(entries)]
    return tuple(name for name in names if int("".join(re.findall(r"\d+", name)[:1]) or 0) % 2 == 0)


def built(cls: type[ZerothOrder], params: Any, options: dict[str, Any]) -> ZerothOrder:
    """The optimizer; groups say what are matrices, and names what are layers, where they must; a composition's
    arguments go to its parts."""
    params = [params] if isinstance(params, Tensor) else list(params)
    if cls is LeZO:
        options = {"layers": every_second(params)} | options
    if cls is DiZO:
        options = {"project": every_second(params)} | options
    if cls.by_role:
        groups = params if isinstance(params[0], dict) else [{"params": params}]
        params = [{"ns": True} | group for group in groups]
    if cls is ZerothOrder:
        method = options["method"]
        estimator = {key: options[key] for key in ("n_directions", "rho_clip") if key in options}
        own = {key: options[key] for key in ("rounding", "momentum_dtype", "maximize") if key in options}
        method = replace(method, estimator=replace(method.estimator, **estimator), **own)
        options = {k: v for k, v in options.items() if k not in (*estimator, *own)} | {"method": method}
    return cls(params, **options)


def make(config: str, params: Any, **changes: Any) -> Any:
    cls, options = CONFIGS[config]
    return built(cls, params, {"tau": TAU, "seed": 12345} | options | changes)
