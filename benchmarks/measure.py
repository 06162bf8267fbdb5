"""How time and memory are measured, the same for every provider.

- Device events on CUDA, perf_counter elsewhere; every sample is one call.
- Before each sample a buffer larger than the last cache is written, outside the timed window: every call finds its inputs in
  memory, not in a cache. On CUDA that write also keeps the device busy while the host submits the call, so that launching shows
  only where it takes longer than the work.
- Providers take turns, and each round begins with another one: what drifts (clocks, neighbours) meets all alike.
- Two passes. The figures are those of the first; "gap" is the second median against it.
- The first call (compilation, allocation) and the warm-up are timed apart and enter no figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Call = Callable[[], object]
SAMPLES, PASSES = 50, 2
WARM_UP_CALLS, WARM_UP_S = 3, 0.03
SAME = 0.02  # medians closer than this are called the same, however sure the difference is
BOOTSTRAPS = 1000
UNKNOWN_CACHE, LARGEST_FLUSH = 64 << 20, 256 << 20  # bytes


@dataclass(frozen=True)
class Time:
    """Microseconds of one call. `again_us` is the median of the second pass, `gap` = again / median - 1 (None: one pass)."""

    median_us: float
    p20_us: float
    p80_us: float
    n: int
    again_us: float | None = None
    gap: float | None = None


@dataclass(frozen=True)
class Versus:
    """One provider's time divided by another's, with a 95 % interval; verdict: "slower", "faster" or "same"."""

    ratio: float
    low: float
    high: float
    verdict: str


# ---- time ----


class Cache:
    """A buffer whose writing empties the last cache of a device; bytes = 0 leaves the cache as it is."""

    def __init__(self, device: torch.device, size: int | None = None) -> None:
        self.bytes = cache_bytes(device) if size is None else size
        self._buffer = torch.zeros(self.bytes, dtype=torch.uint8, device=device)

    def flush(self) -> None:
        if self.bytes:
            self._buffer.zero_()


def cache_bytes(device: torch.device) -> int:
    """Twice the last cache of the device, at least 8 MiB and at most 256 MiB."""
    if device.type == "cuda":
        size = int(torch.cuda.get_device_properties(device).L2_cache_size)
    else:
        found = [
            _kib(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        ]
        size = max(found, default=0) << 10
    return min(max(2 * size, 8 << 20), LARGEST_FLUSH) if size else UNKNOWN_CACHE


def _kib(path: Path) -> int:
    text = path.read_text().strip()
    return int(text[:-1]) * {"K": 1, "M": 1024}.get(text[-1:], 1) if text[:-1].isdigit() else 0


def first_call(call: Call, device: torch.device) -> float:
    """Seconds of the first call: compilation and allocation included."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def warm_up(call: Call, device: torch.device) -> None:
    start, calls = time.perf_counter(), 0
    while calls < WARM_UP_CALLS or time.perf_counter() - start < WARM_UP_S:
        call()
        _wait(device)
        calls += 1


def race(
    calls: Mapping[str, Call],
    device: torch.device,
    cache: Cache,
    *,
    samples: int = SAMPLES,
    passes: int = PASSES,
) -> dict[str, list[list[float]]]:
    """Seconds of each call, by provider and pass."""
    names = list(calls)
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in range(passes)] for name in names}
    for number in range(passes):
        for call in calls.values():
            warm_up(call, device)
        for turn in range(samples):
            first = turn // 2 % len(names)
            order = names[first:] + names[:first]
            for name, spent in _round(calls, order[:: -1 if turn % 2 else 1], device, cache):
                seconds[name][number].append(spent)
    return seconds


def _round(
    calls: Mapping[str, Call], order: Sequence[str], device: torch.device, cache: Cache
) -> list[tuple[str, float]]:
    if device.type != "cuda":
        spent = []
        for name in order:
            cache.flush()
            start = time.perf_counter()
            calls[name]()
            spent.append((name, time.perf_counter() - start))
        return spent
    with torch.cuda.device(device):
        moments: list[tuple[str, Any, Any]] = [(name, _event(), _event()) for name in order]
        for name, begin, end in moments:
            cache.flush()
            begin.record()
            calls[name]()
            end.record()
        torch.cuda.synchronize(device)
    return [(name, begin.elapsed_time(end) / 1000) for name, begin, end in moments]


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(passes: Sequence[Sequence[float]]) -> Time:
    """Of seconds by pass."""
    first = np.asarray(passes[0]) * 1e6
    p20, median, p80 = (float(q) for q in np.quantile(first, (0.2, 0.5, 0.8)))
    again = statistics.median(passes[1]) * 1e6 if len(passes) > 1 else None
    return Time(median, p20, p80, len(first), again, None if again is None else again / median - 1)


def versus(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> Versus:
    """Provider `a` against `b`, both seconds by pass from one race.

    "same" where the bootstrapped 95 % interval of the ratio of medians, all passes together, holds 1, where the ratio is within 2 %
    of 1, or within the gap that either provider shows between its own passes.
    """
    rng = np.random.default_rng(0)
    medians = []
    for passes in (a, b):
        pool = np.concatenate([np.asarray(p) for p in passes])
        medians.append(np.median(rng.choice(pool, (BOOTSTRAPS, len(pool))), axis=1))
    ratio = float(np.median(np.concatenate(list(a))) / np.median(np.concatenate(list(b))))
    low, high = (float(q) for q in np.quantile(medians[0] / medians[1], (0.025, 0.975)))
    margin = max([SAME, *(abs(gap) for gap in (summary(a).gap, summary(b).gap) if gap is not None)])
    if low <= 1 <= high or abs(np.log(ratio)) <= np.log1p(margin):
        return Versus(ratio, low, high, "same")
    return Versus(ratio, low, high, "slower" if ratio > 1 else "faster")


# ---- memory ----


def peak_bytes(call: Call, device: torch.device) -> int:
    """Largest memory that one call has beyond what was there before it, its results included; call it before.

    CUDA: torch's allocator. CPU: every allocation and release of torch's allocator, as its profiler records them, so that
    compiled code counts like any other.
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
    moves = [
        event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    now = peak = 0
    for event in sorted(moves, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# ---- correctness ----


def error_of(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest error of any value, relative to the largest value of its own tensor. Raises ValueError for another shape or number."""
    if len(got) != len(exact):
        raise ValueError(f"{len(got)} results where there are {len(exact)}")
    worst = 0.0
    for number, (g, e) in enumerate(zip(got, exact, strict=True)):
        if g.shape != e.shape:
            raise ValueError(
                f"result {number} has shape {tuple(g.shape)}, the reference {tuple(e.shape)}"
            )
        if g.numel():
            difference = (g.double() - e.double()).abs().max()
            scale = e.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
            worst = max(
                worst,
                float(difference / scale) if bool(torch.isfinite(difference)) else float("inf"),
            )
    return worst


def allowed_error(eager: float, dtype: torch.dtype) -> float:
    """Twice the error of plain eager PyTorch in the same dtype against fp64, and 32 fp32 roundings for sums in another order.

    Where eager itself gives no number the roundings alone are allowed: nobody is excused by it.
    """
    eager = eager if np.isfinite(eager) else 0.0
    return 2 * eager + 32 * torch.finfo(torch.float32 if dtype.itemsize < 4 else dtype).eps


def tensors(out: Any) -> list[Tensor]:
    """The results of a call as a flat list, scalars and tuples included."""
    if isinstance(out, Tensor):
        return [out]
    return [t for item in out for t in tensors(item)] if isinstance(out, (tuple, list)) else []
