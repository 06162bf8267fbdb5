"""The loaders' benchmark: no time without right pixels, figures as a made-up clock gives them, and memory that is really read."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import loader as benchmark
from benchmarks import loader_memory, results
from benchmarks.loader_memory import is_flat, watch, watch_apart
from benchmarks.loader_pixels import Case, Difference, difference, loader_of, ways
from sssd_fast.config import AugmentConfig
from sssd_fast.data.index import DataIndex, check_data
from sssd_fast.data.synthetic import write_synthetic_dataset
from sssd_fast.loaders import PAD_INDEX, PAD_LABEL, Batch
from sssd_fast.loaders import dali as dali_loader
from sssd_fast.loaders.resident import ResidentLoader

CPU = torch.device("cpu")
NAMES = ["torch, 0 workers", "torch, 2 workers", "dali", "resident"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_dataset(tmp_path_factory.mktemp("data") / "slices", 40, (48, 56), seed=3)


@pytest.fixture(scope="module")
def index(folder: Path) -> DataIndex:
    return check_data(folder)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmark, "PAUSE_S", 0.0)
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")


def quick(folder: Path, *more: str) -> dict[str, Any]:
    return benchmark.run(
        [str(folder), "--quick", "--batch", "16", "--size", "32", "--channels", "1", *more]
    )


def timed(rows: list[dict[str, Any]]) -> list[str]:
    return [row["provider"] for row in rows if row["figures"]]


def arguments(index: DataIndex, provider: str = "resident", batch: int = 16) -> dict[str, Any]:
    case = Case("slices", index, channels=1, size=32, batch=batch, threads=1, device=CPU)
    return case.arguments(next(way for way in ways(1) if way.provider == provider))


# ---- speed ----


def test_every_provider_has_a_row_with_its_time_or_the_reason(folder: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    found = quick(folder, "--json", str(tmp_path / "speed.json"))
    rows = {row["provider"]: row for row in found["rows"]}
    assert list(rows) == NAMES
    refused = dali_loader.unavailable(CPU)
    for name, row in rows.items():
        if name == "dali" and refused:
            assert refused in row["reason"]
            continue
        assert row["reason"] is None
        assert len(row["images_per_s"]) == row["figures"]["n"] == benchmark.QUICK["rounds"]
        assert min(row["images_per_s"]) > 0
        assert row["figures"]["median"] == pytest.approx(np.mean(row["images_per_s"]))  # of two
        assert row["ratio"] == pytest.approx(
            row["figures"]["median"] / rows[NAMES[1]]["figures"]["median"]
        )
        assert row["start_s"] > 0
        assert row["difference"]["images"] == 32  # two whole batches of 40 images
        assert (row["difference"]["max"] == 0) == name.startswith("torch")
    written = results.load(tmp_path / "speed.json")
    assert (written["kind"], written["quick"], written["finished"]) == ("loader-speed", True, True)
    assert written["command"].startswith("sssd-fast bench loader slices --quick --batch 16 ")
    assert str(tmp_path.parent) not in json.dumps(written), (
        "a path of this machine stands in the file"
    )
    for row, rounded in zip(found["rows"], written["rows"], strict=True):
        assert rounded["images_per_s"] == pytest.approx(row["images_per_s"], rel=1e-4)
        assert (rounded["provider"], rounded["reason"]) == (row["provider"], row["reason"])
    assert torch.get_num_threads() == threads


def test_a_provider_with_wrong_pixels_gets_no_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ResidentLoader._show
    monkeypatch.setattr(ResidentLoader, "_show", lambda self, *args: real(self, *args) + 30)
    rows = quick(folder)["rows"]
    assert [name for name in NAMES if name not in timed(rows)] == ["dali"] * bool(
        dali_loader.unavailable(CPU)
    ) + ["resident"]
    assert rows[3]["images_per_s"] == []
    assert rows[3]["ratio"] is None
    assert rows[3]["difference"]["mean"] > 25
    assert "grey levels from Pillow on average" in rows[3]["reason"]


def test_a_provider_that_cannot_run_is_listed_with_the_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dali_loader, "unavailable", lambda device: "left out for this test")
    rows = quick(folder, "--markdown")["rows"]
    assert timed(rows) == [NAMES[0], NAMES[1], NAMES[3]]
    assert "left out for this test" in rows[2]["reason"]
    table = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in table} == {len(benchmark.SPEED) + 1}
    assert "left out for this test" in table[4]
    assert f"| {rows[3]['figures']['median']:.0f} |" in table[5]


class FakeLoader:
    """Ten batches of 4; each moves the clock by what `seconds` says of its epoch, the last but eight before it by an hour."""

    steps_per_epoch = 10

    def __init__(
        self, name: str, seconds: dict[int, float], log: list[tuple[str, int]], now: list[float]
    ) -> None:
        self.name = name
        self.seconds = seconds
        self.log = log
        self.now = now

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        self.log.append((self.name, epoch))
        for _ in range(start_step, self.steps_per_epoch):
            self.now[0] += self.seconds.get(epoch, 3600.0)
            yield Batch(
                torch.zeros(4, 1, 2, 2, dtype=torch.uint8), *torch.zeros(3, 4, dtype=torch.int64)
            )


def test_an_epoch_is_timed_after_settling_and_the_order_alternates() -> None:
    log: list[tuple[str, int]] = []
    now = [0.0]
    fast = FakeLoader("fast", {2: 0.1, 4: 0.2, 6: 0.4}, log, now)
    slow = FakeLoader("slow", {2: 1.0, 4: 2.0, 6: 1.0}, log, now)
    loaders: Any = {"fast": fast, "slow": slow}
    rates = benchmark.race(loaders, 4, 3, CPU, clock=lambda: now[0])
    assert rates["fast"] == pytest.approx([40.0, 20.0, 10.0])  # 40 images in 1, 2 and 4 s
    assert rates["slow"] == pytest.approx([4.0, 2.0, 4.0])
    assert log == [
        *[("fast", 1), ("fast", 2), ("slow", 1), ("slow", 2)],
        *[("slow", 3), ("slow", 4), ("fast", 3), ("fast", 4)],
        *[("fast", 5), ("fast", 6), ("slow", 5), ("slow", 6)],
    ]


def test_medians_quantiles_and_gap() -> None:
    found = benchmark.figures([10.0, 20.0, 99.0, 40.0, 50.0])
    assert found == {
        "median": 40.0,
        "p20": pytest.approx(18.0),
        "p80": pytest.approx(59.8),
        "n": 5,
        "gap": 2.0,
    }
    assert benchmark.figures([10.0, 20.0, 15.0, 9.0])["gap"] == pytest.approx(12 / 15 - 1)
    assert benchmark.figures([7.0]) == {"median": 7.0, "p20": 7.0, "p80": 7.0, "n": 1, "gap": None}


def test_one_manifest_per_folder_or_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.arguments(["a", "b", "--manifest", "one.csv"])
    assert "1 manifests for 2 data folders" in capsys.readouterr().err
    assert benchmark.arguments(["a", "b", "--manifest", "one.csv", "two.csv"]).manifest == [
        "one.csv",
        "two.csv",
    ]


# ---- pixels ----


class Shown:
    """One batch of given pixels."""

    steps_per_epoch = 1

    def __init__(self, images: torch.Tensor, indices: list[int]) -> None:
        numbers = torch.tensor(indices)
        labels = torch.where(numbers == PAD_INDEX, PAD_LABEL, numbers % 2)
        self.batch = Batch(images, labels, numbers, numbers != PAD_INDEX)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        yield self.batch


def test_differences_are_counted_in_grey_levels_and_without_padding() -> None:
    wanted = torch.full((3, 1, 2, 5), 200, dtype=torch.uint8)
    got = wanted.clone()
    got[0, 0, 0, 0], got[0, 0, 1, 1], got[2] = 255, 198, 0  # +55 and -2; the last row is padding
    reference: Any = Shown(wanted, [4, 7, PAD_INDEX])
    loader: Any = Shown(got, [4, 7, PAD_INDEX])
    expected = Difference(mean=57 / 20, max=55, images=2, images_differing=1, beyond_2=1 / 20)
    assert difference(loader, reference) == expected
    other: Any = Shown(wanted, [7, 4, PAD_INDEX])
    assert difference(other, reference) == "batch 0 has other indices than the torch loader"


def test_another_order_is_no_difference_of_pixels(index: DataIndex) -> None:
    loaders = [
        loader_of(index, AugmentConfig(), arguments(index, "torch"), seed) for seed in (0, 1)
    ]
    assert difference(*loaders) == "batch 0 has other indices than the torch loader"


def test_the_table_of_pixels_has_both_kinds_of_views(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = quick(folder, "--parity", "--markdown")["rows"]
    assert [(row["provider"], row["view"]) for row in rows] == [
        (name, view) for view in ("training", "evaluation") for name in NAMES[1:]
    ]
    for row in rows:
        if "reason" not in row:
            assert row["images"] == (32 if row["view"] == "training" else 40)
            assert (row["images_differing"] == 0) == row["provider"].startswith("torch")
    assert {line.count("|") for line in capsys.readouterr().out.splitlines()} == {
        len(benchmark.PARITY) + 1
    }


# ---- memory ----


@pytest.mark.parametrize(
    ("mib", "flat"),
    [
        ([400.0] * 50, True),
        ([400.0] * 10, None),
        (
            [100.0 * n for n in range(1, 11)] + [1000.0] * 40,
            True,
        ),  # what grows before the tenth epoch
        ([400.0 + n for n in range(50)], False),  # 1 MiB per epoch
        ([100.0] * 10 + [115.9], True),
        ([100.0] * 10 + [116.0], False),
        ([1000.0] * 10 + [1049.0], True),
        ([1000.0] * 10 + [1050.0], False),
        ([1000.0] * 10 + [900.0], True),
    ],
)
def test_what_counts_as_flat(mib: list[float], flat: bool | None) -> None:
    assert is_flat(mib) is flat


def test_memory_is_what_the_system_says_and_a_leak_is_seen(
    index: DataIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = arguments(index)
    calm = watch(index, 12, settings)
    assert calm.flat is True
    assert calm.peak == pytest.approx(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, rel=0.05
    )
    leaked = []

    def leaking(*args: Any, **kwargs: Any) -> Any:
        loader = loader_of(*args, **kwargs)
        real = loader.epoch

        def epoch(number: int) -> Iterator[Batch]:
            leaked.append(
                np.ones((150 if number >= 10 else 1) * 2**20, dtype=np.uint8)
            )  # 5 % of any test process
            return real(number)

        monkeypatch.setattr(loader, "epoch", epoch)
        return loader

    monkeypatch.setattr(loader_memory, "loader_of", leaking)
    grown = watch(index, 12, settings)
    assert grown.flat is False
    assert grown.epochs[-1] - grown.epochs[9] == pytest.approx(2 * 150, rel=0.1)


def test_a_provider_is_watched_in_a_process_of_its_own(index: DataIndex) -> None:
    found = watch_apart(index, 2, 1, arguments(index))
    assert found.reason is None
    assert len(found.epochs) == 2
    assert found.flat is None
    assert found.before is not None
    assert found.peak is not None
    assert 20 < found.before <= found.epochs[0]
    assert found.peak >= max(found.epochs) - 1


def test_a_process_that_dies_leaves_its_last_words(
    index: DataIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho first words >&2\necho out of memory >&2\nexit 9\n")
    dying.chmod(0o755)
    monkeypatch.setattr(loader_memory.sys, "executable", str(dying))
    found = watch_apart(index, 1, 1, arguments(index))
    assert (found.reason, found.epochs) == ("out of memory", [])


def test_a_provider_that_cannot_run_has_no_memory_but_a_reason(index: DataIndex) -> None:
    found = watch(index, 1, arguments(index, batch=64))
    assert found.epochs == []
    assert "do not fill one batch of 64" in str(found.reason)
