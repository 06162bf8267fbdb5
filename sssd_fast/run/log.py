"""What a command prints: a live display on a terminal, plain lines elsewhere, and train.log.

A terminal gets rich's progress bar with metrics. A file or a batch system gets plain lines without
control characters: one at the first step, then one per interval. Every line is also written to the
log file with its time. A closed pipe or a full disk does not end a run.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

# between plain progress lines
INTERVAL_S = 10.0
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


def _restore_streams_in_child() -> None:
    """A forked loader worker has the display's streams without its thread, whose lock may be held
    forever."""
    sys.stdout = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    sys.stderr = getattr(sys.stderr, "rich_proxied_file", sys.stderr)


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
        # keeps the lines for the log file in memory until it is False
        self.hold_log = False
        self._unwritten = ""
        self._rich: Any = None
        self._bars: Any = None
        if interactive is None:
            interactive = self._out.isatty() and os.environ.get("TERM") != "dumb"
        if interactive and self.enabled:
            from rich.console import Console as RichConsole

            self._rich = RichConsole(file=cast(IO[str], self._out), force_terminal=True)

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing stays open."""

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
        """Cells are folded on a narrow screen, never cut."""
        from rich import box
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text

        cells = [[_clean("" if cell is None else str(cell)) for cell in row] for row in rows]
        table = Table(title=Text(_clean(title), "bold"), title_justify="left", box=box.SIMPLE_HEAD)
        for i, name in enumerate(columns):
            right = bool(cells) and all(_NUMBER.fullmatch(row[i]) for row in cells)
            justify: Any = "right" if right else "left"
            table.add_column(Text(_clean(name)), justify=justify, overflow="fold")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        plain = io.StringIO()
        RichConsole(file=plain, width=1000, force_terminal=False).print(table)
        lines = [line.rstrip() for line in plain.getvalue().replace("─", "-").splitlines()]
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
        if not self.interactive:
            (self._err if error else self._out).write(text + "\n")
        elif not plain:
            from rich.text import Text

            # soft wrap: a path can be copied whole
            self._rich.print(Text(text, style=style), soft_wrap=True)
        if self._log_path is not None:
            self._write_log(text.strip("\n"), self._log_path)

    def _write_log(self, text: str, path: Path) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S  ")
        self._unwritten += stamp + text.replace("\n", "\n" + " " * len(stamp)) + "\n"
        if self.hold_log:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8", errors="replace") as file:
                file.write(self._unwritten)
            self._unwritten = ""
        except OSError as error:
            self._log_path = None
            self.warn(f"no more lines in {path}: {error.strerror}")

    # ---- long work ----

    @contextlib.contextmanager
    def progress(
        self, total: int, description: str, *, start: int = 0, later: float = 0.0
    ) -> Iterator[Progress]:
        """A bar (or lines) from step `start` to `total`; total 0 = unknown.

        later: work of the stages after this one, in steps of this one; 0 = this is all.
        """
        progress = Progress(self, description, total, start, later)
        if not total:
            self._emit(f"{progress.description} ...", plain=True)
        with self._running(progress):
            yield progress
        done = f"{progress.step - start} steps in" if total else "done in"
        self._emit(f"{progress.description}: {done} {progress.elapsed()}")

    def announce(self, what: str) -> contextlib.AbstractContextManager[Progress]:
        """Prints what is happening during a long pause, and how long it took."""
        return self.progress(0, what)

    def doing(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Shows `what` ("validating") while the steps of a bar stand still; prints no line."""
        return self._running(Progress(self, what))

    @contextlib.contextmanager
    def _running(self, activity: Progress) -> Iterator[None]:
        """A row in the live display, which the outermost activity starts and stops."""
        with contextlib.ExitStack() as stack:
            if self.interactive and self._bars is None:
                stack.enter_context(self._display())
            if self._bars is not None:
                state = {"total": activity.total or None, "completed": activity.step}
                activity.bar = self._bars.add_task(activity.description, activity=activity, **state)
                stack.callback(self._bars.remove_task, activity.bar)
            yield

    @contextlib.contextmanager
    def _display(self) -> Iterator[None]:
        from rich import progress
        from rich.text import Text

        class Bars(progress.Progress):
            def get_renderables(self) -> Iterator[Any]:
                yield self.make_tasks_table(self.tasks)
                for task in self.tasks[:1]:
                    yield Text("  ".join(["", *task.fields["activity"].fields()]), "cyan")

        columns = (
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(30),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
        )
        try:
            with Bars(*columns, console=self._rich, transient=True) as self._bars:
                yield
        finally:
            self._bars = None


class Progress:
    """A running count of steps; made by `Console.progress`."""

    def __init__(
        self,
        console: Console,
        description: str,
        total: int = 0,
        start: int = 0,
        later: float = 0.0,
    ) -> None:
        self.description = _clean(description)
        self.total = total
        self.step = start
        self.later = later
        self.metrics: dict[str, Any] = {}
        # its task in the live display
        self.bar: Any = None
        self._console = console
        self._started = time.monotonic()
        # (time, step) of the first update, before which steps compile and caches fill
        self._first: tuple[float, int] | None = None
        # time of the last update
        self._updated = self._started
        # time of the last plain line
        self._line_at = -1e9

    def update(self, step: int, **metrics: Any) -> None:
        """Reports the steps done and metrics, named as in metrics.jsonl (`lr`, `images_per_s`).

        Values are Python numbers: reading a tensor would wait for the device. A metric is shown
        until its next value. Rates and times per step are smoothed over about three updates.
        """
        for name, value in metrics.items():
            if name.endswith(("_per_s", "_time_s")) and name in self.metrics:
                metrics[name] = 0.7 * self.metrics[name] + 0.3 * value
        self.metrics = {**self.metrics, **metrics}
        last = step >= self.total > self.step
        self.step = step
        now = self._updated = time.monotonic()
        self._first = self._first or (now, step)
        if self._console._bars is not None:
            self._console._bars.update(self.bar, completed=step)
        if last or now - self._line_at >= INTERVAL_S:
            self._line_at = now
            each = self._step_s(now)
            left = f", {duration((self.total - step) * each)} left" if each and not last else ""
            times = f"{self.elapsed()} elapsed{left}"
            done = f"step {step}/{self.total} ({step / max(1, self.total):.0%})"
            line = "  ".join([f"{self.description}: {done}", *self.fields(), times])
            self._console._emit(line, plain=True)

    def elapsed(self) -> str:
        return duration(time.monotonic() - self._started)

    def _step_s(self, now: float) -> float | None:
        """Mean seconds of the steps since the first update; None before the second one."""
        began, first = self._first or (now, self.step)
        steps = self.step - first
        return (now - began) / steps if steps else None

    def fields(self) -> list[str]:
        """The metrics with their units, and the time left for all stages."""
        named = self.metrics.items()
        shown = [_clean(format_metric(name, value)) for name, value in named if value is not None]
        each = self._step_s(self._updated)
        if self.later and each:
            left = (self.total - self.step + self.later) * each
            shown.append(f"all stages {duration(left)} left (estimated)")
        return shown


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
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{name.replace('_', ' ')} {value}"
    return _FORMATS[ending].format(name.removesuffix(ending).replace("_", " "), value)


def _clean(text: str) -> str:
    """Without control characters: a file name must not move the cursor."""
    return _CONTROL.sub("", text.expandtabs(4))
