"""The planner: what it recommends fits by its own estimate, more memory never gives less, and the
printed settings can be used."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sssd_fast.cli import main
from sssd_fast.config import load_config
from sssd_fast.errors import ConfigError
from sssd_fast.performance import plan as planner
from sssd_fast.performance.estimate import estimate
from sssd_fast.performance.plan import Row, divisors, parse_memory, plan, recommended

# a model whose activations and parameters matter alike, and that is built quickly
SIZES = "image_size=96 width=256 depth=2 heads=4 decoder_width=128 decoder_depth=1 decoder_heads=4"
HEADS = "head_hidden=64 head_bottleneck=32 prototypes=64"
MODEL = [f"model.{size}" for size in SIZES.split()]
MODEL += [f"objective.{size}" for size in HEADS.split()]


def rows_for(memory: float, *settings: str, task: str = "pretrain", effective: int) -> list[Row]:
    config = load_config(None, [*MODEL, *settings])
    return plan(config, task, memory, effective=effective)


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_plan_takes_the_largest_batch_that_fits(task: str) -> None:
    memory = 0.9e9
    rows = rows_for(memory, task=task, effective=256)
    assert len(rows) == 5
    for row in rows:
        assert 256 % row.micro_batch == 0
        assert row.micro_batch <= row.largest
        assert not [n for n in divisors(256) if row.micro_batch < n <= row.largest]
        assert row.peak_bytes <= memory
    config = load_config(None, MODEL)
    found = estimate(config, task, "bf16", torch.device("cuda"), compiled=True)
    largest = rows[0].largest
    assert 1 < largest < 4 * 256
    for images, fits in ((largest, True), (largest + 1, False)):
        peak = found.peak(images, accumulate=-(-256 // images))
        assert (1.06 * peak + 0.6e9 <= memory) is fits
    by_name = {row.overrides: row for row in rows}
    full = by_name["residual=bf16 compile=false checkpoint=full"]
    narrow = by_name["residual=bf16"]
    kept = [row.estimate.kept_per_image for row in (full, narrow, rows[0])]
    assert kept[0] < 0.5 * kept[1]
    assert kept[1] < kept[2]
    eight_bit = by_name["residual=bf16 compile=false checkpoint=full optimizer=adamw8bit"]
    # parameters and gradients of 4 bytes; moments of 8 or about 2
    assert eight_bit.estimate.fixed == pytest.approx(10 / 16 * full.estimate.fixed, rel=0.05)
    larger = rows_for(1.2e9, task=task, effective=256)
    assert all(a.largest <= b.largest for a, b in zip(rows, larger, strict=True))


def test_plan_without_bf16_tries_no_bf16_residual() -> None:
    rows = rows_for(8e9, "precision=fp16", effective=64)
    full = "compile=false checkpoint=full"
    assert [row.overrides for row in rows] == ["", full, f"{full} optimizer=adamw8bit"]


def test_precision_of_asks_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for capability, precision in (((7, 5), "fp16"), ((8, 6), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d=None, c=capability: c)
        assert planner.precision_of(load_config(None, [])) == precision


def test_recommended_prefers_the_first_that_keeps_a_gpu_busy_then_size() -> None:
    found: Any = None

    def best(*micro_batches: int, effective: int = 256) -> int | None:
        rows = [Row("", found, micro, micro, 1e9) for micro in micro_batches]
        row = recommended(rows, effective)
        return row and row.micro_batch

    assert best(32, 64, 256) == 64
    assert best(0, 8, 16) == 16
    assert best(32, effective=32) == 32
    assert best(0) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GB", 12e9), ("11.5GiB", 11.5 * 2**30), ("8000mb", 8e9), ("6 MiB", 6 * 2.0**20)],
)
def test_parse_memory_reads_sizes(text: str, size: float) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["12", "GB", "-3GB", "0GB", "12TB", "a lot"])
def test_parse_memory_names_what_it_needs(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--memory is .*, needs a size such as 12GB"):
        parse_memory(text)


def test_plan_command_prints_settings_to_paste(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--memory", "12GB", "--batch", "256", *MODEL]) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("recommended"))
    settings = line.partition(": ")[2].split()
    config = load_config(None, settings)
    assert config.pretrain.batch_size * config.pretrain.accumulate == 256
    assert "Not measured on a GPU" in text
    assert "Configured: pretrain.batch_size=64 x pretrain.accumulate=1" in text


def test_plan_command_names_a_way_out_if_nothing_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "--memory", "610MB", *MODEL]) == 2
    assert "nothing fits 0.6 GB" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["plan", "--memory", "auto"]) == 2
        assert "auto on a machine with a CUDA device" in capsys.readouterr().err
