"""Non-finite steps, signals to real child processes, memory figures, seeds, and what may happen to an existing run folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from sssd_fast.errors import CheckpointError, ConfigError, NumericsError, RunExistsError
from sssd_fast.optim import all_finite
from sssd_fast.run import folder
from sssd_fast.run.device import is_out_of_memory, peak_memory_gib
from sssd_fast.run.folder import RUN_MARKER, require_run_folder
from sssd_fast.run.signals import SignalGuard, ignore_signals_in_worker
from sssd_fast.train import FiniteGuard

# ---- non-finite numbers ----

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("loss", "norm", "expected"),
    [
        (1.0, 2.0, True),
        (NAN, 2.0, False),
        (1.0, NAN, False),
        (INF, 1.0, False),
        (1.0, -INF, False),
        (0.0, 0.0, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_finite_sees_loss_and_gradient_norm(
    loss: float, norm: float, expected: bool, dtype: torch.dtype
) -> None:
    flag = all_finite(torch.tensor(loss, dtype=dtype, requires_grad=True), torch.tensor(norm))
    assert flag.dtype == torch.bool
    assert flag.shape == ()
    assert bool(flag) is expected
    assert not flag.requires_grad


def test_all_finite_does_not_wait_for_the_device() -> None:
    """Protects throughput: on the meta device, any read of a value (.item(), bool()) would raise."""
    loss, norm = torch.empty((), device="meta"), torch.empty((3,), device="meta")
    assert all_finite(loss, norm).device.type == "meta"


def test_three_skipped_steps_in_a_row_end_the_run_and_two_do_not() -> None:
    guard = FiniteGuard(limit=3)
    assert guard.check(True, 1) is True
    assert guard.check(False, 2) is False
    assert guard.check(False, 3) is False
    assert guard.check(True, 4) is True
    assert guard.check(False, 5) is False
    assert guard.check(False, 6) is False
    assert (guard.consecutive, guard.skipped) == (2, 4)
    with pytest.raises(
        NumericsError,
        match=r"3 steps in a row, the last was step 7 \(loss nan\).*bf16.*base_lr.*clip_grad",
    ) as error:
        guard.check(False, 7, "loss nan")
    assert error.value.exit_code == 3
    with pytest.raises(ConfigError, match="at least 1"):
        FiniteGuard(limit=0)


def test_the_failure_is_written_as_valid_json(tmp_path: Path) -> None:
    """Protects the post-mortem: NaN is not JSON, and tools refuse a file that holds it."""
    guard = FiniteGuard(limit=1, folder=tmp_path)
    with pytest.raises(
        NumericsError, match=r"loss nan, lr 0\.5\).*Details: .*failure/step-12\.json"
    ):
        guard.check(False, 12, "loss nan, lr 0.5")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "failure" / "step-12.json").read_text(), parse_constant=refuse)
    assert record == {"step": 12, "consecutive": 1, "skipped": 1, "context": "loss nan, lr 0.5"}


def test_a_report_that_cannot_be_written_does_not_hide_the_reason(tmp_path: Path) -> None:
    (tmp_path / "failure").write_text("a file where the folder should be")
    with pytest.raises(NumericsError, match=r"not finite in 1 steps.*failed as well"):
        FiniteGuard(limit=1, folder=tmp_path).check(False, 1)


# ---- signals ----


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """A shell that starts something in the background lets it ignore SIGINT; the children of these tests must not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def in_child(work: Callable[[Connection], None]) -> tuple[Any, Connection]:
    """A real process that runs `work` and exits with its status; (process, pipe to it)."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=work, args=(theirs,))
    child.start()
    return child, ours


def status(child: Any) -> int | None:
    child.join(10)
    return child.exitcode  # type: ignore[no-any-return]


def wait_for_request(pipe: Connection) -> None:
    """What a training does: works until the flag is there, saves, exits with 128 + the signal's number."""
    with SignalGuard() as guard:
        pipe.send("ready")
        while guard.requested is None:
            time.sleep(0.01)
        pipe.send(guard.requested)
        pipe.poll(10)  # "saving"
    sys.exit(128 + guard.requested)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_sets_the_flag_and_lets_the_process_finish(signum: signal.Signals) -> None:
    child, pipe = in_child(wait_for_request)
    assert pipe.recv() == "ready"
    os.kill(child.pid, signum)
    assert pipe.recv() == signum
    pipe.send("saved")
    assert status(child) == 128 + signum


def test_two_signals_at_once_are_one_request_and_a_later_one_ends_at_once() -> None:
    """Protects the save when Ctrl-C reaches both torchrun and its workers, and the user for whom saving takes too long."""
    child, pipe = in_child(wait_for_request)
    assert pipe.recv() == "ready"
    os.kill(child.pid, signal.SIGINT)
    assert pipe.recv() == signal.SIGINT
    os.kill(child.pid, signal.SIGTERM)
    time.sleep(0.1)
    assert child.is_alive()
    time.sleep(1)
    os.kill(child.pid, signal.SIGTERM)
    assert status(child) == 143  # at once; a finished child would have returned 130


def test_earlier_handlers_are_called_and_restored() -> None:
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


def test_ignored_signals_stay_ignored() -> None:
    """Protects `nohup` and background jobs of shells, which ignore SIGINT on purpose."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with SignalGuard() as guard:
            signal.raise_signal(signal.SIGINT)
            assert guard.requested is None
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_is_installed() -> None:
    handlers = []

    def work() -> None:
        with SignalGuard() as guard:
            handlers.append((signal.getsignal(signal.SIGTERM), guard.requested))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [(before, None)]


def parent_of_a_worker(pipe: Connection) -> None:
    with SignalGuard() as guard:
        worker, worker_pipe = in_child(lambda end: (end.send("ready"), time.sleep(30))[1])
        worker_pipe.recv()
        os.kill(worker.pid, signal.SIGINT)
        time.sleep(0.1)
        survived = worker.is_alive()
        os.kill(worker.pid, signal.SIGTERM)
        pipe.send((survived, status(worker), guard.requested))


def test_forked_workers_outlive_ctrl_c_and_die_of_sigterm() -> None:
    """Protects the last checkpoint (a worker killed by Ctrl-C fails the parent's step) and against immortal workers."""
    child, pipe = in_child(parent_of_a_worker)
    assert pipe.recv() == (True, -signal.SIGTERM, None)
    assert status(child) == 0


class Slow(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> int:
        time.sleep(0.01)
        return index


def train_with_workers(pipe: Connection) -> None:
    os.setpgid(0, 0)
    loader = torch.utils.data.DataLoader(
        Slow(), 4, num_workers=2, worker_init_fn=ignore_signals_in_worker
    )
    steps = 0
    with SignalGuard() as guard:
        for steps, _ in enumerate(loader):
            if steps == 2:
                pipe.send("training")
            if guard.requested and steps >= 40:  # long after the signal: workers still deliver
                break
    pipe.send((guard.requested, steps))


def test_a_signal_to_the_whole_group_leaves_loader_workers_at_work() -> None:
    """Protects the last checkpoint under Slurm, `timeout` and `docker stop`, which signal workers and parent alike."""
    child, pipe = in_child(train_with_workers)
    assert pipe.recv() == "training"
    os.killpg(child.pid, signal.SIGTERM)
    assert pipe.recv() == (signal.SIGTERM, 40)
    assert status(child) == 0


# ---- memory ----


def measure_memory(pipe: Connection) -> None:
    before = peak_memory_gib("cpu")
    block = torch.ones(3 << 26)  # 0.75 GiB
    during = peak_memory_gib(torch.device("cpu"))
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    del block
    pipe.send((before, during, resident, peak_memory_gib("cpu")))


def test_peak_memory_on_the_cpu_is_this_process_in_gib() -> None:
    """Protects the unit and the word peak: grows by what is touched, does not shrink, agrees with the kernel's figure.

    In a fresh process, as the peak of this one depends on the tests before.
    """
    child, pipe = in_child(measure_memory)
    before, during, resident, after = pipe.recv()
    assert during - before == pytest.approx(0.75, abs=0.1)
    assert during == pytest.approx(resident, abs=0.05)
    assert after == pytest.approx(during, abs=0.05)  # the kernel batches its counters
    assert status(child) == 0


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    )
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
    )
    with pytest.raises(RuntimeError) as real:
        torch.empty(1 << 60)
    assert is_out_of_memory(real.value)
    wrapped = ValueError("backend failed")
    wrapped.__cause__ = MemoryError()
    assert is_out_of_memory(wrapped)
    assert not is_out_of_memory(ValueError("out of memory"))
    assert not is_out_of_memory(RuntimeError("out of resource: shared memory, Required: 232448"))
    assert not is_out_of_memory(
        RuntimeError("DataLoader worker is killed: workers are out of shared memory")
    )
    assert not is_out_of_memory(None)


# ---- run folders ----


def test_a_new_run_folder_is_made_and_marked(tmp_path: Path) -> None:
    path = require_run_folder(tmp_path / "runs" / "a")
    assert path == tmp_path / "runs" / "a"
    assert "--overwrite" in (path / RUN_MARKER).read_text()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert require_run_folder(empty) == empty
    assert (
        require_run_folder(path) == path
    )  # nothing but the marker: a run that failed before it began


def test_an_existing_run_is_refused_naming_both_ways_out(tmp_path: Path) -> None:
    path = require_run_folder(tmp_path / "a")
    (path / "train.log").write_text("it failed before its first checkpoint")
    assert require_run_folder(path) == path  # nothing to lose: started again without a flag
    assert [item.name for item in path.iterdir()] == [RUN_MARKER]
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "step-0000001.pt").write_bytes(b"x")
    (path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(RunExistsError, match=r"already holds a run\. .*--resume.*--overwrite"):
        require_run_folder(path)
    assert require_run_folder(path, resume=True) == path
    assert (path / "metrics.jsonl").read_text() == "{}\n"
    with pytest.raises(ConfigError, match="exclude each other"):
        require_run_folder(path, resume=True, overwrite=True)


def test_overwrite_empties_a_run_folder_without_following_links(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "scan.png").write_bytes(b"precious")
    path = require_run_folder(tmp_path / "a")
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "best.pt").write_bytes(b"x")
    (path / "images").symlink_to(data, target_is_directory=True)
    (path / "one").symlink_to(data / "scan.png")
    require_run_folder(path, overwrite=True)
    assert [item.name for item in path.iterdir()] == [RUN_MARKER]
    assert (data / "scan.png").read_bytes() == b"precious"


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path: Path, flags: dict[str, bool]) -> None:
    """Protects a user who gives their data folder as the run folder, even with --overwrite."""
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunExistsError, match="not a run folder of sssd-fast"):
        require_run_folder(tmp_path, **flags)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RunExistsError, match="is a file"):
        require_run_folder(tmp_path / "thesis.tex", **flags)


def test_overwrite_refuses_the_folder_one_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (require_run_folder(tmp_path / "a") / "notes").mkdir()
    monkeypatch.chdir(tmp_path / "a" / "notes")
    with pytest.raises(RunExistsError, match="working directory"):
        require_run_folder(tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "notes").is_dir()


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot resume: .*nothing does not exist"):
        require_run_folder(tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(CheckpointError, match="is not a run folder"):
        require_run_folder(tmp_path, resume=True)


HOLDER = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
from sssd_fast.run.folder import require_run_folder
require_run_folder(sys.argv[1])
if os.fork():
    print("held", flush=True)
time.sleep(60)
"""


def test_two_processes_cannot_write_one_run_and_a_killed_one_frees_it_at_once(
    tmp_path: Path,
) -> None:
    """Protects metrics and checkpoints from two writers; an orphaned loader worker must not block the resume."""
    root = str(Path(__file__).parents[3])
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "a"), root],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "held\n"
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(RunExistsError, match="another process is writing"):
                require_run_folder(tmp_path / "a", **flags)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert require_run_folder(tmp_path / "a", resume=True) == tmp_path / "a"
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()


def test_a_folder_deleted_by_hand_can_be_made_again(tmp_path: Path) -> None:
    path = require_run_folder(tmp_path / "a")
    (path / RUN_MARKER).unlink()
    path.rmdir()
    require_run_folder(path)
    assert (path / RUN_MARKER).stat().st_size > 0
    assert folder._held[path / RUN_MARKER] >= 0
