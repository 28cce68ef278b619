"""Parts of the kernel tests: two copies of a model between guard bands, and the laws that run both backends on them.

Compared are whole buffers, so a byte outside of a tensor counts as much as one inside. A NaN equals any NaN: which one
comes out of an operation is the processor's choice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from torch import Tensor

from helpers import interpreter  # noqa: F401 (twice as fast)
from helpers.tensors import BAND, DTYPES, dtype_id
from jaguar.backends import availability, ops
from jaguar.backends import triton as fused
from jaguar.backends.launches import Launches, StepInputs
from jaguar.backends.orthogonal import MatrixStage
from jaguar.method.directions import DENSE, Coordinates, Direction, ReleasedBlock
from jaguar.method.estimators import OneSided, Probe, TwoSided
from jaguar.method.method import Method
from jaguar.method.params import Slot
from jaguar.method.rng import Draw
from jaguar.method.rule import Rule, rounded
from jaguar.method.rules import SGD, AveragedSign, Sign

interpreted = pytest.mark.skipif(
    not availability.interpreted(), reason="runs kernels on CPU tensors, in Triton's interpreter"
)

SEED, STEP = 12345, 7
GROUPS = [
    {"lr": 0.25, "tau": 2.0**-4, "beta": 0.9, "momentum": 0.9, "weight_decay": 0.5},
    {"lr": 3e-3, "tau": 0.7 * 2.0**-6, "beta": 0.3, "momentum": 0.3, "weight_decay": 0.0},
    {"lr": 0.011, "tau": 1e-3, "beta": 0.0, "momentum": 0.0, "weight_decay": 13.3},
]
RHO = [0.37, -1.9, 4e-3]
MOMENTUM: dict[str, Callable[[torch.dtype], torch.dtype | None]] = {
    "own": lambda dtype: torch.bfloat16 if dtype == torch.float16 else dtype,
    "fp32": lambda dtype: torch.float32,
    "bf16": lambda dtype: torch.bfloat16,
    "e5m2": lambda dtype: torch.float8_e5m2,
    "none": lambda dtype: None,
}
DIRECTIONS = {
    "fraction": Coordinates(0.1),
    "count": Coordinates(500),
    "block": Coordinates(1 / 9, "block"),
    "released": ReleasedBlock(),
    "every": Coordinates(1.0),
    "half-ones": Coordinates(0.5, signs="ones"),
    "percent": Coordinates(0.01),
    "rare": Coordinates(1 / 20011),
    "one": Coordinates(1),
    "seven": Coordinates(7),
    "block-percent": Coordinates(0.01, "block"),
    "block-every": Coordinates(1.0, "block"),
    "block-rare": Coordinates(1 / 40**2, "block"),
}
# Shapes of one model each; the dtypes of a model's tensors take turns.
SHAPES = {
    "thousand": [(1,), (129,), (3, 4, 5), (1000,)],
    "odd": [(3,), (), (4099,), (0, 4)],
    "matrix": [(101, 37), (127,), (5, 1)],
    "big": [(8192 + 300,), (7, 13)],
}
_PATTERN = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def crossed(options: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations of some options; shapes and dtypes take turns, so that 16 rows have all pairs of these."""
    rows = [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    return [row | {"shapes": list(SHAPES)[i % 4], "turn": i // 4 % 4} for i, row in enumerate(rows)]


def row_id(row: dict[str, Any]) -> str:
    return "-".join(dtype_id(v) or str(v) for v in row.values())


@dataclass(frozen=True)
class Form:
    """One tensor of a model.

    Attributes:
        shape: of the part that is held.
        start: logical index of its first element, in a tensor of the shape `whole`.
        skew: elements by which its address misses a multiple of 16 bytes.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    group: int = 0
    start: int = 0
    whole: tuple[int, ...] | None = None
    skew: int = 0


def forms_of(shapes: str, turn: int) -> list[Form]:
    """The tensors of a model whose dtypes begin at `turn`; one of them is misaligned."""
    return [
        Form(shape, DTYPES[(turn + i) % 4], (turn + i) % 3, skew=int(i == turn % 2))
        for i, shape in enumerate(SHAPES[shapes])
    ]


def _slot(i: int, form: Form, tensor: Tensor) -> Slot:
    shape = torch.Size(form.whole or form.shape)
    return Slot(f"p{i:02}", tensor, 0x9E3779B9 * (i + 1) & 0xFFFFFFFF, form.group, shape, form.start)


def drawn(direction: Coordinates, forms: Sequence[Form], i: int) -> list[int]:
    """Logical indices that the first direction of a step chooses in the whole of tensor i, which nobody holds."""
    whole = [_slot(k, Form((), f.dtype), torch.empty(()).expand(f.whole or f.shape)) for k, f in enumerate(forms)]
    whole = [replace(slot, shape=slot.tensor.shape) for slot in whole]
    return direction.sample(Draw(SEED, STEP, 0), whole)[i][0].tolist()


class Model:
    """Slots and state between bands of other bytes; the same numbers whenever it is made.

    Args:
        buffers: what the state is stored in, buffer by buffer.
    """

    def __init__(
        self,
        forms: Sequence[Form],
        *buffers: str,
        device: str = "cpu",
        special: bool = True,
        seed: int = 0,
    ) -> None:
        self.buffers: list[Tensor] = []
        self._special, self._device = special, device
        self._generator = torch.Generator().manual_seed(seed)
        tensors = self._placed([(f.shape, f.dtype, f.skew) for f in forms])
        made = [self._placed([(f.shape, MOMENTUM[stored](f.dtype), 0) for f in forms]) for stored in buffers]
        self.state = [tuple(m for m in own if m is not None) for own in zip(*made, strict=True)]
        self.momenta = [next(iter(own), None) for own in self.state]
        self.slots = [_slot(i, f, x) for i, (f, x) in enumerate(zip(forms, tensors, strict=True))]

    def _placed(self, wanted: Sequence[tuple[tuple[int, ...], torch.dtype | None, int]]) -> list[Tensor | None]:
        """Views of one buffer per dtype, each BAND elements away from the next."""
        ends: dict[torch.dtype, int] = {}
        places = []
        for shape, dtype, skew in wanted:
            begin = -(-(ends.get(dtype, 0) + BAND) // 16) * 16 + skew
            places.append(begin)
            ends[dtype] = begin + torch.Size(shape).numel()
        made = {d: torch.full(((n + BAND) * d.itemsize,), 0xA5, dtype=torch.uint8) for d, n in ends.items() if d}
        flat = {d: buffer.to(self._device).view(d) for d, buffer in made.items()}
        self.buffers += flat.values()
        views: list[Tensor | None] = []
        for (shape, dtype, _), begin in zip(wanted, places, strict=True):
            if dtype is None:
                views.append(None)
            else:
                view = flat[dtype][begin : begin + torch.Size(shape).numel()].view(shape)
                view.copy_(self._values(shape, dtype))
                views.append(view)
        return views

    def _values(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """N(0, 0.3^2), some of them replaced by the numbers that arithmetic trips over."""
        x = torch.randn(shape, generator=self._generator, dtype=torch.float64) * 0.3
        if self._special and x.numel() > 100:
            info = torch.finfo(dtype)
            odd = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, info.max, -info.max, info.smallest_normal,
                   info.smallest_normal * info.eps, -info.smallest_normal * 0.75, 1.0, -2.0]  # fmt: skip
            x.view(-1)[3 : 3 + 7 * len(odd) : 7] = torch.tensor(odd, dtype=torch.float64)
        return x.to(dtype)

    def place(self, buffer: int, cell: int) -> str:
        """Where an element of a buffer lies, for messages."""
        tensors = [(slot.name, slot.tensor) for slot in self.slots]
        tensors += [(f"state of {s.name}", m) for s, own in zip(self.slots, self.state, strict=True) for m in own]
        for name, t in tensors:
            if t.untyped_storage().data_ptr() == self.buffers[buffer].untyped_storage().data_ptr():
                k = cell - t.storage_offset()
                if 0 <= k < t.numel():
                    return f"{name} ({t.dtype}, {tuple(t.shape)}) at {k}"
        return f"outside of all tensors ({self.buffers[buffer].dtype})"


def same(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors have equal bits, or NaN in both."""
    pattern = _PATTERN[a.dtype.itemsize]
    equal = a.view(pattern) == b.view(pattern)
    if not bool(equal.all()):
        equal |= a.to(torch.float64).isnan() & b.to(torch.float64).isnan()
    return equal


@dataclass
class Steps:
    """The launches of a method on one backend, and what goes with them.

    Attributes:
        slots: all tensors.
        launches: theirs.
        numbers: what kernels read in a step.
        stage: what follows the launches.
    """

    slots: list[Slot]
    launches: Launches
    numbers: fused.DeviceScalars | None = None
    stage: MatrixStage | None = None

    def prepare(self, inputs: StepInputs) -> None:
        if self.numbers is not None:
            self.numbers.fill(inputs)
        self.launches.prepare(inputs)

    def update_(self, inputs: StepInputs) -> None:
        self.launches.update_(inputs)
        if self.stage is not None:
            self.stage.update_(inputs)


def steps_of(backend: str, method: Method, slots: list[Slot], restore: str = "copy") -> Steps:
    """What `bind` makes of one backend."""
    ops.require(backend, method, slots, GROUPS)
    numbers = None if backend == "reference" else fused.DeviceScalars(slots, method)
    return Steps(slots, availability.named(backend).bind(method, slots, slots, restore, numbers), numbers)


class Twins:
    """A model on the reference backend and its copy on the Triton backend, moved in lockstep.

    Args:
        method: what is computed.
        make: (backend, slots) -> steps; those of the method, unless given.
        restore: how a dense direction goes back.
        buffers: as `Model` takes them.
        active: per slot, whether it takes part in steps.
    """

    def __init__(
        self,
        forms: Sequence[Form],
        method: Method,
        *buffers: str,
        make: Callable[[str, list[Slot]], Steps] | None = None,
        restore: str = "copy",
        active: Sequence[bool] | None = None,
        device: str = "cpu",
        **model: Any,
    ) -> None:
        def usual(backend: str, slots: list[Slot]) -> Steps:
            return steps_of(backend, method, slots, restore)

        self.method, self.active = method, active
        self.models = [Model(forms, *buffers, device=d, **model) for d in ("cpu", device)]
        self.start = Model(forms, *buffers, **model)
        self.steps = [(make or usual)(b, m.slots) for b, m in zip(("reference", "triton"), self.models, strict=True)]
        self.slots = self.models[0].slots

    def inputs(self, k: int, step: int = STEP, rho: Sequence[float] = (), probe: Probe | None = None) -> StepInputs:
        """What the launches of model k are given in a step; with derivatives, or before these are known."""
        draws = tuple(Draw(SEED, step, d) for d in range(self.method.estimator.n_directions))
        scalars = {}
        for kind in dict.fromkeys(slot.kind for slot in self.steps[k].slots):
            group, own = GROUPS[kind.group], [rounded(r, kind.double) for r in rho]
            scalars[kind] = self.method.scalars(kind, group, group["lr"], group["tau"], own, 1)
        return StepInputs(draws, scalars, self.models[k].state, self.active, probe)

    def probes(self, k: int, step: int = STEP) -> list[Probe]:
        """The probes of a step of model k, for which all is prepared."""
        inputs = self.inputs(k, step)
        self.steps[k].prepare(inputs)
        return self.steps[k].launches.probes(inputs)

    def update_(self, k: int, rho: Sequence[float], probe: Probe | None = None, step: int = STEP) -> None:
        """Moves model k."""
        inputs = self.inputs(k, step, rho, probe)
        self.steps[k].prepare(inputs)
        self.steps[k].update_(inputs)

    def check(self, what: str) -> None:
        """Both copies have the same bytes, in tensors and between them."""
        for i, (a, b) in enumerate(zip(*(m.buffers for m in self.models), strict=True)):
            equal = same(a, b.cpu())
            if not bool(equal.all()):
                cells = (~equal).nonzero().flatten().tolist()
                where = self.models[0].place(i, cells[0])
                raise AssertionError(f"{what}: {len(cells)} elements differ, the first {where}")

    def moved(self) -> bool:
        """Whether the kernels changed anything yet."""
        return not all(
            bool(same(a, b.cpu()).all()) for a, b in zip(self.start.buffers, self.models[1].buffers, strict=True)
        )


# What a probe is told.
MOVES: dict[str, Callable[[Probe], None]] = {
    "plus": lambda probe: probe.to(1.0),
    "minus": lambda probe: probe.to(-1.0),
    "finish": lambda probe: probe.finish(),
    "abort": lambda probe: probe.abort(),
}


def step_law(twins: Twins, *, held: bool = True, step: int = STEP) -> None:
    """Every launch of one step has the same results on both backends.

    Args:
        held: the update takes the last probe back; else `finish` (a walk's `abort`) does.
    """
    n, two_sided = twins.method.estimator.n_directions, twins.method.estimator.two_sided
    probes = list(zip(*(twins.probes(k, step) for k in range(2)), strict=True))
    lost = [steps.launches.lost(twins.inputs(k, step)) for k, steps in enumerate(twins.steps)]
    assert lost[0] == lost[1], "the numbers of lost perturbations differ"
    for k, pair in enumerate(probes):
        moves = ["plus", "minus"] if two_sided else ["plus"]
        if not (held and k == n - 1):
            moves += ["finish", "abort"]
        for move in moves:
            for probe in pair:
                MOVES[move](probe)
            twins.check(f"{move} {k}")
            assert twins.moved() or move != "plus", "no element was perturbed"
    for k in range(2):
        twins.update_(k, RHO[:n], probes[-1][k] if held else None, step)
    twins.check("update")
    assert twins.moved(), "no element was moved"


def method_of(
    direction: Direction, rule: Rule, *, stochastic: bool = True, two_sided: bool = True, n: int = 1, walk: bool = False
) -> Method:
    estimator = TwoSided(n) if two_sided else OneSided(n)
    return Method(direction, rule, estimator, "stochastic" if stochastic else "nearest", walk=walk)


def coordinate_twins(
    forms: Sequence[Form], direction: Coordinates | ReleasedBlock, *, update: str = "sampled", momentum: str = "own",
    stochastic: bool = True, two_sided: bool = True, n: int = 1, **model: Any,
) -> Twins:  # fmt: skip
    method = method_of(direction, AveragedSign(update), stochastic=stochastic, two_sided=two_sided, n=n)
    return Twins(forms, method, momentum, **model)


RULES: dict[str, Rule] = {"sgd": SGD(), "sign": Sign()}


def dense_twins(
    forms: Sequence[Form], distribution: str, *, restore: str = "copy", rule: str = "sgd", momentum: str = "own",
    stochastic: bool = True, two_sided: bool = True, n: int = 1, **model: Any,
) -> Twins:  # fmt: skip
    method = method_of(DENSE[distribution], RULES[rule], stochastic=stochastic, two_sided=two_sided, n=n,
                       walk=restore == "walk")  # fmt: skip
    return Twins(forms, method, momentum, restore=restore, **model)
