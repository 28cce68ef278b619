"""Rules that move matrices along the polar factor of their momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from jaguar.method.directions import Dense, Direction, Orthonormal, ReleasedBlock, Sparse, matrix_shape
from jaguar.method.distributed import cut_of
from jaguar.method.params import Slot, is_int
from jaguar.method.rule import FACTOR, NOT_NEGATIVE, Buffer, Range, plain
from jaguar.method.rules import AveragedSign, ScalarSign
from jaguar.method.schemes import SCHEMES, scalar_iterate, validate_scheme

# How a group's tensors with two or more dimensions are read.
NS = (True, False, "flatten")
# vector_lr as a multiple of lr, where it is not given.
VECTOR_RATIO = 0.01
_ADJUSTMENTS = (None, "original", "match_rms_adamw")


@dataclass(frozen=True)
class Orthogonal(AveragedSign):
    """M <- beta M + (1 - beta) g; X <- (1 - lr wd) X - lr NewtonSchulz(M): the rule of JAGUAR Muon for matrices.

    Everything else takes `AveragedSign`'s step at its own learning rate. A group says what its matrices are with `ns`.

    Attributes:
        update: what the sign step moves: "sampled" coordinates, or "all".
        ns_steps, ns_coefficients, ns_dtype: as `jaguar.newton_schulz`.
        ns_period: r: a matrix has its turn in one of r steps, and then moves by r lr.
        adjust_lr: lr by the shape of the matrix: None, "original" or "match_rms_adamw".

    Source: arXiv 2506.04430, Algorithm 2.
    """

    ns_steps: int | None = None
    ns_coefficients: str = "cubic"
    ns_dtype: torch.dtype = torch.bfloat16
    ns_period: int = 1
    adjust_lr: str | None = None
    called: ClassVar[str] = "JaguarMuon"
    flags: ClassVar[tuple[str, ...]] = ("ns",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ns_steps", validate_scheme(self.ns_steps, self.ns_coefficients, self.ns_dtype))
        if not is_int(self.ns_period) or self.ns_period < 1:
            raise ValueError(
                f"ns_period={self.ns_period!r}: give an int of at least 1; 1 moves every matrix in every step"
            )
        if self.adjust_lr not in _ADJUSTMENTS:
            raise ValueError(f"adjust_lr={self.adjust_lr!r}: choose {', '.join(map(repr, _ADJUSTMENTS))}")

    @property
    def steps(self) -> int:
        """Iterations."""
        assert self.ns_steps is not None
        return self.ns_steps

    @property
    def keys(self) -> Mapping[str, Range]:  # type: ignore[override]
        """beta, and the learning rate of what is no matrix: a multiple of lr."""
        return {"beta": FACTOR, "weight_decay": NOT_NEGATIVE, "vector_lr": NOT_NEGATIVE}

    def check(self, direction: Direction) -> None:
        """Raises ValueError for dense directions, whose launches have no step for matrices."""
        if not isinstance(direction, Sparse):
            raise ValueError(
                f"Orthogonal enters its momentum along coordinate directions, and {direction} is dense: give "
                "directions.Coordinates()"
            )

    def options(self) -> dict[str, Any]:
        """The fields."""
        return super().options() | {
            "ns_steps": self.ns_steps,
            "ns_coefficients": self.ns_coefficients,
            "ns_dtype": plain(self.ns_dtype),
            "ns_period": self.ns_period,
            "adjust_lr": self.adjust_lr,
        }

    def completed(self, values: dict[str, Any]) -> dict[str, Any]:
        """`vector_lr` as a multiple of lr."""
        if "lr" not in values:
            raise ValueError("Orthogonal keeps vector_lr as its ratio to lr: pass lr=... to the optimizer")
        return values | {"vector_lr": ratio(values.get("vector_lr"), values["lr"])}

    def prepared(self, group: dict[str, Any], number: int, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The group with `ns` as it is meant, and `vector_lr` as a multiple of lr, so that schedulers scale both."""
        if "ns" not in group:
            raise ValueError(
                f"parameter group {number} does not say whether Newton-Schulz moves its matrices: "
                "pass jaguar.param_groups(model), or dicts with 'ns': True or False"
            )
        group = group | {"ns": validate_ns(group["ns"])}
        if group.get("vector_lr") is not None:
            group = group | {"vector_lr": ratio(group["vector_lr"], group.get("lr", defaults["lr"]))}
        return group

    def is_matrix(self, slot: Slot, group: Mapping[str, Any]) -> bool:
        """Tells whether Newton-Schulz moves a slot."""
        return len(slot.shape) >= 2 and bool(group["ns"])

    def role(self, slot: Slot, group: Mapping[str, Any]) -> dict[str, Any]:
        """The length of a tensor's step, and the stage that moves it."""
        if not self.is_matrix(slot, group):
            return {"rate": float(group["vector_lr"])}
        rows, columns = matrix_shapes(slot, group["ns"])
        if slot.spread is None and 0 < slot.count < slot.total and not _whole_matrices(slot, rows * columns):
            raise ValueError(
                f"{slot.name} is a part of a matrix, and Newton-Schulz needs all of it: cut batches between their "
                "matrices, or give the part to the sign rule, with 'ns': False"
            )
        gain = 1.0
        if self.adjust_lr == "original" and columns:
            gain = math.sqrt(max(1.0, rows / columns))
        elif self.adjust_lr == "match_rms_adamw":
            gain = 0.2 * math.sqrt(max(rows, columns))
        return {"rate": float(self.ns_period), "gain": gain, "signed": False}


@dataclass(frozen=True)
class DenseOrthogonal(Orthogonal):
    """M <- momentum M + g; X <- (1 - lr wd) X - lr NewtonSchulz(M): the rule of ZO-Muon, along dense directions.

    Everything else moves by x <- (1 - lr wd) x - lr sign(m) at its own learning rate. Without momentum M is g.

    Source: arXiv 2506.04430, Algorithm 3.
    """

    called: ClassVar[str] = "ZOMuon"

    @property
    def keys(self) -> Mapping[str, Range]:  # type: ignore[override]
        """momentum, and the learning rate of what is no matrix: a multiple of lr."""
        return {"momentum": FACTOR, "weight_decay": NOT_NEGATIVE, "vector_lr": NOT_NEGATIVE}

    def check(self, direction: Direction) -> None:
        """Raises ValueError for coordinate directions, along which momentum is an average."""
        if not isinstance(direction, Dense):
            raise ValueError(f"DenseOrthogonal is for dense directions, and {direction} is not: use Orthogonal")

    def state(self, group: Mapping[str, Any]) -> tuple[Buffer, ...]:
        """M; without momentum it is there during a step only."""
        return (Buffer("momentum", lasting=float(group["momentum"]) > 0.0),)

    def entry_numbers(self, group: Mapping[str, Any], t: int) -> tuple[float, ...]:
        """momentum."""
        return (float(group["momentum"]),)

    def weights(self, rho: Sequence[float], group: Mapping[str, Any], double: bool, t: int) -> tuple[float, ...]:
        """rho."""
        return tuple(rho)

    def shown(self, groups: Sequence[Mapping[str, Any]], fraction: float, momentum: str) -> list[str]:
        """The precision of M."""
        return [f"momentum: {momentum}"]


@dataclass(frozen=True)
class SampledOrthogonal(ScalarSign):
    """X <- (1 - lr wd) X - lr sign(rho) E, E = U V^T: a step along the direction itself, which needs no Newton-Schulz.

    Everything else moves by x <- (1 - lr wd) x - lr sign(rho) e, e_i = +1 or -1, at its own learning rate.

    Source: arXiv 2506.04430, Algorithm 4.
    """

    momentum: bool = False

    called: ClassVar[str] = "ZOMuon"
    flags: ClassVar[tuple[str, ...]] = ("ns",)

    @property
    def keys(self) -> Mapping[str, Range]:  # type: ignore[override]
        """The learning rate of what is no matrix: a multiple of lr."""
        return {"weight_decay": NOT_NEGATIVE, "vector_lr": NOT_NEGATIVE}

    def check(self, direction: Direction) -> None:
        """Raises ValueError for other directions."""
        if not isinstance(direction, Orthonormal):
            raise ValueError(f"SampledOrthogonal moves along Orthonormal() directions, and not along {direction}")

    def options(self) -> dict[str, Any]:
        """The mark of Algorithm 4."""
        return {"algorithm": 4}

    def completed(self, values: dict[str, Any]) -> dict[str, Any]:
        """`vector_lr` as a multiple of lr."""
        return Orthogonal().completed(values)

    def prepared(self, group: dict[str, Any], number: int, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The group with `ns` as it is meant, and `vector_lr` as a multiple of lr."""
        return Orthogonal().prepared(group, number, defaults)

    def role(self, slot: Slot, group: Mapping[str, Any]) -> dict[str, Any]:
        """The learning rate of what is no matrix, and the size of the matrices."""
        if len(slot.shape) < 2 or not group["ns"]:
            return {"rate": float(group["vector_lr"])}
        return {"matrices": matrix_shapes(slot, group["ns"])}

    def shown(self, groups: Sequence[Mapping[str, Any]], fraction: float, momentum: str) -> list[str]:
        """A line that says that there is no momentum."""
        return ["matrices move along their directions, everything else by signs; no momentum"]


@dataclass(frozen=True)
class ReleasedOrthogonal(AveragedSign):
    """The authors' released step along a `ReleasedBlock`: X <- X - lr sign(rho) s / sqrt(r c) on r x c entries.

    Momentum of rank one has a closed form of ten quintic steps, s = 1.1246...; on k entries of a vector the step is
    lr sign(rho) / sqrt(k).
    """

    averages: bool = False

    called: ClassVar[str] = "JaguarMuon"
    flags: ClassVar[tuple[str, ...]] = ("ns",)

    def check(self, direction: Direction) -> None:
        """Raises ValueError for other directions."""
        if not isinstance(direction, ReleasedBlock):
            raise ValueError(f"ReleasedOrthogonal is a closed form along ReleasedBlock(), and not along {direction}")

    def options(self) -> dict[str, Any]:
        """The options of `Orthogonal`, which have no part in it."""
        return Orthogonal(self.update).options()

    def prepared(self, group: dict[str, Any], number: int, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The group with `ns`, which changes nothing, as it is meant."""
        return group | {"ns": validate_ns(group["ns"])} if "ns" in group else group

    def role(self, slot: Slot, group: Mapping[str, Any]) -> dict[str, Any]:
        """Length of the closed form's step on the drawn entries: of a rank-one block, or of a vector over its norm."""
        rows, columns = matrix_shape(slot.shape)
        drawn = max(1, rows // 10) * max(1, columns // 10)
        quintic = SCHEMES["quintic"].coefficients(10)
        return {"gain": (scalar_iterate(1.0, quintic) if len(slot.shape) >= 2 else 1.0) / math.sqrt(drawn)}


def matrix_shapes(slot: Slot, ns: Any) -> tuple[int, int]:
    """Rows and columns of the matrix (or of each matrix of a batch) that Newton-Schulz sees."""
    shape = slot.shape[1:] if ns != "flatten" and len(slot.shape) == 3 else slot.shape
    return matrix_shape(torch.Size(shape))


def is_scattered(slot: Slot, stacked: bool) -> bool:
    """Tells whether the parts of a DTensor must come together before Newton-Schulz can have its matrices.

    Args:
        stacked: it holds a batch of matrices, and is cut between them if it is cut along the first dimension.
    """
    cut = None if slot.spread is None else cut_of(slot.spread)
    return cut is not None and not (stacked and cut.dim == 0)


def _whole_matrices(slot: Slot, size: int) -> bool:
    """Tells whether a part of a batch holds whole matrices of `size` elements, one after the other."""
    one_run = slot.end - slot.start == slot.count and slot.tensor.shape[1:] == slot.shape[1:]
    return one_run and slot.start % size == slot.count % size == 0


def ratio(vector_lr: float | None, lr: float) -> float:
    """`vector_lr` as a multiple of `lr`.

    Raises:
        ValueError: one of them is no number, or out of range.
    """
    if vector_lr is None:
        return VECTOR_RATIO
    for name, value in (("lr", lr), ("vector_lr", vector_lr)):
        if not isinstance(value, (int, float)) and not (isinstance(value, Tensor) and value.numel() == 1):
            raise ValueError(f"{name}={value!r} is not a number")
    if not 0.0 <= vector_lr < math.inf:
        raise ValueError(f"vector_lr={vector_lr} must be at least 0")
    if not lr > 0:
        raise ValueError(f"vector_lr={vector_lr} is kept as its ratio to lr, and lr={lr}: give an lr above 0")
    return float(vector_lr) / float(lr)


def validate_ns(ns: Any) -> bool | str:
    """`ns` as a plain value.

    Raises:
        ValueError: it is none of `NS`.
    """
    if isinstance(ns, str) or ns not in NS:  # 0 == False, and numpy has truths of its own
        if ns != "flatten":
            raise ValueError(f"ns={ns!r}: choose {', '.join(map(repr, NS))}")
        return "flatten"
    return bool(ns)
