"""How time, memory and errors are measured; the same for every provider (README.md, rules 3 to 5).

CUDA events on a GPU, perf_counter on a CPU. Every sample is one call. Before each one a buffer
larger than the last-level cache is written outside the timed window, so that inputs are read from
memory. On a GPU the time is that of the kernels: the call is captured in a CUDA graph once, and its
replay is timed. A call that cannot be captured is submitted while the device is held up. The time
until the call itself returns is the host time. Each round starts with another provider, so that
drift (clocks, other processes) affects all of them equally.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)
SAMPLES = 100
WARM_UP_CALLS, WARM_UP_S, SLOW_S = 3, 0.03, 1.0
SAME = 0.02  # medians closer than this are reported as the same
BOOTSTRAPS = 1000
LARGEST_FLUSH = 256 << 20  # bytes
BUSY = 0.1  # share of the usable CPUs used by other processes, from which on verdicts are doubtful
SPREAD = 1.5  # p80 / p20, from which on verdicts are doubtful
DELAY_CYCLES_PER_S, LONGEST_DELAY_S = 3e9, 0.02  # no GPU has a faster clock


class Sample(NamedTuple):
    seconds: float
    host: float  # seconds until the call returned
    how: str = "call"  # "graph" and "delayed call": seconds of the device alone


@dataclass(frozen=True)
class Time:
    """Microseconds of one call. gap: the median of the second half of the samples relative to that
    of the first half, minus 1."""

    median_us: float
    p20_us: float
    p80_us: float
    n: int
    gap: float
    host_us: float
    how: str = "call"


@dataclass(frozen=True)
class Versus:
    """Time divided by that of ours, with a 95 % interval; "slower", "faster" or "same"."""

    ratio: float
    low: float
    high: float
    verdict: str


class Cache:
    """A buffer; writing it evicts the last-level cache of the device.

    size: bytes, 0 disables it; default: twice the L2 cache of a GPU, LARGEST_FLUSH on a CPU.
    """

    def __init__(self, device: torch.device, size: int | None = None) -> None:
        self.bytes = LARGEST_FLUSH if size is None else size
        if size is None and device.type == "cuda":
            cache = int(torch.cuda.get_device_properties(device).L2_cache_size)
            self.bytes = min(max(2 * cache, 8 << 20), LARGEST_FLUSH)
        self._buffer = torch.zeros(self.bytes, dtype=torch.uint8, device=device)

    def flush(self) -> None:
        if self.bytes:
            self._buffer.zero_()


def first_call(call: Call, device: torch.device) -> float:
    """Seconds of the first call, including compilation and allocation."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def race(
    calls: Mapping[Name, Call],
    device: torch.device,
    cache: Cache,
    samples: int = SAMPLES,
    replayed: bool = True,
) -> dict[Name, list[Sample]]:
    """The samples of each call. replayed: of the device alone, if it is a GPU."""
    names = list(calls)
    found: dict[Name, list[Sample]] = {name: [] for name in names}
    for call in calls.values():
        warm_up(call, device)
    timed = {name: TimedCall(call, call) for name, call in calls.items()}
    if device.type == "cuda" and replayed:
        pool = torch.cuda.graph_pool_handle()  # one for all: no result of a replay is read
        timed = {name: on_device(call, device, pool) for name, call in calls.items()}
    for turn in range(samples):
        first = turn // 2 % len(names)
        order = (names[first:] + names[:first])[:: -1 if turn % 2 else 1]
        started = {name: _sample(timed[name], device, cache) for name in order}
        wait(device)
        for name, sample in started.items():
            found[name].append(sample())
    return found


class TimedCall(NamedTuple):
    call: Call
    submit: Call  # what is timed
    how: str = "call"
    delay_s: float = 0.0  # how long the device is held up before it


def on_device(call: Call, device: torch.device, pool: Any) -> TimedCall:
    """The replay of the call's CUDA graph. If it cannot be captured, the call after a delay of
    twice its host time, so that its kernels are queued when the device starts.
    """
    wait(device)
    delay_s = min(2 * _seconds(call), LONGEST_DELAY_S)
    wait(device)
    graph = torch.cuda.CUDAGraph()
    try:
        # A call that waits for the device cannot be captured. This finds it without a failed
        # capture, after which torch's generators of random numbers are unusable.
        with warnings.catch_warnings():  # that this check is a prototype
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        call()
        torch.cuda.set_sync_debug_mode("default")
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool):
            call()
    except Exception:  # noqa: BLE001 - the same call ran before: only its capture fails
        return TimedCall(call, call, "delayed call", delay_s)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return TimedCall(call, graph.replay, "graph")


def warm_up(call: Call, device: torch.device) -> None:
    """At least three calls, or one that takes a second."""
    start, calls, spent = time.perf_counter(), 0, 0.0
    while (calls < WARM_UP_CALLS or spent < WARM_UP_S) and spent < SLOW_S:
        call()
        wait(device)
        calls += 1
        spent = time.perf_counter() - start


def _sample(one: TimedCall, device: torch.device, cache: Cache) -> Callable[[], Sample]:
    """Calls once; the sample can be read when the device has finished."""
    cache.flush()
    if device.type != "cuda":
        seconds = _seconds(one.call)
        return lambda: Sample(seconds, seconds)
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if one.delay_s:
            torch.cuda._sleep(int(one.delay_s * DELAY_CYCLES_PER_S))
        begin.record()
        host = _seconds(one.submit)
        end.record()
        if one.submit is not one.call:
            host = _seconds(one.call)
    return lambda: Sample(begin.elapsed_time(end) / 1000, host, one.how)


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gap_of(values: Sequence[float]) -> float:
    """The median of the second half relative to that of the first, minus 1; 0 for one value."""
    half = len(values) // 2
    return float(np.median(values[-half:]) / np.median(values[:half]) - 1) if half else 0.0


def summary(samples: Sequence[Sample]) -> Time:
    us = [one.seconds * 1e6 for one in samples]
    p20, median, p80 = (float(q) for q in np.quantile(us, (0.2, 0.5, 0.8)))
    host_us = float(np.median([one.host for one in samples])) * 1e6
    return Time(median, p20, p80, len(us), gap_of(us), host_us, samples[0].how)


def versus(a: Sequence[Sample], b: Sequence[Sample]) -> Versus:
    """Provider `a` relative to provider `b` of the same race.

    "same" if the bootstrapped 95 % interval of the ratio of medians contains 1, if the ratio is
    within 2 % of 1, or if it is within the gap of either provider.
    """
    rng = np.random.default_rng(0)
    pools = [np.asarray([one.seconds for one in samples]) for samples in (a, b)]
    medians = [np.median(rng.choice(pool, (BOOTSTRAPS, len(pool))), axis=1) for pool in pools]
    ratio = float(np.median(pools[0]) / np.median(pools[1]))
    low, high = (float(q) for q in np.quantile(medians[0] / medians[1], (0.025, 0.975)))
    margin = max(SAME, *(abs(summary(samples).gap) for samples in (a, b)))
    if low <= 1 <= high or abs(np.log(ratio)) <= np.log1p(margin):
        return Versus(ratio, low, high, "same")
    return Versus(ratio, low, high, "slower" if ratio > 1 else "faster")


# ---- load of the machine ----


class Load:
    """CPU time that other processes use on the CPUs that this process may use."""

    def __init__(self) -> None:
        self._start = self._now()

    def others(self) -> float | None:
        """Share of the usable CPUs since the object was created, 0 to 1; None if unknown."""
        now = self._now()
        if now is None or self._start is None or now[0] - self._start[0] < 1:
            return None  # /proc/stat counts in steps of 10 ms: too short to say anything
        wall, busy, own = (end - start for end, start in zip(now, self._start, strict=True))
        return min(max((busy - own) / (wall * len(os.sched_getaffinity(0))), 0.0), 1.0)

    def _now(self) -> tuple[float, float, float] | None:
        """Seconds: wall clock, all processes on the usable CPUs, this process and its children."""
        try:
            usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}
            lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        except (OSError, AttributeError):  # not Linux
            return None
        # user, nice, system, idle, iowait, irq, softirq, steal; guest time is part of user time
        ticks = sum(sum(map(int, [*w[1:4], *w[6:9]])) for w in lines if w and w[0] in usable)
        own = sum(os.times()[:4])
        for process in multiprocessing.active_children():  # counted above only after their end
            with suppress(OSError):
                stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                own += (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), own


def doubt(load: float | None, times: Sequence[Mapping[str, float]]) -> str | None:
    """Why the verdicts of a race are doubtful; None if they are not."""
    reasons = []
    if load is not None and load > BUSY:
        reasons.append(f"other processes used {load:.0%} of the CPUs")
    wide = max((time["p80_us"] / time["p20_us"] for time in times), default=1.0)
    if wide > SPREAD:
        reasons.append(f"p80 is up to {wide:.1f} times p20")
    return f"{' and '.join(reasons)}: repeat on an idle machine" if reasons else None


# ---- memory ----


def peak_bytes(call: Call, device: torch.device) -> int:
    """Peak memory of one call beyond what was allocated before it, including its results.

    CUDA: torch's allocator. CPU: every allocation and release of torch's allocator as its profiler
    records them, so that compiled code is included. Call the function once before.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = call()
        torch.cuda.synchronize(device)
        del kept
        return int(torch.cuda.max_memory_allocated(device) - before)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = call()
        del kept
    events = found.profiler.kineto_results.events()
    moves = [event for event in events if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(moves, key=lambda event: event.start_ns())]
    return int(max(np.cumsum(sizes), default=0))


# ---- correctness ----


def error_of(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest error of any value, relative to the largest value of its own tensor.

    Raises ValueError for another number or shape of results.
    """
    if [t.shape for t in got] != [t.shape for t in exact]:
        raise ValueError(f"results of shapes {[list(t.shape) for t in got]}")
    worst = 0.0
    for g, e in zip(got, exact, strict=True):
        if g.numel():
            difference = float((g.double() - e.double()).abs().max())
            scale = max(float(e.double().abs().max()), torch.finfo(torch.float64).tiny)
            worst = max(worst, difference / scale if np.isfinite(difference) else float("inf"))
    return worst


def allowed_error(eager: float, dtype: torch.dtype) -> float:
    """Twice the error of eager PyTorch in the same dtype, plus 32 fp32 roundings (order of sums).

    If eager overflows, only the roundings are allowed.
    """
    eager = eager if np.isfinite(eager) else 0.0
    return 2 * eager + 32 * torch.finfo(torch.float32 if dtype.itemsize < 4 else dtype).eps


def tensors(out: Any) -> list[Tensor]:
    """The tensors of a result as a flat list."""
    if isinstance(out, Tensor):
        return [out]
    return [t for item in out for t in tensors(item)] if isinstance(out, (tuple, list)) else []
