"""Newton-Schulz on a GPU: our kernels beside torch's, all on the same inputs in one process; parity before speed.

Errors are relative (Frobenius), against the reference in fp32 without TF32. Ours may be at most 1.2 times that of
torch's products in bf16: a competitor that errs more is reported and not timed. Inputs are random: on zeros a GPU is
faster than it ever is in use.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu import polar_cases
from gpu.clock import CpuClock
from gpu.memory import no_room, release
from gpu.polar_cases import Case
from jaguar.backends import availability
from jaguar.backends.polar import reference
from jaguar.backends.polar import run as polar_run
from jaguar.method.schemes import SCHEMES
from polar import peers
from polar.peers import NotHere

Row = dict[str, Any]
LIST = "newton-schulz"
# Errors of ours over that of torch in bf16, and what no competitor may reach: it would compute something else.
_WORSE, _OTHER = 1.2, 0.25
# Seconds without which nothing more is begun.
_LEAST = 3.0


def run(
    clock: CpuClock,
    left: Callable[[], float],
    *,
    cases: Sequence[Case] = polar_cases.CASES,
    more: Sequence[Case] = polar_cases.MORE,
    lora: Sequence[polar_cases.Shape] = polar_cases.LORA,
    products: Sequence[tuple[int, int]] = polar_cases.PRODUCTS,
    ceiling: int = polar_cases.CEILING,
    compiled: peers.Compiled | None = None,
) -> Iterator[Row]:
    """All rows as they come; the arguments after `left` are what is measured.

    Kinds of rows: "ceiling"; "ns": a batch or the LoRA factors; "product": a single launch; "failure": parity or
    something else went wrong, and there is no speed; "dropped": not measured, for the reason that it gives.

    Args:
        left: () -> seconds that may still be spent.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    missing = availability.unavailable()
    for name in peers.OWN:
        if name in missing:
            yield _row("dropped", "all", peers.OWN[name], reason=f"not available: {missing[name]}")
    backends = [name for name in peers.OWN if name not in missing]
    compiled = compiled or peers.Compiled()
    top = math.nan
    jobs: list[tuple[str, float, Callable[[], Iterator[Row]]]] = [
        (case.name, case.seconds, partial(_case_rows, case, backends, compiled, clock, left)) for case in cases
    ]
    jobs.append((polar_cases.LORA_NAME, _LEAST, partial(_lora_rows, lora, backends, clock)))
    jobs += [(c.name, c.seconds, partial(_case_rows, c, backends, compiled, clock, left)) for c in more]
    jobs += [(_product_name(b, n), _LEAST, partial(_product_rows, b, n, backends, clock)) for b, n in products]
    with torch.no_grad():
        try:
            top = _ceiling(ceiling, clock)
            yield _row("ceiling", f"{ceiling} x {ceiling} x {ceiling}", "cuBLAS, bf16", tflops=top)
        except Exception as error:  # shares of it are missing then
            yield _row("dropped", "ceiling", "cuBLAS, bf16", reason=_words(error))
        for name, seconds, job in jobs:
            if left() < seconds:
                yield _row("dropped", name, "all", reason="no time was left")
                continue
            try:
                for row in job():
                    yield row | ({"of_ceiling": row["tflops"] / top} if row.get("tflops") and top == top else {})
            except Exception as error:  # the others are still worth measuring
                traceback.print_exc(limit=-8)
                yield _row("failure", name, "all", reason=_words(error))
            release(clock.device)


def _row(kind: str, case: str, competitor: str, **more: Any) -> Row:
    return {"kind": kind, "list": LIST, "method": f"{case}: {competitor}", "case": case, "by": competitor} | more


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _ceiling(side: int, clock: CpuClock) -> float:
    """TFLOP/s of a large product of random numbers, which nothing else here can exceed by much."""
    a, b = (torch.randn(side, side, device=clock.device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    ms = clock.kernel_ms(lambda: torch.mm(a, b, out=out))
    return 2e-9 * side**3 / ms["median"]


def judged(errors: dict[str, float], usual: str, own: Sequence[str]) -> dict[str, str]:
    """Why a competitor's results cannot be accepted, by name.

    Args:
        errors: of all of them.
        usual: whose error ours are measured by.
        own: which are ours.
    """
    found = {}
    for name, error in errors.items():
        bound = _WORSE * errors[usual] if name in own else _OTHER
        if not error <= bound:  # NaN is not
            found[name] = f"parity: relative error {error:.3g}, allowed is {bound:.3g}"
    return found


class _Field:
    """The competitors of one case: who ran, with which error, and the rows of those who did not."""

    def __init__(self, case: str, error: Callable[[Any], float]) -> None:
        self.case, self._error = case, error
        self.calls: dict[str, Callable[[], Any]] = {}
        self.errors: dict[str, float] = {}
        self.rows: list[Row] = []

    def enter(self, name: str, make: Callable[[], tuple[Callable[[], Any], Any]], ours: bool) -> None:
        """Runs a competitor once; `make` returns its call and its first result."""
        try:
            call, result = make()
            self.errors[name] = self._error(result)
            self.calls[name] = call
        except NotHere as reason:
            self.rows.append(_row("dropped", self.case, name, reason=str(reason)))
        except Exception as error:
            traceback.print_exc(limit=-8)
            kind = "failure" if ours else "dropped"
            self.rows.append(_row(kind, self.case, name, reason=_words(error)))

    def sift(self, usual: str, own: Sequence[str]) -> None:
        """Takes out those whose results are wrong."""
        if usual not in self.errors:
            raise RuntimeError(f"{usual} did not run, and without it there is no bound on errors")
        for name, reason in judged(self.errors, usual, own).items():
            del self.calls[name]
            # torch's own mistakes are none of ours.
            self.rows.append(_row("failure" if name in own else "dropped", self.case, name, reason=reason))

    def timed(self, clock: CpuClock) -> dict[str, dict[str, float]]:
        """Times of the others, side by side."""
        return dict(zip(self.calls, clock.side_by_side_ms(list(self.calls.values())), strict=True))


def _first(call: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    return call, call()


def _best(ms: dict[str, dict[str, float]], names: Sequence[str]) -> float | None:
    return min((ms[name]["median"] for name in names if name in ms), default=None)


def _case_rows(
    case: Case, backends: Sequence[str], compiled: peers.Compiled, clock: CpuClock, left: Callable[[], float]
) -> Iterator[Row]:
    if reason := no_room(case.bytes + 2**31, clock.device):
        yield _row("dropped", case.name, "all", reason=reason)
        return
    scheme = SCHEMES[case.scheme]
    coefficients = scheme.coefficients(case.steps)
    # Two matrices take turns, so that the fp32 reference need not do all of a batch.
    pair = torch.randn(min(2, case.batch), case.n, case.m, device=clock.device).to(torch.bfloat16)
    G = pair.repeat(-(-case.batch // len(pair)), 1, 1)[: case.batch]
    exact = reference.newton_schulz(pair, coefficients, scheme.margin, torch.float32)
    matrices = list(G.unbind())
    field = _Field(case.name, partial(_worst, exact))
    for backend in backends:
        call = peers.own(backend, case.scheme, case.steps)
        field.enter(peers.OWN[backend], partial(_first, partial(call, matrices)), ours=True)
    for name, function in ((peers.EAGER, peers.eager), (peers.EACH, peers.each)):
        if name != peers.EACH or case.batch > 1:
            field.enter(name, partial(_first, partial(function, G, coefficients)), ours=False)

    def first_compiled() -> tuple[Callable[[], Any], Any]:
        return partial(compiled, G, case.scheme), compiled.first(G, case.scheme, left() - case.seconds)

    field.enter(peers.COMPILED, first_compiled, ours=False)
    if case.scheme == "quintic":  # it has no other
        field.enter(peers.MUON, lambda: _first(peers.muon(G, case.steps)), ours=False)
    field.sift(peers.EAGER, [peers.OWN[name] for name in backends])
    yield from field.rows
    ms = field.timed(clock)
    best = _best(ms, peers.TORCH)
    for name, found in ms.items():
        yield _row(
            "ns",
            case.name,
            name,
            ms=found,
            error=field.errors[name],
            flops=case.flops,
            tflops=1e-9 * case.flops / found["median"],
            of_torch=best / found["median"] if best else None,
        )


def _lora_rows(shapes: Sequence[polar_cases.Shape], backends: Sequence[str], clock: CpuClock) -> Iterator[Row]:
    """All factors at once against torch's loop over them, by the host's clock: launching is what the loop costs."""
    matrices = [torch.randn(shape, device=clock.device).to(torch.bfloat16) for shape in shapes]
    scheme = SCHEMES["cubic"]
    coefficients = scheme.coefficients()
    exact = [reference.newton_schulz(G, coefficients, scheme.margin, torch.float32) for G in matrices]
    alike: dict[polar_cases.Shape, Tensor] = {s: torch.stack([G for G in matrices if G.shape == s]) for s in shapes}

    def error(outs: Sequence[Tensor]) -> float:
        return max(_relative(a, b) for a, b in zip(outs, exact, strict=True))

    def loop() -> list[Tensor]:
        return [peers.eager(G, coefficients) for G in matrices]

    def batched() -> list[Tensor]:
        queues = {s: iter(peers.eager(G, coefficients)) for s, G in alike.items()}
        return [next(queues[s]) for s in shapes]

    field = _Field(polar_cases.LORA_NAME, error)
    for backend in backends:
        call = peers.own(backend, "cubic", scheme.steps)
        field.enter(peers.OWN[backend], partial(_first, partial(call, matrices)), ours=True)
    field.enter(peers.EACH, partial(_first, loop), ours=False)
    field.enter(peers.EAGER, partial(_first, batched), ours=False)
    field.sift(peers.EACH, [peers.OWN[name] for name in backends])
    yield from field.rows
    device = field.timed(clock)
    ms = {name: clock.wall_ms(call) for name, call in field.calls.items()}
    flops = sum(polar_cases.standard_flops(min(s), max(s), "cubic", scheme.steps) for s in shapes)
    best, of_loop = _best(ms, peers.TORCH), _best(ms, [peers.EACH])
    for name, found in ms.items():
        yield _row(
            "ns",
            polar_cases.LORA_NAME,
            name,
            ms=found,
            device_ms=device[name],
            error=field.errors[name],
            flops=flops,
            tflops=1e-9 * flops / found["median"],
            of_torch=best / found["median"] if best else None,
            of_loop=found["median"] / of_loop if of_loop else None,
        )


def _product_name(batch: int, n: int) -> str:
    return f"X X^T, {batch} x {n} x {n}"


def _product_rows(batch: int, n: int, backends: Sequence[str], clock: CpuClock) -> Iterator[Row]:
    """One launch each: all tiles, half of them, and torch.bmm, fp16 in and out."""
    name = _product_name(batch, n)
    X = (torch.randn(batch, n, n, device=clock.device) / math.sqrt(n)).to(torch.float16)
    exact = torch.bmm(X.float(), X.mT.float())
    field = _Field(name, partial(_worst, exact))
    own = []
    for backend in backends:
        product = polar_run._products(backend).product
        for triangle in (False, True):
            out = torch.empty_like(X)
            own.append(f"{peers.OWN[backend]}, {'triangle' if triangle else 'full'}")
            call = partial(_into, out, partial(product, out, X, X.mT, alpha=1.0, triangle=triangle))
            field.enter(own[-1], partial(_first, call), ours=True)
            if triangle and own[-1] in field.calls and not torch.equal(out, out.mT):
                field.errors[own[-1]] = math.nan  # mirrored tiles are equal to the last bit
    out = torch.empty_like(X)
    field.enter("torch.bmm", partial(_first, partial(_into, out, partial(torch.bmm, X, X.mT, out=out))), ours=False)
    field.sift("torch.bmm", own)
    yield from field.rows
    ms = field.timed(clock)
    flops, best = 2.0 * batch * n**3, _best(ms, ["torch.bmm"])
    for by, found in ms.items():
        yield _row(
            "product",
            name,
            by,
            ms=found,
            error=field.errors[by],
            flops=flops,
            tflops=1e-9 * flops / found["median"],
            of_torch=best / found["median"] if best else None,
        )


def _into(out: Tensor, call: Callable[[], object]) -> Tensor:
    call()
    return out


def _relative(got: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(got.float() - exact) / torch.linalg.vector_norm(exact))


def _worst(exact: Tensor, outs: Sequence[Tensor] | Tensor) -> float:
    """The largest error of a batch whose inputs repeat those of `exact`; NaN where one is."""
    errors = [_relative(out, exact[k % len(exact)]) for k, out in enumerate(outs)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)
