"""Measured rates: counted work over measured time."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sssd_fast.performance import ceilings
from sssd_fast.performance.ceilings import measure_ceilings, median_seconds

CPU = torch.device("cpu")


def test_median_seconds_is_the_time_of_one_call() -> None:
    assert median_seconds(lambda: time.sleep(0.02), 0.1) == pytest.approx(0.02, abs=0.015)


def test_ceilings_are_counted_work_over_measured_time(monkeypatch: pytest.MonkeyPatch) -> None:
    flops: list[int] = []

    def timed(work: Callable[[], object], seconds: float) -> float:
        with FlopCounterMode(display=False) as counter:
            result = work()
        flops.append(counter.get_total_flops())
        copied.append(result.nbytes if isinstance(result, torch.Tensor) else 0)
        return 2.0

    copied: list[int] = []
    monkeypatch.setattr(ceilings, "median_seconds", timed)
    found = measure_ceilings(CPU, torch.float32)
    assert found.matmul_flops == flops[0] / 2 > 0
    assert flops[1] == 0
    assert found.copy_bytes == 2 * copied[1] / 2  # read plus written
    assert found.dtype == "float32"
