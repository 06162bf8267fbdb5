"""Signals to real child processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

from sssd_fast.run.signals import SignalGuard


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """A shell that starts something in the background lets it ignore SIGINT; the children of
    these tests must not.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def in_child(work: Callable[[Connection], None]) -> tuple[Any, Connection]:
    """(a real process that runs `work`, a pipe to it, after its first message)."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=work, args=(theirs,))
    child.start()
    assert ours.recv() == "ready"
    return child, ours


def status(child: Any) -> int | None:
    child.join(10)
    return child.exitcode  # type: ignore[no-any-return]


def wait_for_request(pipe: Connection) -> None:
    """As a training: works until a signal, saves, exits with 128 + the signal's number."""
    with SignalGuard() as guard:
        pipe.send("ready")
        while guard.requested is None:
            time.sleep(0.01)
        pipe.send(guard.requested)
        # saving
        pipe.poll(10)
    sys.exit(128 + guard.requested)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_guard_sets_the_flag_and_lets_the_process_finish(signum: signal.Signals) -> None:
    child, pipe = in_child(wait_for_request)
    os.kill(child.pid, signum)
    assert pipe.recv() == signum
    pipe.send("saved")
    assert status(child) == 128 + signum


def test_guard_takes_two_signals_at_once_as_one_and_exits_on_a_later_one() -> None:
    """Protects the save when Ctrl-C reaches both torchrun and its workers, and the user for whom
    saving takes too long.
    """
    child, pipe = in_child(wait_for_request)
    os.kill(child.pid, signal.SIGINT)
    assert pipe.recv() == signal.SIGINT
    os.kill(child.pid, signal.SIGTERM)
    time.sleep(0.1)
    assert child.is_alive()
    time.sleep(1)
    os.kill(child.pid, signal.SIGTERM)
    assert status(child) == 143  # at once; a finished child would have returned 130


def test_guard_calls_and_restores_earlier_handlers() -> None:
    """Protects batch systems' own handlers (requeue on SIGUSR1), and guards inside guards."""
    seen: list[int] = []
    before = {signum: signal.getsignal(signum) for signum in SignalGuard.SIGNALS}
    signal.signal(signal.SIGUSR1, lambda signum, _: seen.append(signum))
    custom = signal.getsignal(signal.SIGUSR1)
    try:
        with SignalGuard() as outer, SignalGuard() as inner:
            signal.raise_signal(signal.SIGUSR1)
            assert inner.requested == outer.requested == signal.SIGUSR1
        assert seen == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR1) is custom
        assert signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
        with pytest.raises(RuntimeError, match="inside"), SignalGuard():
            raise RuntimeError("inside")
        assert signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM]
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_guard_leaves_ignored_signals_and_other_threads_alone() -> None:
    """Protects `nohup` and background jobs of shells, which ignore SIGINT on purpose."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with SignalGuard() as guard:
            signal.raise_signal(signal.SIGINT)
            assert guard.requested is None
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    handlers = []

    def work() -> None:
        with SignalGuard():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


def parent_of_a_worker(pipe: Connection) -> None:
    with SignalGuard() as guard:
        pipe.send("ready")
        worker, _ = in_child(lambda end: (end.send("ready"), time.sleep(0.5))[1])
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
        pipe.send((status(worker), guard.requested))


def test_forked_worker_survives_signals() -> None:
    """Protects the last checkpoint: a worker killed by Ctrl-C fails the parent's step."""
    child, pipe = in_child(parent_of_a_worker)
    assert pipe.recv() == (0, None)
    assert status(child) == 0
