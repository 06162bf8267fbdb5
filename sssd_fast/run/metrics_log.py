"""The metrics of a run: metrics.jsonl, metrics.csv and TensorBoard events.

metrics.jsonl has one JSON object per line, written at once: {"kind": "train" | "val" | "event",
"step": ..., "epoch": ..., "loss": ..., "time_s": ...}. Names hold units (`images_per_s`,
`memory_gib`); fractions are from 0 to 1. NaN and infinity are written as null, followed by an event
that names them, so that every line is valid JSON.
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

from sssd_fast.errors import DataError, RunExistsError, SssdError
from sssd_fast.run.files import atomic_write_text

METRICS_JSONL = "metrics.jsonl"
METRICS_CSV = "metrics.csv"
KINDS = ("train", "val", "event")
_FIRST_COLUMNS = ("kind", "step", "epoch", "loss", "loss_reconstruction", "loss_distillation", "lr")
_CSV_EVERY_S = 60.0


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
        # seconds of the run before this process
        self._time_before_s = 0.0
        self._started = time.monotonic()
        self._csv_due = 0.0
        self._ready = False
        self._resumed_step = 0
        self._at_resume: set[tuple[str, frozenset[str]]] = set()

    def start(self, step: int | None = None) -> None:
        """Opens the files of a new run (step None or 0), or of one resumed at `step`.

        Records beyond `step` are removed, so that a resumed run leaves the same records as one that
        was not interrupted. Raises RunExistsError if there are records and `step` is None.
        """
        if not self.enabled:
            return
        path = self.folder / METRICS_JSONL
        records, damaged = _parse(path) if path.exists() else ([], 0)
        if records and step is None:
            raise RunExistsError(
                f"{path} holds {len(records)} records; resume that run, or choose another folder"
            )
        kept = [record for record in records if record["step"] <= (step or 0)]
        if damaged:
            self._note(f"{path}: {damaged} unreadable line(s) removed (killed, or the disk full)")
        if path.exists():
            atomic_write_text(path, "".join(_line(record) for record in kept))
        self._time_before_s = max((record.get("time_s") or 0.0 for record in kept), default=0.0)
        self._started = time.monotonic()
        self._resumed_step = step or 0
        measured = [r for r in kept if r["step"] == step and r["kind"] != "event"]
        self._at_resume = {_signature(record) for record in measured}
        self._ready = True
        self._open(step + 1 if step else None)

    def _open(self, purge_step: int | None = None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.folder / METRICS_JSONL, "a", encoding="utf-8")  # noqa: SIM115
        self._csv_due = time.monotonic() + _CSV_EVERY_S
        if not self._tensorboard:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            reason = "no TensorBoard events, because tensorboard is not installed"
            self._note(f'{reason}: pip install "sssd-fast[train]"')
            return
        # TensorBoard hides what earlier files hold from purge_step on
        self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge_step)

    def log(self, kind: str, step: int, **values: Any) -> None:
        """Appends one record and adds `time_s`, the seconds of the run without its pauses.

        Args:
            values: numbers, strings, booleans, None, tensors and NumPy scalars of one element.

        Raises DataError for another kind or value, SssdError if the disk is full.
        """
        if not self.enabled:
            return
        if kind not in KINDS:
            raise DataError(f"metrics: kind of step {step} is {kind!r}, needs one of {KINDS}")
        if not self._ready:
            self.start()
        elif self._file is None:
            self._open()
        record = {"kind": kind, "step": int(step)}
        record |= {name: _plain(name, value) for name, value in values.items()}
        elapsed = round(self._time_before_s + time.monotonic() - self._started, 3)
        record.setdefault("time_s", elapsed)
        if record["step"] == self._resumed_step and _signature(record) in self._at_resume:
            # already recorded between the checkpoint and the kill, such as a validation
            return
        numbers = {name: v for name, v in record.items() if isinstance(v, float)}
        bad = {name: str(v) for name, v in numbers.items() if not math.isfinite(v)}
        self._append({name: None if name in bad else v for name, v in record.items()})
        if bad:
            event = {"kind": "event", "step": int(step), "event": "non_finite", "values": bad}
            self._append({**event, "time_s": elapsed})
        for name, value in record.items() if self._writer is not None else ():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and name not in ("step", "time_s"):
                self._writer.add_scalar(f"{kind}/{name}", value, int(step))
        if time.monotonic() >= self._csv_due:
            began = time.monotonic()
            write_csv(self.folder)
            # writing takes longer as the run grows: at most 2 % of the time
            took = time.monotonic() - began
            self._csv_due = began + max(_CSV_EVERY_S, 50 * took)

    def _append(self, record: dict[str, Any]) -> None:
        assert self._file is not None
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            reason = f"cannot write {self.folder / METRICS_JSONL}: {error.strerror}"
            raise SssdError(f"{reason}; free some space and resume") from error

    def close(self) -> None:
        """Writes metrics.csv and closes the files; may be called again."""
        if self._file is not None:
            self._file.close()
            self._file = None
            write_csv(self.folder)
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(folder: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run folder or a metrics.jsonl, in the order written, of one kind or all.

    A value that was not finite is None; lines cut off by a kill are skipped; the run may be active.
    Raises DataError if the file does not exist.
    """
    path = Path(folder)
    path = path / METRICS_JSONL if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"no metrics: {path} does not exist; give the folder of a run")
    return [record for record in _parse(path)[0] if kind in (None, record["kind"])]


def write_csv(folder: str | Path) -> Path:
    """metrics.csv from metrics.jsonl: one row per record, empty where a record lacks a name."""
    records = read_metrics(folder)
    present = {"kind", "step"}.union(*records)
    names = [name for name in _FIRST_COLUMNS if name in present]
    names += [name for name in dict.fromkeys(n for r in records for n in r) if name not in names]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    for record in records:
        cells = {n: json.dumps(v) if isinstance(v, dict) else v for n, v in record.items()}
        writer.writerow(cells)
    path = Path(folder) / METRICS_CSV
    atomic_write_text(path, text.getvalue())
    return path


def _parse(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(records, number of unreadable lines). A kill can cut a line within a character."""
    records, damaged = [], 0
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if record["kind"] not in KINDS or not isinstance(record["step"], int):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            damaged += 1
        else:
            records.append(record)
    return records, damaged


def _signature(record: dict[str, Any]) -> tuple[str, frozenset[str]]:
    return record["kind"], frozenset(record)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(name: str, value: Any) -> Any:
    # a tensor or a NumPy scalar
    if callable(getattr(value, "item", None)):
        try:
            value = value.item()
        except (ValueError, RuntimeError) as error:
            problem = f"metrics: {name} has more than one element {tuple(value.shape)}"
            raise DataError(f"{problem}; record its mean") from error
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = type(value).__name__
    raise DataError(f"metrics: {name} is a {kind}; numbers, strings and None can be recorded")
