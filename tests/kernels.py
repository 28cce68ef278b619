"""What the kernel tests share: two copies of a model between guard bands, and the laws that run both backends on them.

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
import interpreter  # noqa: F401 (twice as fast)
from conftest import BAND, DTYPES, FORMS, Bag, all_bits, dtype_id, state_bits
from torch import Tensor, nn

from jaguar import ops, rules
from jaguar.directions import DENSE, Coordinates, ReleasedBlock
from jaguar.fused import coordinate, dense
from jaguar.fused.plan import Plan, Table
from jaguar.launches import Launches
from jaguar.params import Slot
from jaguar.rng import Draw
from jaguar.triton_kernels import tables as T

interpreted = pytest.mark.skipif(not ops.interpreted(), reason="runs kernels on CPU tensors, in Triton's interpreter")

SEED, STEP = 12345, 7
GROUPS = [
    {"lr": 0.25, "tau": 2.0**-4, "beta": 0.9, "weight_decay": 0.5},
    {"lr": 3e-3, "tau": 0.7 * 2.0**-6, "beta": 0.3, "weight_decay": 0.0},
    {"lr": 0.011, "tau": 1e-3, "beta": 0.0, "weight_decay": 13.3},
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
    """Slots and momenta between bands of other bytes; the same numbers whenever it is made."""

    def __init__(
        self, forms: Sequence[Form], momentum: str = "own", device: str = "cpu", special: bool = True, seed: int = 0
    ) -> None:
        self.buffers: list[Tensor] = []
        self._special, self._device = special, device
        self._generator = torch.Generator().manual_seed(seed)
        tensors = self._placed([(f.shape, f.dtype, f.skew) for f in forms])
        self.momenta = self._placed([(f.shape, MOMENTUM[momentum](f.dtype), 0) for f in forms])
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
        tensors += [(f"momentum of {s.name}", m) for s, m in zip(self.slots, self.momenta, strict=True)]
        for name, t in tensors:
            if t is not None and t.untyped_storage().data_ptr() == self.buffers[buffer].untyped_storage().data_ptr():
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


class Twins:
    """A model on the reference backend and its copy on the Triton backend, moved in lockstep."""

    def __init__(
        self, forms: Sequence[Form], make: Callable[[str, list[Slot]], Launches], momentum: str = "own", **model: Any
    ) -> None:
        device = model.pop("device", "cpu")
        self.models = [Model(forms, momentum, d, **model) for d in ("cpu", device)]
        self.start = Model(forms, momentum, **model)
        self.steps = [make(b, m.slots) for b, m in zip(("reference", "triton"), self.models, strict=True)]
        self.slots = self.models[0].slots
        self.taus = [rules.rounded(GROUPS[s.group]["tau"], s.tensor.dtype == torch.float64) for s in self.slots]

    def scalars(self, rho: Sequence[float]) -> list[rules.Scalars]:
        """The scalars of every slot for these derivatives."""
        found = []
        for slot in self.slots:
            double = slot.tensor.dtype == torch.float64
            own = [rules.rounded(r, double) for r in rho]
            found.append(rules.step_scalars(own, **GROUPS[slot.group], rho_clip=None, double=double))
        return found

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


def step_law(twins: Twins, *, n: int = 1, two_sided: bool = True, held: bool = True, step: int = STEP) -> None:
    """Every launch of one step has the same results on both backends.

    Args:
        held: the update takes the last probe back; else `finish` (a walk's `abort`) does.
    """
    draws = [Draw(SEED, step, k) for k in range(n)]
    lost = [steps.lost(draws[0], twins.taus) for steps in twins.steps]
    assert lost[0] == lost[1], "the numbers of lost perturbations differ"
    probes = list(zip(*(steps.probes(draws, twins.taus) for steps in twins.steps), strict=True))
    for k, pair in enumerate(probes):
        moves = ["plus", "minus"] if two_sided else ["plus"]
        if not (held and k == n - 1):
            moves += ["finish", "abort"]
        for move in moves:
            for probe in pair:
                getattr(probe, move)()
            twins.check(f"{move} {k}")
            assert twins.moved() or move != "plus", "no element was perturbed"
    last = probes[-1] if held else (None, None)
    for steps, model, probe in zip(twins.steps, twins.models, last, strict=True):
        steps.update_(draws, twins.scalars(RHO[:n]), model.momenta, probe)
    twins.check("update")
    assert twins.moved(), "no element was moved"


def coordinate_twins(
    forms: Sequence[Form], direction: Coordinates | ReleasedBlock, *, update: str = "sampled", momentum: str = "own",
    stochastic: bool = True, two_sided: bool = True, n: int = 1, **model: Any,
) -> Twins:  # fmt: skip
    def make(backend: str, slots: list[Slot]) -> Launches:
        return ops.coordinate_steps(
            backend, slots, direction, update=update, stochastic=stochastic, two_sided=two_sided, n_directions=n
        )

    return Twins(forms, make, momentum, **model)


def dense_twins(
    forms: Sequence[Form], distribution: str, *, restore: str = "copy", rule: str = "sgd", momentum: str = "own",
    stochastic: bool = True, two_sided: bool = True, n: int = 1, **model: Any,
) -> Twins:  # fmt: skip
    def make(backend: str, slots: list[Slot]) -> Launches:
        return ops.dense_steps(
            backend, slots, DENSE[distribution], restore=restore, rule=rule, stochastic=stochastic,
            two_sided=two_sided, n_directions=n,
        )  # fmt: skip

    return Twins(forms, make, momentum, **model)


def edit_tables(monkeypatch: pytest.MonkeyPatch, edit: Callable[[Plan, Table, bool], None]) -> list[Table]:
    """Lets `edit(plan, table, of elements rather than strata)` change every table before a kernel reads it."""
    real, edited = Plan._table, []

    def table(self: Plan, key: Any, members: Any, momenta: Any, block: int, tiles: bool) -> Table:
        edited.append(real(self, key, members, momenta, block, tiles))
        edit(self, edited[-1], tiles)
        return edited[-1]

    monkeypatch.setattr(Plan, "_table", table)
    return edited


def as_the_end(
    plan: Plan, table: Table, tiles: bool, momentum: str, first: dict[str, int] | None = None, dense: bool = False
) -> None:
    """For `edit_tables`: shards become the ends of tensors that are held from their beginning, of which only the last
    programs run. So kernels address element 2^31 and on, of memory that is not there.

    Args:
        first: by name, the first stratum whose coordinate is in the shard, where the table does not begin there.
    """  # fmt: skip
    for t, i in enumerate(table.members):
        slot, row = plan.slots[i], table.tensors[t]
        dtype = MOMENTUM[momentum](slot.tensor.dtype)
        row[T.COUNT.value] += slot.start
        row[T.X.value] -= slot.start * slot.tensor.itemsize
        row[T.M.value] -= slot.start * dtype.itemsize if dtype and row[T.M.value] else 0
        row[T.START.value] -= slot.start
        row[T.ORIGIN.value] -= slot.start
        row[T.SAVED.value] -= slot.start if dense else 0
        mine = table.programs[:, T.TENSOR.value] == t
        if tiles:
            table.programs[mine, T.FIRST.value] += slot.start
        elif first:
            assert int(mine.sum()) == 1
            table.programs[mine, T.FIRST.value] = first[slot.name]


def bag_of(*dtypes: torch.dtype) -> Bag:
    """Parameters of some contiguous forms and every dtype."""
    return Bag([FORMS[form](dtype) for dtype in dtypes for form in ("contiguous", "empty", "cube")])


def parameters(module: nn.Module) -> list[Tensor]:
    return list(module.parameters())


def everything(module: nn.Module, optimizer: Any) -> tuple[list[bytes], list[bytes]]:
    return all_bits(parameters(module)), state_bits(optimizer, parameters(module))


def counted(monkeypatch: pytest.MonkeyPatch, run: bool) -> list[dict[str, Any]]:
    """What is launched from now on, and whether it runs too: kernels' names and compile-time options."""
    seen: list[dict[str, Any]] = []
    for module in (coordinate, dense):

        def launch(kernel: Any, n: int, *arguments: Any, _real: Any = module.launch, **constants: Any) -> None:
            seen.append({"name": kernel.__name__, **constants})
            if run:
                _real(kernel, n, *arguments, **constants)

        monkeypatch.setattr(module, "launch", launch)
    return seen


def jobs(launches: list[dict[str, Any]]) -> list[str]:
    """The jobs since the last call."""
    names = [launch.get("JOB", launch["name"]) for launch in launches]
    launches.clear()
    return names
