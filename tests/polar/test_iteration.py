"""The schedule of products that kernels follow, run on products made by torch in fp16."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from helpers.spectra import with_spectrum
from jaguar.backends.polar import schedule as iteration
from jaguar.backends.polar.reference import newton_schulz, normalised
from jaguar.backends.polar.schedule import Task, batches, gram_segments, half_pays, orthogonalise
from jaguar.method.schemes import SCHEMES, Coefficients

N_SMS = 132
schemes = pytest.mark.parametrize("name", SCHEMES)


class Halves:
    """The three operations of `Products` with fp16 operands, fp32 sums and one rounding; checks what it is given."""

    def __init__(self, small: int = 0) -> None:
        self.small, self.flops, self.together = small, 0.0, []

    def prepare(self, matrices: Sequence[Tensor], out: Tensor, statistics: Tensor, scale: float) -> None:
        assert statistics.shape == (len(matrices), 2, 64) and out.dtype == torch.float16
        assert out.stride(-1) == 1 and out.stride(-2) % 8 == 0 and out.data_ptr() % 16 == 0
        G = torch.stack(list(matrices))
        G = G.mT if G.shape[-2] > G.shape[-1] else G
        assert G.shape == out.shape
        out.copy_(normalised(G, 1.0, torch.float32) * scale)
        self.together.append(len(matrices))

    def product(
        self,
        out: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        alpha: float,
        beta: float = 0.0,
        c: Tensor | None = None,
        triangle: bool = False,
    ) -> None:
        assert out.data_ptr() not in (a.data_ptr(), b.data_ptr())
        assert a.dtype == b.dtype == torch.float16 and a.stride(-1) == 1 and 1 in b.stride()[-2:]
        for t in (out, a, b, *([] if c is None else [c])):
            assert max(t.stride()[-2:]) % 8 == 0 and t.data_ptr() % 16 == 0
        d = alpha * (a.float() @ b.float())
        if c is not None:
            d = d + beta * c.float()
        assert d.abs().max() < 65504 or not d.isfinite().all()
        if triangle:
            d = d.tril() + d.tril(-1).mT
        out.copy_(d)
        self.flops += (1.0 if triangle else 2.0) * a.shape[-2] * a.shape[-1] * b.shape[-1] * a.shape[0]

    def small_(
        self, matrices: Sequence[Tensor], outs: Sequence[Tensor], coefficients: Sequence[Coefficients], scale: float
    ) -> None:
        assert scale == pytest.approx(1.0, rel=0.02)
        for G, out in zip(matrices, outs, strict=True):
            out.copy_(newton_schulz(G, list(coefficients), 1.0 / scale, torch.float32))


def run(G: Tensor, name: str, steps: int | None = None, kernels: Halves | None = None) -> Tensor:
    scheme = SCHEMES[name]
    task = Task(scheme, steps or scheme.steps, N_SMS)
    out = torch.full(G.shape, torch.nan)
    for where, factors in orthogonalise(kernels or Halves(), list(G.unbind()), task):
        for i, factor in zip(where, factors, strict=True):
            assert factor.is_contiguous() and factor.dtype == torch.bfloat16
            out[i] = factor.float()
    return out


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@schemes
@pytest.mark.parametrize("shape", [(2, 40, 40), (1, 100, 103), (2, 64, 200), (2, 200, 64), (1, 9, 300)], ids=str)
@pytest.mark.parametrize("spectrum", ["gaussian", "three decades"])
def test_kernels_err_less_than_bf16(shape: tuple[int, ...], name: str, spectrum: str) -> None:
    """On the products alone; the result is then stored as bf16, which adds a rounding of 1.7e-3 on average."""
    torch.manual_seed(1)
    G = torch.randn(shape) if spectrum == "gaussian" else with_spectrum(shape)[0].float()
    scheme = SCHEMES[name]
    exact = newton_schulz(G, scheme.coefficients(), scheme.margin, torch.float64)
    bf16 = newton_schulz(G, scheme.coefficients(), scheme.margin, torch.bfloat16)
    assert error(run(G, name), exact) < max(0.9 * error(bf16, exact), 2.5e-3)


@schemes
@pytest.mark.parametrize("steps", [1, 2, 7, 13])
def test_any_number_of_steps(name: str, steps: int) -> None:
    torch.manual_seed(0)
    scheme = SCHEMES[name]
    for shape in ((1, 24, 24), (1, 24, 120)):
        G = torch.randn(shape)
        exact = newton_schulz(G, scheme.coefficients(steps), scheme.margin, torch.float64)
        # Thirteen quintic steps have a slope at zero of 10^7: the smallest singular values are noise in 16 bits.
        assert error(run(G, name, steps), exact) < (0.2 if steps == 13 and name == "quintic" else 0.02)


@schemes
def test_nothing_leaves_the_range_of_fp16(name: str) -> None:
    """One row, one entry, one column: norms that concentrate; `Halves` looks for overflow."""
    for shape in ((1, 64, 70), (1, 64, 400)):
        G = torch.zeros(shape)
        G[0, 3, 5] = 7.0
        assert run(G, name).argmax() == 3 * shape[-1] + 5
        G = torch.randn(shape)
        G[0, 0] *= 1e4
        exact = newton_schulz(G, SCHEMES[name].coefficients(), SCHEMES[name].margin, torch.float32)
        assert error(run(G, name), exact) < 0.01


def test_small_entries_are_not_flushed() -> None:
    """After normalisation the entries of a 64 x 4096 matrix are 2e-3, and a row of a thousandth of that 2e-6."""
    torch.manual_seed(0)
    G = torch.randn(1, 64, 4096)
    G[0, 5] *= 1e-3
    exact = newton_schulz(G, SCHEMES["cubic"].coefficients(), 1.0, torch.float64)
    assert error(run(G, "cubic")[0, 5], exact[0, 5]) < 0.01


def test_zero_and_nan_in_a_batch() -> None:
    for shape in ((3, 20, 20), (3, 20, 90)):
        G = torch.randn(shape)
        G[0], G[1, 2, 2] = 0.0, torch.nan
        out = run(G, "cubic")
        assert torch.equal(out[0], torch.zeros(shape[1:])) and out[1].isnan().all() and out[2].isfinite().all()


def test_the_gram_form_saves_operations_where_it_is_taken() -> None:
    for name, scheme in SCHEMES.items():
        for ratio in (1.0, 1.1, 1.3, 2.0, 4.0, 16.0):
            n, m = 32, int(32 * ratio)
            task = Task(scheme, scheme.steps, N_SMS)
            kernels = Halves()
            run(torch.randn(1, n, m), name, kernels=kernels)
            every = scheme.coefficients()
            standard = sum(3 * n * n * m + (n**3 if c else 0) for _, _, c in every)
            if gram_segments(n, m, task):
                assert kernels.flops < iteration._GRAM_GAIN * standard * 1.001
            else:
                assert kernels.flops >= 0.99 * standard  # tiles of one small matrix are not halved
    assert gram_segments(2048, 8192, Task(SCHEMES["cubic"], 10, N_SMS)) == [SCHEMES["cubic"].coefficients()]
    assert gram_segments(4096, 4096, Task(SCHEMES["cubic"], 10, N_SMS)) == []


def test_half_tiles_are_taken_where_they_save_a_wave() -> None:
    """kernels.md, 1.3: tiles of 128 x 128 on 132 multiprocessors."""
    assert [half_pays(1, n, 132) for n in (512, 768, 1024, 1536, 2048, 3072, 4096, 5120)] == [
        False, False, False, True, False, True, True, True]  # fmt: skip
    assert [half_pays(8, n, 132) for n in (512, 768, 1024, 2048)] == [False, True, True, True]
    for batch in (1, 3, 8):
        for n in range(1, 2000, 37):
            for sms in (1, 108, 132):
                t = math.ceil(n / 128)
                assert half_pays(batch, n, sms) == (-(-batch * t * (t + 1) // 2 // sms) < -(-batch * t * t // sms))


def test_batches() -> None:
    shapes = [(4, 9), (9, 4), (40, 50), (4, 9), (50, 40), *[(40, 50)] * 11]
    G = [torch.randn(s) for s in shapes]
    G[7] = G[7].bfloat16()
    found = batches(G, small=8)
    assert sorted(i for part in found for i in part) == list(range(len(G)))
    assert found[0] == [0, 1, 3]  # every small one, whatever its shape, in one launch
    for part in found[1:]:
        assert len({(G[i].shape, G[i].dtype) for i in part}) == 1 and len(part) <= 8
    assert sorted(map(len, found[1:])) == [1, 1, 3, 8]


def test_batches_are_bounded_in_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iteration, "_BATCH_ELEMENTS", 2 * 40 * 50 + 1)
    G = [torch.randn(40, 50) for _ in range(5)] + [torch.randn(400, 50)]
    kernels = Halves()
    list(orthogonalise(kernels, G, Task(SCHEMES["cubic"], 2, N_SMS)))
    assert kernels.together == [2, 2, 1, 1]


def test_the_batch_does_not_change_a_result() -> None:
    G = torch.randn(5, 24, 80)
    assert torch.equal(run(G, "cubic"), torch.cat([run(G[k : k + 1], "cubic") for k in range(5)]))


def test_small_matrices_take_one_launch() -> None:
    G = [torch.randn(8, 30), torch.randn(30, 8), torch.randn(16, 16)]
    found = list(orthogonalise(Halves(small=16), G, Task(SCHEMES["polar_express"], 8, N_SMS)))
    assert len(found) == 1 and found[0][0] == [0, 1, 2]
    for matrix, factor in zip(G, found[0][1], strict=True):
        exact = newton_schulz(matrix, SCHEMES["polar_express"].coefficients(), 1.01, torch.float64)
        assert error(factor, exact) < 3e-3
