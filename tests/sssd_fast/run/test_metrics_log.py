"""metrics.jsonl after a kill, a resume, a NaN; the CSV and TensorBoard files made beside it."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sssd_fast.errors import DataError, RunExistsError, SssdError
from sssd_fast.run import metrics_log as tracking
from sssd_fast.run.metrics_log import Tracker, read_metrics


def without_time(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in record.items() if name != "time_s"} for record in records
    ]


def work(tracker: Tracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        tracker.log("train", step, epoch=step / 4, loss=1 / step, lr=1e-4)
        if step % 4 == 0:
            tracker.log("val", step, epoch=step / 4, accuracy=0.5 + step / 100)


def strict(text: str) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_records_are_on_disk_at_once_one_per_line_in_order(tmp_path: Path) -> None:
    """Protects what a killed run leaves: nothing waits in a buffer (read while the tracker is still open)."""
    tracker = Tracker(tmp_path, tensorboard=False)
    tracker.start(0)
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
    assert read_metrics(tmp_path / "metrics.jsonl", "val") == records[-1:]
    tracker.close()


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """Protects curves and tables: steps that were lost and done again do not appear twice, and time goes on."""
    with Tracker(tmp_path / "whole", tensorboard=False) as whole:
        work(whole, 1, 12)
    killed = Tracker(tmp_path / "resumed", tensorboard=False)
    killed.start(0)
    killed._started -= 50  # as if 50 s had passed
    work(killed, 1, 7)
    killed.log("train", 8, time_s=100.0)  # beyond the checkpoint: must not count
    with Tracker(tmp_path / "resumed", tensorboard=False) as resumed:
        resumed.start(5)
        assert [record["step"] for record in read_metrics(tmp_path / "resumed", "train")] == [
            1,
            2,
            3,
            4,
            5,
        ]
        work(resumed, 6, 12)
    assert without_time(read_metrics(tmp_path / "resumed")) == without_time(
        read_metrics(tmp_path / "whole")
    )
    times = [record["time_s"] for record in read_metrics(tmp_path / "resumed")]
    assert times == sorted(times)
    assert 50 <= times[-1] < 100


def test_validation_done_again_at_the_resumed_step_is_recorded_once(tmp_path: Path) -> None:
    """Protects the moment between a checkpoint by steps and the end of its epoch."""
    killed = Tracker(tmp_path, tensorboard=False)
    work(killed, 1, 4)
    with Tracker(tmp_path, tensorboard=False) as resumed:
        resumed.start(4)
        resumed.log("val", 4, epoch=1.0, accuracy=0.54)
        resumed.log("val", 4, epoch=1.0, auc=0.9)
        resumed.log("val", 8, epoch=1.0, accuracy=0.6)
    assert [(r["step"], r.get("accuracy")) for r in read_metrics(tmp_path, "val")] == [
        (4, 0.54),
        (4, None),
        (8, 0.6),
    ]


@pytest.mark.parametrize(
    "torn",
    [
        '{"kind": "train", "st',
        '{"kind": "train", "step": 3, "note": "é',
        "\x00\x00\x00",
        "7",
        '{"a": 1}',
    ],
)
def test_a_torn_last_line_is_repaired_and_said(tmp_path: Path, torn: str) -> None:
    with Tracker(tmp_path, tensorboard=False) as tracker:
        work(tracker, 1, 2)
    path = tmp_path / "metrics.jsonl"
    with open(path, "ab") as file:
        file.write(torn.encode()[:-1] if "é" in torn else torn.encode())
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    notes: list[str] = []
    with Tracker(tmp_path, tensorboard=False, notify=notes.append) as tracker:
        tracker.start(2)
        tracker.log("train", 3, loss=0.1)
    assert [record["step"] for record in strict(path.read_text())] == [1, 2, 3]
    assert notes == [f"{path}: 1 unreadable line(s) removed, cut off by a kill or a full disk"]


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path: Path) -> None:
    with Tracker(tmp_path, tensorboard=False) as tracker:
        work(tracker, 1, 2)
        tracker.close()
        tracker.log("event", 2, event="report written")  # the same run, after it was closed once
    with pytest.raises(RunExistsError, match="holds 3 records"):
        Tracker(tmp_path, tensorboard=False).log("train", 1, loss=1.0)
    assert len(read_metrics(tmp_path)) == 3


def test_values_that_are_not_finite_become_null_and_an_event(tmp_path: Path) -> None:
    """Protects every reader: NaN is not JSON; and the person looking for the step where it began."""
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.log("train", 7, loss=float("nan"), grad_norm=torch.tensor(float("-inf")), lr=1e-3)
    train, event = without_time(strict((tmp_path / "metrics.jsonl").read_text()))
    assert train == {"kind": "train", "step": 7, "loss": None, "grad_norm": None, "lr": 1e-3}
    assert event == {
        "kind": "event",
        "step": 7,
        "event": "non_finite",
        "values": {"loss": "nan", "grad_norm": "-inf"},
    }


def test_tensors_and_numpy_scalars_are_recorded_as_numbers(tmp_path: Path) -> None:
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.log(
            "val",
            np.int64(3),
            a=torch.tensor(2),
            b=np.float32(0.5),
            c=torch.tensor([1.5]),
            d=True,
            e="é",
            f=None,
        )
        with pytest.raises(DataError, match=r"loss has more than one element \(\(2,\)\)"):
            tracker.log("train", 1, loss=torch.ones(2))
        with pytest.raises(DataError, match="path is a PosixPath"):
            tracker.log("train", 1, path=tmp_path)
        with pytest.raises(
            DataError, match="kind 'test' of step 1; it must be one of train, val, event"
        ):
            tracker.log("test", 1)
    (record,) = without_time(strict((tmp_path / "metrics.jsonl").read_text("utf-8")))
    assert record == {
        "kind": "val",
        "step": 3,
        "a": 2,
        "b": 0.5,
        "c": 1.5,
        "d": True,
        "e": "é",
        "f": None,
    }


def test_the_csv_has_every_record_and_every_name(tmp_path: Path) -> None:
    with Tracker(tmp_path, tensorboard=False) as tracker:
        work(tracker, 1, 4)
        tracker.log("train", 5, loss=float("nan"), images_per_s=512.5)
        assert not (tmp_path / "metrics.csv").exists()
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    header = list(rows[0])
    assert header[:5] == ["kind", "step", "epoch", "loss", "lr"]
    assert {"accuracy", "images_per_s", "time_s", "values"} <= set(header)
    for row, record in zip(rows, read_metrics(tmp_path), strict=True):
        for name, cell in row.items():
            value = record.get(name)
            assert cell == (
                ""
                if value is None
                else json.dumps(value)
                if isinstance(value, dict)
                else str(value)
            )


def test_the_csv_is_written_while_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_CSV_EVERY_S", 0.0)
    tracker = Tracker(tmp_path, tensorboard=False)
    tracker.log("train", 1, loss=1.0)
    assert (tmp_path / "metrics.csv").read_text().startswith("kind,step,loss,time_s\ntrain,1,1.0,")
    tracker.close()


def test_tensorboard_gets_the_figures_and_forgets_lost_steps(tmp_path: Path) -> None:
    """Protects the TensorBoard view: read back with TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = Tracker(tmp_path)
    work(killed, 1, 4)
    killed.log("train", 5, loss=99.0)
    assert killed._writer is not None
    killed._writer.close()
    with Tracker(tmp_path) as resumed:
        resumed.start(4)
        resumed.log("train", 5, loss=0.2, skipped=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "train/lr",
        "train/epoch",
        "train/skipped",
        "val/accuracy",
        "val/epoch",
    }
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (4, 0.25),
        (5, 0.2),
    ]


def test_without_tensorboard_there_is_one_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    notes: list[str] = []
    with Tracker(tmp_path, notify=notes.append) as tracker:
        work(tracker, 1, 2)
    assert notes == [
        'no TensorBoard events, because tensorboard is not installed: pip install "sssd-fast[train]"'
    ]
    assert len(read_metrics(tmp_path)) == 2
    assert not (tmp_path / "tensorboard").exists()


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, tensorboard=False)
    tracker.start(0)
    assert tracker._file is not None
    tracker._file.close()
    tracker._file = open("/dev/full", "w")  # noqa: SIM115 - what Linux offers for this
    with pytest.raises(SssdError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        tracker.log("train", 1, loss=1.0)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Tracker(tmp_path / "run", enabled=False) as tracker:
        tracker.start(3)
        tracker.log("train", 1, loss=1.0)
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="no metrics"):
        read_metrics(tmp_path / "run")
