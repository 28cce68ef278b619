"""Timing: CUDA events for kernels, the host's clock around whole steps; medians and quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], object]

# Far above the L2 cache of any GPU so far (60 MB on an H200, 126 MB on a B200).
_FLUSH = 2**28
# About 0.2 ms: the host has recorded and launched before the GPU gets there, so that its own time is not measured.
_HEAD_START = 400_000
# For calls that launch a lot: cycles of a fast clock per second of the host, and the most of them.
_CYCLES_PER_SECOND, _LONGEST_HEAD_START = 2.5e9, 50_000_000


def nothing() -> None:
    """What is done before a repetition that needs no preparation."""


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and number of samples."""
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return {"median": median, "q1": q1, "q3": q3, "n": len(samples)}


def repeats(one: float, seconds: float, least: int, most: int) -> int:
    """How often something that takes `one` second fits into `seconds`, within bounds."""
    return max(least, min(most, int(seconds / max(one, 1e-9))))


class CpuClock:
    """Times by the host's clock on the CPU: enough to try the benchmark where there is no GPU, and no measurement.

    Args:
        device: where tensors lie.
        seconds: what one measurement may take, about.
        least: repetitions of a measurement, however long they take.
        warm_up: calls before them that are not timed.
    """

    copy_bytes = 2**30

    def __init__(self, device: torch.device, seconds: float, least: int = 5, warm_up: int = 3) -> None:
        self.device, self._seconds, self._least, self._warm_up = device, seconds, least, warm_up

    def synchronize(self) -> None:
        """Waits until the device has nothing left to do."""

    def _calibrated(self, call: Call, most: int, before: Call = nothing) -> int:
        """Warms up, and says how many repetitions fit into the time."""
        one, _ = self._warmed(call, before)
        return repeats(one, self._seconds, self._least, most)

    def _warmed(self, call: Call, before: Call = nothing) -> tuple[float, float]:
        """Seconds of the last call of the warm-up, and of the host in it; 0 without a warm-up."""
        one = host = 0.0
        for _ in range(self._warm_up):
            self.synchronize()
            begin = time.perf_counter()
            before()
            call()
            host = time.perf_counter() - begin
            self.synchronize()
            one = time.perf_counter() - begin
        return one, host

    def kernel_ms(self, call: Call) -> dict[str, float]:
        """Milliseconds of the device's work that `call` queues."""
        return self.wall_ms(call)

    def side_by_side_ms(self, calls: Sequence[Call]) -> list[dict[str, float]]:
        """Milliseconds of the device's work of several calls, one after the other in every round.

        What changes while they run (clocks, temperature) meets all of them alike.
        """
        found = self._rounds(calls, self._by_the_host)
        return [summary([1e3 * (end - begin) for begin, end in pairs]) for pairs in found]

    def _rounds(self, calls: Sequence[Call], timed: Callable[[Call, float], Any]) -> list[list[Any]]:
        """What `timed` (call, seconds that the host needs for it) returns, for every call and round."""
        needs = [self._warmed(call) for call in calls]
        n = repeats(sum(whole for whole, _ in needs), self._seconds * len(calls), self._least, 100)
        found: list[list[Any]] = [[] for _ in calls]
        for _ in range(n):
            for call, (_, host), own in zip(calls, needs, found, strict=True):
                own.append(timed(call, host))
        self.synchronize()
        return found

    def _by_the_host(self, call: Call, host: float) -> tuple[float, float]:
        self.synchronize()
        begin = time.perf_counter()
        call()
        self.synchronize()
        return begin, time.perf_counter()

    def wall_ms(self, call: Call, before: Call = nothing) -> dict[str, float]:
        """Milliseconds until the work of `call` is done, from an idle device; `before` is not timed."""
        return self._timed(call, before, wait=True)

    def host_ms(self, call: Call, before: Call = nothing) -> dict[str, float]:
        """Milliseconds until `call` returns, from an idle device; what it queued may still be running."""
        return self._timed(call, before, wait=False)

    def _timed(self, call: Call, before: Call, wait: bool) -> dict[str, float]:
        samples = []
        for _ in range(self._calibrated(call, 50, before)):
            before()
            self.synchronize()
            begin = time.perf_counter()
            call()
            if wait:
                self.synchronize()
            samples.append(1e3 * (time.perf_counter() - begin))
        self.synchronize()
        return summary(samples)

    def copy_gb_s(self) -> dict[str, Any]:
        """The yardstick: bytes read and written by a copy within the device's memory, per second."""
        source = torch.empty(self.copy_bytes // 4, dtype=torch.float32, device=self.device).normal_()
        target = torch.empty_like(source)
        ms = self.kernel_ms(lambda: target.copy_(source))
        return {"bytes": 2 * self.copy_bytes, "ms": ms, "gb_s": 2e-6 * self.copy_bytes / ms["median"]}


class CudaClock(CpuClock):
    """Times on a GPU. Kernels start with a cold L2 cache: in a training step a whole forward pass lies between."""

    def __init__(self, device: torch.device, seconds: float, least: int = 5, warm_up: int = 3) -> None:
        super().__init__(device, seconds, least, warm_up)
        self._flush = torch.ones(_FLUSH // 4, dtype=torch.float32, device=device)

    def synchronize(self) -> None:
        """Waits until the device has nothing left to do."""
        torch.cuda.synchronize()

    def kernel_ms(self, call: Call) -> dict[str, float]:
        """Milliseconds of the device's work that `call` queues, by CUDA events."""
        events = [self._between_events(call) for _ in range(self._calibrated(call, 100))]
        self.synchronize()
        return summary([begin.elapsed_time(end) for begin, end in events])

    def side_by_side_ms(self, calls: Sequence[Call]) -> list[dict[str, float]]:
        """As `kernel_ms`; the head start lasts until the host has launched all of a call."""

        def timed(call: Call, host: float) -> Any:
            return self._between_events(call, int(1.2 * host * _CYCLES_PER_SECOND))

        return [summary([begin.elapsed_time(end) for begin, end in pairs]) for pairs in self._rounds(calls, timed)]

    def _between_events(self, call: Call, head_start: int = _HEAD_START) -> tuple[Any, Any]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.sum()  # reads, so that no written lines are left for the timed kernel to evict
        torch.cuda._sleep(min(max(head_start, _HEAD_START), _LONGEST_HEAD_START))
        begin.record()
        call()
        end.record()
        return begin, end
