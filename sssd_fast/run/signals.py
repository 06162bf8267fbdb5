"""SIGTERM and Ctrl-C as a flag that a training loop polls between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Any


class SignalGuard:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag, so that the loop can save and stop.

    A second signal ends the process at once with status 128 + number; checkpoints are atomic.
    Signals less than REPEAT_AFTER_S after the first count as the same request: Ctrl-C under
    torchrun, and `timeout`, deliver two. Earlier handlers are called too and restored at the end;
    ignored signals (nohup, background jobs) stay ignored. Does nothing outside the main thread.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    REPEAT_AFTER_S = 1.0

    def __init__(self) -> None:
        self.requested: int | None = None
        self._requested_at = 0.0
        self._pid = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalGuard:
        if threading.current_thread() is threading.main_thread():
            for signum in self.SIGNALS:
                previous = signal.getsignal(signum)
                # None: installed from C, cannot be restored
                if previous not in (signal.SIG_IGN, None):
                    self._previous[signum] = previous
                    signal.signal(signum, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)
        self._previous.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked loader worker: one that died would cost the parent its last step.
            return
        now = time.monotonic()
        if self.requested is not None:
            if now - self._requested_at >= self.REPEAT_AFTER_S:
                self._exit_at_once(signum)
            return
        self.requested = signum
        self._requested_at = now
        previous = self._previous.get(signum)
        if callable(previous) and previous is not signal.default_int_handler:
            previous(signum, frame)

    def _exit_at_once(self, signum: int) -> None:
        # a live progress display hides the cursor
        cursor = "\x1b[?25h" if os.isatty(2) else ""
        text = "\nsecond signal: leaving at once; the last checkpoint is intact\n"
        with contextlib.suppress(OSError):
            os.write(2, (cursor + text).encode())
        os._exit(128 + signum)
