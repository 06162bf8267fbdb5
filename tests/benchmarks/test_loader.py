"""The loader benchmark: no speed without right pixels, and rates of a fake clock."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import loader as module
from benchmarks.loader import difference, make_loader
from sssd_fast.data.index import DataIndex, check_data
from sssd_fast.data.synthetic import write_synthetic_dataset
from sssd_fast.errors import SssdError
from sssd_fast.loaders import Batch
from sssd_fast.loaders import dali as dali_loader
from sssd_fast.loaders.resident import ResidentLoader
from tests.benchmarks.helpers import CPU, make_bench


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_dataset(tmp_path_factory.mktemp("data") / "slices", 40, (48, 56), seed=3)


@pytest.fixture(scope="module")
def index(folder: Path) -> DataIndex:
    return check_data(folder)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.0)


def run(folder: Path, out: Path, *words: str) -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    sizes = ["--batch", "16", "--size", "32", "--channels", "1", "--rounds", "2"]
    bench = make_bench("loader", out)
    module.run(parser.parse_args([str(folder), *sizes, *words]), bench)
    return {row["provider"]: row for row in bench.results.rows}


def test_speed_has_a_row_for_every_provider(folder: Path, tmp_path: Path) -> None:
    rows = run(folder, tmp_path)
    assert list(rows) == ["torch, 0 workers", "torch, 2 workers", "dali", "resident"]
    for name, row in rows.items():
        if name == "dali" and (problem := dali_loader.unavailable(CPU)):
            assert problem in row["reason"]
            continue
        more = row["more"]
        assert row["reason"] is None and more["n"] == 2 and more["start_s"] > 0
        assert more["p20"] <= more["images_per_s"] <= more["p80"]
        baseline = rows["torch, 2 workers"]["more"]["images_per_s"]
        assert more["x_baseline"] == pytest.approx(more["images_per_s"] / baseline)
        assert more["mean"] <= module.MAX_MEAN


def test_provider_with_wrong_pixels_is_not_timed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ResidentLoader.epoch

    def brighter(self: ResidentLoader, *args: Any) -> Iterator[Batch]:
        for batch in real(self, *args):
            yield replace(batch, images=(batch.images.int() + 9).clamp(0, 255).byte())

    monkeypatch.setattr(ResidentLoader, "epoch", brighter)
    rows = run(folder, tmp_path)
    assert str(rows["resident"]["reason"]).startswith("wrong: 8.")
    assert "images_per_s" not in rows["resident"]["more"]
    assert rows["torch, 0 workers"]["more"]["images_per_s"] > 0


def test_difference_counts_grey_levels_and_refuses_other_batches(index: DataIndex) -> None:
    reference = make_loader(index, 1, 32, 16, "torch, 0 workers", CPU)

    class Shifted:
        steps_per_epoch = reference.steps_per_epoch
        labels_shift = 0

        def epoch(self, epoch: int) -> Iterator[Batch]:
            for batch in reference.epoch(epoch):
                images = batch.images.clone()
                images[0, 0, 0, :4] = (images[0, 0, 0, :4].int() + 128).byte()
                yield replace(batch, images=images, labels=batch.labels + self.labels_shift)

    shifted: Any = Shifted()
    found = difference(shifted, reference)
    pixels = 16 * 32 * 32  # of a batch
    assert found["max"] == 128
    assert found["mean"] == pytest.approx(4 * 128 / pixels)
    shifted.labels_shift = 1
    with pytest.raises(SssdError, match="other labels"):
        difference(shifted, reference)


def test_race_times_epochs_after_settling_and_alternates() -> None:
    now, seen = 0.0, list[tuple[str, int, int]]()

    class Fake:
        steps_per_epoch = 10

        def __init__(self, name: str, seconds: float) -> None:
            self.name = name
            self.seconds = seconds

        def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
            nonlocal now
            seen.append((self.name, epoch, start))
            for _ in range(self.steps_per_epoch - start):
                now += self.seconds
                yield Batch(torch.zeros(1, 1, 1, 1), torch.zeros(1), torch.zeros(1), 1)

    loaders: Any = {"a": Fake("a", 0.1), "b": Fake("b", 0.2)}
    rates = module.race(loaders, 8, 2, CPU, clock=lambda: now)
    assert rates["a"] == pytest.approx([80, 80]) and rates["b"] == pytest.approx([40, 40])
    assert [name for name, _, _ in seen[::2]] == ["a", "b", "b", "a"]
    assert seen[0] == ("a", 1, 2) and seen[1] == ("a", 2, 0)


def test_bad_argument_names_the_option(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SssdError, match="--rounds is 0, needs at least 1"):
        run(folder, tmp_path, "--rounds", "0")
