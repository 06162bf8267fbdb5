"""The planner: what it recommends fits by its own model, more memory never gives less, and its words are precise."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch

from sssd_fast.cli import main
from sssd_fast.config import load_config
from sssd_fast.errors import ConfigError
from sssd_fast.performance import plan as planner
from sssd_fast.performance.memory_check import Traced
from sssd_fast.performance.memory_model import saved_per_image, total_peak
from sssd_fast.performance.plan import (
    RESERVE,
    Row,
    divisors,
    options_of,
    parse_memory,
    plan,
    recommended,
    work_of,
)


@pytest.fixture(autouse=True)
def _no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is kept for a budget of a half; the real tracing has a test of its own and takes 15 s for ViT-B."""

    def traced(work: Any, o: Any, images: int, budget: float) -> Traced:
        return Traced(
            budget * saved_per_image(work.stages(o)), 0.0, 0.1 * planner.flops_of(work), 0.0
        )

    monkeypatch.setattr(planner, "measured_saved_bytes", traced)


def _rows(
    memory: float, *settings: str, task: str = "pretrain", effective: int | None = None
) -> list[Row]:
    return plan(
        load_config(None, [*settings]), task, memory, effective=effective, say=lambda text: None
    )


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
@pytest.mark.parametrize("memory", [6e9, 12e9, 24e9])
def test_what_is_said_to_fit_fits_and_the_next_size_does_not(task: str, memory: float) -> None:
    config = load_config(None, [])
    rows = _rows(memory, task=task, effective=256)
    assert len(rows) == len(planner.TRIED)
    for row in rows:
        assert row.micro_batch * row.accumulate == 256
        assert row.micro_batch <= row.largest
        assert not [n for n in divisors(256) if row.micro_batch < n <= row.largest]
        assert row.peak_bytes <= memory
    work = work_of(config, task)
    o = options_of(config, work, "bf16", torch.device("cuda"), compiled=True)
    largest = rows[0].largest
    for images, fits in ((largest, True), (largest + 1, False)):
        assert (
            total_peak(work, work.stages(o), images, o, accumulate=-(-256 // images))
            <= RESERVE.usable(memory)
        ) is fits


def test_more_memory_never_gives_less_and_cheaper_rows_keep_more() -> None:
    plans = [_rows(m, effective=512) for m in (4e9, 8e9, 16e9)]
    for smaller, larger in itertools.pairwise(plans):
        assert all(a.largest <= b.largest for a, b in zip(smaller, larger, strict=True))
    compiled = [row.kept_bytes_per_image for row in plans[2][:4]]
    assert compiled == sorted(compiled, reverse=True)
    by_name = {row.name: row for row in plans[2]}
    full = by_name["residual=bf16 compile=false checkpoint=full"]
    assert (
        full.kept_bytes_per_image
        < 0.3 * by_name["residual=bf16 compile=false checkpoint=selective"].kept_bytes_per_image
    )
    assert full.speed == pytest.approx(0.75)
    eight = by_name["residual=bf16 compile=false checkpoint=full optimizer=adamw8bit"]
    assert eight.fixed_bytes < 0.7 * full.fixed_bytes


def test_recomputation_and_old_gpus_are_planned_as_they_would_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = load_config(None, ["step.checkpoint=full"]).step
    assert not planner.would_compile(step)  # auto does not compile then, see compute.pick_compile
    assert _rows(12e9, "step.checkpoint=full")[0].kept_bytes_per_image < 10e6
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert planner.precision_of(load_config(None, [])) == "fp16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    assert planner.precision_of(load_config(None, [])) == "bf16"


def test_a_micro_batch_too_small_for_its_budget_is_planned_without() -> None:
    """An effective batch whose only small divisor is 1: the size that was traced is not the one that is used."""
    alone = [
        row
        for row in _rows(4.5e9, effective=251)
        if "activation_budget" in row.settings and row.micro_batch == 1
    ]
    assert alone
    assert {row.note for row in alone} == {"torch ignores the budget at so few images"}


def test_the_recommendation_prefers_speed_and_then_size() -> None:
    def row(micro: int, speed: float, **settings: Any) -> Row:
        return Row(settings, 1e6, 1e9, micro, micro, 256 // micro if micro else 0, 1e9, speed)

    plain = row(32, 1.0)
    budget = row(64, 0.95, activation_budget=0.5)
    full = row(256, 0.75, checkpoint="full")
    assert recommended([plain, budget, full], 256) is budget  # the fastest that keeps a GPU busy
    assert recommended([row(0, 1.0), row(8, 1.0), row(16, 0.75)], 256).micro_batch == 16  # type: ignore[union-attr]
    assert recommended([row(32, 1.0)], 32) is not None  # a small effective batch is no reproach
    assert recommended([row(0, 1.0)], 256) is None


def test_without_bf16_no_line_asks_for_a_bf16_residual() -> None:
    rows = _rows(8e9, "precision=fp16", "model.name=small")
    assert all("residual" not in row.settings for row in rows)
    assert len({row.name for row in rows}) == len(rows) == len(planner.TRIED) - 1


def test_a_budget_that_torch_would_ignore_is_said_and_changes_nothing() -> None:
    rows = _rows(2.5e9, "model.name=large", effective=4)
    budget = next(row for row in rows if row.settings.get("activation_budget") == 0.5)
    assert budget.note == "torch ignores the budget at so few images"
    assert budget.kept_bytes_per_image == rows[1].kept_bytes_per_image


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GB", 12e9),
        ("11.5GiB", 11.5 * 2**30),
        ("8000mb", 8e9),
        ("512MiB", 2.0**29),
        ("6 GB", 6e9),
    ],
)
def test_sizes_are_read(text: str, size: float) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["12", "GB", "-3GB", "0GB", "12TB", "a lot"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--memory is .*, needs a size such as 12GB"):
        parse_memory(text)


def test_the_command_prints_settings_that_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "base", "--memory", "12GB", "--batch", "256"]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("recommended"))
    settings = line.partition(": ")[2].split()
    config = load_config(None, settings)
    assert config.pretrain.batch_size * config.pretrain.accumulate == 256
    assert "Not measured on a GPU" in said
    assert main(["plan", "--model", "base", "--memory", "12GB", "--batch", "256", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommended"] == settings
    assert found["predicted"] is True
    assert len(found["rows"]) == len(planner.TRIED)


def test_nothing_fits_is_an_error_with_a_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "large", "--memory", "3GB"]) == 2
    assert "nothing fits 3.0 GB" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["plan", "--memory", "auto"]) == 2
        assert "needs a CUDA device" in capsys.readouterr().err
