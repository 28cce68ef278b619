"""The table of recorded runs: every public optimizer with every option, two at a time."""

from __future__ import annotations

import random

import torch

from helpers.covering import pairwise
from helpers.fingerprints import DTYPES, Row

COMMON: dict[str, list[Row]] = {
    "dtype": [{"dtype": name} for name in DTYPES],
    "how": [
        {},
        {"how": "measure"},  # and apply_, in place of step
        {"how": "discard"},  # what was measured first
        {"how": "replay"},  # by another optimizer, without a closure
        {"how": "save"},  # and load in the middle
        {"how": "freeze"},  # every other tensor for two steps
        {"how": "schedule"},
        {"how": "skip"},  # the second step, whose loss is infinite
        {"how": "unnamed"},
    ],
    "model": [{}, {"model": "tables"}],
    "groups": [{}, {"groups": True}],
    "estimator": [{}, {"estimator": "one-sided"}],
    "rounding": [{}, {"rounding": "nearest"}],
    "n_directions": [{}, {"n_directions": 2}, {"n_directions": 3}],
    "tau": [{}, {"tau": 0.002}],
    "weight_decay": [{}, {"weight_decay": 0.3}, {"weight_decay": 31.7}],
    "rho_clip": [{}, {"rho_clip": 0.9}],
    "maximize": [{}, {"maximize": True}],
}
MOMENTUM: list[Row] = [
    {},
    {"momentum_dtype": torch.float32},
    {"momentum_dtype": torch.bfloat16},
    {"momentum_dtype": torch.float8_e5m2},
]
COORDINATES: dict[str, list[Row]] = {
    "coordinates": [
        {"coordinates": 0.1},
        {"coordinates": 40},
        {"coordinates": 1},
        {"coordinates": 1.0},
        {"coordinates": 1 / 9, "layout": "block"},
        {"coordinates": 1.0, "layout": "block"},
    ],
    "update": [{}, {"update": "all"}],
    "signs": [{}, {"signs": "ones"}],
    "beta": [{}, {"beta": 0.0}],
    "momentum_dtype": MOMENTUM,
}
DENSE: dict[str, list[Row]] = {
    "distribution": [{}, {"distribution": "rademacher"}],
    "restore": [{}, {"restore": "walk"}, {"restore": "module"}],
    "momentum": [{"momentum": 0.9}, {}],
    "momentum_dtype": MOMENTUM,
}
NEWTON_SCHULZ: dict[str, list[Row]] = {
    "ns_coefficients": [{}, {"ns_coefficients": "quintic"}, {"ns_coefficients": "polar_express"}],
    "ns_dtype": [{}, {"ns_dtype": torch.float32}, {"ns_dtype": torch.float64}],
    "ns_steps": [{}, {"ns_steps": 3}],
    "ns_period": [{}, {"ns_period": 2}],
    "vector_lr": [{}, {"vector_lr": None}],
    "adjust_lr": [{}, {"adjust_lr": "original"}, {"adjust_lr": "match_rms_adamw"}],
}
# Momentum is +-rho, of which sixteen have the norm 4 rho: one or two cubic steps are exact, in any order of the sums.
EXACT: dict[str, list[Row]] = {
    "model": [{"model": "square", "coordinates": 1.0, "beta": 0.0, "momentum_dtype": torch.float32}],
    "ns_dtype": [{"ns_dtype": torch.float32}, {"ns_dtype": torch.float64}],
    "ns_steps": [{"ns_steps": 1}, {"ns_steps": 2}],
    "groups": [{}],
}
RELEASED: list[Row] = [{"released": True}]
LARGE: list[Row] = [
    {"optimizer": "JaguarSignSGD", "dtype": "bf16", "coordinates": 1.0},
    {"optimizer": "JaguarSignSGD", "dtype": "mixed", "coordinates": 0.5, "update": "all", "n_directions": 2},
    {"optimizer": "JaguarSignSGD", "dtype": "fp16", "coordinates": 1.0, "layout": "block"},
    {"optimizer": "ZOSGD", "dtype": "mixed", "momentum": 0.9},
    {"optimizer": "ZOSGD", "dtype": "bf16", "momentum": 0.9, "restore": "walk", "n_directions": 2},
    # The last three are quick in the interpreter too.
    {"optimizer": "JaguarSignSGD", "dtype": "fp32", "coordinates": 40000, "estimator": "one-sided"},
    {"optimizer": "JaguarMuon", "dtype": "mixed", "released": True},
    {"optimizer": "ZOSignSGD", "dtype": "fp16", "distribution": "rademacher", "restore": "module"},
]


def label(options: Row) -> str:
    """Options as they are written in a call."""
    return ",".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in options.items())


def row_id(row: Row) -> str:
    """The row in words."""
    return f"{row['optimizer']}({label({k: v for k, v in row.items() if k != 'optimizer'})})"


def rows_of(optimizer: str, factors: dict[str, list[Row]]) -> list[Row]:
    """Rows in which every two levels of two factors meet."""
    levels = {factor: {label(level): level for level in some} for factor, some in factors.items()}
    covered = pairwise({factor: list(some) for factor, some in levels.items()})
    rows = [[levels[factor][name] for factor, name in row.items()] for row in covered]
    return [{"optimizer": optimizer} | {k: v for level in row for k, v in level.items()} for row in rows]


def reference_rows() -> list[Row]:
    """Runs on the reference."""
    return [
        *rows_of("JaguarSignSGD", COMMON | COORDINATES),
        *rows_of("JaguarSignSGD", COMMON | {"released": RELEASED}),
        *rows_of("JaguarMuon", COMMON | COORDINATES | NEWTON_SCHULZ),
        *rows_of("JaguarMuon", COMMON | {"released": RELEASED}),
        *rows_of("JaguarMuon", COMMON | NEWTON_SCHULZ | {"ns_coefficients": [{}]} | EXACT),
        *rows_of("ZOSGD", COMMON | DENSE),
        *rows_of("ZOSignSGD", COMMON | DENSE),
        *({"model": "large"} | row for row in LARGE),
    ]


def some_of(count: int, optimizer: str, factors: dict[str, list[Row]]) -> list[Row]:
    """Rows in which the levels of each factor are equally frequent, in an order of its own."""
    rows: list[Row] = [{"optimizer": optimizer} for _ in range(count)]
    for factor, levels in factors.items():
        turns = [levels[i % len(levels)] for i in range(count)]
        random.Random(f"{optimizer} {factor}").shuffle(turns)
        rows = [row | level for row, level in zip(rows, turns, strict=True)]
    return rows


def interpreter_rows() -> list[Row]:
    """Runs in Triton's interpreter: few, because each of them takes as long as thirty on the reference."""
    common = {
        "dtype": [{"dtype": "mixed"}],
        "how": [{}, {"how": "measure"}, {"how": "freeze"}, {"how": "replay"}],
        **{name: COMMON[name] for name in ("model", "groups", "estimator", "rounding", "tau", "weight_decay")},
    }
    several = {"n_directions": [{}, {"n_directions": 2}]}
    orthogonal = {name: NEWTON_SCHULZ[name] for name in ("ns_coefficients", "ns_period", "adjust_lr")}
    return [
        *some_of(9, "JaguarSignSGD", common | several | COORDINATES),
        *some_of(2, "JaguarSignSGD", common | {"released": RELEASED}),
        *some_of(7, "JaguarMuon", common | several | COORDINATES | orthogonal | {"ns_steps": [{"ns_steps": 2}]}),
        *some_of(2, "JaguarMuon", common | {"released": RELEASED}),
        *some_of(7, "ZOSGD", common | several | DENSE),
        *some_of(4, "ZOSignSGD", common | several | {name: DENSE[name] for name in ("distribution", "momentum")}),
        *({"model": "large"} | row for row in LARGE[-3:]),
    ]
