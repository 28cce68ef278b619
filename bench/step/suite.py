"""Measurements on each parameter list, their order, and the rows that come out of them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch

import jaguar
from gpu.clock import CpuClock, nothing
from gpu.memory import no_room, release
from jaguar.triton_kernels.launch import around
from step import parity, peers, shapes, traffic
from step.compiled import CompiledSign, TooSlow
from step.shapes import Named, ParameterList

Row = dict[str, Any]
LR = 1e-4
# Bytes per parameter that a list may need at once: parameters, momentum in fp32, a copy of the parameters.
_MEMORY = 8


@dataclass(frozen=True)
class Method:
    """An optimizer of this package as it is measured.

    Attributes:
        name: what it is called in tables.
        make: (named tensors, backend=..., shards=...) -> optimizer.
        fraction: share of the coordinates that is sampled.
    """

    name: str
    make: Callable[..., Any]
    fraction: float = 1.0


def _jaguar(name: str, **options: Any) -> Method:
    return Method(f"JAGUAR {name}", partial(jaguar.JaguarSignSGD, lr=LR, coordinates=0.01, **options), 0.01)


def _zosgd(name: str, kind: type[jaguar.ZOSGD] = jaguar.ZOSGD, **options: Any) -> Method:
    return Method(name, partial(kind, lr=1e-6, **options))


# On every list.
METHODS = (
    _jaguar("all, m bf16", update="all", momentum_dtype=torch.bfloat16),
    _jaguar("sampled, m bf16", update="sampled", momentum_dtype=torch.bfloat16),
    _zosgd("ZO-SGD rademacher, walk", distribution="rademacher", restore="walk"),
    _zosgd("ZO-SGD gaussian, walk", distribution="gaussian", restore="walk"),
)
# On the first list only.
MORE = (
    _jaguar("all, m fp32", update="all", momentum_dtype=torch.float32),
    _jaguar("all, m e5m2", update="all", momentum_dtype=torch.float8_e5m2),
    _zosgd("ZO-SGD rademacher, copy", distribution="rademacher", restore="copy"),
    _zosgd("ZO-SGD gaussian, copy", distribution="gaussian", restore="copy"),
    _zosgd("ZO-SGD rademacher, walk, m bf16", distribution="rademacher", restore="walk", momentum=0.9),
    _zosgd("ZO-SGD gaussian, walk, m bf16", distribution="gaussian", restore="walk", momentum=0.9),
    _zosgd(
        "ZO-SignSGD rademacher, copy, m bf16",
        jaguar.ZOSignSGD,
        distribution="rademacher",
        restore="copy",
        momentum=0.9,
    ),
)


# A launch of the Triton backend: its kernel, its compile-time options, and a function that repeats it.
Launch: TypeAlias = tuple[str, dict[str, Any], Callable[[], None]]


@contextmanager
def launches_kept() -> Iterator[list[Launch]]:
    """All launches meanwhile."""
    kept: list[Launch] = []

    def keep(kernel: str, programs: object, constants: dict[str, Any], run: Callable[[], None]) -> None:
        kept.append((kernel, constants, run))
        run()

    with around(keep):
        yield kept


def _unlike(launches: Sequence[Launch]) -> dict[str, list[Launch]]:
    """The launches by label: one of each job, together with those of it for other dtypes or alignments."""
    found: dict[str, list[Launch]] = {}
    for kernel, constants, again in launches:
        same = found.setdefault(traffic.label(kernel, constants), [])
        if all(constants != other for _, other, _ in same):
            same.append((kernel, constants, again))
    return found


def _kernel_rows(
    launches: Sequence[Launch], method: Method, clock: CpuClock, count: int, copy_gb_s: float, timed: set[str]
) -> Iterator[Row]:
    for label, same in _unlike(launches).items():
        if label in timed:
            continue
        timed.add(label)
        kernel, constants, _ = same[0]
        each, formula = traffic.per_parameter(kernel, constants, method.fraction)
        ms = clock.kernel_ms(lambda same=same: [again() for _, _, again in same])
        gb_s = 1e-6 * each * count / ms["median"]
        yield {
            "kind": "kernel",
            "method": method.name,
            "kernel": label,
            "launches": len(same),
            "formula": formula,
            "bytes_per_parameter": each,
            "bytes": each * count,
            "ms": ms,
            "gb_s": gb_s,
            "of_copy": gb_s / copy_gb_s,
        }


def own_rows(named: Named, method: Method, clock: CpuClock, copy_gb_s: float, timed: set[str]) -> Iterator[Row]:
    """Parity first, then every kernel of a method that was not `timed` before, its whole step and its apply_."""
    optimizer = parity.check(named, method.make)
    losses, cpu = parity.Losses(clock.device), torch.device("cpu")
    with launches_kept() as launches:
        optimizer.step(losses)
        per_step = len(launches)
        record = optimizer.measure(losses)
        before_apply = len(launches)
        optimizer.apply_(record)
        per_apply = len(launches) - before_apply
    yield from _kernel_rows(launches, method, clock, sum(p.numel() for _, p in named), copy_gb_s, timed)
    del launches  # it holds buffers of saved values

    def measure() -> None:
        nonlocal record
        record = optimizer.measure(losses)

    def step() -> None:
        optimizer.step(losses)

    def apply_() -> None:
        optimizer.apply_(record)

    for what, call, before, n in (("step", step, nothing, per_step), ("apply_", apply_, measure, per_apply)):
        losses.place(clock.device)
        wall = clock.wall_ms(call, before)
        losses.place(cpu)
        host = clock.host_ms(call, before)
        yield _step_row(method.name, what, wall, host) | {"launches": n}


def peer_rows(named: Named, peer: Any, clock: CpuClock) -> Iterator[Row]:
    """Its formula first, then its step."""
    peer.check(named)
    losses = parity.Losses(clock.device)
    step = peer(named, losses)
    wall = clock.wall_ms(step)
    losses.place(torch.device("cpu"))
    yield _step_row(peer.name, peer.what, wall, clock.host_ms(step)) | {"peer": True}


def _step_row(method: str, what: str, wall: Row, host: Row) -> Row:
    return {"kind": "step", "method": method, "what": what, "wall_ms": wall, "host_ms": host}


def plan(lists: Sequence[ParameterList]) -> list[tuple[ParameterList, list[Any]]]:
    """What is measured on which list, in this order; what takes long to compile comes after the lists with targets."""
    work: list[tuple[ParameterList, list[Any]]] = []
    for i, entry in enumerate(lists):
        work.append((entry, [*METHODS, *peers.PEERS, *(MORE if i == 0 else ())]))
        if i == min(2, len(lists)) - 1:
            work += [(early, [CompiledSign]) for early in lists[:2]]
    return work


def run(
    work: Sequence[tuple[ParameterList, Sequence[Any]]], clock: CpuClock, left: Callable[[], float]
) -> Iterator[Row]:
    """The rows of everything in `work` for which there is time, as they come.

    Kinds of rows: "copy", "kernel", "step"; "failure": parity or something else went wrong, and there is no speed;
    "dropped": not measured, for the reason that it gives.

    Args:
        left: () -> seconds that may still be spent.
    """
    for entry, jobs in work:
        reason = no_room(_MEMORY * entry.count + 2**32, clock.device) if left() > _LEAST else "no time was left"
        if reason:
            yield from ({"kind": "dropped", "list": entry.name, "method": job.name, "reason": reason} for job in jobs)
            continue
        named = shapes.tensors(entry, clock.device)
        copy = clock.copy_gb_s()
        yield {"kind": "copy", "list": entry.name, **copy}
        timed: set[str] = set()  # kernels that more than one method launches
        for job in jobs:
            for row in _guarded(named, job, clock, copy["gb_s"], left, timed):
                yield {"list": entry.name, **row}
            release(clock.device)
        del named
        release(clock.device)


# Seconds without which nothing more is begun.
_LEAST = 8.0


def _guarded(
    named: Named, job: Any, clock: CpuClock, copy_gb_s: float, left: Callable[[], float], timed: set[str]
) -> Iterator[Row]:
    """The rows of one job, or one row that says why there are none (or no more)."""
    if left() < max(_LEAST, getattr(job, "seconds", 0.0)):
        yield {"kind": "dropped", "method": job.name, "reason": "no time was left"}
        return
    try:
        shapes.fill_(named)
        if isinstance(job, Method):
            yield from own_rows(named, job, clock, copy_gb_s, timed)
        else:
            yield from peer_rows(named, job, clock)
    except TooSlow as error:
        yield {"kind": "dropped", "method": job.name, "reason": str(error)}
    except parity.Mismatch as error:
        yield {"kind": "failure", "method": job.name, "reason": f"parity: {error}"}
    except Exception as error:  # the others are still worth measuring
        traceback.print_exc(limit=-8)
        text = " ".join(str(error).split())[:200]
        yield {"kind": "failure", "method": job.name, "reason": f"{type(error).__name__}: {text}"}
