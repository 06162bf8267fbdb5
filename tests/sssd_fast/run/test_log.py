"""What a person sees on a terminal, in a file, in a narrow or old terminal, with rich missing, and when nobody listens."""

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

from sssd_fast.run import log as console_module
from sssd_fast.run.log import Console, Progress, duration, figure

ROOT = str(Path(__file__).parents[3])


class Clock:
    """Replaces the module's clock, so that hours pass at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        clock = SimpleNamespace(monotonic=lambda: self.now, strftime=time.strftime)
        monkeypatch.setattr(console_module, "time", clock)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


def lines(out: io.StringIO) -> list[str]:
    return out.getvalue().splitlines()


def control_characters(text: str) -> set[str]:
    return {character for character in text if ord(character) < 32 and character != "\n"} | (
        {"\x7f"} & set(text)
    )


# ---- plain lines ----


def test_plain_progress_is_early_regular_and_has_no_control_characters(
    clock: Clock, out: io.StringIO
) -> None:
    """Protects log files of batch systems (Lightning #10876): one line at the first step, then by time, and the last."""
    console = Console(stream=out, interval=10)
    assert not console.interactive
    with console.progress(10_000, "pretrain") as bar:
        for step in range(1, 401):
            clock.now += 0.125
            bar.update(step, loss=0.5, lr=1e-4)
    steps = [
        int(found[1]) for line in lines(out) if (found := re.search(r"step (\d+)/10000", line))
    ]
    assert steps == [1, 81, 161, 241, 321]
    assert control_characters(out.getvalue()) == set()
    assert lines(out)[0].startswith("pretrain: step 1/10000 (0%)  loss 0.5  lr 1.00e-04  ")
    assert lines(out)[-1] == "pretrain: 400 steps in 50 s"


def test_a_short_run_gets_lines_by_steps_and_its_last_step(clock: Clock, out: io.StringIO) -> None:
    with Console(stream=out, interval=60).progress(40, "finetune") as bar:
        for step in range(1, 41):
            clock.now += 0.5
            bar.update(step, loss=0.5)
    steps = [int(found[1]) for line in lines(out) if (found := re.search(r"step (\d+)/40", line))]
    assert steps == [*range(1, 40, 2), 40]


def test_time_left_ignores_the_warm_up(clock: Clock, out: io.StringIO) -> None:
    """Protects the estimate: 60 s of compilation in the first steps would add hours to a long run."""
    with Console(stream=out).progress(1000, "pretrain", start=100) as bar:
        for step in range(101, 111):
            clock.now += 60
            bar.update(step)
            assert bar.seconds_left() is None
        for step in range(111, 201):
            clock.now += 2
            bar.update(step)
        assert bar.seconds_left() == pytest.approx(800 * 2)
        clock.now += 30  # a step that takes longer: the clock goes on
        assert bar.seconds_left() == pytest.approx(1570)
        assert "26:40 left" not in bar.plain_line()
        assert "26:10 left" in bar.plain_line()


def test_a_short_run_is_estimated_after_a_tenth(clock: Clock, out: io.StringIO) -> None:
    with Console(stream=out).progress(20, "x") as bar:
        clock.now += 50
        bar.update(2)
        clock.now += 3
        bar.update(3)
        assert bar.seconds_left() == pytest.approx(17 * 3)


def test_silence_is_broken_and_names_what_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, out: io.StringIO
) -> None:
    """Protects users who kill a run that compiles or autotunes, because nothing moves."""
    monkeypatch.setattr(console_module, "SILENCE_S", 0.1)
    console = Console(stream=out)
    with console.progress(9, "pretrain") as bar:
        bar.update(3, loss=1.0)
        time.sleep(0.25)
        with console.announce("compiling the step"):
            time.sleep(0.25)
    time.sleep(0.15)
    text = out.getvalue()
    assert re.search(r"pretrain: still at step 3/9, 0\.\d s since then\n", text)
    assert re.search(r"compiling the step: still working after 0\.\d s\n", text)
    assert re.search(
        r"compiling the step \.\.\.\n(.*\n)*compiling the step: done in 0\.\d s\n", text
    )
    assert lines(out)[-1].startswith("pretrain: 3 steps in")


def test_announce_and_progress_say_when_they_fail(clock: Clock, out: io.StringIO) -> None:
    console = Console(stream=out)

    def work() -> None:
        with console.progress(9, "pretrain") as bar:
            bar.update(4)
            with console.announce("compiling"):
                clock.now += 75
                raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        work()
    assert lines(out)[1:] == [
        "compiling ...",
        "compiling: failed after 1:15",
        "pretrain: stopped at step 4/9 after 1:15",
    ]
    assert console._activities == ()


def test_warnings_and_errors_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(interactive=False)
    console.info("one")
    console.warn("two")
    console.error("three")
    captured = capsys.readouterr()
    assert captured.out == "one\n"
    assert captured.err == "warning: two\nerror: three\n"


def test_plain_table_aligns_numbers_right(out: io.StringIO) -> None:
    Console(stream=out).table(
        "Results", ["split", "n", "accuracy"], [["val", 5, "91.3 %"], ["test", 1234, "8 %"]]
    )
    assert lines(out) == [
        "Results",
        "split     n  accuracy",
        "-----  ----  --------",
        "val       5    91.3 %",
        "test   1234       8 %",
    ]


# ---- what goes in must not change how it looks ----


NASTY = "a[/red] [bold]\x1b[31mb\x1b]0;title\x07 \x9b2Jc\rd :smile: (1).png"


@pytest.mark.parametrize("interactive", [False, True])
def test_file_names_cannot_steer_the_terminal(
    out: io.StringIO, interactive: bool, tmp_path: Path
) -> None:
    """Protects against markup errors in rich ("[/red]" raises) and escape sequences in names of images."""
    console = Console(interactive=interactive, stream=out, log_file=tmp_path / "train.log")
    console.info(NASTY)
    console.warn(NASTY)
    console.rule(NASTY)
    console.table(NASTY, [NASTY], [[NASTY]])
    with console.announce(NASTY), console.progress(2, NASTY) as bar:
        bar.update(1, note=NASTY)
    console.close()
    text = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()) if interactive else out.getvalue()
    assert "a[/red] [bold]b" in text
    assert ":smile:" in text
    assert "\x07" not in text
    assert "\x9b" not in text
    assert "\x1b]0" not in text
    if not interactive:
        assert control_characters(text) == set()
    assert control_characters((tmp_path / "train.log").read_text()) == set()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize("interactive", [False, True])
def test_old_terminals_get_what_they_can_show(encoding: str, interactive: bool) -> None:
    """Protects against UnicodeEncodeError ending a run under LANG=C."""
    raw = io.BytesIO()
    console = Console(
        interactive=interactive, stream=io.TextIOWrapper(raw, encoding=encoding, newline="")
    )
    console.info("16×16 → done — 腫瘍 \udcff")
    console.rule("títle")
    console.table("t", ["a"], [["…"]])
    with console.progress(2, "x") as bar, console.announce("y…"):
        bar.update(1, loss=0.5)
        time.sleep(0.3 if interactive else 0)
    text = raw.getvalue().decode(encoding)
    assert "16x16 -> done - ?? ?" in text
    assert ("títle" in text) == (encoding != "ascii")


# ---- the log file ----


@pytest.mark.parametrize("interactive", [False, True])
def test_every_line_is_in_the_log_with_its_time(
    tmp_path: Path, clock: Clock, out: io.StringIO, interactive: bool
) -> None:
    log = tmp_path / "run" / "train.log"
    for _ in range(2):  # a resumed run goes on in the same file
        with Console(interactive=interactive, stream=out, log_file=log) as console:
            console.rule("part")
            console.info("two\nlines é")
            console.table("T", ["a"], [[1]])
            with console.progress(2, "x") as bar:
                bar.update(2, loss=0.5)
                bar.note("epoch 1")
            console.error("bad")
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "
    text = log.read_text("utf-8")
    assert re.match(
        rf"{stamp}---- part ----\n{stamp}two\n {{21}}lines é\n{stamp}T\n {{21}}a\n", text
    )
    found = [line[21:] for line in text.splitlines()]
    assert found[: len(found) // 2] == found[len(found) // 2 :]
    assert found[7].startswith("x: step 2/2 (100%)  loss 0.5  ")
    assert found[8] == "epoch 1"
    assert found[9].startswith("x: 2 steps in 0.0 s")
    assert found[10] == "error: bad"
    assert control_characters(text) == set()


def test_a_log_that_cannot_be_written_is_said_once_and_training_goes_on(
    tmp_path: Path, out: io.StringIO
) -> None:
    (tmp_path / "file").write_text("")
    console = Console(stream=out, log_file=tmp_path / "file" / "train.log")
    console.info("one")
    console.info("two")
    assert [line.split(":")[0] for line in lines(out)] == ["one", "warning", "two"]
    assert "no more lines in" in lines(out)[1]


# ---- who speaks, and to whom ----


def test_only_rank_0_speaks(
    monkeypatch: pytest.MonkeyPatch, out: io.StringIO, tmp_path: Path
) -> None:
    for rank, speaks in (("0", True), ("1", False), ("10", False)):
        monkeypatch.setenv("RANK", rank)
        console = Console(stream=out, log_file=tmp_path / rank)
        assert console.enabled is speaks
        console.info("x")
        console.error("x")
        console.rule("x")
        console.table("x", ["a"], [[1]])
        with console.progress(3, "x") as bar, console.announce("y"):
            bar.update(1)
            bar.note("z")
        assert (tmp_path / rank).exists() is speaks
        assert bool(out.getvalue()) is speaks
        out.truncate(0)
        out.seek(0)
    assert Console(enabled=True, stream=out).enabled


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("interactive", [False, True])
def test_a_closed_pipe_does_not_end_a_run(interactive: bool, tmp_path: Path) -> None:
    """Protects `sssd-fast pretrain | head`: the log still gets everything."""
    console = Console(interactive=interactive, stream=Broken(), log_file=tmp_path / "log")
    console.info("one")
    with console.progress(2, "x") as bar:
        bar.update(2)
    console.close()
    assert "one" in (tmp_path / "log").read_text()


def test_without_rich_there_is_one_notice_and_plain_lines(
    monkeypatch: pytest.MonkeyPatch, out: io.StringIO
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    console = Console(interactive=True, stream=out)
    with console.progress(2, "x") as bar:
        bar.update(2)
    console.table("t", ["a"], [[1]])
    assert (
        lines(out)[0]
        == 'warning: no live display, because rich is not installed: pip install "sssd-fast[train]"'
    )
    assert out.getvalue().count("rich") == 1
    assert control_characters(out.getvalue()) == set()


def test_plain_output_imports_neither_rich_nor_torch() -> None:
    """Protects `--help` and batch jobs from imports that they do not need."""
    code = (
        "import sys; from sssd_fast.run.log import Console; c = Console(); c.table('t', ['a'], [[1]]); c.rule('r')\n"
        "with c.progress(2, 'x') as bar: bar.update(1)\n"
        "print(sorted({'rich', 'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "[]"


# ---- the live display ----


METRICS = {
    "loss": 0.123456,
    "lr": 1.5e-4,
    "images_per_s": 5123.4,
    "memory_gib": 3.14,
    "data_wait_fraction": 0.021,
}


@pytest.mark.parametrize("width", [24, 40, 60, 80, 120, 200])
@pytest.mark.parametrize("unicode", [True, False])
def test_the_display_fits_every_width_and_drops_no_figure(
    width: int, unicode: bool, clock: Clock
) -> None:
    progress = Progress(Console(stream=io.StringIO()), 12_000, "pretrain", 0, 10)
    for step in (10, 6000):
        clock.now += 60
        progress.update(step, **METRICS)
    rows = [str(row) for row in progress.live_lines(width, unicode)]
    assert all(len(row) <= width for row in rows[1:])
    assert len(rows[0]) <= max(width, len("pretrain 6000/12000   50%  2:00  1:00 left"))
    text = "  ".join(row.strip() for row in rows[1:])
    assert text == "loss 0.1235  lr 1.50e-04  5,123 images/s  memory 3.1 GiB  data wait 2%"
    assert ("━" in rows[0]) == (unicode and width >= 60)
    assert ("#" in rows[0]) == (not unicode and width >= 60)
    if width >= 60:
        bar = re.search(r"[━#-]{8,}", rows[0])
        assert bar is not None
        if not unicode:
            assert (
                abs(bar[0].count("#") - bar[0].count("-")) <= 1
            )  # half of the steps, half of the bar


def test_a_folded_table_loses_no_character(
    monkeypatch: pytest.MonkeyPatch, out: io.StringIO
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = "runs/demo/a_rather_long_name_of_a_folder/eval/predictions.csv"
    Console(interactive=True, stream=out).table("t", ["n", "path"], [[7, path]])
    text = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())
    assert all(len(line) <= 40 for line in text.splitlines())
    assert path in "".join(
        re.sub(r"[^\w/.]", "", line.replace("7", "", 1)) for line in text.splitlines()
    )


ON_A_TERMINAL = """
import os, sys, time
from sssd_fast.run.log import Console
with Console() as console:
    assert console.interactive
    with console.progress(50, "pretrain") as bar:
        with console.announce("compiling"):
            time.sleep(0.3)
        bar.update(20, loss=0.25)
        with console.progress(5, "validate") as inner:
            inner.update(2)
            time.sleep(0.3)
            print("a stray print")
        if not (child := os.fork()):
            os.write(2, f"worker: {type(sys.stdout).__name__} {type(sys.stderr).__name__}\\r\\n".encode())
            os._exit(0)
        os.waitpid(child, 0)
        bar.update(50, loss=0.125)
print("streams:", type(sys.stdout).__name__)
"""


def test_on_a_real_terminal_the_bar_lives_and_leaves_everything_as_it_was() -> None:
    """Protects the terminal: cursor back, bar gone, stray prints above it, loader workers with the plain streams."""
    ours, theirs = pty.openpty()
    environment = {
        **os.environ,
        "TERM": "xterm-256color",
        "COLUMNS": "90",
        "PYTHONIOENCODING": "utf-8",
    }
    environment.pop("RANK", None)
    child = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env=environment,
    )
    os.close(theirs)
    raw = b""
    while select.select([ours], [], [], 20)[0]:
        try:
            raw += os.read(ours, 65536)
        except OSError:
            break
    os.close(ours)
    assert child.wait() == 0, raw.decode()
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", raw.decode())
    assert raw.count(b"\x1b[?25l") == raw.count(b"\x1b[?25h") == 1
    assert "━" in text
    assert "20/50   40%" in text
    assert "validate" in text
    assert re.search(r"[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏] compiling", text)
    assert re.search(r"compiling: done in 0\.\d s\r", text)
    assert "a stray print" in text
    assert "worker: TextIOWrapper TextIOWrapper" in text
    assert re.search(r"pretrain: 50 steps in 0\.\d s  loss 0\.125\r\n", text)
    assert text.endswith("streams: TextIOWrapper\r\n")


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "dumb")
    assert not Console(stream=Terminal()).interactive
    monkeypatch.setenv("TERM", "xterm")
    assert Console(stream=Terminal()).interactive


# ---- formats ----


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("loss", 0.123456, "loss 0.1235"),
        ("loss", float("nan"), "loss nan"),
        ("lr", 0.00015, "lr 1.50e-04"),
        ("images_per_s", 8123.4, "8,123 images/s"),
        ("images_per_s", 3.26, "3.3 images/s"),
        ("memory_gib", 11.96, "memory 12.0 GiB"),
        ("data_wait_fraction", 0.004, "data wait 0%"),
        ("step_time_s", 0.0123, "step 12 ms"),
        ("step_time_s", 2.5, "step 2.50 s"),
        ("grad_norm", 12.3456, "grad norm 12.35"),
        ("skipped", 3, "skipped 3"),
        ("stage", "warm-up", "stage warm-up"),
    ],
)
def test_figures_carry_their_unit(name: str, value: Any, expected: str) -> None:
    assert figure(name, value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1:00"),
        (3599.7, "1:00:00"),
        (93784, "26:03:04"),
    ],
)
def test_durations(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected
