"""Newton-Schulz in csrc and Triton on an NVIDIA GPU: `make gpu`, or `pytest -m gpu`.

All tests of csrc, which needs no compilation here, come before those of Triton; in each, the most important first.
Tests whose names contain "small" have few elements and are checked on the CPU; they run under compute-sanitizer too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import jaguar
from helpers.laws import TAU
from helpers.tensors import Bag, bits, dtype_id, state_bits, weights
from jaguar import JaguarMuon
from jaguar.backends import availability
from jaguar.backends.polar import run as polar_run
from jaguar.method.schemes import SCHEMES

# The interpreter would run the kernels on the CPU, and prove nothing here.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or availability.interpreted(), reason="needs a GPU, compiled kernels"
    ),
]

DEVICE = "cuda"
BAND = 8192  # more than any tile, so that stores without a mask end in it
NS_SHAPES = [(1, 9), (9, 1), (8, 64), (64, 8), (33, 40), (40, 33), (64, 128), (3, 6, 10), (2, 36, 80)]
LARGER = [(8, 256, 1024), (768, 768), (1000, 1003), (64, 16384), (16384, 64)]
FLOATS = [torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.float8_e5m2]
# Squares and rectangles on and off the tiles, LoRA factors; what the tests of behaviour run on.
SEVERAL = [(256, 256), (200, 1000), (1000, 72), (16, 2048)]


@pytest.fixture(scope="module", params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Module-wide, so that pytest runs everything on one of them first."""
    if request.param in availability.unavailable():
        pytest.skip(availability.unavailable()[request.param])
    return str(request.param)


def normal(shape: Sequence[int], seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def exactly(G: Tensor, scheme: str = "cubic") -> Tensor:
    return jaguar.newton_schulz(G.double(), coefficients=scheme, dtype=torch.float64, backend="reference")


def relative(O: Tensor, exact: Tensor) -> float:  # noqa: E741
    """The largest relative error of a batch."""
    a, b = (x.double().reshape(-1, *x.shape[-2:]) for x in (O, exact))
    return float((torch.linalg.matrix_norm(a - b) / torch.linalg.matrix_norm(b)).max())


def errs_no_more_than_torch(G: Tensor, scheme: str, backend: str) -> None:
    exact = exactly(G, scheme)
    usual = relative(jaguar.newton_schulz(G, coefficients=scheme, backend="reference"), exact)
    error = relative(jaguar.newton_schulz(G, coefficients=scheme, backend=backend), exact)
    # The result is stored as bf16, an error of 1.7e-3 on average; 2^-8 where one element is all there is.
    assert error <= max(1.2 * usual, 4e-3), (error, usual)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", LARGER, ids=str)
def test_larger_matrices_err_no_more_than_torch_in_bf16(shape: tuple[int, ...], scheme: str, backend: str) -> None:
    errs_no_more_than_torch(normal(shape).float(), scheme, backend)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", NS_SHAPES, ids=str)
def test_matrices_err_no_more_than_torch_in_bf16(shape: tuple[int, ...], scheme: str, backend: str) -> None:
    errs_no_more_than_torch(normal(shape).float(), scheme, backend)


@pytest.mark.parametrize("shape", [(512, 512), (256, 1024)], ids=str)
def test_a_wide_spectrum_errs_no_more_than_torch_in_bf16(shape: tuple[int, int], backend: str) -> None:
    U, s, Vh = torch.linalg.svd(normal(shape).cpu(), full_matrices=False)
    G = (U * torch.logspace(0, -3, len(s), dtype=torch.float64) @ Vh).float().to(DEVICE)
    for scheme in SCHEMES:
        errs_no_more_than_torch(G, scheme, backend)


def factors() -> list[Tensor]:
    """Those of rank 8 on q and v of OPT-1.3B."""
    return [normal(((8, 2048), (2048, 8))[i % 2], seed=i).bfloat16() for i in range(96)]


class Spy:
    """Counts the launches of a backend."""

    def __init__(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        kind = type(polar_run._products(backend))
        for name in ("prepare", "product", "small_"):
            monkeypatch.setattr(kind, name, self._counted(name, getattr(kind, name)))

    def _counted(self, name: str, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append(name)
            return real(*arguments, **options)

        return call


def orthogonalised(matrices: Sequence[Tensor], backend: str, scheme: str = "cubic") -> list[Tensor]:
    run = polar_run.NewtonSchulz(backend, steps=None, coefficients=scheme, dtype=torch.bfloat16)
    outs: list[Tensor] = [matrices[0]] * len(matrices)
    for where, found in run(matrices):
        for i, factor in zip(where, found, strict=True):
            outs[i] = factor
    return outs


def test_all_lora_factors_in_one_launch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = factors()
    spy = Spy(backend, monkeypatch)
    outs = orthogonalised(matrices, backend)
    assert spy.calls == ["small_"]
    for G, O in zip(matrices, outs, strict=True):  # noqa: E741
        assert O.shape == G.shape and O.dtype == torch.bfloat16
        assert relative(O, exactly(G)) < 4e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_runs_are_equal(scheme: str, backend: str) -> None:
    for shape in SEVERAL:
        G = normal((3, *shape)).bfloat16()
        runs = [jaguar.newton_schulz(G, coefficients=scheme, backend=backend) for _ in range(3)]
        assert all(torch.equal(O, runs[0]) for O in runs[1:]), shape  # noqa: E741


def test_a_matrix_does_not_depend_on_its_batch(backend: str) -> None:
    for shape in SEVERAL:
        G = normal((3, *shape)).bfloat16()
        together = jaguar.newton_schulz(G, backend=backend)
        assert relative(jaguar.newton_schulz(G[1], backend=backend), together[1].double()) < 8e-3, shape


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_every_input(dtype: torch.dtype, backend: str) -> None:
    """Any dtype and strides; a zero, a NaN and an infinity leave the rest of a batch alone."""
    for rows, columns in ((6, 20), (20, 6), (136, 144), (150, 70)):
        G = normal((5, columns, rows)).mT
        G[1] = 0.0
        G[2, 0, 1], G[3, 2, 2] = math.nan, math.inf
        G = G.to(dtype)
        assert not G.is_contiguous()
        O = jaguar.newton_schulz(G, backend=backend)  # noqa: E741
        exact = exactly(G)
        assert O.dtype == dtype and O.is_contiguous() and O.shape == G.shape
        assert bool((O[1].float() == 0).all()) and bool(O[2:4].float().isnan().all())
        for k in (0, 4):
            assert relative(O[k], exact[k]) < (0.1 if dtype == torch.float8_e5m2 else 1e-2), (rows, columns, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_id)
def test_misaligned_inputs(dtype: torch.dtype, backend: str) -> None:
    """A contiguous view that begins one element after a multiple of 16 bytes."""
    for rows, columns in ((8, 40), (136, 144), (70, 150)):
        whole = torch.zeros(rows * columns + 1, dtype=dtype, device=DEVICE)
        G = whole[1:].view(rows, columns)
        G.copy_(normal((rows, columns)))
        assert G.data_ptr() % 16 and G.is_contiguous()
        for shifted in (G, G.mT):
            O = jaguar.newton_schulz(shifted, backend=backend)  # noqa: E741
            assert relative(O, exactly(shifted)) < 1e-2, (rows, columns)


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e-300])
def test_magnitudes(scale: float, backend: str) -> None:
    for shape in ((4, 7), (130, 140)):
        G = normal(shape) * scale
        assert relative(jaguar.newton_schulz(G, backend=backend), exactly(G)) < 1e-2
    if scale < 1e30:
        assert jaguar.newton_schulz(torch.empty(2, 0, 4, device=DEVICE), backend=backend).shape == (2, 0, 4)


def test_refusals(backend: str) -> None:
    with pytest.raises(TypeError, match=r"torch\.int32"):
        jaguar.newton_schulz(torch.ones(3, 3, dtype=torch.int32, device=DEVICE), backend=backend)
    with pytest.raises(availability.Unavailable, match="the matrix is on cpu"):
        jaguar.newton_schulz(torch.ones(3, 3), backend=backend)
    with pytest.raises(availability.Unavailable, match="16 bits"):
        jaguar.newton_schulz(torch.ones(3, 3, device=DEVICE), dtype=torch.float32, backend=backend)


def test_another_stream(backend: str) -> None:
    """Everything is queued on the current stream: elsewhere it would read what is not there yet."""
    side = torch.cuda.Stream()
    for shape in ((16, 512), (256, 256), (200, 1000)):
        values = normal(shape).bfloat16()
        wanted = jaguar.newton_schulz(values, backend=backend)
        G = torch.full_like(values, math.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)  # some 25 ms
            G.copy_(values)
            O = jaguar.newton_schulz(G, backend=backend)  # noqa: E741
        side.synchronize()
        assert torch.equal(O, wanted), shape


@pytest.fixture
def never_waiting() -> Iterator[None]:
    """torch raises where the host would wait for the device."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # "is a prototype feature"
def test_nothing_waits_for_the_device(backend: str, never_waiting: None) -> None:
    """A second time, when kernels are loaded; tables of addresses that are new come from pinned memory."""
    inputs = [normal(shape).bfloat16() for shape in SEVERAL]
    inputs += [normal((2, 200, 1000)).double(), normal((2, 256, 256)).float()]
    for G in inputs:
        jaguar.newton_schulz(G, backend=backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    outs = [jaguar.newton_schulz(G, backend=backend) for G in inputs]
    torch.cuda.set_sync_debug_mode("default")
    assert all(bool(O.isfinite().all()) for O in outs)  # noqa: E741


class Guarded:
    """A batch of matrices between rows, columns and bands of NaN that nothing may write to."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool = False) -> None:
        b, n, m = (shape[0], shape[2], shape[1]) if transposed else shape
        pitch = -(-m // 8) * 8 + 8
        self._all = torch.full((2 * BAND + b * n * pitch,), math.nan, dtype=dtype, device=DEVICE)
        self._outside = torch.ones_like(self._all, dtype=torch.bool)
        inner, inner_outside = (x[BAND:-BAND].view(b, n, pitch)[:, :, :m] for x in (self._all, self._outside))
        inner_outside.fill_(False)
        self.inside = inner.mT if transposed else inner
        self._before = self._all.view(torch.int16).clone()

    def filled(self, values: Tensor) -> Tensor:
        self.inside.copy_(values)
        return self.inside

    def intact(self) -> bool:
        return bool((self._all.view(torch.int16) == self._before)[self._outside].all())


PRODUCTS = [(2, 7, 33, 65), (1, 70, 65, 70), (2, 64, 128, 64), (1, 136, 264, 72), (2, 256, 256, 128)]


def product_is_right(shape: tuple[int, int, int, int], backend: str, triangle: bool, transposed: bool) -> None:
    """One product: right up to one rounding, symmetric where it should be, and not a byte outside changed."""
    batch, m, n, k = shape
    n = m if triangle else n
    half = torch.float16
    a = Guarded((batch, m, k), half).filled(normal((batch, m, k)) / math.sqrt(k))
    b = a.mT if triangle else Guarded((batch, k, n), half).filled(normal((batch, k, n), 1))
    c = Guarded((batch, m, n), half).filled(normal((batch, m, n), 2))
    if triangle:
        c.copy_(c.double() + c.double().mT)
    kinds = [(half, 0.0), (half, 1.5)] + ([] if triangle else [(torch.bfloat16, -0.5)])
    for dtype, beta in kinds:
        out = Guarded((batch, m, n), dtype, transposed and not triangle)
        extra = {} if beta == 0.0 else {"beta": beta, "c": c}
        polar_run._products(backend).product(out.inside, a, b, alpha=0.7, triangle=triangle, **extra)
        A, B, C = (x.cpu().double() for x in (a, b, c))
        exact = 0.7 * (A @ B) + beta * C
        unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
        sums = (A.abs() @ B.abs() + abs(beta) * C.abs()) * (k + 3) * 2.0**-23
        error = (out.inside.cpu().double() - exact).abs()
        assert bool((error <= 1.01 * unit * exact.abs() + sums + 2.0**-25).all()), (shape, dtype, beta)
        assert out.intact(), (shape, dtype, beta)
        if triangle:
            assert torch.equal(out.inside, out.inside.mT)


@pytest.mark.parametrize("form", ["full", "transposed", "triangle"])
def test_a_product_writes_nothing_outside(form: str, backend: str) -> None:
    for shape in PRODUCTS:
        product_is_right(shape, backend, form == "triangle", form == "transposed")


@pytest.mark.parametrize("form", ["full", "transposed", "triangle"])
def test_small_product(form: str, backend: str) -> None:
    product_is_right((2, 70, 65, 72), backend, form == "triangle", form == "transposed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_small_preparation(dtype: torch.dtype, backend: str) -> None:
    """Wide and tall: norm 1, nothing outside written."""
    for rows, columns in ((70, 90), (90, 70), (64, 128)):
        matrices = [normal((rows, columns), i).to(dtype) for i in range(2)]
        n, m = min(rows, columns), max(rows, columns)
        out = Guarded((2, n, m), torch.float16)
        statistics = torch.full((2, 2, 64), math.nan, device=DEVICE)
        polar_run._products(backend).prepare(matrices, out.inside, statistics, 1.0)
        for x, G in zip(out.inside, matrices, strict=True):
            exact = (G if rows <= columns else G.mT).cpu().double()
            exact = exact / torch.linalg.matrix_norm(exact)
            assert bool(((x.cpu().double() - exact).abs() <= 2.0**-10.9 * exact.abs() + 2.0**-25).all())
        assert out.intact()


def test_small_matrices_on_chip(backend: str) -> None:
    """Several shapes in one launch, between bands that nothing may write to."""
    shapes = [(1, 5), (5, 1), (8, 72), (72, 8), (16, 16), (30, 70)]
    matrices = [normal(shape, i).bfloat16() for i, shape in enumerate(shapes)]
    whole = [torch.full((2 * BAND + G.numel(),), math.nan, dtype=torch.bfloat16, device=DEVICE) for G in matrices]
    outs = [w[BAND:-BAND].view(G.shape) for w, G in zip(whole, matrices, strict=True)]
    polar_run._products(backend).small_(matrices, outs, SCHEMES["cubic"].coefficients(), 1.0)
    for w, G, O in zip(whole, matrices, outs, strict=True):  # noqa: E741
        assert relative(O.cpu(), exactly(G.cpu())) < 8e-3, G.shape
        assert bool(w[:BAND].isnan().all()) and bool(w[-BAND:].isnan().all())


@pytest.mark.parametrize("shape", [(66, 72), (66, 200)], ids=["standard", "Gram"])
def test_small_newton_schulz(shape: tuple[int, int], backend: str) -> None:
    """All the launches of an iteration."""
    G = normal((2, *shape)).float()
    for scheme in ("cubic", "quintic"):
        O = jaguar.newton_schulz(G, coefficients=scheme, backend=backend)  # noqa: E741
        assert relative(O.cpu(), exactly(G.cpu(), scheme)) < 2e-2


# -- the optimizer -------------------------------------------------------------------------------------------------


def muon(net: Bag, backend: str, **options: Any) -> JaguarMuon:
    return JaguarMuon(jaguar.param_groups(net), coordinates=0.3, tau=TAU, seed=5, backend=backend, **options)


def net_of(dtype: torch.dtype) -> Bag:
    shapes = [(8, 24), (24, 8), (72, 80), (80, 200), (200, 80), (50,)]
    return Bag([weights(dtype, *shape, seed=i) for i, shape in enumerate(shapes)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_momentum_is_the_references_for_the_same_records(dtype: torch.dtype, backend: str) -> None:
    """Bit for bit, whatever Newton-Schulz rounds: it never flows back into momentum but through the losses."""
    own, twin = net_of(dtype).to(DEVICE), net_of(dtype)
    opt, replay = muon(own, backend, lr=0.01), muon(twin, "reference", lr=0.01)
    assert f"on {backend}" in repr(opt)
    for _ in range(4):
        opt.step(own)
        replay.apply_(opt.last_record)
        ours, theirs = ([m.state[p]["momentum"].cpu() for p in n.parameters()] for m, n in ((opt, own), (replay, twin)))
        assert [bits(m) for m in ours] == [bits(m) for m in theirs]
    assert len(state_bits(replay, list(twin.parameters()))) == 6


def test_a_whole_step_is_near_the_references(backend: str) -> None:
    """One step of lr 1, so that a matrix moves by O: as far from float64 as torch in bf16, or less."""
    own, twin = net_of(torch.float32).to(DEVICE), net_of(torch.float32).to(DEVICE)
    before = [p.detach().clone() for p in own.parameters()]
    opt, replay = muon(own, backend, lr=1.0), muon(twin, "reference", lr=1.0)
    opt.step(own)
    replay.apply_(opt.last_record)
    for p, q, x in zip(own.parameters(), twin.parameters(), before, strict=True):
        if p.dim() == 1:  # the sign rule; a device's products and sums may round into one
            assert bool(((p - q).detach().abs() <= 1e-6).all())
            continue
        exact = exactly(opt.state[p]["momentum"])
        error, usual = (relative((x - y.detach()).double(), exact) for y in (p, q))
        assert error <= max(1.2 * usual, 4e-3), (tuple(p.shape), error, usual)


# -- the two beside each other ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_csrc_and_triton_agree(scheme: str) -> None:
    if missing := {"cuda", "triton"} & set(availability.unavailable()):
        pytest.skip(f"{', '.join(missing)} cannot run here")
    for shape in (*SEVERAL, (8, 256, 1024)):
        G = normal(shape).bfloat16()
        one, other = (jaguar.newton_schulz(G, coefficients=scheme, backend=name) for name in ("cuda", "triton"))
        usual = relative(jaguar.newton_schulz(G, coefficients=scheme, backend="reference"), exactly(G, scheme))
        assert relative(one, other.double()) <= max(2.4 * usual, 8e-3), shape
