"""What a command prints: a live display on a terminal, plain lines elsewhere, and train.log.

A terminal gets a progress bar with metrics (rich). A file or a batch system gets plain lines
without control characters: one at the first step, then one per interval, and never 30 s of silence.
Every line is also written to the log file with its time. A closed pipe or a full disk does not end
a run.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

# between plain progress lines
INTERVAL_S = 10.0
SILENCE_S = 30.0
# the remaining time is estimated from the steps of this period
ESTIMATE_S = 300.0
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-_]?|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?( ?%| ?[a-zA-Z/]{1,8})?|nan|-|")
_FORMATS = {
    "lr": "lr {1:.2e}",
    "_per_s": "{1:,.1f} {0}/s",
    "_gib": "{0} {1:.1f} GiB",
    "_fraction": "{0} {1:.0%}",
    "_time_s": "{0} {1:.3g} s",
    "": "{0} {1:.4g}",
}
# standard output and error before a live display replaced them
_own_streams: list[tuple[Any, Any]] = []


def _restore_streams_in_child() -> None:
    """A forked loader worker has the display's streams without its thread: if that thread held a
    lock at the fork, the first warning that the worker prints would wait for it forever."""
    if _own_streams:
        sys.stdout, sys.stderr = _own_streams[0]


os.register_at_fork(after_in_child=_restore_streams_in_child)


class Console:
    """Prints lines, tables and progress; appends every line to the log file.

    Args:
        interactive: True = live display, False = plain lines, None = live on a terminal.
        enabled: whether this process prints; None = on rank 0 of torchrun only.
        stream: replaces standard output, and standard error, where plain warnings go.
    """

    def __init__(
        self,
        interactive: bool | None = None,
        log_file: str | Path | None = None,
        *,
        enabled: bool | None = None,
        stream: IO[str] | None = None,
    ) -> None:
        self.enabled = os.environ.get("RANK", "0") == "0" if enabled is None else enabled
        self._out = _SafeStream(stream or sys.stdout)
        self._err = _SafeStream(stream or sys.stderr)
        self._log_path = None if log_file is None else Path(log_file)
        self._log: IO[str] | None = None
        # keeps the lines for the log file in memory until it is False
        self.hold_log = False
        self._unwritten = ""
        self._lock = threading.RLock()
        self._last_line = time.monotonic()
        # outermost first; replaced, never changed in place: other threads read it
        self._activities: tuple[Progress, ...] = ()
        self._rich: Any = None
        self._bars: Any = None
        if interactive is None:
            interactive = self._out.isatty() and os.environ.get("TERM") != "dumb"
        if interactive and self.enabled:
            from rich.console import Console as RichConsole

            self._rich = RichConsole(file=cast(IO[str], self._out), force_terminal=True)

    @property
    def interactive(self) -> bool:
        return self._rich is not None

    # ---- lines ----

    def info(self, text: str) -> None:
        self._emit(text)

    def warn(self, text: str) -> None:
        self._emit(f"warning: {text}", "yellow", error=True)

    def error(self, text: str) -> None:
        self._emit(f"error: {text}", "bold red", error=True)

    def rule(self, title: str) -> None:
        """A headline."""
        self._emit(f"\n---- {title} ----", "bold")

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Cells are folded on a narrow screen, never cut. Columns of numbers are aligned right."""
        if not self.enabled:
            return
        from rich import box
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text

        cells = [[_clean("" if cell is None else str(cell)) for cell in row] for row in rows]
        table = Table(title=Text(_clean(title), "bold"), title_justify="left", box=box.SIMPLE_HEAD)
        for i, name in enumerate(columns):
            right = bool(cells) and all(_NUMBER.fullmatch(row[i]) for row in cells)
            table.add_column(Text(_clean(name)), "", justify="right" if right else "left")
            table.columns[i].overflow = "fold"
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        plain = io.StringIO()
        RichConsole(file=plain, width=1000, force_terminal=False).print(table)
        lines = [line.rstrip() for line in plain.getvalue().replace("─", "-").splitlines()]
        with self._lock:
            if self.interactive:
                self._rich.print(table)
            self._emit("\n".join(filter(None, lines)), plain=True)

    def _emit(
        self, text: str, style: str = "", *, error: bool = False, plain: bool = False
    ) -> None:
        """plain: the live display shows it in another form."""
        if not self.enabled:
            return
        text = _clean(text)
        with self._lock:
            self._last_line = time.monotonic()
            if not self.interactive:
                (self._err if error else self._out).write(text + "\n")
            elif not plain:
                from rich.text import Text

                # soft wrap: a path can be copied whole
                self._rich.print(Text(text, style=style), soft_wrap=True)
            self._write_log(text.strip("\n"))

    def _write_log(self, text: str) -> None:
        path = self._log_path
        if path is None:
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S  ")
        self._unwritten += stamp + text.replace("\n", "\n" + " " * len(stamp)) + "\n"
        if self.hold_log:
            return
        try:
            if self._log is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._log = open(path, "a", 1, encoding="utf-8", errors="replace")  # noqa: SIM115
            self._log.write(self._unwritten)
            self._unwritten = ""
        except OSError as error:
            self._log_path = None
            self.warn(f"no more lines in {path}: {error.strerror}")

    # ---- long work ----

    @contextlib.contextmanager
    def progress(self, total: int, description: str, *, start: int = 0) -> Iterator[Progress]:
        """A bar (or lines) from step `start` to `total`; total 0 = unknown."""
        progress = Progress(self, total, _clean(description), start)
        if not total:
            self._emit(f"{progress.description} ...", plain=True)
        with self._running(progress):
            try:
                yield progress
            except BaseException:
                at = f" at {progress.position()}" if total else ""
                took = duration(progress.elapsed())
                self._emit(f"{progress.description}: stopped{at} after {took}")
                raise
        done = f"{progress.step - start} steps in" if total else "done in"
        # the last plain line already has the last metrics
        metrics = progress.fields() if self.interactive else []
        took = f"{progress.description}: {done} {duration(progress.elapsed())}"
        self._emit("  ".join([took, *metrics]))

    def announce(self, what: str) -> contextlib.AbstractContextManager[Progress]:
        """Prints what is happening during a long pause, and how long it took."""
        return self.progress(0, what)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Shows `what` ("validating") on the innermost bar while its steps stand still."""
        activity = self._activities[-1] if self._activities else Progress(self)
        before = activity.doing
        activity.doing = _clean(what)
        try:
            yield
        finally:
            activity.doing = before

    @contextlib.contextmanager
    def _running(self, activity: Progress) -> Iterator[None]:
        """Shows the activity; the outermost one starts and stops the display, or the heartbeat."""
        before = self._activities
        self._activities = (*before, activity)
        with contextlib.ExitStack() as stack:
            if self.enabled and not before:
                stack.enter_context(self._display() if self.interactive else self._heartbeat())
            if self._bars is not None:
                total, fields = activity.total or None, {"activity": activity}
                activity.bar = self._bars.add_task(activity.description, total=total, **fields)
                stack.callback(self._bars.remove_task, activity.bar)
            try:
                yield
            finally:
                self._activities = before

    @contextlib.contextmanager
    def _display(self) -> Iterator[None]:
        from rich import progress
        from rich.text import Text

        # read by rich's thread, which must not take our lock
        texts = ("description", "fields[activity].steps", "fields[activity].times")
        name, steps, times = (
            progress.TextColumn(f"{{task.{text}}}", markup=False) for text in texts
        )
        columns = (name, progress.BarColumn(30), steps, times)

        class Bars(progress.Progress):
            def get_renderables(self) -> Iterator[Any]:
                yield self.make_tasks_table(self.tasks)
                for task in self.tasks[:1]:
                    yield Text("  ".join(["", *task.fields["activity"].fields()]), "cyan")

        _own_streams.append((sys.stdout, sys.stderr))
        try:
            with Bars(*columns, console=self._rich, transient=True) as self._bars:
                yield
        finally:
            self._bars = None
            _own_streams.pop()

    @contextlib.contextmanager
    def _heartbeat(self) -> Iterator[None]:
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(max(0.01, self._last_line + SILENCE_S - time.monotonic())):
                with self._lock:
                    now = self._activities
                    if now and time.monotonic() - self._last_line >= SILENCE_S:
                        self._emit(now[-1].heartbeat())

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            stop.set()

    def close(self) -> None:
        with self._lock:
            if self._log is not None:
                self._log.close()
                self._log = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Progress:
    """A running count of steps; made by `Console.progress`."""

    def __init__(
        self, console: Console, total: int = 0, description: str = "", start: int = 0
    ) -> None:
        self.description = description
        self.doing = ""
        # its task in the live display
        self.bar: Any = None
        self.total = total
        self.step = start
        self.metrics: dict[str, Any] = {}
        self._console = console
        self._updates = 0
        self._started = self._updated = time.monotonic()
        # (time, step) since the first update, before which steps compile and caches fill
        self._samples: deque[tuple[float, int]] = deque()
        # time of the last plain line
        self._line_at = -1e9

    def update(self, step: int, **metrics: Any) -> None:
        """Reports the steps done and metrics, named as in metrics.jsonl (`lr`, `images_per_s`).

        Values are Python numbers: reading a tensor would wait for the device. A metric is shown
        until its next value. Rates and times per step are smoothed over about three updates.
        """
        for name, value in metrics.items():
            if name.endswith(("_per_s", "_time_s")) and self._updates > 1 and name in self.metrics:
                metrics[name] = 0.7 * self.metrics[name] + 0.3 * value
        self.metrics = {**self.metrics, **metrics}
        last = step >= self.total > self.step
        self.step = step
        self._updates += 1
        self._updated = time.monotonic()
        if self._console._bars is not None:
            self._console._bars.update(self.bar, completed=step)
        self._samples.append((self._updated, step))
        while self._updated - self._samples[0][0] > ESTIMATE_S and len(self._samples) > 2:
            self._samples.popleft()
        if last or self._updated - self._line_at >= INTERVAL_S:
            self._line_at = self._updated
            self._console._emit(self.plain_line(), plain=True)

    def elapsed(self) -> float:
        return time.monotonic() - self._started

    def seconds_left(self) -> float | None:
        """As of the last update; None before the second one."""
        if len(self._samples) < 2 or self.step == self._samples[0][1]:
            return None
        (first_time, first_step), (last_time, last_step) = self._samples[0], self._samples[-1]
        return (self.total - last_step) * (last_time - first_time) / (last_step - first_step)

    def position(self) -> str:
        return f"step {self.step}/{self.total}"

    def fields(self) -> list[str]:
        """The metrics with their units."""
        named = self.metrics.items()
        return [_clean(format_metric(name, value)) for name, value in named if value is not None]

    def plain_line(self) -> str:
        left = self.seconds_left()
        times = f"{duration(self.elapsed())} elapsed" + (f", {duration(left)} left" if left else "")
        head = f"{self.description}: {self.position()} ({self.step / max(1, self.total):.0%})"
        return "  ".join([head, *self.fields(), times])

    def heartbeat(self) -> str:
        """The line that breaks a silence."""
        if not self.total:
            return f"{self.description}: still working after {duration(self.elapsed())}"
        state = f"{self.doing}, still" if self.doing else "still"
        since = duration(time.monotonic() - self._updated)
        return f"{self.description}: {state} at {self.position()}, {since} since the last step"

    @property
    def steps(self) -> str:
        return f"{self.step}/{self.total}  {self.step / self.total:.0%}" if self.total else ""

    @property
    def times(self) -> str:
        """Elapsed and remaining; the latter does not count down while the steps stand still."""
        left = self.seconds_left()
        state = self.doing or ("estimating" if left is None else f"{duration(left)} left")
        return "  ".join([duration(self.elapsed()), *[state] * bool(self.total)])


class _SafeStream:
    """A text stream that replaces what its encoding lacks, and ignores errors once it is closed."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        # a closed pipe, a full disk, a closed file
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """`write` has flushed."""

    def isatty(self) -> bool:
        return not self._stream.closed and self._stream.isatty()


def duration(seconds: float) -> str:
    """7.3 s, 42 s, 1:05, 2:00:07"""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"


def format_metric(name: str, value: Any) -> str:
    """A metric with the unit in its name: ("memory_gib", 3.14) -> "memory 3.1 GiB"."""
    ending = next(ending for ending in _FORMATS if name.endswith(ending))
    words = name.removesuffix(ending).replace("_", " ")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{name.replace('_', ' ')} {value}"
    return _FORMATS[ending].format(words, value)


def _clean(text: str) -> str:
    """Without control characters: a file name must not move the cursor."""
    return _CONTROL.sub("", text.expandtabs(4))
