"""The memory benchmark: peaks against an independent count, the search for the largest batch, and a cap that is always lifted again."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sssd_fast.performance.memory_check import measure
from sssd_fast.performance.memory_model import Options, Work

from benchmarks import memory, step_data, step_models
from benchmarks.bench import Bench
from benchmarks.measure import Cache
from benchmarks.results import Results
from sssd_fast.config import Config, from_dict
from sssd_fast.run.log import Console

CPU = torch.device("cpu")


@pytest.fixture
def config() -> Config:
    model = {
        "image_size": 32, "patch_size": 8, "in_channels": 3, "width": 32, "depth": 2, "heads": 2, "decoder_width": 24,
        "decoder_depth": 1, "decoder_heads": 2,
    }  # fmt: skip
    objective = {"head_hidden": 20, "head_bottleneck": 12, "prototypes": 24}
    return from_dict({"model": model, "objective": objective})


def bench_on(device: torch.device, path: Path, only: tuple[str, ...]) -> Bench:
    ceilings = {"matmul_flops_per_s": {"fp32": 1e12}}
    results = Results(
        "memory", device, [torch.float32], words=["memory"], path=path, ceilings=ceilings
    )
    return Bench(
        device, Console(stream=io.StringIO()), results, Cache(device, 0), samples=3, only=only
    )


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Config) -> Bench:
    monkeypatch.setattr(step_data, "configuration", lambda name, device: config)
    return bench_on(CPU, tmp_path / "memory.json", ("published", "plain"))


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    memory.add_arguments(parser)
    args = parser.parse_args(words)
    args.dtypes = None
    return args


# ---- peaks ----


def test_peaks_are_those_that_another_count_finds(bench: Bench, config: Config) -> None:
    memory.run(arguments("--batch", "8", "24", "16"), bench)
    found = {
        (row["case"], row["provider"], row["sizes"]["batch"]): row for row in bench.results.rows
    }
    assert len(found) == 2 * 2 * 3
    for task in step_models.TASKS:
        own = step_data.for_task(config, task)
        work = Work(own.model, own.objective)
        options = Options(
            "fp32", attention="sdpa", decoder_attention="sdpa", device="cpu", plain_ops=True
        )
        source = step_data.initial_model(own)
        values = sum(p.numel() for p in source.parameters())
        trained = sum(p.numel() for p in source.parameters() if p.requires_grad)
        for batch in (8, 16, 24):
            row = found[task, "plain", batch]
            noises = step_data.NOISES * batch * own.model.num_patches * 4
            standing = (
                4 * (values + 2 * trained + source.center.numel()) + batch * 3 * 32 * 32 + noises
            )
            counted = measure(
                work, options, batch
            ).peak  # activations and gradients, of the forward and backward
            assert row["peak_bytes"] == pytest.approx(standing + counted, rel=0.02)
            assert row["more"]["mb_per_image"] == pytest.approx(row["peak_bytes"] / batch / 1e6)
        slope = (
            found[task, "plain", 24]["peak_bytes"] - found[task, "plain", 16]["peak_bytes"]
        ) / 8
        assert found[task, "plain", 24]["more"]["mb_per_further_image"] == pytest.approx(
            slope / 1e6
        )
        assert "mb_per_further_image" not in found[task, "plain", 8]["more"]
        assert (
            found[task, "published", 24]["peak_bytes"]
            > 1.1 * found[task, "plain", 24]["peak_bytes"]
        )
    assert bench.results.head["missing"] == {
        "memory caps": "torch can limit the memory of a CUDA device only"
    }


def test_a_provider_that_runs_out_of_memory_is_not_asked_for_more(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = step_models.build, []

    def build(name: str, setup: step_data.Setup, *args: Any) -> Any:
        asked.append((name, setup.batch))
        if name == "published" and setup.batch > 8:
            raise torch.OutOfMemoryError("tried to allocate 2 EiB")
        return real(name, setup, *args)

    monkeypatch.setattr(step_models, "build", build)
    memory.run(arguments("--task", "MAE", "--batch", "8", "16", "24"), bench)
    found = {(row["provider"], row["sizes"]["batch"]): row for row in bench.results.rows}
    assert found["published", 16]["reason"] == "out of memory"
    assert found["published", 16]["peak_bytes"] is None
    assert ("published", 24) not in found
    assert ("published", 24) not in asked
    assert found["plain", 24]["peak_bytes"] > 0


def test_a_provider_with_another_loss_has_no_peak(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = step_models.published_model

    def spoiled(*args: Any) -> Any:
        model = real(*args)
        model.decoder_pred.weight.data.neg_()
        return model

    monkeypatch.setattr(step_models, "published_model", spoiled)
    memory.run(arguments("--task", "MAE", "--batch", "8", "16"), bench)
    (row,) = (row for row in bench.results.rows if row["provider"] == "published")
    assert row["reason"].startswith("wrong: the loss at step 1 is ")
    assert row["peak_bytes"] is None


# ---- the largest batch ----


def linear(images: int) -> float:
    return 1000.0 + 10 * images


@pytest.mark.parametrize("truth", [0.9, 1.0, 1.1])
def test_the_largest_batch_fits_though_the_prediction_lies(truth: float) -> None:
    limit, tried = linear(500), list[int]()

    def fits(images: int) -> bool:
        tried.append(images)
        return truth * linear(images) <= limit

    found = memory.largest_batch((64, int(linear(64))), (128, int(linear(128))), limit, fits)
    assert found is not None
    assert found % 8 == 0
    assert fits(found)
    assert tried[0] == 496  # 500, rounded down
    assert tried[:-1] == sorted(set(tried[:-1]), reverse=True)
    assert not any(
        truth * linear(images) <= limit for images in tried[: tried.index(found)]
    )  # none that fits was passed by
    if truth > 1:
        best = max(n for n in range(8, 1000, 8) if truth * linear(n) <= limit)
        assert found >= 0.96 * best - 8
    else:
        assert found == 496


def test_nothing_fits() -> None:
    tried: list[int] = []

    def never(images: int) -> bool:
        tried.append(images)
        return False

    assert memory.largest_batch((8, 1080), (16, 1160), 1600.0, never) is None
    assert tried[-1] == 8
    assert memory.largest_batch((8, 1080), (16, 1160), 900.0, never) is None
    with pytest.raises(ValueError, match="do not grow"):
        memory.largest_batch((8, 1000), (16, 1000), 2000.0, never)


@pytest.fixture
def fake_card(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A card of 80e9 bytes with 1e9 held already; returns the fractions that are set."""
    fractions: list[float] = []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80e9)
    )
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1e9)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: fractions.append(share)
    )
    return fractions


def test_the_cap_is_lifted_whatever_happens(fake_card: list[float]) -> None:
    with pytest.raises(KeyError), memory.capped(CPU, 11e9):
        {}[fake_card[-1]]
    assert fake_card == [pytest.approx(12 / 80), 1.0]


def searched(bench: Bench, config: Config, points: list[Any], cap: float) -> dict[str, Any]:
    setup = step_data.Setup(config, "SSSD", CPU, torch.float32, 64)
    memory.under_cap(bench, setup, "ours", points, cap)
    return bench.results.rows[-1]


def test_rows_of_largest_batches(
    bench: Bench, config: Config, fake_card: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [(64, 2_000_000_000), (128, 4_000_000_000)]  # 31.25 MB an image
    needs = {"of": 33e6}

    def runs(bench: Bench, row: Any, setup: step_data.Setup, name: str) -> bool:
        row.more["images_per_s"] = 10.0 * setup.batch
        return setup.batch * needs["of"] <= 11.4e9

    monkeypatch.setattr(memory, "_runs", runs)
    row = searched(bench, config, points, 12)
    assert (row["case"], row["phase"], row["shape"]) == (
        "largest batch SSSD",
        "memory, 12 GB",
        "ViT 32x2/8, 32",
    )
    assert row["more"]["tried"] == [360, 344]  # 11.4e9 / 31.25e6 = 364.8
    assert row["more"]["largest_batch"] == row["sizes"]["batch"] == 344
    assert row["more"]["verified"] is True
    assert row["more"]["images_per_s"] == 3440
    assert fake_card[-1] == 1.0
    needs["of"] = 1e12
    assert searched(bench, config, points, 8)["reason"] == "not even 8 images fit"
    assert searched(bench, config, points, 96)["reason"] == "this GPU has 80.0 GB"
    assert "has 1" in searched(bench, config, points[:1], 12)["reason"]
    monkeypatch.setattr(memory, "_runs", lambda *_: 1 / 0)
    assert searched(bench, config, points, 12)["reason"].startswith("fails: ZeroDivisionError")
    assert fake_card[-1] == 1.0
    assert all("largest_batch" not in row["more"] for row in bench.results.rows[1:])


def test_only_running_out_of_memory_counts_as_not_fitting(
    bench: Bench, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = step_data.Setup(config, "SSSD", CPU, torch.float32, 8)
    row = memory._row(setup, "largest batch SSSD", "ours", "memory, 8 GB")

    def raises(error: BaseException) -> Callable[..., None]:
        def steps(*_: Any) -> None:
            raise error

        return steps

    monkeypatch.setattr(memory, "_steps", raises(torch.OutOfMemoryError("CUDA out of memory")))
    assert memory._runs(bench, row, setup, "ours") is False
    monkeypatch.setattr(memory, "_steps", raises(RuntimeError("another one")))
    with pytest.raises(RuntimeError, match="another one"):
        memory._runs(bench, row, setup, "ours")
    monkeypatch.setattr(memory, "_steps", lambda *_: None)
    assert memory._runs(bench, row, setup, "ours") is True


@pytest.mark.gpu
def test_a_real_cap_is_in_force_and_lifted(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(step_data, "configuration", lambda name, device: config)
    bench = bench_on(device, tmp_path / "memory.json", ("plain",))
    memory.run(arguments("--task", "MAE", "--batch", "256", "512", "--cap", "1"), bench)
    row = bench.results.rows[-1]
    assert row["reason"] is None
    assert row["more"]["verified"]
    assert row["peak_bytes"] < 0.4e9  # 1 GB less what the context takes
    with memory.capped(device, 0.1e9), pytest.raises(torch.OutOfMemoryError):
        torch.empty(200_000_000, dtype=torch.uint8, device=device)
    assert torch.empty(200_000_000, dtype=torch.uint8, device=device).numel() == 200_000_000
