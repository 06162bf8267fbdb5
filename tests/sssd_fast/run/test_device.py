"""Memory of the process, and errors about it."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection

import pytest
import torch

from sssd_fast.run.device import is_out_of_memory, peak_memory_gib


def measure_memory(pipe: Connection) -> None:
    before = peak_memory_gib("cpu")
    # 0.75 GiB
    block = torch.ones(3 << 26)
    during = peak_memory_gib("cpu")
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    del block
    pipe.send((before, during, resident, peak_memory_gib("cpu")))


def test_peak_memory_is_that_of_this_process_in_gib() -> None:
    """In a fresh process: this one has a peak and freed memory of the tests before."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    child = context.Process(target=measure_memory, args=(theirs,))
    child.start()
    before, during, resident, after = pipe.recv()
    child.join()
    assert during - before == pytest.approx(0.75, abs=0.1)
    assert during == pytest.approx(resident, abs=0.05)
    # the kernel batches its counters
    assert after == pytest.approx(during, abs=0.05)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (ValueError("out of memory"), False),
        (RuntimeError("out of resource: shared memory, Required: 232448"), False),
        (RuntimeError("DataLoader worker is killed: workers are out of shared memory"), False),
        (None, False),
    ],
)
def test_is_out_of_memory(error: BaseException | None, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
    wrapped = ValueError("backend failed")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped) is expected


def test_is_out_of_memory_recognises_a_real_error() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(1 << 60)
    assert is_out_of_memory(real.value)
