"""Console: lines in a file, the live display of a real terminal, old encodings, a closed pipe."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sssd_fast.run import log
from sssd_fast.run.log import Console, duration, format_metric

ROOT = str(Path(__file__).parents[3])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replaces the module's clock, so that hours pass at once."""
    clock = SimpleNamespace(now=1000.0, strftime=time.strftime)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(log, "time", clock)
    return clock


def control_characters(text: str) -> set[str]:
    return set(re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text))


def test_progress_writes_plain_lines_by_time_and_smooths_rates(clock: SimpleNamespace) -> None:
    """Log files of batch systems: the first step, one line per interval, the last step."""
    out = io.StringIO()
    with Console(stream=out).progress(800, "pretrain") as bar:
        for step in range(1, 801):
            clock.now += 1 / 16
            bar.update(step, loss=0.5, images_per_s=100.0 + step % 2)
    text = out.getvalue()
    steps = [int(n) for n in re.findall(r"step (\d+)/800", text)]
    assert steps == [1, 161, 321, 481, 641, 800]
    assert control_characters(text) == set()
    lines = text.splitlines()
    assert lines[0] == "pretrain: step 1/800 (0%)  loss 0.5  101.0 images/s  0.1 s elapsed"
    # alternating 101 and 100 with weight 0.3: (0.7 * 0.3 * 101 + 0.3 * 100) / (1 - 0.7 * 0.7)
    assert re.search(r"  100\.4 images/s  50 s elapsed$", lines[-2])
    assert lines[-1] == "pretrain: 800 steps in 50 s"


def test_progress_estimates_from_the_steps_after_the_first(clock: SimpleNamespace) -> None:
    """The first step compiles for minutes: it must not count. Nor must those before a resume."""
    out = io.StringIO()
    with Console(stream=out).progress(1000, "finetune", start=100) as bar:
        clock.now += 600
        bar.update(101)
        for step in range(102, 202):
            clock.now += 2
            bar.update(step)
    lines = out.getvalue().splitlines()
    assert lines[0] == "finetune: step 101/1000 (10%)  10:00 elapsed"
    assert lines[-2] == f"finetune: step 201/1000 (20%)  13:20 elapsed, {duration(799 * 2)} left"


NASTY = "a[/red] [bold]\x1b[31mb\x1b]0;title\x07 \x9b2Jc\rd :smile: (1).png"


@pytest.mark.parametrize("interactive", [False, True])
def test_console_removes_control_characters_and_logs_every_line(
    interactive: bool, tmp_path: Path
) -> None:
    """Names of images can hold rich markup and escape sequences."""
    out, path = io.StringIO(), tmp_path / "run" / "train.log"
    # a resumed run appends to the same file
    for _ in range(2):
        with Console(interactive, path, stream=out) as console:
            console.info("two\nlines é")
            console.rule(NASTY)
            console.table(NASTY, [NASTY, "n"], [[NASTY, 5], ["b", 123]])
            with console.announce(NASTY), console.progress(2, NASTY) as bar:
                bar.update(2, loss=0.5, note=NASTY)
            console.error(NASTY)
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", out.getvalue()) if interactive else out.getvalue()
    assert "a[/red] [bold]b" in text
    assert not {"\x07", "\x9b"} & set(text)
    assert interactive or control_characters(text) == set()
    logged = path.read_text("utf-8")
    assert control_characters(logged) == set()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "
    assert re.match(rf"{stamp}two\n {{21}}lines é\n{stamp}---- a.*\n{stamp}a", logged)
    assert re.search(r"\n +a\[/red\].*png     5\n +b +123\n", logged)
    assert len(re.findall(rf"{stamp}error: a", logged)) == 2


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", None])
def test_console_survives_old_encodings_and_a_closed_pipe(
    interactive: bool, encoding: str | None, tmp_path: Path
) -> None:
    """`sssd-fast pretrain | head`, or LANG=C: neither may end a run."""
    raw = io.BytesIO()
    stream = Broken() if encoding is None else io.TextIOWrapper(raw, encoding=encoding)
    console = Console(interactive, tmp_path / "log", stream=stream)
    console.info("16x16 — 腫瘍 é")
    console.table("t", ["a"], [["…"]])
    with console.progress(2, "x") as bar:
        bar.update(2, loss=0.5)
    assert "16x16 — 腫瘍 é" in (tmp_path / "log").read_text("utf-8")
    if encoding is not None:
        written = raw.getvalue().decode(encoding)
        assert f"16x16 ? ?? {'é' if encoding == 'latin-1' else '?'}" in written


def test_console_holds_the_log_back_and_reports_once_that_it_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refused resume must not change the folder; an accepted one loses no line."""
    (tmp_path / "file").write_text("")
    console = Console(False, tmp_path / "file" / "train.log")
    console.info("one")
    console.info("two")
    captured = capsys.readouterr()
    assert captured.out == "one\ntwo\n"
    assert re.fullmatch(r"warning: no more lines in .*\n", captured.err)
    console = Console(False, tmp_path / "log", stream=io.StringIO())
    console.hold_log = True
    console.info("one")
    assert not (tmp_path / "log").exists()
    console.hold_log = False
    console.info("two")
    assert re.fullmatch(r".* one\n.* two\n", (tmp_path / "log").read_text())


@pytest.mark.parametrize(("rank", "prints"), [("0", True), ("10", False)])
def test_console_prints_on_rank_0_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: str, prints: bool
) -> None:
    monkeypatch.setenv("RANK", rank)
    out = io.StringIO()
    console = Console(log_file=tmp_path / "log", stream=out)
    console.error("x")
    console.table("x", ["a"], [[1]])
    with console.progress(3, "x") as bar, console.announce("y"):
        bar.update(1)
    assert bool(out.getvalue()) is (tmp_path / "log").exists() is prints


def test_progress_estimates_this_stage_and_those_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """2 s per step from the second step on: 6 steps left, and later work of 10 steps."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out = io.StringIO()
    console = Console(stream=out)
    with console.progress(10, "pretrain (stage 1 of 2)", later=10.0) as bar:
        now[0] += 30.0  # compiling does not count
        bar.update(1, loss=1.0)
        for step in (2, 3, 4):
            now[0] += 2.0
            bar.update(step, loss=1.0)
        assert "all stages 32 s left (estimated)" in bar.fields()[-1]
        now[0] += 60.0  # a pause does not change the estimate of the display
        assert "all stages 32 s left (estimated)" in bar.fields()[-1]
        now[0] -= 56.0
        bar.update(6, loss=1.0)
    line = out.getvalue().splitlines()[-2]
    assert line.startswith("pretrain (stage 1 of 2): step 6/10 (60%)")
    assert "40 s elapsed, 8.0 s left" in line


ON_A_TERMINAL = """
import os, sys, time
from sssd_fast.run.log import Console
with Console() as console:
    assert console.interactive
    with console.progress(50, "pretrain") as bar:
        with console.announce("compiling"):
            time.sleep(0.3)
        bar.update(20, loss=0.25)
        with console.doing("validating"):
            time.sleep(0.3)
            print("a stray print")
        if not (child := os.fork()):
            names = f"{type(sys.stdout).__name__} {type(sys.stderr).__name__}"
            os.write(2, f"worker: {names}\\r\\n".encode())
            os._exit(0)
        os.waitpid(child, 0)
        bar.update(50, loss=0.125)
print("streams:", type(sys.stdout).__name__)
"""


def test_console_leaves_a_real_terminal_as_it_was() -> None:
    """Cursor back, bar gone, stray prints above it, forked loader workers with the plain
    streams.
    """
    ours, theirs = pty.openpty()
    changes = {"TERM": "xterm-256color", "COLUMNS": "90", "PYTHONIOENCODING": "utf-8", "RANK": "0"}
    command = [sys.executable, "-c", ON_A_TERMINAL]
    streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    child = subprocess.Popen(command, **streams, cwd=ROOT, env={**os.environ, **changes})
    os.close(theirs)
    raw = b""
    while select.select([ours], [], [], 20)[0]:
        try:
            raw += os.read(ours, 65536)
        except OSError:
            break
    os.close(ours)
    assert child.wait() == 0, raw.decode()
    assert raw.count(b"\x1b[?25l") == raw.count(b"\x1b[?25h") == 1
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", raw.decode())
    assert re.search(r"pretrain +━.*20/50 +0:0\d:\d\d", text)
    assert re.search(r"validating +━", text)
    assert re.search(r"compiling +━", text)
    assert re.search(r"compiling: done in [\d.]+ s\r", text)
    assert "a stray print" in text
    assert "worker: TextIOWrapper TextIOWrapper" in text
    assert re.search(r"pretrain: 50 steps in [\d.]+ s\r\n", text)
    assert text.endswith("streams: TextIOWrapper\r\n")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("loss", 0.123456, "loss 0.1235"),
        ("loss", float("nan"), "loss nan"),
        ("lr", 0.00015, "lr 1.50e-04"),
        ("images_per_s", 8123.4, "8,123.4 images/s"),
        ("memory_gib", 11.96, "memory 12.0 GiB"),
        ("data_wait_fraction", 0.004, "data wait 0%"),
        ("step_time_s", 0.01234, "step 0.0123 s"),
        ("grad_norm", 12.3456, "grad norm 12.35"),
        ("stage", "warm-up", "stage warm-up"),
    ],
)
def test_format_metric_adds_the_unit(name: str, value: Any, expected: str) -> None:
    assert format_metric(name, value) == expected


def test_duration() -> None:
    values = {0.04: "0.0 s", 9.96: "10 s", 59.6: "1:00", 3599.7: "1:00:00", 93784: "26:03:04"}
    assert {seconds: duration(seconds) for seconds in values} == values
