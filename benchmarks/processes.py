"""Commands with a limit of time: at once, each with a file for what it is and prints, and nothing of theirs left running."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# First as Ctrl-C does: pytest and the benchmarks then write what they have. Seconds until the next, ruder one.
SIGNALS = ((signal.SIGINT, 6.0), (signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0))
POLL_S = 0.05
TICK_S = 1.0


@dataclass(frozen=True)
class Done:
    command: list[str]
    returncode: int | None  # None: cut off
    seconds: float


def run(
    commands: Sequence[Sequence[str]],
    outputs: Sequence[Path],
    limit_s: float,
    *,
    tick: Callable[[], None] = lambda: None,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> list[Done]:
    """All commands at once, until they end or limit_s is over. `tick` is called about once a second.

    Whatever they started is ended with them: also when an exception (a signal's, of tick) leaves this function.
    """
    started, ticked, done = time.monotonic(), time.monotonic(), dict[int, Done]()
    running: dict[int, subprocess.Popen[bytes]] = {}
    leaders: set[int] = set()
    try:
        for i, (command, output) in enumerate(zip(commands, outputs, strict=True)):
            try:
                running[i] = _start(command, output, env, cwd)
                leaders.add(running[i].pid)
            except OSError as error:  # no such program: told in its own output, as the others tell what happens to them
                with open(output, "a", encoding="utf-8") as file:
                    file.write(f"{command[0]}: {error.strerror}\n")
                done[i] = Done(list(command), 127, 0.0)
        while running and time.monotonic() - started < limit_s:
            for i, process in list(running.items()):
                if process.poll() is not None:
                    done[i] = Done(
                        list(commands[i]), process.returncode, time.monotonic() - started
                    )
                    end({running.pop(i).pid}, SIGNALS[-1:])  # what it left behind
            if time.monotonic() - ticked >= TICK_S:
                tick()
                ticked = time.monotonic()
            time.sleep(POLL_S)
    finally:
        end(leaders, SIGNALS)
        for process in running.values():
            process.wait()
    cut = {i: Done(list(commands[i]), None, time.monotonic() - started) for i in running}
    return [(done | cut)[i] for i in range(len(commands))]


def _start(
    command: Sequence[str], output: Path, env: dict[str, str] | None, cwd: Path | None
) -> subprocess.Popen[bytes]:
    with open(output, "wb") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=cwd,
            start_new_session=True,
        )


def end(leaders: Iterable[int], signals: Sequence[tuple[signal.Signals, float]]) -> None:
    """Ends everything in the sessions of the leaders and all their descendants."""
    wanted = set(leaders)
    for which, grace_s in signals:
        until = time.monotonic() + grace_s
        for pid in members(wanted):
            wanted.add(
                pid
            )  # a child that made a session of its own has no parent to be found by once that is gone
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, which)
        while members(wanted) and time.monotonic() < until:
            time.sleep(POLL_S)


def members(leaders: set[int]) -> set[int]:
    """Living processes that are one of the leaders, in the session of one, or descend from such a one."""
    parents, found = dict[int, int](), set[int]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        pid = int(stat.parent.name)
        if state not in "ZX":
            parents[pid] = int(parent)
            if pid in leaders or int(session) in leaders:
                found.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def excerpt(path: Path, most_bytes: int) -> bytes:
    """The file, or its first and last half of most_bytes with a line between that says what is left out."""
    if not path.exists():
        return b""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size <= most_bytes:
            return file.read()
        head = file.read(most_bytes // 2)
        file.seek(-(most_bytes // 2), os.SEEK_END)
        left_out = size - 2 * (most_bytes // 2)
        return head + f"\n[{left_out:,} bytes are left out here]\n".encode() + file.read()
