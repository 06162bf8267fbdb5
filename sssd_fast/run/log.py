"""Everything a person sees while a command runs: a live display on a terminal, plain lines elsewhere, and train.log.

On a terminal, rich draws a progress bar with its figures. In a file or a batch system there are plain lines,
without any control character: one at the first step, then one per interval, and none is followed by more than 30 s
of silence. Every line also goes to the log file with its time. Losing the screen (a closed pipe, a full disk) does
not end a run.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

SILENCE_S = 30.0
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-_]?|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_ASCII = str.maketrans(
    dict(
        zip(
            "—–…×±→≤≥µ━─",
            ["-", "-", "...", "x", "+-", "->", "<=", ">=", "u", "=", "-"],
            strict=True,
        )
    )
)
_SPINNERS = {True: "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", False: "|/-\\"}

_own_streams: list[
    tuple[Any, Any]
] = []  # what standard output and error were before a live display took them over


def _restore_streams_in_child() -> None:
    """A forked loader worker has the display's streams but not its thread; if that thread held a lock at the fork, the
    first warning printed by the worker would wait for it for ever."""
    if _own_streams:
        sys.stdout, sys.stderr = _own_streams[0]


os.register_at_fork(after_in_child=_restore_streams_in_child)


class Console:
    """interactive: True = live display, False = plain lines, None = live on a terminal; log_file: appended to.

    enabled: whether this process speaks; None = rank 0 of torchrun. interval: seconds between plain progress lines.
    stream: instead of standard output (and standard error, where errors and warnings go in plain mode).
    """

    def __init__(
        self,
        interactive: bool | None = None,
        log_file: str | Path | None = None,
        *,
        enabled: bool | None = None,
        interval: float = 10.0,
        stream: IO[str] | None = None,
    ) -> None:
        self.enabled = os.environ.get("RANK", "0") == "0" if enabled is None else enabled
        self.interval = interval
        self._out = _SafeStream(stream or sys.stdout)
        self._err = _SafeStream(stream or sys.stderr)
        self._log_path = None if log_file is None else Path(log_file)
        self._log: IO[str] | None = None
        self._lock = threading.RLock()
        self._spoke_at = time.monotonic()
        self._activities: tuple[
            Progress | _Announcement, ...
        ] = ()  # outermost first; replaced, never changed
        self._live: Any = None
        self._rich: Any = None
        self._stop_watching: threading.Event | None = None
        if interactive is None:
            interactive = self._out.isatty() and os.environ.get("TERM") != "dumb"
        if interactive and self.enabled:
            self._open_rich()

    @property
    def interactive(self) -> bool:
        return self._rich is not None

    def _open_rich(self) -> None:
        try:
            from rich.console import Console as RichConsole
        except ImportError:
            self.warn(
                'no live display, because rich is not installed: pip install "sssd-fast[train]"'
            )
            return
        self._rich = RichConsole(file=cast(IO[str], self._out), force_terminal=True)

    # ---- lines ----

    def info(self, text: str) -> None:
        self._emit(text)

    def warn(self, text: str) -> None:
        self._emit(f"warning: {text}", style="yellow", error=True)

    def error(self, text: str) -> None:
        self._emit(f"error: {text}", style="bold red", error=True)

    def rule(self, title: str) -> None:
        """A line across the screen that starts a part of the command."""
        if not self.enabled:
            return
        title = _clean(title)
        if self._rich is None:
            self._emit(f"\n---- {title} ----")
            return
        from rich.rule import Rule
        from rich.text import Text

        with self._lock:
            self._rich.print(Rule(Text(title, style="bold"), style="dim"))
            self._write_log(f"---- {title} ----")

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Cells are shown whole: folded on a narrow screen, never cut. Columns of numbers are aligned right."""
        if not self.enabled:
            return
        title, header = _clean(title), [_clean(name) for name in columns]
        cells = [[_clean("" if cell is None else str(cell)) for cell in row] for row in rows]
        right = [
            bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(header))
        ]
        plain = _plain_table(title, header, cells, right)
        if self._rich is None:
            self._emit(plain)
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=Text(title, style="bold"),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1),
        )
        for name, is_right in zip(header, right, strict=True):
            table.add_column(Text(name), justify="right" if is_right else "left", overflow="fold")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        with self._lock:
            self._rich.print(table)
            self._write_log(plain)

    def _emit(
        self, text: str, *, style: str = "", error: bool = False, log_only: bool = False
    ) -> None:
        if not self.enabled:
            return
        text = _clean(text)
        with self._lock:
            if not log_only:
                self._spoke_at = time.monotonic()
                if self._rich is not None:
                    from rich.text import Text

                    self._rich.print(
                        Text(text, style=style), soft_wrap=True
                    )  # whole words to copy, paths unbroken
                else:
                    (self._err if error else self._out).write(text + "\n")
            self._write_log(text.strip("\n"))

    def _write_log(self, text: str) -> None:
        if self._log_path is None:
            return
        try:
            if self._log is None:
                self._log_path.parent.mkdir(parents=True, exist_ok=True)
                self._log = open(  # noqa: SIM115 - held for the run
                    self._log_path, "a", encoding="utf-8", errors="replace", buffering=1
                )
            stamp = time.strftime("%Y-%m-%d %H:%M:%S  ")
            self._log.write(stamp + text.replace("\n", "\n" + " " * len(stamp)) + "\n")
        except OSError as error:
            path = self._log_path
            self._log_path = None
            self.warn(f"no more lines in {path}: {error.strerror}")

    # ---- long work ----

    @contextlib.contextmanager
    def progress(
        self, total_steps: int, description: str, *, start: int = 0, warmup_steps: int = 10
    ) -> Iterator[Progress]:
        """A bar (or lines) from step `start` to `total_steps`; the time left ignores the first `warmup_steps` steps,
        which compile, fill caches and start workers (fewer in a short run: at most a tenth of it)."""
        progress = Progress(self, total_steps, _clean(description), start, warmup_steps)
        with self._doing(progress):
            try:
                yield progress
            except BaseException:
                self._emit(
                    f"{progress.description}: stopped at {progress.position()} after {duration(progress.elapsed())}"
                )
                raise
        took = f"{progress.description}: {progress.step - start} steps in {duration(progress.elapsed())}"
        # where there are plain lines, the last one holds the last figures
        self._emit("  ".join([took, *_figures(progress.metrics)]) if self.interactive else took)

    @contextlib.contextmanager
    def announce(self, what: str) -> Iterator[None]:
        """Says what is going on in a pause that could be taken for a hang, and at the end how long it took."""
        announcement = _Announcement(_clean(what))
        self._emit(f"{announcement.text} ...", log_only=self.interactive)
        with self._doing(announcement):
            try:
                yield
            except BaseException:
                self._emit(f"{announcement.text}: failed after {duration(announcement.elapsed())}")
                raise
        self._emit(f"{announcement.text}: done in {duration(announcement.elapsed())}")

    @contextlib.contextmanager
    def _doing(self, activity: Progress | _Announcement) -> Iterator[None]:
        """Keeps the display, or the thread that breaks silences, alive while anything is going on."""
        if not self.enabled:
            yield
            return
        outermost = not self._activities
        self._activities = (*self._activities, activity)
        if outermost:
            self._open_display()
        try:
            yield
        finally:
            self._activities = tuple(item for item in self._activities if item is not activity)
            if outermost:
                self._close_display()

    def _open_display(self) -> None:
        if self._rich is not None:
            from rich.live import Live

            self._live = Live(
                get_renderable=self._render,
                console=self._rich,
                refresh_per_second=8,
                transient=True,
            )
            _own_streams.append((sys.stdout, sys.stderr))
            self._live.start()
            return
        self._stop_watching = threading.Event()
        threading.Thread(
            target=self._watch, args=(self._stop_watching,), name="console", daemon=True
        ).start()

    def _close_display(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            _own_streams.pop()
        if self._stop_watching is not None:
            self._stop_watching.set()
            self._stop_watching = None

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(max(0.01, self._spoke_at + SILENCE_S - time.monotonic())):
            with self._lock:
                activities = self._activities
                if (
                    activities
                    and not stop.is_set()
                    and time.monotonic() - self._spoke_at >= SILENCE_S
                ):
                    self._emit(activities[-1].still_there())

    def _render(self) -> Any:
        """What the live display shows. Called by rich's thread: takes no lock of ours (printing holds both)."""
        from rich.console import Group
        from rich.text import Text

        unicode = self._rich.encoding.startswith("utf")
        lines: list[Text] = []
        for activity in self._activities:
            lines += activity.live_lines(self._rich.width, unicode)
        for line in lines:
            line.no_wrap = True
            line.overflow = "ellipsis" if unicode else "crop"
        return Group(*lines)

    def close(self) -> None:
        with self._lock:
            self._close_display()
            if self._log is not None:
                self._log.close()
                self._log = None

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Progress:
    """One running count of steps; made by `Console.progress`."""

    def __init__(
        self, console: Console, total: int, description: str, start: int, warmup_steps: int
    ) -> None:
        self.description = description
        self.total = total
        self.start = start
        self.step = start
        self.metrics: dict[str, Any] = {}
        self._console = console
        self._warm_at = start + min(warmup_steps, max(1, (total - start) // 10))
        self._warm: tuple[int, float] | None = None  # (step, time) from which speed is measured
        self._started = self._updated = time.monotonic()
        self._line: tuple[int, float] | None = None  # (step, time) of the last plain line

    def update(self, step: int, **metrics: Any) -> None:
        """Steps done so far, and figures named as in metrics.jsonl (`lr`, `images_per_s`, `memory_gib`, ...): Python
        numbers, as reading a tensor would wait for the device. A figure stays until it is given again."""
        now = time.monotonic()
        if metrics:
            self.metrics = {**self.metrics, **metrics}
        self.step = step
        self._updated = now
        if self._warm is None and step >= self._warm_at:
            self._warm = (step, now)
        if self._line_is_due(step, now):
            self._line = (step, now)
            self._console._emit(self.plain_line(), log_only=self._console.interactive)

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._console.info(text)

    def _line_is_due(self, step: int, now: float) -> bool:
        if self._line is None:
            return True
        line_step, line_time = self._line
        if step >= self.total:
            return line_step < step
        every = max(1, self.total // 20)
        return now - line_time >= self._console.interval or (
            step // every > line_step // every and now - line_time >= 1
        )

    def elapsed(self) -> float:
        return time.monotonic() - self._started

    def seconds_left(self) -> float | None:
        """None until the steps after the warm-up tell."""
        if self._warm is None or self.step <= self._warm[0]:
            return 0.0 if self.step >= self.total else None
        per_step = (self._updated - self._warm[1]) / (self.step - self._warm[0])
        return max(0.0, per_step * (self.total - self.step) - (time.monotonic() - self._updated))

    def position(self) -> str:
        return f"step {self.step}/{self.total}"

    def plain_line(self) -> str:
        left = self.seconds_left()
        times = f"{duration(self.elapsed())} elapsed" + (f", {duration(left)} left" if left else "")
        head = f"{self.description}: {self.position()} ({self.step / max(1, self.total):.0%})"
        return "  ".join([head, *_figures(self.metrics), times])

    def still_there(self) -> str:
        return f"{self.description}: still at {self.position()}, {duration(time.monotonic() - self._updated)} since then"

    def live_lines(self, width: int, unicode: bool) -> list[Any]:
        from rich.text import Text

        left = self.seconds_left()
        fraction = min(1.0, self.step / max(1, self.total))
        after = f" {self.step}/{self.total}  {fraction:>4.0%}  {duration(self.elapsed())}"
        after += "  " + (
            "estimating" if left is None else f"{duration(left)} left" if left else "finishing"
        )
        bar_width = min(40, width - len(self.description) - len(after) - 1)
        line = Text(self.description, style="bold")
        if bar_width >= 8:
            done = round(fraction * bar_width)
            line.append(" ").append(("━" if unicode else "#") * done, style="not bold green")
            line.append(
                ("━" if unicode else "-") * (bar_width - done), style="not bold bright_black"
            )
        line.append(after, style="not bold")
        return [
            line,
            *(Text(row, style="cyan") for row in _wrap(_figures(self.metrics), width, indent="  ")),
        ]


class _Announcement:
    def __init__(self, text: str) -> None:
        self.text = text
        self._started = time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self._started

    def still_there(self) -> str:
        return f"{self.text}: still working after {duration(self.elapsed())}"

    def live_lines(self, width: int, unicode: bool) -> list[Any]:
        from rich.text import Text

        frames = _SPINNERS[unicode]
        clock = f" {duration(self.elapsed())}"
        words = self.text.split(" ")
        rows = _wrap(words, width - len(clock) - 2, indent="", between=" ")
        lines = [Text(row) for row in rows]
        lines[0] = Text(frames[int(self.elapsed() * 8) % len(frames)] + " ", style="yellow").append(
            lines[0]
        )
        lines[-1].append(clock, style="cyan")
        return lines


class _SafeStream:
    """A text stream that replaces what its encoding lacks, and falls silent instead of raising when nobody can hear it."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            text = text.translate(_ASCII).encode(self.encoding, "replace").decode(self.encoding)
        with contextlib.suppress(OSError, ValueError):  # a closed pipe, a full disk, a closed file
            self._stream.write(text)
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self._stream.isatty()
        return False

    def fileno(self) -> int:
        return self._stream.fileno()


# ---- formatting ----


def duration(seconds: float) -> str:
    """7.3 s, 42 s, 1:05, 2:00:07"""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"


def figure(name: str, value: Any) -> str:
    """One figure with its unit, from its name in metrics.jsonl: ("images_per_s", 512.3) -> "512 images/s"."""
    words = name.replace("_", " ")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{words} {value}"
    if name == "lr":
        return f"lr {value:.2e}"
    if name.endswith("_per_s"):
        return f"{value:,.0f} {words[:-6]}/s" if value >= 10 else f"{value:.1f} {words[:-6]}/s"
    if name.endswith("_gib"):
        return f"{words[:-4]} {value:.1f} GiB"
    if name.endswith("_fraction"):
        return f"{words[:-9]} {value:.0%}"
    if name.endswith("_time_s"):
        return f"{words[:-7]} {value * 1000:.0f} ms" if value < 1 else f"{words[:-7]} {value:.2f} s"
    return f"{words} {value:.4g}"


def _figures(metrics: dict[str, Any]) -> list[str]:
    return [_clean(figure(name, value)) for name, value in metrics.items() if value is not None]


def _wrap(fields: list[str], width: int, *, indent: str, between: str = "  ") -> list[str]:
    """Fields on as many rows as they need; no field is divided."""
    rows: list[str] = []
    for field in fields:
        if rows and len(rows[-1]) + len(between) + len(field) <= width:
            rows[-1] += between + field
        else:
            rows.append(indent + field)
    return rows


def _clean(text: str) -> str:
    """Without control characters: a file name must not move the cursor or recolour the screen."""
    return _CONTROL.sub("", text.expandtabs(4))


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?[\d.,]+(e[-+]?\d+)?( ?%| ?[a-zA-Z/]{1,8})?|nan|-|", text) is not None


def _plain_table(title: str, header: list[str], cells: list[list[str]], right: list[bool]) -> str:
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]

    def line(row: list[str]) -> str:
        padded = (
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join(
        [
            title,
            line(header),
            "  ".join("-" * width for width in widths),
            *(line(row) for row in cells),
        ]
    )
