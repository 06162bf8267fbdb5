"""Checkpoints after a kill, a full disk, a flipped bit or a hostile file; which files a run
keeps; how they are found.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sssd_fast.errors import CheckpointError, SssdError
from sssd_fast.run.checkpoint import (
    CheckpointManager,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from sssd_fast.run.files import atomic_write_bytes

ROOT = str(Path(__file__).parents[3])


def state_of(value: float) -> dict[str, Any]:
    return {"value": value, "model": {"weight": torch.full((64, 32), value)}}


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".sha256")


def test_checkpoint_returns_everything_a_run_saves(tmp_path: Path) -> None:
    """Model, AdamW, GradScaler, nested containers, dtypes and big integers pass the safe loader."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": torch.amp.GradScaler("cpu", enabled=True).state_dict(),
        "loader": np.random.default_rng(3).bit_generator.state,
        "shape": (1, [2.5, None, True, "é"], {3, 4}),
        "dtype": torch.bfloat16,
        "half": torch.tensor([1.5, -2], dtype=torch.bfloat16),
    }
    path = save_checkpoint(tmp_path / "deep" / "a.pt", state)
    loaded = load_checkpoint(path)
    for name in ("loader", "shape", "dtype", "scaler"):
        assert loaded[name] == state[name]
    torch.testing.assert_close(loaded["half"], state["half"], rtol=0, atol=0)
    torch.testing.assert_close(loaded["model"], dict(state["model"]), rtol=0, atol=0)
    exp_avg = optimizer.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], exp_avg)
    assert exp_avg.abs().sum() > 0
    assert verify_checkpoint(path) == path
    assert sorted(os.listdir(tmp_path / "deep")) == ["a.pt", "a.pt.sha256"]


def test_sidecar_is_read_and_written_as_by_sha256sum(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "a b.pt", state_of(1.0))
    sidecar = tmp_path / "a b.pt.sha256"
    command = ["sha256sum", "--strict", "-c", sidecar.name]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    made = subprocess.run(["sha256sum", path.name], cwd=tmp_path, capture_output=True, check=True)
    sidecar.write_bytes(made.stdout)
    assert load_checkpoint(path)["value"] == 1.0


# ---- damage ----


@pytest.mark.parametrize("position", [0, 4000, -1])
def test_load_rejects_a_flipped_bit(tmp_path: Path, position: int) -> None:
    """torch.load alone accepts a flipped bit in a weight."""
    path = save_checkpoint(tmp_path / "a.pt", state_of(1.0))
    flip_bit(path, position)
    with pytest.raises(CheckpointError, match=r"a\.pt is damaged: its content changed"):
        load_checkpoint(path)
    os.truncate(path, 1000)
    with pytest.raises(CheckpointError, match=r"a\.pt is damaged"):
        load_checkpoint(path)


class Hostile:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch HOSTILE",)


@pytest.mark.parametrize(
    ("content", "sidecar", "message"),
    [
        (None, None, r"cannot read .*a\.pt: No such .*holds other\.pt"),
        (state_of(1.0), "", r"sha256 is missing.*sha256sum a\.pt > a\.pt\.sha256"),
        (state_of(1.0), "garbage", "missing or unreadable"),
        # a correct checksum does not make code acceptable
        ({"model": Hostile()}, None, r"a\.pt holds \S*system: rejected, .*can run code"),
        ([1, 2], None, "holds a list, a dict is needed"),
        (b"", None, r"a\.pt"),
        (b"hello", None, r"a\.pt"),
        (b"PK\x03\x04 not a zip", None, r"a\.pt"),
    ],
)
def test_load_rejects_other_files_and_never_runs_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: Any,
    sidecar: str | None,
    message: str,
) -> None:
    """sidecar: None = correct, "" = none."""
    monkeypatch.chdir(tmp_path)
    Path("other.pt").write_bytes(b"")
    path = tmp_path / "a.pt"
    if not isinstance(content, bytes | None):
        torch.save(content, path)
        content = path.read_bytes()
    if content is not None:
        digest = hashlib.sha256(content).hexdigest()
        path.write_bytes(content)
        Path("a.pt.sha256").write_text(f"{digest}  a.pt\n" if sidecar is None else sidecar)
    if sidecar == "":
        Path("a.pt.sha256").unlink()
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)
    assert not Path("HOSTILE").exists()


def test_save_rejects_what_load_would_reject(tmp_path: Path) -> None:
    """On resume it would be hours too late."""
    wrong = {"PosixPath": Path("x"), "SimpleNamespace": SimpleNamespace(), "numpy": np.float64(1.0)}
    for name, value in wrong.items():
        with pytest.raises(CheckpointError, match=rf"a\.pt holds .*{name}.*: rejected"):
            save_checkpoint(tmp_path / "a.pt", {"config": [1, {"out": value}]})
    with pytest.raises(CheckpointError, match="holds a list, a dict is needed"):
        save_checkpoint(tmp_path / "a.pt", [1])  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []
    path = save_checkpoint(tmp_path / "a.pt", state_of(1.0))
    with pytest.raises(CheckpointError, match="it exists"):
        save_checkpoint(path, state_of(2.0))
    assert load_checkpoint(path)["value"] == 1.0


# ---- faults while writing ----


# renames: sidecar, file; syncs: both files, the folder after each rename
CALLS_PER_SAVE = 2 + 4


@pytest.mark.parametrize("fail_at", range(CALLS_PER_SAVE + 1))
def test_save_that_fails_anywhere_leaves_no_unverified_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    path = tmp_path / "a.pt"
    calls = []

    def failing(name: str) -> Any:
        real = getattr(os, name)

        def call(*args: Any) -> Any:
            calls.append(name)
            if len(calls) > fail_at:
                raise OSError(28, "No space left on device")
            return real(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing("replace"))
        patch.setattr(os, "fsync", failing("fsync"))
        if fail_at == CALLS_PER_SAVE:
            save_checkpoint(path, state_of(2.0))
            assert len(calls) == CALLS_PER_SAVE
        else:
            message = r"cannot write .*a\.pt.*: No space left on device \([\d.]+ GiB free"
            with pytest.raises(SssdError, match=message):
                save_checkpoint(path, state_of(2.0))
    renamed = calls.count("replace") == 2 and calls[-1] == "fsync"
    assert path.exists() == renamed
    assert list(tmp_path.glob(".*.tmp")) == []
    if not renamed:
        save_checkpoint(path, state_of(2.0))
    assert load_checkpoint(path)["value"] == 2.0


def test_save_to_a_disk_that_fills_up_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    """A real partial write (file size limit)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(SssdError, match=r"cannot write .*a\.pt: .*GiB free"):
            save_checkpoint(tmp_path / "a.pt", {"weight": torch.zeros(1 << 20)})
        with pytest.raises(SssdError, match=r"cannot write .*b\.json: File too large"):
            atomic_write_bytes(tmp_path / "b.json", bytes(2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


KILLED_CHILD = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from sssd_fast.run.checkpoint import CheckpointManager
manager = CheckpointManager(sys.argv[1])
step = int(manager.latest().stem[5:]) if manager.latest() else 0
while True:
    step += 1
    value = torch.full((200_000,), float(step))
    manager.save({"step": step, "value": value}, step, best=step % 2 == 0)
    print("saved", flush=True)
"""


def test_manager_loses_no_checkpoint_to_kill_9(tmp_path: Path) -> None:
    """A process that does nothing but save is killed again and again; every file loads (nnU-Net
    #211).
    """
    last_step = 0
    moments = random.Random(0)
    for _ in range(4):
        command = [sys.executable, "-c", KILLED_CHILD, str(tmp_path), ROOT]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "saved\n"
        time.sleep(moments.uniform(0.1, 0.3))
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        for path in tmp_path.glob("*.pt"):
            state = load_checkpoint(path)
            assert torch.equal(state["value"], torch.full((200_000,), float(state["step"])))
        newest = CheckpointManager(tmp_path).latest()
        assert newest is not None
        step = load_checkpoint(newest)["step"]
        assert step > last_step
        last_step = step
    best = CheckpointManager(tmp_path).best()
    assert best is not None
    assert load_checkpoint(best)["step"] >= last_step - 2


# ---- which files are kept ----


def test_manager_keeps_the_last_two_and_the_best(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last=2)
    for step in (50, 100, 150, 200, 250, 300, 350):
        manager.save(state_of(step), step, best=step == 150)
    kept = ["step-0000150.pt", "step-0000300.pt", "step-0000350.pt"]
    assert names(tmp_path) == ["best", *kept]
    assert (tmp_path / "best").read_text() == "step-0000150.pt\n"
    assert load_checkpoint(manager.best() or "none")["value"] == 150
    assert sorted(path.name for path in tmp_path.glob("*.sha256")) == [f"{k}.sha256" for k in kept]
    # the same step again: the end of an epoch after a save by steps
    manager.save(state_of(350.5), 350, best=True)
    assert load_checkpoint(manager.best() or "none")["value"] == 350.5
    assert manager.latest() == manager.path(350) == tmp_path / "step-0000350-2.pt"
    leftover = tmp_path / ".step-0000400.pt.0123456789ab.tmp"
    leftover.write_bytes(b"of a killed process")
    manager.save(state_of(400), 400)
    manager.save(state_of(450), 450)
    kept = ["step-0000350-2.pt", "step-0000400.pt", "step-0000450.pt"]
    assert names(tmp_path) == ["best", *kept]


def test_manager_orders_steps_by_number(tmp_path: Path) -> None:
    """By name, step 10000000 is before 9999999."""
    manager = CheckpointManager(tmp_path)
    for step in (9_999_999, 10_000_000):
        manager.save(state_of(step), step)
    assert manager.latest() == tmp_path / "step-10000000.pt"


def test_manager_skips_a_damaged_newest_and_says_so(tmp_path: Path) -> None:
    notes: list[str] = []
    manager = CheckpointManager(tmp_path, log=notes.append)
    assert manager.latest() is None
    for step in (1, 2):
        manager.save(state_of(step), step)
    flip_bit(manager.path(2), 500)
    assert manager.latest() == manager.path(1)
    (note,) = notes
    assert "skipping step-0000002.pt" in note
    assert "content changed" in note
    manager.path(1).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is intact \(step-0000002\.pt, step-0000001\.pt\)"):
        manager.latest()


def test_manager_keeps_files_of_later_steps(tmp_path: Path) -> None:
    """A damaged one, or a wrong save into another run's folder."""
    manager = CheckpointManager(tmp_path)
    for step in (100, 200):
        manager.save(state_of(step), step)
    flip_bit(manager.path(200), 500)
    resumed = CheckpointManager(tmp_path, log=lambda text: None)
    assert resumed.latest() == manager.path(100)
    resumed.save(state_of(150), 150)
    assert names(tmp_path) == ["step-0000100.pt", "step-0000150.pt", "step-0000200.pt"]
    assert resumed.latest() == manager.path(150)
    resumed.save(state_of(200.5), 200)
    assert load_checkpoint(resumed.latest() or "none")["value"] == 200.5


# ---- finding them ----


def test_find_checkpoint_accepts_runs_files_and_the_pointer(tmp_path: Path) -> None:
    runs = {stage: tmp_path / "ct" / stage for stage in ("pretrain", "finetune")}
    for stage, run in runs.items():
        manager = CheckpointManager(run / "checkpoints")
        manager.save(state_of(1), 1, best=stage == "finetune")
        manager.save(state_of(2), 2)
    one, two = (runs["finetune"] / "checkpoints" / f"step-000000{step}.pt" for step in (1, 2))
    assert find_checkpoint(two) == two
    assert find_checkpoint(runs["finetune"]) == find_checkpoint(tmp_path / "ct") == one
    assert find_checkpoint(runs["finetune"] / "checkpoints" / "best") == one
    assert find_checkpoint(runs["finetune"] / "checkpoints" / "best", "last") == one
    assert find_checkpoint(tmp_path / "ct", "last") == two
    # without a best, the newest
    pretrained = runs["pretrain"] / "checkpoints" / "step-0000002.pt"
    assert find_checkpoint(runs["pretrain"]) == pretrained
    assert find_checkpoint(tmp_path / "ct", stages=("pretrain", "finetune")) == pretrained
    with pytest.raises(CheckpointError, match=r"neither .* it holds the runs .*ct/finetune, .*ct/"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="neither a checkpoint file nor a run folder"):
        find_checkpoint(tmp_path / "none")
