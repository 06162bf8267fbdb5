"""The metrics of a run: metrics.jsonl, metrics.csv and TensorBoard events.

metrics.jsonl has one JSON object per line, written at once: {"kind": "train" | "val" | "event",
"step": ..., "epoch": ..., "loss": ..., "time_s": ...}. Names hold units (`images_per_s`,
`memory_gib`); fractions are from 0 to 1. NaN and infinity are written as null, followed by an event
that names them, so that every line is valid JSON. metrics.csv is written at the end.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from sssd_fast.errors import DataError, SssdError
from sssd_fast.run.files import atomic_write_text

METRICS_JSONL = "metrics.jsonl"


class Tracker:
    """Writes the metrics of one run into `folder`. One process writes (rank 0).

    Args:
        enabled: False = every method does nothing.
        log: receives one-line notes (TensorBoard missing, a line that was repaired).
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tensorboard: bool = True,
        enabled: bool = True,
        log: Callable[[str], None] = print,
    ) -> None:
        self.folder = Path(folder)
        self.enabled = enabled
        self._note = log
        self._tensorboard = tensorboard
        self._file: IO[str] | None = None
        self._writer: Any = None
        # when the run would have started without its pauses
        self._started = 0.0

    def start(self, step: int = 0) -> None:
        """Opens the files of a run that continues at `step`; call it before `log`.

        Records beyond `step` are removed, so that a resumed run leaves the same records as one that
        was not interrupted.
        """
        if not self.enabled:
            return
        path = self.folder / METRICS_JSONL
        records, damaged = _parse(path) if path.exists() else ([], 0)
        kept = [record for record in records if record["step"] <= step]
        if damaged:
            self._note(f"{path}: {damaged} unreadable line(s) removed (killed, or the disk full)")
        atomic_write_text(path, "".join(_line(record) for record in kept))
        before = max((record.get("time_s") or 0.0 for record in kept), default=0.0)
        self._started = time.monotonic() - before
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        if not self._tensorboard:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._note('tensorboard is not installed: pip install "sssd-fast[train]"')
            return
        # TensorBoard hides what earlier files hold from purge_step on
        purge = step + 1 if step else None
        self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge)

    def log(self, kind: str, step: int, **values: Any) -> None:
        """Appends one record and adds `time_s`, the seconds of the run without its pauses.

        Args:
            kind: train, val or event.
            values: numbers, strings, booleans, None, tensors and NumPy scalars of one element.

        Raises SssdError if the disk is full.
        """
        if self._file is None:
            return
        plain = {name: v.item() if hasattr(v, "item") else v for name, v in values.items()}
        times = {"time_s": round(time.monotonic() - self._started, 3)}
        record = {"kind": kind, "step": int(step), **times, **plain}
        numbers = {name: v for name, v in record.items() if isinstance(v, float)}
        bad = {name: str(v) for name, v in numbers.items() if not math.isfinite(v)}
        lines = [record | dict.fromkeys(bad)]
        if bad:
            event = {"event": "non_finite", "values": bad}
            lines.append({"kind": "event", "step": int(step), **event, **times})
        try:
            self._file.write("".join(_line(line) for line in lines))
            self._file.flush()
        except OSError as error:
            path = self.folder / METRICS_JSONL
            raise SssdError(f"cannot write {path}: {error.strerror}; free some space") from error
        for name, value in plain.items() if self._writer is not None else ():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(f"{kind}/{name}", value, int(step))

    def close(self) -> None:
        """May be called again."""
        if self._file is not None:
            self._file.close()
            self._file = None
            _write_csv(self.folder)
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run folder, in the order written.

    A value that was not finite is None; lines cut off by a kill are skipped. Raises DataError if
    the file does not exist.
    """
    path = Path(folder, METRICS_JSONL)
    if not path.is_file():
        raise DataError(f"no metrics: {path} does not exist; give the folder of a run")
    return _parse(path)[0]


def _write_csv(folder: Path) -> None:
    """One row per record, empty where a record lacks a name."""
    records = read_metrics(folder)
    text = io.StringIO()
    names = dict.fromkeys(name for record in records for name in record)
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({n: json.dumps(v) if isinstance(v, dict) else v for n, v in record.items()})
    atomic_write_text(folder / "metrics.csv", text.getvalue())


def _parse(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(records, number of unreadable lines). A kill can cut a line within a character.

    A validation that a resumed run repeated is read once.
    """
    records: dict[Any, dict[str, Any]] = {}
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    damaged = 0
    for line in lines:
        try:
            record = json.loads(line)
            key = record["kind"], int(record["step"]), record.get("event"), frozenset(record)
        except (ValueError, KeyError, TypeError, AttributeError):
            damaged += 1
        else:
            records[key] = record
    return list(records.values()), damaged


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"
