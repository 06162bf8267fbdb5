"""metrics.jsonl after a kill, a resume, a NaN; the TensorBoard files."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sssd_fast.errors import DataError, DependencyError, SssdError
from sssd_fast.run.metrics_log import Tracker, read_metrics


def started(folder: Path, step: int = 0, **options: Any) -> Tracker:
    tracker = Tracker(folder, **{"tensorboard": False, **options})
    tracker.start(step)
    return tracker


def without_time(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: v for name, v in record.items() if name != "time_s"} for record in records]


def work(tracker: Tracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        tracker.log("train", step, epoch=step / 4, loss=1 / step, lr=1e-4)
        if step % 4 == 0:
            tracker.log("val", step, epoch=step / 4, accuracy=0.5 + step / 100)


def strict(text: str) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_tracker_writes_every_record_at_once(tmp_path: Path) -> None:
    """A killed run must not lose a buffer (read while the tracker is open)."""
    tracker = started(tmp_path)
    work(tracker, 1, 4)
    records = strict((tmp_path / "metrics.jsonl").read_text())
    assert without_time(records) == [
        {"kind": "train", "step": 1, "epoch": 0.25, "loss": 1.0, "lr": 1e-4},
        {"kind": "train", "step": 2, "epoch": 0.5, "loss": 0.5, "lr": 1e-4},
        {"kind": "train", "step": 3, "epoch": 0.75, "loss": 1 / 3, "lr": 1e-4},
        {"kind": "train", "step": 4, "epoch": 1.0, "loss": 0.25, "lr": 1e-4},
        {"kind": "val", "step": 4, "epoch": 1.0, "accuracy": 0.54},
    ]
    assert read_metrics(tmp_path) == records
    tracker.close()
    tracker.log("train", 5, loss=1.0)  # closed: does nothing
    assert read_metrics(tmp_path) == records


def test_tracker_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """Steps that were lost and repeated appear once; the time continues."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    work(started(whole), 1, 12)
    killed = started(parts)
    # as if 50 s had passed
    killed._started -= 50
    work(killed, 1, 7)
    # beyond the checkpoint: must not count
    killed.log("train", 8, time_s=100.0)
    tracker = started(parts, 5)
    assert [r["step"] for r in read_metrics(parts) if r["kind"] == "train"] == [1, 2, 3, 4, 5]
    work(tracker, 6, 12)
    assert without_time(read_metrics(parts)) == without_time(read_metrics(whole))
    times = [record["time_s"] for record in read_metrics(parts)]
    assert times == sorted(times)
    assert 50 <= times[-1] < 100


def test_tracker_records_a_repeated_validation_once(tmp_path: Path) -> None:
    """A checkpoint by steps at the last step of an epoch: on resume, validation runs again."""
    work(started(tmp_path), 1, 4)
    resumed = started(tmp_path, 4)
    resumed.log("val", 4, epoch=1.0, accuracy=0.54)
    resumed.log("val", 4, epoch=1.0, auc=0.9)
    resumed.log("val", 8, epoch=1.0, accuracy=0.6)
    found = [(r["step"], r.get("accuracy")) for r in read_metrics(tmp_path) if r["kind"] == "val"]
    assert found == [(4, 0.54), (4, None), (8, 0.6)]


@pytest.mark.parametrize(
    "torn",
    [b'{"kind": "train", "st', '{"kind": "train", "note": "é'.encode()[:-1], b"\0\0", b"7", b"{}"],
)
def test_tracker_repairs_a_torn_line(tmp_path: Path, torn: bytes) -> None:
    work(started(tmp_path), 1, 2)
    path = tmp_path / "metrics.jsonl"
    with open(path, "ab") as file:
        file.write(torn)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    notes: list[str] = []
    started(tmp_path, 2, log=notes.append).log("train", 3, loss=0.1)
    assert [record["step"] for record in strict(path.read_text())] == [1, 2, 3]
    assert notes == [f"{path}: 1 unreadable line(s) removed (killed, or the disk full)"]


def test_tracker_records_scalars_as_numbers_and_non_finite_ones_as_null(tmp_path: Path) -> None:
    plain = {"a": 2, "b": 0.5, "c": 1.5, "d": True, "e": "é", "f": None}
    special = {"a": torch.tensor(2), "b": np.float32(0.5), "c": torch.tensor([1.5])}
    tracker = started(tmp_path)
    tracker.log("val", np.int64(3), **{**plain, **special})
    tracker.log("train", 7, loss=float("nan"), grad_norm=torch.tensor(float("-inf")), lr=1e-3)
    bad = {"loss": "nan", "grad_norm": "-inf"}
    assert without_time(strict((tmp_path / "metrics.jsonl").read_text("utf-8"))) == [
        {"kind": "val", "step": 3, **plain},
        {"kind": "train", "step": 7, "loss": None, "grad_norm": None, "lr": 1e-3},
        {"kind": "event", "step": 7, "event": "non_finite", "values": bad},
    ]


def test_csv_holds_every_record(tmp_path: Path) -> None:
    tracker = started(tmp_path)
    work(tracker, 1, 4)
    tracker.log("train", 5, loss=float("nan"), images_per_s=512.5)
    tracker.close()
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"accuracy", "images_per_s", "time_s", "values"} <= set(rows[0])
    for row, record in zip(rows, read_metrics(tmp_path), strict=True):
        for name, cell in row.items():
            value = record.get(name)
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            assert cell == ("" if value is None else text)


def test_tensorboard_forgets_lost_steps(tmp_path: Path) -> None:
    """Read back with TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = started(tmp_path, tensorboard=True)
    work(killed, 1, 4)
    killed.log("train", 5, loss=99.0)
    [(_, end)] = killed._senders  # TensorBoard
    end()
    resumed = started(tmp_path, 4, tensorboard=True)
    resumed.log("train", 5, loss=0.2, skipped=2)
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    train = {f"train/{name}" for name in ("loss", "lr", "epoch", "skipped")}
    assert set(events.Tags()["scalars"]) == train | {"val/accuracy", "val/epoch"}
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 6)]


def test_tracker_names_the_file_on_a_full_disk(tmp_path: Path) -> None:
    tracker = started(tmp_path)
    assert tracker._file is not None
    tracker._file.close()
    tracker._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(SssdError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        tracker.log("train", 1, loss=1.0)


def test_tracker_of_other_ranks_or_without_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(tmp_path / "run", 3, enabled=False).log("train", 1, loss=1.0)
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="no metrics"):
        read_metrics(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    notes: list[str] = []
    work(started(tmp_path, tensorboard=True, log=notes.append), 1, 2)
    (note,) = notes
    assert 'tensorboard is not installed: pip install "sssd-fast[train]"' in note
    assert len(read_metrics(tmp_path)) == 2


@pytest.mark.parametrize("logger", ["wandb", "mlflow"])
def test_missing_logger_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: str
) -> None:
    monkeypatch.setitem(sys.modules, logger, None)
    with pytest.raises(DependencyError, match=rf"pip install 'sssd-fast\[{logger}\]'"):
        started(tmp_path, logger=logger)


@pytest.mark.mlflow
def test_mlflow_holds_the_metrics_of_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run in mlflow.db, with the settings, over the interruption."""
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    options = {"logger": "mlflow", "settings": {"seed": 3, "data.source": "ct"}}
    tracker = started(tmp_path, **options)
    work(tracker, 1, 3)
    tracker.close()
    tracker = started(tmp_path, 2, **options)
    work(tracker, 3, 4)
    tracker.close()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("sssd-fast")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"seed": "3", "data.source": "ct"}
    assert run.info.status == "FINISHED"
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert {m.step: m.value for m in losses} == {1: 1.0, 2: 0.5, 3: 1 / 3, 4: 0.25}
    assert run.data.metrics["val/accuracy"] == 0.54


@pytest.mark.wandb
def test_wandb_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run keeps its name; files of both parts are in the run folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = {"logger": "wandb", "settings": {"seed": 3}}
    for first in (1, 3):
        tracker = started(tmp_path, first - 1, **options)
        work(tracker, first, first + 1)
        tracker.close()
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    name = (tmp_path / "wandb-run.txt").read_text().strip()
    assert len(files) == 2
    assert {path.stem for path in files} == {f"run-{name}"}
    assert all(b"train/loss" in path.read_bytes() for path in files)
