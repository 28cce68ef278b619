"""JAGUAR Muon (arXiv 2506.04430, Algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from jaguar import ops
from jaguar.directions import Coordinates, matrix_shape
from jaguar.launches import Launches
from jaguar.optimizers.coordinate_momentum import CoordinateMomentum
from jaguar.optimizers.matrices import NS, listed, matrix_shapes
from jaguar.optimizers.options import is_int
from jaguar.params import Slot
from jaguar.schemes import SCHEMES, checked, scalar_iterate

# vector_lr as a multiple of lr, where it is not given.
_VECTOR_RATIO = 0.01
_ADJUSTMENTS = (None, "original", "match_rms_adamw")


class JaguarMuon(CoordinateMomentum):
    """Muon with momentum on sampled coordinates: matrices move along the polar factor of their momentum.

        rho = (f(x + tau e) - f(x - tau e)) / (2 tau),   e = sum over i in S of s_i e_i
        m_i <- beta m_i + (1 - beta) rho s_i             for i in S
        X   <- (1 - lr wd) X - lr NewtonSchulz(M)        hidden matrices
        x_i <- x_i - vector_lr sign(m_i)                 everything else, by JAGUAR SignSGD's rule

    `jaguar.param_groups(model)` says which is which. One Newton-Schulz per matrix and step.

    With `ns_period=r` 1/r of the matrices have their turn in each step, in rotation in canonical order, and then move
    by r lr (weight decay by r lr wd): Newton-Schulz costs 1/r. When a run ends, some matrices lack up to r - 1 steps.
    They are dealt by number, not by size: with powers of two the steps of a transformer cost about the same.

    `released=True` is the closed form of what the authors' released code does: momentum starts at 0 in each step, so
    that of a block of r x c entries (a tenth of the rows and columns) has rank one, and its ten quintic steps are

        X <- X - lr sign(rho) s / sqrt(r c) on the block, s = 1.1246...;   x <- x - lr sign(rho) / sqrt(k) on k entries,

    embeddings included. That code's second, clipped update of each step is a bug and not kept.

    Args:
        params: groups from `jaguar.param_groups(model)`, or dicts with `ns` (and their own lr, tau, beta, weight_decay,
            vector_lr): True: matrices, and three dimensions are a batch of them; "flatten": (first, rest);
            False: the sign rule. Tensors with fewer than two dimensions take the sign rule in any group.
        lr: learning rate of the matrices; the polar factor has singular values near 1.
        beta: momentum factor in [0, 1).
        weight_decay: decoupled, multiplied by lr (of the sign rule's tensors: by vector_lr).
        tau: length of the perturbation of a coordinate.
        coordinates: int: number over the whole set; float in (0, 1]: fraction of every tensor.
        layout: "uniform": elements; "block": rows x columns of each matrix.
        signs: "rademacher": random s_i; "ones": s_i = 1.
        update: what the sign rule moves: "sampled" or "all".
        ns_steps: iterations; None: 10 for cubic, 5 for quintic, 8 for polar_express.
        ns_coefficients: "cubic" (the paper's), "quintic" or "polar_express".
        ns_dtype: torch.bfloat16, or float32 or float64, which the reference has. CPUs without products in bf16 multiply
            bf16 values in fp32 and round.
        ns_period: r, at least 1.
        vector_lr: learning rate of the sign rule; None: 0.01 lr. Groups keep it as its ratio to lr, so that schedulers
            scale both.
        adjust_lr: None; "original": lr sqrt(max(1, rows / columns)); "match_rms_adamw": 0.2 lr sqrt(max(rows,
            columns)), as in torch.optim.Muon.
        momentum_dtype: torch.float32, bfloat16 or float8_e5m2; None: the parameter's (bfloat16 for fp16 parameters).
        rounding: "stochastic" (the default) or "nearest", for everything stored in less than fp32.
        n_directions: directions per step; entry updates in order, then one step.
        estimator: "two-sided", or "one-sided": (f(x + tau e) - f(x)) / tau.
        rho_clip: bound on |rho|.
        maximize: make the loss larger, as in torch.optim.
        seed: of all directions and rounding noise, in [0, 2**64).
        backend: "auto", or a name that `jaguar info` lists; "cuda": Newton-Schulz in csrc, other launches as "auto".
        released: see above; excludes the sampling, beta, update, ns and vector_lr arguments.

    Raises:
        ValueError: an argument is out of range, or a group has no `ns`; the message names what would be right.

    Source: arXiv 2506.04430, Algorithm 2.
    Equivalent to: `M[S] = beta * M[S] + (1 - beta) * rho * s; X -= lr * jaguar.newton_schulz(M)`.
    """

    group_keys: tuple[str, ...] = ("lr", "tau", "beta", "weight_decay", "vector_lr")
    group_flags: tuple[str, ...] = ("ns",)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        *,
        tau: float = 1e-3,
        coordinates: int | float = 0.01,
        layout: str = "uniform",
        signs: str = "rademacher",
        update: str = "sampled",
        ns_steps: int | None = None,
        ns_coefficients: str = "cubic",
        ns_dtype: torch.dtype = torch.bfloat16,
        ns_period: int = 1,
        vector_lr: float | None = None,
        adjust_lr: str | None = None,
        momentum_dtype: torch.dtype | None = None,
        rounding: str | None = None,
        n_directions: int = 1,
        estimator: str = "two-sided",
        rho_clip: float | None = None,
        maximize: bool = False,
        seed: int = 0,
        backend: str = "auto",
        released: bool = False,
    ) -> None:
        steps = checked(ns_steps, ns_coefficients, ns_dtype)
        if not is_int(ns_period) or ns_period < 1:
            raise ValueError(f"ns_period={ns_period!r}: give an int of at least 1; 1 moves every matrix in every step")
        if adjust_lr not in _ADJUSTMENTS:
            raise ValueError(f"adjust_lr={adjust_lr!r}: choose {', '.join(map(repr, _ADJUSTMENTS))}")
        self._period, self._adjust, self._ns_backend = ns_period, adjust_lr, ops.choose(backend)
        self._ns: dict[str, Any] = {"steps": steps, "coefficients": ns_coefficients, "dtype": ns_dtype}
        self._released = bool(released)
        options = {
            "ns_steps": steps,
            "ns_coefficients": ns_coefficients,
            "ns_dtype": str(ns_dtype),
            "ns_period": ns_period,
            "adjust_lr": adjust_lr,
        }
        fixed = {
            "coordinates": (coordinates, 0.01),
            "layout": (layout, "uniform"),
            "signs": (signs, "rademacher"),
            "update": (update, "sampled"),
            "beta": (beta, 0.9),
            "ns_steps": (ns_steps, None),
            "ns_coefficients": (ns_coefficients, "cubic"),
            "ns_dtype": (ns_dtype, torch.bfloat16),
            "ns_period": (ns_period, 1),
            "vector_lr": (vector_lr, None),
            "adjust_lr": (adjust_lr, None),
        }
        super().__init__(
            params,
            {
                "lr": lr,
                "tau": tau,
                "beta": beta,
                "weight_decay": weight_decay,
                "vector_lr": _ratio(vector_lr, lr),
            },
            options=options,
            coordinates=coordinates,
            layout=layout,
            signs=signs,
            update=update,
            released=released,
            fixed=fixed,
            estimator=estimator,
            n_directions=n_directions,
            rho_clip=rho_clip,
            maximize=maximize,
            rounding=rounding,
            momentum_dtype=momentum_dtype,
            seed=seed,
            backend="auto" if backend == "cuda" else backend,
        )
        self._check_backend(self._slots)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, with its `ns`; only before the first `measure`."""
        if isinstance(param_group, dict):
            if "ns" not in param_group and not self._released:
                raise ValueError(
                    f"parameter group {len(self.param_groups)} does not say whether Newton-Schulz moves its matrices: "
                    "pass jaguar.param_groups(model), or dicts with 'ns': True or False"
                )
            if "ns" in param_group:
                param_group = param_group | {"ns": _checked_ns(param_group["ns"])}
            if param_group.get("vector_lr") is not None and not self._released:
                lr = param_group.get("lr", self.defaults["lr"])
                param_group = param_group | {"vector_lr": _ratio(param_group["vector_lr"], lr)}
        super().add_param_group(param_group)

    def _check_backend(self, slots: Sequence[Slot]) -> None:
        """Raises Unavailable where Newton-Schulz of a matrix cannot run; before anything is written."""
        for slot in filter(self._is_matrix, slots):
            ops.assigned(self._ns_backend, slot.tensor, self._ns["steps"], self._ns["dtype"])

    def _is_matrix(self, slot: Slot) -> bool:
        return not self._released and len(slot.shape) >= 2 and bool(self.param_groups[slot.group]["ns"])

    def _with_roles(self, slots: list[Slot]) -> list[Slot]:
        return [replace(slot, **self._role(slot)) for slot in slots]

    def _role(self, slot: Slot) -> dict[str, Any]:
        """How far a tensor moves, and by which rule."""
        if self._released:
            return {"gain": _released_gain(slot)}
        group = self.param_groups[slot.group]
        if not self._is_matrix(slot):
            return {"rate": float(group["vector_lr"])}
        rows, columns = matrix_shapes(slot, group["ns"])
        gain = 1.0
        if self._adjust == "original" and columns:
            gain = math.sqrt(max(1.0, rows / columns))
        elif self._adjust == "match_rms_adamw":
            gain = 0.2 * math.sqrt(max(rows, columns))
        return {"rate": float(self._period), "gain": gain, "signed": False}

    def _make_steps(self, slots: Sequence[Slot]) -> Launches:
        if self._released:
            return super()._make_steps(slots)
        assert isinstance(self._direction, Coordinates)
        self._check_backend(slots)
        stacked = [s.stream for s in slots if len(s.shape) == 3 and self.param_groups[s.group]["ns"] != "flatten"]
        return ops.muon_steps(
            self._backend,
            slots,
            self._direction,
            stacked=frozenset(stacked),
            newton_schulz=ops.NewtonSchulz(self._ns_backend, **self._ns),
            period=self._period,
            **self._how,
        )

    def _describe(self) -> list[str]:
        if self._released:
            return [*super()._describe(), "all tensors: the closed form of the released code's ten quintic steps"]
        matrices = [slot for slot in self._slots if self._is_matrix(slot)]
        names = [ops.assigned(self._ns_backend, s.tensor, self._ns["steps"], self._ns["dtype"]) for s in matrices]
        how = f"{self._ns['coefficients']}, {self._ns['steps']} steps, {self._ns['dtype']}"
        turns = f", each in 1 of {self._period} steps" if self._period > 1 else ""
        return [
            *super()._describe(),
            f"Newton-Schulz: {how}{turns}, on {' and '.join(dict.fromkeys(names)) or 'nothing'}",
            f"  moves {listed(matrices)}",
            f"  the sign rule moves {listed([slot for slot in self._slots if not self._is_matrix(slot)])}",
        ]


def _ratio(vector_lr: float | None, lr: float) -> float:
    if vector_lr is None:
        return _VECTOR_RATIO
    for name, value in (("lr", lr), ("vector_lr", vector_lr)):
        if not isinstance(value, (int, float)) and not (isinstance(value, torch.Tensor) and value.numel() == 1):
            raise ValueError(f"{name}={value!r} is not a number")
    if not 0.0 <= vector_lr < math.inf:
        raise ValueError(f"vector_lr={vector_lr} must be at least 0")
    if not lr > 0:
        raise ValueError(f"vector_lr={vector_lr} is kept as its ratio to lr, and lr={lr}: give an lr above 0")
    return float(vector_lr) / float(lr)


def _checked_ns(ns: Any) -> bool | str:
    if isinstance(ns, str) or ns not in NS:  # 0 == False, and numpy has truths of its own
        if ns != "flatten":
            raise ValueError(f"ns={ns!r}: choose {', '.join(map(repr, NS))}")
        return "flatten"
    return bool(ns)


def _released_gain(slot: Slot) -> float:
    """Length of the closed form's step on the drawn entries: of a rank-one block, or of a vector over its 2-norm."""
    rows, columns = matrix_shape(slot.shape)
    drawn = max(1, rows // 10) * max(1, columns // 10)
    quintic = SCHEMES["quintic"].coefficients(10)
    return (scalar_iterate(1.0, quintic) if len(slot.shape) >= 2 else 1.0) / math.sqrt(drawn)
