"""The host's code for a GPU on any machine: a fake CUDA device counts launches, copies and waits.

Values mean nothing there, and times neither. `make test-fakegpu`, docs/gpu.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sssd_fast.config import AugmentConfig
from sssd_fast.data.index import check_data
from sssd_fast.data.synthetic import write_synthetic_dataset
from tests.sssd_fast.loaders.loading import loader_of
from tests.sssd_fast.test_step_gpu import _config, _train

pytestmark = pytest.mark.fakegpu

# Launches of a pre-training step of 2 + 2 blocks outside CUDA graphs and inside, as counted with
# torch 2.11; a tenth more fails
STEPS = {
    "plain fp32": (["step.compile=false"], "fp32", 333, 0),
    "plain fp16": (["step.compile=false"], "fp16", 427, 0),
    "plain bf16": (["step.compile=false"], "bf16", 418, 0),
    "compiled bf16": (["step.compile=true", "step.cuda_graphs=false"], "bf16", 363, 0),
    "captured bf16": (["step.compile=true", "step.cuda_graphs=true"], "bf16", 31, 333),
}


@contextmanager
def _counting(counts: dict[str, int]) -> Iterator[None]:
    """Fills `counts` with what the host asks the device to do; a wait for it is an error."""
    import fakegpu

    torch.cuda.set_sync_debug_mode("error")
    try:
        with fakegpu.counting() as found:
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    counts.update(found)


@pytest.mark.parametrize("name", STEPS)
def test_step_never_waits_and_launches_no_more_than_counted(name: str) -> None:
    settings, precision, outside, inside = STEPS[name]
    torch._dynamo.reset()
    counts: dict[str, int] = {}
    config, device = _config(*settings), torch.device("cuda")
    _train(config, precision, device, steps=5, last=_counting(counts))
    assert counts["syncs"] == counts["pageable_reads"] == counts["to_host"] == 0
    assert counts["graph_launches"] == (2 if inside else 0)
    assert 0 < counts["kernels"] <= 1.1 * outside, counts
    assert 0 <= counts["graph_kernels"] <= 1.1 * inside, counts


@pytest.mark.parametrize("provider", ["resident", "staged"])
def test_loader_needs_three_launches_and_no_wait_per_batch(provider: str, tmp_path: Path) -> None:
    index = check_data(write_synthetic_dataset(tmp_path / "data", 24, (96, 96)))
    loader = loader_of(
        index, provider=provider, device="cuda", batch_size=8, image_size=(64, 64), seed=0,
        augment=AugmentConfig(),
    )  # fmt: skip
    list(loader.epoch(0))  # compiles, and grows the pinned memory
    counts: dict[str, int] = {}
    with _counting(counts):
        batches = len(list(loader.epoch(1)))
    loader.close()
    assert batches == 3
    assert counts["syncs"] == counts["pageable_reads"] == counts["to_host"] == 0
    assert 0 < counts["kernels"] <= 3 * batches, counts


def _pretrain(folder: Path, memory: str, *settings: str) -> subprocess.CompletedProcess[str]:
    """One epoch of a small model on the fake device with so much memory."""
    data = write_synthetic_dataset(folder / "data", 64, (64, 64))
    words = ["pretrain", "--out", str(folder / "run"), f"data.source={data}", "--config"]
    words += ["cpu_smoke", "device=cuda", "precision=bf16", "step.compile=false"]
    words += ["pretrain.epochs=1"]
    return subprocess.run(
        [sys.executable, "-m", "sssd_fast", *words, *settings],
        env={**os.environ, "FAKEGPU_MEMORY": memory},
        capture_output=True,
        text=True,
    )


def test_batch_that_does_not_fit_ends_with_what_to_do(tmp_path: Path) -> None:
    done = _pretrain(tmp_path, "1G", "pretrain.batch_size=40", "model.image_size=896")
    text = done.stdout + done.stderr
    assert done.returncode != 0 and "Traceback" not in text
    assert "error: out of memory" in text and "Lower batch_size" in text


def test_planned_batch_fits_with_validation_and_pictures(tmp_path: Path) -> None:
    done = _pretrain(tmp_path, "2G", "pretrain.batch=auto", "model.image_size=448")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "run" / "images").glob("attention-*.png"))
