"""`sssd-fast bench session`, `make gpu`: everything that needs a GPU, within a given time, so that a stop loses nothing.

    info       the card, versions, which implementation of each op runs here; always
    tests      pytest -m gpu
    sanitize   every kernel under compute-sanitizer (tests/kernels/sanitize_run.py)
    bench      kernels, attention, step, memory and loaders: `bench all`
    tune       which launch of each kernel is fastest: `bench tune`
    paper      the paper's experiments on the data sets whose folders are given: `sssd-fast reproduce`

A stage has a share of the time that is left (stages.py); what it does not use goes to the next. One that fails or is cut off stops
no other. In --out lie session.json (anew after every stage), a log of each stage, and results.tar with the small files that the
stages wrote, made anew while they run. Unpacked in a checkout, results of benchmarks lie where `bench report` looks for them.

Exit codes: 0 all passed, 1 a stage failed, was cut off or had no time left, 2 bad arguments or no GPU, 130 or 143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import shlex
import signal
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from sssd_fast.errors import SssdError
from sssd_fast.run.files import atomic_write_bytes, atomic_write_text
from sssd_fast.run.log import Console, duration

from . import processes, results
from .stages import DATA_SETS, ROOT, SHARES, Stage, folder, paper_folder, stages

SCHEMA = "sssd_fast.session/1"
NOT_ENOUGH_S = 5.0  # a stage with less is not begun
LOG_BYTES, FILE_BYTES, ARCHIVE_BYTES = 4 << 20, 4 << 20, 15 << 20
SMALL = {".json", ".jsonl", ".csv", ".md", ".txt", ".log", ".yaml", ".xml", ".png", ".html"}
ARCHIVE_EVERY_S = 5.0
TAIL_LINES = 12  # of what a command that did not pass printed, on the screen


@dataclass
class Result:
    name: str
    result: str
    ok: bool
    seconds: float = 0.0
    limit_s: float | None = None
    log: str | None = None
    commands: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Stopped(Exception):
    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Session:
    """state: what session.json holds. work: where the stages' own files lie while they run."""

    def __init__(
        self, out: Path, work: Path, minutes: float, words: Sequence[str], console: Console
    ) -> None:
        self.out = out
        self.work = work
        self.minutes = minutes
        self.console = console
        self.started = time.monotonic()
        self._before = _signatures(self._written())
        self._archived = ""
        self._archived_at = 0.0
        now = datetime.datetime.now(datetime.timezone.utc)
        self._stamp = f"{now:%Y%m%d-%H%M%S}"
        self.state: dict[str, Any] = {
            "schema": SCHEMA, "command": shlex.join(["sssd-fast", "bench", *words]), "minutes": minutes,
            "started": now.isoformat(timespec="seconds"), "seconds": 0.0, "finished": False, "machine": None, "stages": [],
            "archive": {"file": "results.tar", "holds": [], "left_out": []},
        }  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        for name in ("results.tar", *(f"{stage}.log" for stage in SHARES)):  # of an earlier session
            (out / name).unlink(missing_ok=True)
        self.save()

    # ---- running ----

    def run(self, wanted: Sequence[Stage]) -> None:
        end, left = self.started + 60 * self.minutes, list(wanted)
        planned_s = 60 * self.minutes / (sum(stage.share for stage in wanted) or 1)
        while left:
            stage = left[0]
            # one that does not take part leaves its share to the others
            shares = sum(one.share for one in left if one.left_out is None) or 1
            limit_s = (end - time.monotonic()) * stage.share / shares
            if stage.left_out is not None:
                self._add(Result(stage.name, f"left out because {stage.left_out}", True))
            elif limit_s < min(NOT_ENOUGH_S, planned_s * stage.share / 2):
                self._add(Result(stage.name, "left out because the time was up", False))
            else:
                self._run(stage, limit_s)
            left.pop(0)

    def _run(self, stage: Stage, limit_s: float) -> None:
        log, began = self.out / f"{stage.name}.log", time.monotonic()
        self.console.info(f"{stage.name}: {limit_s:.0f} s at most, {log.name}")
        for note in stage.notes:
            self.console.warn(f"{stage.name}: {note}")
        running = Result(
            stage.name,
            "running",
            False,
            limit_s=round(limit_s, 1),
            log=log.name,
            notes=[*stage.notes],
        )
        self.state["stages"].append(asdict(running))
        self.save()
        parts, done, stopped = list[Path](), list[processes.Done](), None

        def tick() -> None:
            self._log(log, parts)
            if time.monotonic() - self._archived_at >= ARCHIVE_EVERY_S:
                self.archive()

        try:
            for i, group in enumerate(stage.groups):
                left_s = limit_s - (time.monotonic() - began)
                seconds = max(
                    left_s * group.share / sum(one.share for one in stage.groups[i:]), 0.0
                )
                commands = group.commands(seconds)
                new = [
                    self.work / f"{stage.name}-{len(parts) + k}.out" for k in range(len(commands))
                ]
                parts.extend(new)
                done += processes.run(
                    commands, new, seconds, tick=tick, env=_environment(), cwd=ROOT
                )
        except Stopped as signal_:
            stopped = signal_
        self._log(log, parts)
        self.state["stages"].pop()
        tests = count(sorted(self.work.glob(f"{stage.name}-*.xml"))) or count_lines(
            self.work / f"{stage.name}.json"
        )
        seconds = time.monotonic() - began
        said = verdict([one.returncode for one in done], tests, seconds, stopped)
        ok, told = said.startswith("passed"), [_told(one) for one in done]
        self._add(replace(running, result=said, ok=ok, seconds=round(seconds, 1), commands=told))
        for part, one in zip(parts, done, strict=False):
            if one.returncode != 0:
                lines = processes.excerpt(part, LOG_BYTES).decode("utf-8", "replace").splitlines()
                self.console.info("\n".join(f"  {line}" for line in lines[-TAIL_LINES:]))
        self.archive()
        if stopped is not None:
            raise stopped

    def _add(self, result: Result) -> None:
        self.state["stages"].append(asdict(result))
        with contextlib.suppress(
            OSError, ValueError
        ):  # the stage info has not written it, or was cut off while it did
            self.state["machine"] = json.loads(
                (self.work / "machine.json").read_text(encoding="utf-8")
            )
        self.save()
        self.console.info(f"{result.name}: {result.result}, {result.seconds:.0f} s")

    def finish(self, finished: bool) -> int:
        self.state["finished"] = finished
        self.save()
        columns = ["stage", "result", "seconds", "log"]
        rows = [
            [s["name"], s["result"], f"{s['seconds']:.0f}", s["log"] or "-"]
            for s in self.state["stages"]
        ]
        title = f"{os.path.relpath(self.out)}: {duration(self.state['seconds'])} of {self.minutes:g} minutes"
        self.console.table(title, columns, rows)
        return 0 if all(s["ok"] for s in self.state["stages"]) else 1

    # ---- files ----

    def save(self) -> None:
        self.state["seconds"] = round(time.monotonic() - self.started, 1)
        atomic_write_text(self.out / "session.json", json.dumps(self.state, indent=1) + "\n")

    def _log(self, log: Path, parts: Sequence[Path]) -> None:
        texts = [processes.excerpt(part, LOG_BYTES // len(parts)) for part in parts]
        atomic_write_bytes(log, b"\n".join(texts))

    def _written(self) -> list[Path]:
        """Where benchmarks and the paper's experiments write."""
        return [*results.FOLDER.rglob("*.json"), *_small(paper_folder(self.out))]

    def archive(self) -> None:
        """results.tar, if anything in it changed: what was measured since the session began, and what its stages left."""
        self._archived_at = time.monotonic()
        files = {f"session/{path.name}": path for path in _small(self.work)}
        paper = paper_folder(self.out)
        for path, signature in _signatures(self._written()).items():
            if self._before.get(path) == signature:
                continue
            if paper not in path.parents:
                files[path.relative_to(results.FOLDER.parent.parent).as_posix()] = path
                continue
            name = path.relative_to(paper).as_posix()
            files[f"paper/{name}"] = path
            if (
                name.count("/") == 1 and path.name == "results.json"
            ):  # where `bench report` looks for it
                files[f"benchmarks/results/paper/{path.parent.name}-{self._stamp}.json"] = path
        state = repr(sorted(_signatures(files.values()).items()))
        if state == self._archived:
            return
        data, left_out = pack(files)
        atomic_write_bytes(self.out / "results.tar", data)
        self._archived = state
        held = sorted(set(files) - set(left_out))
        self.state["archive"] = {"file": "results.tar", "holds": held, "left_out": left_out}
        self.save()


def pack(files: dict[str, Path]) -> tuple[bytes, list[str]]:
    """A tar file, and the names of those that are too large for it, or were gone when they were to be read."""
    packed, left_out = io.BytesIO(), list[str]()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, path in sorted(files.items()):
            try:
                data = path.read_bytes()
            except OSError:
                left_out.append(name)
                continue
            if len(data) > FILE_BYTES or packed.tell() + len(data) > ARCHIVE_BYTES:
                left_out.append(name)
                continue
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            entry.mtime = int(time.time())
            tar.addfile(entry, io.BytesIO(data))
    return packed.getvalue(), left_out


def _small(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in SMALL]


def _signatures(paths: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    found = {}
    for path in paths:
        with contextlib.suppress(OSError):  # gone meanwhile
            stat = path.stat()
            found[path] = (stat.st_mtime_ns, stat.st_size)
    return found


# ---- what a stage's result is called ----


class Count(NamedTuple):
    ran: int
    failed: int
    skipped: int


def count(files: Sequence[Path]) -> Count | None:
    """Of pytest's XML files; None where there is none that is whole."""
    suites = list[ET.Element]()
    for file in files:
        with contextlib.suppress(ET.ParseError):  # pytest was killed while it wrote
            suites += ET.parse(file).iter("testsuite")
    if not suites:
        return None
    names = ("tests", "failures", "errors", "skipped")
    tests, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in names
    )
    return Count(tests - skipped, failures + errors, skipped)


def count_lines(file: Path) -> Count | None:
    """Of the table that sanitize_run.py writes; None where there is none."""
    try:
        lines = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Count(len(lines), sum(not line["ok"] for line in lines), 0)


def verdict(
    codes: Sequence[int | None], tests: Count | None, seconds: float, stopped: Stopped | None
) -> str:
    """Begins with "passed" where nothing is wrong. codes: exit codes; None: cut off."""
    skipped = f", {tests.skipped} skipped" if tests and tests.skipped else ""
    if stopped is not None or None in codes:
        so_far = f", {tests.failed} of {tests.ran} failed until then" if tests else ""
        return (
            f"cut off after {seconds:.0f} s{f' by {stopped}' if stopped else ''}{so_far}{skipped}"
        )
    if any(codes):
        exits = ", ".join(dict.fromkeys(f"exit code {code}" for code in codes if code))
        return (
            f"failed {tests.failed} of {tests.ran}"
            if tests and tests.failed
            else f"failed: {exits}"
        ) + skipped
    return (f"passed {tests.ran}" if tests else "passed") + skipped


def _told(done: processes.Done) -> dict[str, Any]:
    words = ["python" if word == sys.executable else word for word in done.command]
    return {
        "command": shlex.join(words),
        "returncode": done.returncode,
        "seconds": round(done.seconds, 1),
    }


def _environment() -> dict[str, str]:
    path = os.pathsep.join(
        [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


# ---- the command ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes", type=float, default=9.0, metavar="M", help="for all of it (default 9)"
    )
    parser.add_argument(
        "--stages", nargs="+", choices=list(SHARES), metavar="S", help=f"of: {', '.join(SHARES)}"
    )
    parser.add_argument(
        "--out", default="runs/gpu-session", metavar="DIR", help="default runs/gpu-session"
    )
    for name in DATA_SETS:
        parser.add_argument(
            f"--{name}", metavar="DIR", help=f"the images of {name}, for the stage paper"
        )


def main(args: argparse.Namespace, words: Sequence[str]) -> int:
    if not args.minutes >= 0.1:
        raise SssdError(f"--minutes is {args.minutes:g}, needs at least 0.1")
    for name in DATA_SETS:
        given = folder(args, name)
        if given is not None and not Path(given).is_dir():
            raise SssdError(
                f"--{name} is {given!r}, which is no folder; give the one that holds the images"
            )
    if not torch.cuda.is_available():
        raise SssdError(
            "bench session needs a CUDA device, and torch finds none here (see `sssd-fast doctor`)"
        )
    out = Path(args.out).resolve()
    return conduct(lambda work: stages(args, out, work), out, args.minutes, words)


def conduct(
    make: Callable[[Path], Sequence[Stage]], out: Path, minutes: float, words: Sequence[str] = ()
) -> int:
    """Runs the stages that make(folder for their own files) gives, with signals told to the session. Returns the exit code."""
    if out.exists() and not out.is_dir():
        raise SssdError(f"--out is {str(out)!r}, which is a file; give a folder")
    with Console() as console, tempfile.TemporaryDirectory(prefix="sssd_fast_session_") as work:
        session = Session(out, Path(work), minutes, words, console)
        handlers = {which: signal.signal(which, _stop) for which in (signal.SIGINT, signal.SIGTERM)}
        try:
            session.run(make(Path(work)))
        except Stopped as stopped:
            session.finish(finished=False)
            return 128 + stopped.signum
        finally:
            for which, handler in handlers.items():
                signal.signal(which, handler)
        return session.finish(finished=True)


def _stop(signum: int, _: object) -> NoReturn:
    for which in (signal.SIGINT, signal.SIGTERM):  # a second one must not stop the tidying up
        signal.signal(which, signal.SIG_IGN)
    raise Stopped(signum)
