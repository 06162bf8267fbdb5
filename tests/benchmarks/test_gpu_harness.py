"""The harness on a CUDA device: what is timed, allocator, and all ops in bf16."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from benchmarks import ops
from benchmarks.harness import Bench, run_op
from benchmarks.race import Cache, peak_bytes, race, summary, versus
from benchmarks.results import Results
from mae_kernels import Sample
from sssd_fast.run.log import Console

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
CYCLES = 2_000_000  # about a millisecond
EAGER = ["published", "plain", "sdpa auto", "ours"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    found = Results("ops", CUDA, (), ["ops"], tmp_path / "rows.json", ceilings={})
    return Bench(CUDA, Console(enabled=False), found, Cache(CUDA), samples=5, only=EAGER)


def test_events_time_the_device_and_host_time_does_not_wait_for_it() -> None:
    calls = {"one": lambda: torch.cuda._sleep(CYCLES), "two": lambda: torch.cuda._sleep(2 * CYCLES)}
    found = race(calls, CUDA, Cache(CUDA), samples=20)
    one, two = summary(found["one"]), summary(found["two"])
    assert 100 < one.median_us < 20_000
    assert versus(found["two"], found["one"]).ratio == pytest.approx(2, rel=0.2)
    assert max(one.host_us, two.host_us) < 0.5 * one.median_us


def test_python_of_a_provider_is_host_time_and_not_time_of_the_device() -> None:
    x = torch.zeros(1 << 10, device=CUDA)

    def slow_python() -> None:
        end = time.perf_counter() + 1e-3
        while time.perf_counter() < end:
            pass
        x.add_(1)

    found = race({"fast": lambda: x.add_(1), "slow": slow_python}, CUDA, Cache(CUDA), samples=20)
    fast, slow = summary(found["fast"]), summary(found["slow"])
    assert fast.how == slow.how == "graph"
    assert slow.host_us >= 1000 > 5 * fast.host_us
    assert slow.median_us < 2 * fast.median_us + 20


def test_call_that_cannot_be_captured_is_timed_after_a_delay() -> None:
    x = torch.zeros(1 << 10, device=CUDA)
    (found,) = race({"waits": lambda: float(x.add_(1)[0])}, CUDA, Cache(CUDA), samples=3).values()
    assert {one.how for one in found} == {"delayed call"}
    torch.rand(2, device=CUDA)  # a failed capture would leave the generator unusable


def test_flush_is_larger_than_the_cache() -> None:
    size = torch.cuda.get_device_properties(CUDA).L2_cache_size
    assert Cache(CUDA).bytes >= min(2 * size, 256 << 20)


def test_peak_is_what_the_call_allocates() -> None:
    held = torch.ones(1 << 20, device=CUDA)
    assert peak_bytes(lambda: (held * 2).exp(), CUDA) == 2 * held.nbytes
    assert peak_bytes(lambda: held.add_(1), CUDA) == 0


@pytest.mark.parametrize("sample", [*ops.samples("ops"), *ops.samples("attention")], ids=str)
def test_op_passes_its_gate(sample: Sample, bench: Bench) -> None:
    op = ops.op_of(sample, CUDA, torch.bfloat16, 5)
    for row in run_op(bench, op):
        assert row.reason is None, f"{row.provider}, {row.phase}: {row.reason}"
        assert row.time is not None
