"""JAGUAR Muon on the Triton backend: the reference's bits in all but Newton-Schulz, and a bound on that."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.laws import TAU
from helpers.tensors import all_bits, dtype_id, state_bits

pytest.importorskip("triton")
import jaguar
from helpers.covering import pairwise
from helpers.kernels import DIRECTIONS, Form, Steps, Twins, forms_of, interpreted, method_of, row_id, step_law, steps_of
from helpers.launches import counted, jobs
from jaguar import JaguarMuon
from jaguar.backends import reference
from jaguar.backends import triton as fused
from jaguar.backends.orthogonal import MatrixStage
from jaguar.backends.polar import run as polar_run
from jaguar.method.params import Slot
from jaguar.method.rules import AveragedSign

pytestmark = [interpreted, pytest.mark.usefixtures("poisoned")]

FACTORS: dict[str, list[Any]] = {
    "layout": ["fraction", "count", "block"],
    "update": ["sampled", "all"],
    "factor": [torch.bfloat16, torch.float32, torch.float64],
    "stochastic": [True, False],
    "n": [1, 2],
    "momentum": ["own", "fp32", "e5m2"],
    "shapes": ["matrix", "thousand", "odd"],
    "turn": [0, 1, 2, 3],
}


class Given:
    """Matrices themselves in the place of their polar factors, in another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(self, matrices: Sequence[Tensor]) -> Iterator[tuple[Sequence[int], Sequence[Tensor]]]:
        yield range(0, len(matrices), 2), [m.to(self._dtype, copy=True) for m in matrices[::2]]
        if len(matrices) > 1:
            yield range(1, len(matrices), 2), [m.to(self._dtype, copy=True) for m in matrices[1::2]]

    def forget(self) -> None:
        pass


def muon_twins(
    forms: Sequence[Form], direction: Any, *, factor: torch.dtype, update: str = "sampled", stochastic: bool = True,
    momentum: str = "own", n: int = 1, period: int = 1, stacked: Sequence[int] = (),
) -> Twins:  # fmt: skip
    """Both backends follow the same matrices: the momentum itself, in another dtype."""

    method = method_of(direction, AveragedSign(update), stochastic=stochastic, n=n)

    def make(backend: str, slots: list[Slot]) -> Steps:
        # Every other tensor is moved along a matrix; vectors are (n, 1).
        roles = [replace(s, signed=bool(i % 2), rate=0.5 + i % 3, gain=1.0 + i % 2) for i, s in enumerate(slots)]
        made = steps_of(backend, method, roles)
        numbers = made.numbers
        moves = reference.MatrixLaunches(method) if numbers is None else fused.MatrixLaunches(method, numbers)
        stage = MatrixStage(roles, frozenset(slots[i].stream for i in stacked), Given(factor), moves, period)
        return replace(made, stage=stage)

    return Twins(forms, method, momentum, make=make)


@pytest.mark.parametrize("row", pairwise(FACTORS), ids=row_id)
def test_bits_of_the_reference(row: dict[str, Any]) -> None:
    twins = muon_twins(
        forms_of(row["shapes"], row["turn"]),
        DIRECTIONS[row["layout"]],
        **{key: row[key] for key in ("factor", "update", "stochastic", "momentum", "n")},
    )
    step_law(twins)


@pytest.mark.parametrize("held", [True, False])
def test_a_batch_of_matrices_and_a_part_of_a_tensor(held: bool) -> None:
    """Each matrix of a batch rounds with the noise of its own place in the whole."""
    forms = [
        Form((3, 5, 40), torch.bfloat16),
        Form((7,), torch.float32),
        Form((8, 16), torch.float16, 1, 8192, (2000, 16)),
    ]
    twins = muon_twins(forms, DIRECTIONS["fraction"], factor=torch.bfloat16, stacked=[0])
    step_law(twins, held=held)


def test_a_matrix_larger_than_a_program() -> None:
    twins = muon_twins([Form((2, 8192 + 40), torch.bfloat16)], DIRECTIONS["percent"], factor=torch.bfloat16)
    step_law(twins)


def address(tensor: Tensor) -> int | None:
    """None without a storage, as some of those have that other tests leave."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return None


def test_factors_are_read_where_they_are_and_let_go() -> None:
    """Tables that are kept for the next step do not keep the memory of this step's factors."""
    twins = muon_twins([Form((4, 6), torch.float32)], DIRECTIONS["fraction"], factor=torch.bfloat16)
    steps, inputs = twins.steps[1], twins.inputs(1, rho=[0.5])
    factor, other = torch.empty(4, 6), torch.empty(4, 6)
    steps.prepare(inputs)
    for given, value in ((factor, 1.0), (other, -1.0), (other, 1.0)):
        given.fill_(value)
        before = steps.slots[0].tensor.clone()
        steps.stage.moves.move_(steps.slots, [given], inputs)
        assert bool((steps.slots[0].tensor < before).all()) is (value > 0)
    held = [t for t in gc.get_objects() if type(t) is Tensor and address(t) == other.data_ptr()]
    assert len(held) == 1 and held[0] is other


class Net(nn.Module):
    """Matrices of several shapes, a vector, and a loss that every element reaches."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        shapes = {"a": (8, 24), "b": (24, 8), "c": (20, 40), "d": (40, 20), "e": (33, 33), "v": (50,)}
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=gen) * 0.3
            setattr(self, name, nn.Parameter(values.to(dtype)))

    def forward(self) -> Tensor:
        return sum(
            (p.float() - torch.linspace(-1, 1, p.numel()).view(p.shape)).square().sum() for p in self.parameters()
        )


@pytest.mark.parametrize("period", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_steps_with_the_same_newton_schulz_are_equal(
    dtype: torch.dtype, period: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer as users make it; only Newton-Schulz, which rounds differently, runs on the reference for both."""
    monkeypatch.setattr(polar_run, "assigned", lambda *_: "reference")
    net = Net(dtype)
    runs = []
    for backend in ("reference", "triton"):
        own = copy.deepcopy(net)
        opt = JaguarMuon(jaguar.param_groups(own, 0.1), lr=0.01, coordinates=0.1, tau=TAU, ns_period=period, ns_steps=3,
                         backend=backend)  # fmt: skip
        runs.append((own, opt))
    for _ in range(4):
        for own, opt in runs:
            opt.step(own)
        a, b = ([*all_bits(list(own.parameters())), *state_bits(opt, list(own.parameters()))] for own, opt in runs)
        assert a == b and runs[0][1].last_record == runs[1][1].last_record


def test_whole_steps_stay_near_the_reference() -> None:
    """Newton-Schulz in kernels too: momentum of the first step bit for bit, parameters within the error of bf16."""
    net = Net(torch.float32)
    runs = []
    for backend in ("reference", "triton"):
        own = copy.deepcopy(net)
        opt = JaguarMuon(jaguar.param_groups(own), lr=1.0, coordinates=0.5, tau=TAU, backend=backend)
        opt.step(own)
        runs.append((own, opt))
    assert "on triton" in repr(runs[1][1])
    assert state_bits(runs[0][1], list(runs[0][0].parameters())) == state_bits(
        runs[1][1], list(runs[1][0].parameters())
    )
    assert torch.equal(runs[0][0].v, runs[1][0].v)
    for name in "abcde":
        before, one, other = (getattr(m, name).detach() for m in (net, runs[0][0], runs[1][0]))
        exact = jaguar.newton_schulz(runs[0][1].state[getattr(runs[0][0], name)]["momentum"], dtype=torch.float64)
        # The reference iterates in bf16; kernels err less than it does, whatever either errs.
        errors = [float(((before - x) - exact).norm() / exact.norm()) for x in (one, other)]
        assert errors[0] < 0.02 and errors[1] < max(errors[0], 2.5e-3)


@pytest.mark.parametrize("update", ["sampled", "all"])
def test_launches(update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(torch.float32)
    monkeypatch.setattr(polar_run, "assigned", lambda *_: "reference")
    opt = JaguarMuon(jaguar.param_groups(net), coordinates=0.1, tau=TAU, update=update, ns_steps=2, backend="triton")
    opt.step(net)
    with counted(run=True) as launches:
        opt.step(net)
    # The last ones: one for every batch of matrices of one shape.
    assert jobs(launches) == ["perturb", "flip", "fused" if update == "sampled" else "tiles", *["along"] * 5]


# Every shape with the paper's scheme; the others, which differ in the number of products, on one of each form.
NS_SHAPES = [(1, 9), (9, 1), (8, 64), (64, 8), (33, 40), (40, 33), (64, 128), (3, 6, 10), (2, 36, 80)]
NS_CASES = [("cubic", shape) for shape in NS_SHAPES]
NS_CASES += [(name, shape) for name in ("quintic", "polar_express") for shape in ((8, 64), (33, 40), (2, 36, 80))]


@pytest.mark.parametrize(("name", "shape"), NS_CASES, ids=str)
def test_newton_schulz_errs_less_than_bf16(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    G = torch.randn(shape)
    exact = jaguar.newton_schulz(G.double(), coefficients=name, dtype=torch.float64)
    bf16 = jaguar.newton_schulz(G, coefficients=name, backend="reference")
    O = jaguar.newton_schulz(G, coefficients=name, backend="triton")  # noqa: E741
    error, usual = (float((x.double() - exact).norm() / exact.norm()) for x in (O, bf16))
    # The result is stored as bf16, an error of 1.7e-3 on average; 2^-8 where one element is all there is.
    assert O.shape == G.shape and error < max(0.9 * usual, 4e-3)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2], ids=dtype_id
)
def test_every_input_of_newton_schulz(dtype: torch.dtype) -> None:
    """Any dtype, strides and magnitude; zero, non-finite and empty ones: what the reference gives, to its precision."""
    torch.manual_seed(0)
    for rows, columns in ((6, 20), (36, 40)):
        G = torch.randn(5, columns, rows).to(dtype).mT
        G[1] = 0.0
        G[2, 0, 1], G[3, 2, 2] = torch.nan, torch.inf
        O = jaguar.newton_schulz(G, backend="triton")  # noqa: E741
        exact = jaguar.newton_schulz(G.double(), dtype=torch.float64)
        assert O.dtype == dtype and O.is_contiguous()
        assert not O[1].float().any() and O[2:4].float().isnan().all()
        for k in (0, 4):
            bound = 0.1 if dtype == torch.float8_e5m2 else 5e-3
            assert (O[k].double() - exact[k]).norm() < bound * exact[k].norm()
    for scale in (1e-30, 1e30, 1e-300):
        G = torch.randn(4, 7, dtype=torch.float64) * scale
        O = jaguar.newton_schulz(G, backend="triton")  # noqa: E741
        assert (O - jaguar.newton_schulz(G, dtype=torch.float64)).abs().max() < 5e-3
    assert jaguar.newton_schulz(torch.empty(2, 0, 4, dtype=dtype), backend="triton").shape == (2, 0, 4)
    with pytest.raises(TypeError, match=r"torch\.int32"):
        jaguar.newton_schulz(torch.ones(3, 3, dtype=torch.int32), backend="triton")


def test_due_matrices_take_turns() -> None:
    slots = [Slot(str(i), torch.ones(2, 2), i, 0, torch.Size((2, 2)), signed=i == 2) for i in range(5)]
    stage = MatrixStage(slots, frozenset(), None, None, 3)
    assert [stage.due(k) for k in range(4)] == [[0, 4], [1], [3], [0, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_released_steps_are_equal(dtype: torch.dtype) -> None:
    """Tensors of one group with steps of different lengths: each reads its own row of scalars."""
    net = Net(dtype)
    found = []
    for backend in ("reference", "triton"):
        own = copy.deepcopy(net)
        opt = JaguarMuon(jaguar.param_groups(own, 0.1), lr=0.3, tau=TAU, released=True, backend=backend)
        for _ in range(3):
            opt.step(own)
        found.append([*all_bits(list(own.parameters())), *state_bits(opt, list(own.parameters()))])
    assert found[0] == found[1]
