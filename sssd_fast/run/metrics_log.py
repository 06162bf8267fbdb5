"""What a run measured: metrics.jsonl while it runs, metrics.csv for spreadsheets, TensorBoard events where it is
installed.

metrics.jsonl has one JSON object per line, written at once: {"kind": "train" | "val" | "event", "step": ...,
"epoch": ..., "loss": ..., "time_s": ...}. Names carry units (`images_per_s`, `memory_gib`, `time_s`); fractions are
from 0 to 1. It is always valid JSON: a value that is NaN or infinite is written as null, and an event beside it
says which and what it was.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sssd_fast.errors import DataError, RunExistsError, SssdError
from sssd_fast.run.files import atomic_write_text

METRICS_JSONL = "metrics.jsonl"
METRICS_CSV = "metrics.csv"
KINDS = ("train", "val", "event")
_FIRST_COLUMNS = ("kind", "step", "epoch", "loss", "loss_reconstruction", "loss_distillation", "lr")
_CSV_EVERY_S = 60.0


class Tracker:
    """Writes one run's figures into `folder`. One writer (rank 0): with enabled=False every method does nothing.

    `start(step)` opens the files, and must be told where the run stands: records beyond that step, of work that was
    lost with the process, are removed, so that a resumed run leaves the same records as one that was never
    interrupted. notify: where one-line notes go (TensorBoard missing, a line that was repaired).
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tensorboard: bool = True,
        enabled: bool = True,
        notify: Callable[[str], None] = print,
    ) -> None:
        self.folder = Path(folder)
        self.enabled = enabled
        self._notify = notify
        self._want_tensorboard = tensorboard
        self._file: IO[str] | None = None
        self._writer: Any = None
        self._time_before_s = 0.0  # of the run before this process
        self._started = time.monotonic()
        self._csv_due = 0.0
        self._ready = False
        self._at_resume: set[tuple[str, frozenset[str]]] = set()
        self._resumed_step = 0

    def start(self, step: int | None = None) -> None:
        """Opens the files of a new run (step None or 0) or one resumed at `step`, the number of steps done.

        Raises RunExistsError if there are records and no step to resume at.
        """
        if not self.enabled:
            return
        path = self.folder / METRICS_JSONL
        kept: list[dict[str, Any]] = []
        if path.exists():
            records, damaged = _parse(path)
            if records and step is None:
                raise RunExistsError(
                    f"{path} holds {len(records)} records; resume that run, or choose another folder"
                )
            kept = [record for record in records if record["step"] <= (step or 0)]
            if damaged:
                self._notify(
                    f"{path}: {damaged} unreadable line(s) removed, cut off by a kill or a full disk"
                )
            atomic_write_text(path, "".join(_line(record) for record in kept))
        self._time_before_s = max((record.get("time_s") or 0.0 for record in kept), default=0.0)
        self._started = time.monotonic()
        self._resumed_step = step or 0
        self._at_resume = {
            _shape(record)
            for record in kept
            if record["step"] == step and record["kind"] != "event"
        }
        self._ready = True
        self._open(purge_step=step + 1 if step else None)

    def _open(self, purge_step: int | None = None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.folder / METRICS_JSONL, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._csv_due = time.monotonic() + _CSV_EVERY_S
        self._open_tensorboard(purge_step)

    def _open_tensorboard(self, purge_step: int | None) -> None:
        if not self._want_tensorboard:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._notify(
                'no TensorBoard events, because tensorboard is not installed: pip install "sssd-fast[train]"'
            )
            return
        # TensorBoard hides what earlier files hold from purge_step on
        self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge_step)

    def log(self, kind: str, step: int, **values: Any) -> None:
        """Appends one record. Values: numbers, strings, booleans, None, tensors and numpy scalars of one element.

        `time_s`, the seconds of the run (of all its processes, without the pauses), is added. Raises DataError for
        another kind or value, SssdError when the disk refuses.
        """
        if not self.enabled:
            return
        if kind not in KINDS:
            raise DataError(
                f"metrics: kind {kind!r} of step {step}; it must be one of {', '.join(KINDS)}"
            )
        if not self._ready:
            self.start()
        elif self._file is None:
            self._open()
        elapsed = round(self._time_before_s + time.monotonic() - self._started, 3)
        record = {
            "kind": kind,
            "step": int(step),
            **{name: _plain(name, value) for name, value in values.items()},
        }
        record.setdefault("time_s", elapsed)
        if record["step"] == self._resumed_step and _shape(record) in self._at_resume:
            return  # work between the checkpoint and the kill that was recorded already and done again, such as validation
        bad = {
            name: str(value)
            for name, value in record.items()
            if isinstance(value, float) and not math.isfinite(value)
        }
        self._append({name: None if name in bad else value for name, value in record.items()})
        if bad:
            self._append(
                {
                    "kind": "event",
                    "step": int(step),
                    "event": "non_finite",
                    "values": bad,
                    "time_s": elapsed,
                }
            )
        if self._writer is not None:
            for name, value in record.items():
                if (
                    name not in ("step", "time_s")
                    and isinstance(value, int | float)
                    and not isinstance(value, bool)
                ):
                    self._writer.add_scalar(f"{kind}/{name}", value, int(step))
        if time.monotonic() >= self._csv_due:
            began = time.monotonic()
            write_csv(self.folder)
            took = (
                time.monotonic() - began
            )  # grows with the run: at most one fiftieth of the time goes into it
            self._csv_due = began + max(_CSV_EVERY_S, 50 * took)

    def _append(self, record: dict[str, Any]) -> None:
        assert self._file is not None
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            raise SssdError(
                f"cannot write {self.folder / METRICS_JSONL}: {error.strerror}; free some space and resume"
            ) from error

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(folder: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run folder (or of a metrics.jsonl), of one kind or all, in the order written; of a running
    one too.

    A value that was not finite is None. Lines cut off by a kill are left out. Raises DataError if there is no such
    file.
    """
    path = Path(folder)
    path = path / METRICS_JSONL if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"no metrics: {path} does not exist; give the folder of a run")
    return [record for record in _parse(path)[0] if kind in (None, record["kind"])]


def write_csv(folder: str | Path) -> Path:
    """metrics.csv from metrics.jsonl: one row per record, one column per name, empty where a record lacks it."""
    records = read_metrics(folder)
    names = dict.fromkeys(_FIRST_COLUMNS[:2])
    present = dict.fromkeys(name for record in records for name in record)
    names.update(dict.fromkeys(name for name in _FIRST_COLUMNS if name in present))
    names.update(present)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), restval="", lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow(
            {name: json.dumps(v) if isinstance(v, dict | list) else v for name, v in record.items()}
        )
    path = Path(folder) / METRICS_CSV
    atomic_write_text(path, text.getvalue())
    return path


def _parse(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(records, number of lines that are none). A kill can cut the last line off in the middle of a character."""
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


def _shape(record: dict[str, Any]) -> tuple[str, frozenset[str]]:
    return record["kind"], frozenset(record)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(name: str, value: Any) -> Any:
    if callable(getattr(value, "item", None)):  # a tensor or a numpy scalar
        try:
            value = value.item()
        except (ValueError, RuntimeError) as error:
            raise DataError(
                f"metrics: {name} has more than one element ({tuple(value.shape)}); record its mean"
            ) from error
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise DataError(
        f"metrics: {name} is a {type(value).__name__}; numbers, strings and None can be recorded"
    )
