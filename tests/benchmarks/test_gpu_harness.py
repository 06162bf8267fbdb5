"""The harness on a CUDA device: events, allocator, nvidia-smi, and all ops in bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import attention, results
from benchmarks.harness import Bench, run_case
from benchmarks.ops import OPS
from benchmarks.race import Cache, cache_bytes, peak_bytes, race, summary, versus
from benchmarks.results import Results
from benchmarks.shapes import MODELS, SEQUENCES
from sssd_fast.run.log import Console

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
CYCLES = 2_000_000  # about a millisecond
EAGER = ["published", "tuned", "library", "eager", "sdpa auto", "ours"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    found = Results("ops", CUDA, (), words=["ops"], path=tmp_path / "rows.json", ceilings={})
    return Bench(CUDA, Console(enabled=False), found, Cache(CUDA), samples=5, only=EAGER)


def test_events_time_the_device_and_host_time_does_not_wait_for_it() -> None:
    calls = {"one": lambda: torch.cuda._sleep(CYCLES), "two": lambda: torch.cuda._sleep(2 * CYCLES)}
    found = race(calls, CUDA, Cache(CUDA), samples=20)
    one, two = summary(found["one"]), summary(found["two"])
    assert 100 < one.median_us < 20_000
    assert versus(found["two"], found["one"]).ratio == pytest.approx(2, rel=0.2)
    assert one.host_us is not None and two.host_us is not None
    assert max(one.host_us, two.host_us) < 0.5 * one.median_us


def test_flush_is_larger_than_the_cache() -> None:
    size = torch.cuda.get_device_properties(CUDA).L2_cache_size
    assert cache_bytes(CUDA) >= min(2 * size, 256 << 20)


def test_peak_is_what_the_call_allocates() -> None:
    held = torch.ones(1 << 20, device=CUDA)
    assert peak_bytes(lambda: (held * 2).exp(), CUDA) == 2 * held.nbytes
    assert peak_bytes(lambda: held.add_(1), CUDA) == 0


def test_clocks_are_found() -> None:
    found = results.clocks(CUDA)
    assert found is not None, "nvidia-smi is missing or does not know the device"
    assert found["clocks.sm"].endswith("MHz") and found["power.draw"].endswith("W")


@pytest.mark.parametrize("model", ["ViT-B", "ViT-S"])
@pytest.mark.parametrize("name", OPS)
def test_op_passes_its_gate(name: str, model: str, bench: Bench) -> None:
    for row in run_case(bench, OPS[name], MODELS[model].at(5), torch.bfloat16):
        if row.provider in OPS[name].providers:
            assert row.reason is None, f"{row.provider}, {row.phase}: {row.reason}"
            assert row.time is not None


@pytest.mark.parametrize("name", ["ViT-B encoder", "ViT-B decoder", "ViT-S decoder"])
def test_attention_passes_its_gate(name: str, bench: Bench) -> None:
    shape = SEQUENCES[name].at(5)
    op = attention.attention_op(shape, CUDA, torch.bfloat16)
    for row in run_case(bench, op, shape, torch.bfloat16):
        assert row.reason is None, f"{row.provider}, {row.phase}: {row.reason}"
