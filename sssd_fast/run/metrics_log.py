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
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from sssd_fast.errors import DataError, DependencyError, SssdError
from sssd_fast.run.files import atomic_write_text

METRICS_JSONL = "metrics.jsonl"
Send = Callable[[str, int, Mapping[str, float]], None]


class Tracker:
    """Writes the metrics of one run into `folder`. One process writes (rank 0).

    Args:
        logger: also send the metrics to wandb or mlflow (see `_LOGGERS`).
        settings: the run's settings, which they show.
        enabled: False = every method does nothing.
        log: receives one-line notes (TensorBoard missing, a line that was repaired).
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tensorboard: bool = True,
        logger: str = "none",
        settings: Mapping[str, Any] | None = None,
        enabled: bool = True,
        log: Callable[[str], None] = print,
    ) -> None:
        self.folder = Path(folder)
        self.enabled = enabled
        self._note = log
        self._tensorboard = tensorboard
        self._logger = logger
        self._settings = settings or {}
        self._file: IO[str] | None = None
        # functions that take (kind, step, numbers), and those that end their logging
        self._senders: list[tuple[Send, Callable[[], object]]] = []
        # when the run would have started without its pauses
        self._started = 0.0

    def start(self, step: int = 0) -> None:
        """Opens the files of a run that continues at `step`; call it before `log`.

        Records beyond `step` are removed, so that a resumed run leaves the same records as one that
        was not interrupted. Raises DependencyError if the package of `logger` is missing.
        """
        if not self.enabled:
            return
        if self._logger != "none":
            self._senders.append(_LOGGERS[self._logger](self.folder, self._settings))
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
        writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge)

        def send(kind: str, step: int, numbers: Mapping[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(f"{kind}/{name}", value, step)

        self._senders.append((send, writer.close))

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
        scalars = {n: v for n, v in plain.items() if isinstance(v, int | float)}
        scalars = {n: v for n, v in scalars.items() if not isinstance(v, bool)}
        for send, _ in self._senders:
            send(kind, int(step), scalars)

    def close(self) -> None:
        """May be called again."""
        if self._file is not None:
            self._file.close()
            self._file = None
            _write_csv(self.folder)
        for _, end in self._senders:
            end()
        self._senders = []


# ---- other loggers; their environment variables select server, project and offline mode ----


def _wandb(folder: Path, settings: Mapping[str, Any]) -> tuple[Send, Callable[[], object]]:
    """Weights & Biases; WANDB_MODE=offline keeps everything in RUN/wandb."""
    try:
        import wandb
    except ImportError as error:
        raise DependencyError("logger is wandb: pip install 'sssd-fast[wandb]'") from error
    known = _known_run(folder, "wandb")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "sssd-fast"),
        name=f"{folder.parent.name}/{folder.name}",
        dir=folder,
        config=dict(settings),
        id=known or None,
        resume="allow",
    )
    _remember_run(folder, "wandb", run.id)
    # a resumed run repeats steps, which wandb's own counter rejects
    run.define_metric("*", step_metric="step")

    def send(kind: str, step: int, numbers: Mapping[str, float]) -> None:
        run.log({"step": step} | {f"{kind}/{name}": value for name, value in numbers.items()})

    return send, run.finish


def _mlflow(folder: Path, settings: Mapping[str, Any]) -> tuple[Send, Callable[[], object]]:
    """MLflow; without MLFLOW_TRACKING_URI everything is in RUN/mlflow.db."""
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise DependencyError("logger is mlflow: pip install 'sssd-fast[mlflow]'") from error
    place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.absolute() / 'mlflow.db'}"
    client, known = MlflowClient(place), _known_run(folder, "mlflow")
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "sssd-fast")
    if not known:
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else client.create_experiment(name)
        run = client.create_run(experiment, run_name=f"{folder.parent.name}/{folder.name}")
        known = run.info.run_id
        _remember_run(folder, "mlflow", known)
        for key, value in settings.items():
            client.log_param(known, key, value)

    def send(kind: str, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            client.log_metric(known, f"{kind}/{name}", value, step=step)

    return send, lambda: client.set_terminated(known)


_LOGGERS = {"wandb": _wandb, "mlflow": _mlflow}


def _known_run(folder: Path, logger: str) -> str:
    """The logger's name of this run, if it was started before; "" if not."""
    path = folder / f"{logger}-run.txt"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _remember_run(folder: Path, logger: str, name: str) -> None:
    atomic_write_text(folder / f"{logger}-run.txt", name + "\n")


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
