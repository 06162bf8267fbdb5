"""What keeps a long run from harm: non-finite numbers, signals, memory, seeds, and folders that already hold a run."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from .checkpoint import atomic_write_text
from .errors import CheckpointError, ConfigError, NumericsError, RunExistsError, SssdError

RUN_MARKER = ".sssd-fast-run"
_MARKER_TEXT = "This is a run folder of sssd-fast. With --overwrite, everything in this folder may be deleted.\n"

# ---- non-finite numbers ----


def all_finite(loss: Tensor, *others: Tensor) -> Tensor:
    """Whether every element of the loss (and gradient norm, ...) is finite: a bool tensor [] on the loss's device.

    Nothing here waits for the device, so it can stand in a compiled or captured step; read the flag when convenient.
    """
    finite = torch.isfinite(loss.detach()).all()
    for other in others:
        finite = finite & torch.isfinite(other.detach()).all().to(finite.device)
    return finite


class FiniteGuard:
    """Host-side policy: a non-finite step is skipped; `limit` of them in a row end the run.

    fp16 needs a larger limit than bf16 or fp32 (3): its loss scale starts too high and halves at every overflow.
    folder: the run folder, for `failure/step-N.json`; without one nothing is written. Steps draw from (seed, step) alone, so
    resuming from the last checkpoint reproduces the failure.
    """

    def __init__(self, limit: int = 3, *, folder: str | Path | None = None) -> None:
        if limit < 1:
            raise ConfigError(
                f"the number of non-finite steps in a row that ends a run is {limit}, at least 1 is needed"
            )
        self.limit = limit
        self.folder = None if folder is None else Path(folder) / "failure"
        self.consecutive = 0
        self.skipped = 0

    def check(self, finite: bool, step: int, context: str | Mapping[str, Any] = "") -> bool:
        """Whether to apply `step`. Raises NumericsError at the `limit`-th skipped step in a row.

        context: what to report with it, such as {"loss": ..., "lr": ..., "loss_scale": ...}.
        """
        if finite:
            self.consecutive = 0
            return True
        self.consecutive += 1
        self.skipped += 1
        if self.consecutive < self.limit:
            return False
        numbers = context if isinstance(context, str) else ", ".join(f"{key} {value}" for key, value in context.items())
        raise NumericsError(
            f"loss or gradients were not finite in {self.consecutive} steps in a row, the last was step {step}"
            + (f" ({numbers})" if numbers else "")
            + ". None of these steps was applied: parameters and checkpoints are intact. Try precision=bf16 (fp32 on "
            "hardware without it), a lower base_lr, or a smaller clip_grad." + self._write(step, context)
        )

    def _write(self, step: int, context: str | Mapping[str, Any]) -> str:
        """Files for the post-mortem; a problem in writing them must not hide the reason the run stopped."""
        import json

        if self.folder is None:
            return ""
        values = {"context": context} if isinstance(context, str) else dict(context)
        record = {"step": step, "consecutive": self.consecutive, "skipped": self.skipped, **values}
        # NaN and infinity are not JSON: written as the strings "nan", "inf"
        safe = {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        path = self.folder / f"step-{step}.json"
        try:
            atomic_write_text(path, json.dumps(safe, indent=2, default=str) + "\n")
        except (OSError, SssdError) as error:
            return f" (Writing {self.folder} failed as well: {error})"
        return f" Details: {path}"


# ---- signals ----


class SignalGuard:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag to poll, so that the loop can save and leave between two steps.

    with SignalGuard() as guard: ... if guard.requested: save; raise Interrupted(..., guard.requested)

    A second signal ends the process at once with status 128 + number; checkpoints are atomic, so that is safe. Signals
    less than `repeat_after_s` after the first count as the same request: Ctrl-C under torchrun, and `timeout`, deliver
    two. Handlers that were there before are called too and restored at the end; signals that were ignored (nohup,
    background jobs) stay ignored. Outside the main thread, where Python cannot install handlers, it does nothing.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, *, repeat_after_s: float = 1.0) -> None:
        self.requested: int | None = None
        self.repeat_after_s = repeat_after_s
        self._requested_at = 0.0
        self._pid = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalGuard:
        if threading.current_thread() is threading.main_thread():
            for signum in self.SIGNALS:
                previous = signal.getsignal(signum)
                if previous not in (signal.SIG_IGN, None):  # None: installed from C, cannot be restored
                    self._previous[signum] = previous
                    signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)
        self._previous.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            self._handle_in_child(signum)
            return
        now = time.monotonic()
        if self.requested is not None:
            if now - self._requested_at >= self.repeat_after_s:
                self._exit_at_once(signum)
            return
        self.requested, self._requested_at = signum, now
        previous = self._previous.get(signum)
        if callable(previous) and previous is not signal.default_int_handler:
            previous(signum, frame)

    def _handle_in_child(self, signum: int) -> None:
        """Forked loader workers inherit handlers. Ctrl-C reaches the whole process group: a worker that died of it
        would cost the parent its last step; any other signal does what it would have done."""
        if signum != signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def _exit_at_once(self, signum: int) -> None:
        with contextlib.suppress(OSError):
            cursor = b"\x1b[?25h" if os.isatty(2) else b""  # a live progress display hid it
            os.write(2, cursor + b"\nsecond signal: leaving at once; the last checkpoint is intact\n")
        os._exit(128 + signum)


def ignore_signals_in_worker(worker_id: int) -> None:
    """A `worker_init_fn` for torch's DataLoader: batch systems signal the whole process group, and a worker that dies of
    it makes the parent's next batch fail before the parent can save. Workers still end when the parent does."""
    for signum in SignalGuard.SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


# ---- memory ----


def peak_memory_gib(device: torch.device | str) -> float:
    """Peak memory in GiB since the process started (or since torch.cuda.reset_peak_memory_stats).

    CUDA: what PyTorch's allocator reserved on `device`, the figure that decides whether a batch fits (the CUDA context,
    some 0.5 GiB, comes on top). Otherwise: resident memory of this process, without its loader workers.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    with contextlib.suppress(OSError, ValueError, StopIteration):
        # not getrusage, where there is /proc: its maximum is inherited from the process that started this one
        status = Path("/proc/self/status").read_text()
        kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(kib) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "cudaErrorMemoryAllocation",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the device or the host ran out of memory, in any of the ways PyTorch says so, wrapped by others or not."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False


# ---- run folders ----


_held: dict[Path, int] = {}


def require_run_folder(path: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Makes a new run folder, or reopens (resume) or empties (overwrite) an old one; returns its absolute path.

    A marker file tells a run folder; nothing is ever deleted in a folder without one. A run that ended before its first
    checkpoint may be started again without `overwrite`. The marker stays locked until
    the process ends, so that two processes cannot write to one run. Call it on rank 0 only.

    Raises RunExistsError for a folder that holds something and neither flag was given, is not a run folder, or is in
    use; CheckpointError where there is nothing to resume; ConfigError for both flags.
    """
    path = Path(path).absolute()
    marker = path / RUN_MARKER
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other: continue the run, or delete it and start again")
    if path.exists() and not path.is_dir():
        raise RunExistsError(f"{path} is a file; choose another folder for the run")
    if resume and not marker.is_file():
        what = "is not a run folder" if path.exists() else "does not exist"
        raise CheckpointError(f"cannot resume: {path} {what}. Check the path, or start a new run without --resume")
    if path.is_dir() and any(item.name != RUN_MARKER for item in path.iterdir()) and not resume:
        if not marker.is_file():
            raise RunExistsError(
                f"{path} is not empty and not a run folder of sssd-fast (it lacks {RUN_MARKER}), so nothing in it was "
                "touched. Choose another folder"
            )
        if not any((path / "checkpoints").glob("*.pt")):
            overwrite = True  # it failed before it trained anything: nothing is lost by starting again
        if not overwrite:
            raise RunExistsError(
                f"{path} already holds a run. Continue it with --resume, delete it and start again with --overwrite, "
                "or choose another folder"
            )
    path.mkdir(parents=True, exist_ok=True)
    _hold(marker)
    if overwrite:
        _empty(path)
    return path


def _hold(marker: Path) -> None:
    """Writes the marker and locks it while this process lives. A record lock, not flock: forked workers that outlive a
    killed parent by seconds do not inherit it, so that the run can be resumed at once."""
    held = _held.get(marker)
    if held is not None and marker.exists() and os.path.samestat(os.fstat(held), os.stat(marker)):
        return
    descriptor = os.open(marker, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        os.close(descriptor)
        raise RunExistsError(
            f"another process is writing to the run in {marker.parent}; wait for it to end, or choose another folder"
        ) from error
    except OSError:
        pass  # a file system without locks
    if os.fstat(descriptor).st_size == 0:
        os.write(descriptor, _MARKER_TEXT.encode())
    _held[marker] = descriptor  # closing it, or any other descriptor of the file, would drop the lock


def _empty(path: Path) -> None:
    """Deletes everything in a run folder but its marker, so that an interrupted deletion can be taken up again."""
    working = Path.cwd()
    if path.resolve() in (working, *working.parents, Path.home()):
        raise RunExistsError(f"refusing to empty {path}: it contains the working directory or is your home")
    for item in path.iterdir():
        if item.name == RUN_MARKER:
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()
