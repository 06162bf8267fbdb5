"""What the machine at hand can do, measured: the rates of a large matrix product and of a large
copy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch


@dataclass(frozen=True)
class Ceilings:
    """Never from a data sheet: the best that a large product and a large copy reach here."""

    matmul_flops: float  # FLOP/s
    copy_bytes: float  # bytes/s, read plus written
    dtype: str  # of the product


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.5) -> Ceilings:
    """Medians over about `seconds` each, with the number of threads and the TF32 setting that
    torch has now.
    """
    n, copied = (8192, 2**29) if device.type == "cuda" else (1024, 2**26)
    a, b, product = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    matmul_s = median_seconds(partial(torch.mm, a, b, out=product), device, seconds)
    source, target = (torch.zeros(copied, dtype=torch.uint8, device=device) for _ in range(2))
    copy_s = median_seconds(partial(target.copy_, source), device, seconds)
    return Ceilings(2.0 * n**3 / matmul_s, 2.0 * copied / copy_s, str(dtype).removeprefix("torch."))


def median_seconds(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median time of one call after two for warming up; at least 3 and at most 200 calls. Device
    events on CUDA.
    """
    cuda, times = device.type == "cuda", list[float]()
    for _ in range(2):
        work()
    started = time.perf_counter()
    while len(times) < 3 or (len(times) < 200 and time.perf_counter() - started < seconds):
        if cuda:
            with torch.cuda.device(device):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                work()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1000)
        else:
            before = time.perf_counter()
            work()
            times.append(time.perf_counter() - before)
    return statistics.median(times)
