"""What the machine at hand can do, measured: the rates of a large matrix product and of a large
copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.benchmark import Timer


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
    cuda = device.type == "cuda"
    n, copied = (8192, 2**29) if cuda else (1024, 2**26)
    a, b, product = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    source, target = (torch.zeros(copied, dtype=torch.uint8, device=device) for _ in range(2))
    # The timer waits for the current device; -1 changes nothing.
    with torch.cuda.device(device if cuda else -1):
        matmul_s = median_seconds(partial(torch.mm, a, b, out=product), seconds)
        copy_s = median_seconds(partial(target.copy_, source), seconds)
    return Ceilings(2.0 * n**3 / matmul_s, 2.0 * copied / copy_s, str(dtype).removeprefix("torch."))


def median_seconds(work: Callable[[], object], seconds: float) -> float:
    """Median time of one call, the work on a GPU included."""
    threads = torch.get_num_threads()
    timer = Timer("work()", globals={"work": work}, num_threads=threads)
    return float(timer.blocked_autorange(min_run_time=seconds).median)
