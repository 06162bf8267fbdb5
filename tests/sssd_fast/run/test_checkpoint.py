"""Checkpoints after a kill, a full disk, a flipped bit or a hostile file; which files a run keeps; exact random states."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sssd_fast.errors import CheckpointError, ConfigError, SssdError
from sssd_fast.run import checkpoint
from sssd_fast.run.checkpoint import (
    CheckpointManager,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from sssd_fast.run.files import atomic_write_bytes, atomic_write_text, remove_leftovers


def state_of(value: float) -> dict[str, Any]:
    return {"value": value, "model": {"weight": torch.full((64, 32), value)}}


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


# ---- what goes in comes out ----


def test_everything_a_run_saves_comes_back_equal(tmp_path: Path) -> None:
    """Protects resuming: model, AdamW, GradScaler, nested containers, dtypes and big integers survive the safe loader."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    generator = np.random.default_rng(3)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": torch.amp.GradScaler("cpu", enabled=True).state_dict(),
        "loader": generator.bit_generator.state,
        "shape": (1, [2.5, None, True, "é"], {3, 4}),
        "dtype": torch.bfloat16,
        "half": torch.tensor([1.5, -2], dtype=torch.bfloat16),
    }
    info = save_checkpoint(tmp_path / "deep" / "a.pt", state, step=7)
    loaded = load_checkpoint(info.path)
    assert loaded["loader"] == state["loader"]
    assert loaded["shape"] == state["shape"]
    assert loaded["dtype"] is torch.bfloat16
    assert torch.equal(loaded["half"], state["half"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded["model"][name], tensor)
    exp_avg = optimizer.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], exp_avg)
    assert exp_avg.abs().sum() > 0
    assert verify_checkpoint(info.path) == info
    assert info.step == 7
    assert [path.name for path in sorted((tmp_path / "deep").iterdir())] == ["a.pt", "a.pt.sha256"]


def test_the_sidecar_is_what_sha256sum_reads(tmp_path: Path) -> None:
    """Protects people who copy checkpoints between machines: `sha256sum -c` checks them, and its own output is accepted."""
    path = save_checkpoint(tmp_path / "a b.pt", state_of(1.0)).path
    sidecar = tmp_path / "a b.pt.sha256"
    command = ["sha256sum", "--strict", "-c", sidecar.name]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    assert hashlib.sha256(path.read_bytes()).hexdigest() in sidecar.read_text()
    made = subprocess.run(["sha256sum", path.name], cwd=tmp_path, capture_output=True, check=True)
    sidecar.write_bytes(made.stdout)
    assert load_checkpoint(path)["value"] == 1.0


# ---- damage ----


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_flipped_bit_is_refused(tmp_path: Path, where: str) -> None:
    """Protects against training on from silently altered weights (torch.load alone accepts a flipped weight bit)."""
    path = save_checkpoint(tmp_path / "a.pt", state_of(1.0)).path
    size = path.stat().st_size
    flip_bit(path, {"first": 0, "middle": size // 2, "last": size - 1}[where])
    with pytest.raises(CheckpointError, match=r"a\.pt is damaged: its content changed"):
        load_checkpoint(path)


def test_a_truncated_file_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "a.pt", state_of(1.0)).path
    size = path.stat().st_size
    os.truncate(path, size - 100)
    with pytest.raises(
        CheckpointError, match=rf"a\.pt is damaged: {size - 100} bytes, {size} were written"
    ):
        load_checkpoint(path)
    os.truncate(path, 0)
    with pytest.raises(CheckpointError, match="0 bytes"):
        load_checkpoint(path)


def test_a_missing_file_or_sidecar_is_named_with_a_way_out(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other.pt", state_of(1.0))
    with pytest.raises(
        CheckpointError, match=r"cannot read .*a\.pt: No such file.*holds other\.pt"
    ):
        load_checkpoint(tmp_path / "a.pt")
    (tmp_path / "other.pt.sha256").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"other\.pt\.sha256 is missing.*sha256sum other\.pt > other\.pt\.sha256",
    ):
        load_checkpoint(tmp_path / "other.pt")
    (tmp_path / "other.pt.sha256").write_bytes(b"\xff\x00garbage")
    with pytest.raises(CheckpointError, match="missing or unreadable"):
        load_checkpoint(tmp_path / "other.pt")


class Hostile:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch HOSTILE",)


def test_a_pickled_class_is_refused_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects users who load a stranger's checkpoint: a correct checksum does not make code acceptable."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pt"
    torch.save({"model": Hostile()}, path)
    Path("a.pt.sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  a.pt\n")
    with pytest.raises(
        CheckpointError, match=r"a\.pt holds \S*system: refused, because loading .* can run code"
    ):
        load_checkpoint(path)
    assert not Path("HOSTILE").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 not a zip"])
def test_a_file_that_never_was_a_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    (tmp_path / "a.pt.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  a.pt\n")
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    (tmp_path / "a.pt.sha256").write_text(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  a.pt\n"
    )
    with pytest.raises(CheckpointError, match="holds a list, a dict is needed"):
        load_checkpoint(path)


@dataclass
class Settings:
    width: int = 3


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Path("x"), "PosixPath"),
        (Settings(), "Settings"),
        (np.float64(1.0), "numpy.float64"),
        (np.ones(2), "numpy.ndarray"),
        (defaultdict(int), "defaultdict"),
    ],
)
def test_a_state_that_could_not_be_loaded_is_refused_when_saving(
    tmp_path: Path, value: Any, name: str
) -> None:
    """Protects the run: finding this out when resuming would be hours too late. The old checkpoint stays."""
    path = save_checkpoint(tmp_path / "a.pt", state_of(1.0)).path
    with pytest.raises(CheckpointError, match=rf"state\['config'\]\[1\]\['out'\] is a .*{name}"):
        save_checkpoint(path, {"config": [1, {"out": value}]})
    assert load_checkpoint(path)["value"] == 1.0
    with pytest.raises(CheckpointError, match="the state is a list"):
        save_checkpoint(path, [1])  # type: ignore[arg-type]


# ---- faults while writing ----


CALLS_PER_SAVE = (
    3 + 6
)  # renames: sidecar, file, sidecar; syncs: file, folder, and both for each sidecar


@pytest.mark.parametrize("fail_at", range(CALLS_PER_SAVE))
@pytest.mark.parametrize("existing", [False, True])
def test_a_crash_after_any_write_leaves_a_loadable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int, existing: bool
) -> None:
    """Protects the pair file + sidecar: stopping before every rename and every sync leaves the old or the new, verified."""
    path = tmp_path / "a.pt"
    if existing:
        save_checkpoint(path, state_of(1.0))
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
        with pytest.raises(
            CheckpointError,
            match=r"cannot write .*a\.pt: No space left on device \([\d.]+ GiB free",
        ):
            save_checkpoint(path, state_of(2.0))
    in_place = calls.count("replace") > 2 or (calls.count("replace") == 2 and calls[-1] == "fsync")
    if existing or in_place:
        assert load_checkpoint(path)["value"] == (2.0 if in_place else 1.0)
    else:
        assert not path.exists()
    assert list(tmp_path.glob(".*.tmp")) == []
    assert save_checkpoint(path, state_of(3.0)).size == path.stat().st_size
    assert load_checkpoint(path)["value"] == 3.0
    assert len((tmp_path / "a.pt.sha256").read_text().splitlines()) == 2


def test_the_number_of_calls_above_is_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("replace", "fsync"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real: calls.append(1) or real(*args))
    save_checkpoint(tmp_path / "a.pt", state_of(1.0))
    assert len(calls) == CALLS_PER_SAVE


def test_a_disk_that_fills_up_midway_leaves_the_old_file(tmp_path: Path) -> None:
    """Protects against torch hiding the disk's error behind one about positions: a real, partial write (file size limit)."""
    path = save_checkpoint(tmp_path / "a.pt", state_of(1.0)).path
    big = {"weight": torch.zeros(1 << 20)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*a\.pt: File too large"):
            save_checkpoint(path, big)
        with pytest.raises(SssdError, match=r"cannot write .*b\.json: File too large"):
            atomic_write_bytes(tmp_path / "b.json", bytes(2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(path)["value"] == 1.0
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.pt", "a.pt.sha256"]


def test_a_folder_that_cannot_be_written_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"cannot write .*file/a\.pt: .*check the permissions"
    ):
        save_checkpoint(tmp_path / "file" / "a.pt", state_of(1.0))


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


def test_kill_9_while_saving_never_costs_a_checkpoint(tmp_path: Path) -> None:
    """Protects against nnU-Net #211: a process that does nothing but save is killed again and again; every file loads."""
    root = str(Path(__file__).parents[3])
    last_step = 0
    moments = random.Random(0)
    for _ in range(5):
        command = [sys.executable, "-c", KILLED_CHILD, str(tmp_path), root]
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "saved\n"
        time.sleep(moments.uniform(0.1, 0.3))
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        files = sorted(tmp_path.glob("*.pt"))
        assert files
        for path in files:
            state = load_checkpoint(path)
            assert torch.equal(state["value"], torch.full((200_000,), float(state["step"])))
        newest = CheckpointManager(tmp_path).latest()
        assert newest is not None
        step = load_checkpoint(newest)["step"]
        assert step > last_step
        last_step = step
        assert list(tmp_path.glob(".*.tmp")) == []
    assert load_checkpoint(tmp_path / "best.pt")["step"] >= last_step - 2


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path: Path) -> None:
    """Protects a running training from an evaluation that opens the same folder while a checkpoint is being written."""
    dead = tmp_path / ".step-0000500.pt.0123456789ab.tmp"
    dead.write_bytes(b"half")
    with checkpoint._temporary(tmp_path / "step-0000600.pt") as (living, _):
        CheckpointManager(tmp_path)
        assert living.exists()
        assert not dead.exists()
    assert not living.exists()
    assert remove_leftovers(tmp_path) == []


def test_atomic_text_replaces_and_honours_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "new" / "index.json"
    atomic_write_text(path, "first\n")
    atomic_write_text(path, "zweite Größe\n")
    assert path.read_bytes() == "zweite Größe\n".encode()
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert [item.name for item in path.parent.iterdir()] == ["index.json"]


# ---- the manager ----


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".pt")


def test_keeps_the_last_two_and_the_best(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last=2)
    for step in (50, 100, 150, 200, 250, 300, 350):
        manager.save(state_of(step), step, best=step == 150)
    assert names(tmp_path) == ["best.pt", *(f"step-0000{step}.pt" for step in (300, 350))]
    assert load_checkpoint(tmp_path / "best.pt")["value"] == 150
    assert verify_checkpoint(tmp_path / "best.pt").step == 150
    assert {path.name for path in tmp_path.glob("*.sha256")} == {
        name + ".sha256" for name in names(tmp_path)
    }
    manager.save(
        state_of(350.5), 350, best=True
    )  # the same step again: the end of an epoch after a save by steps
    assert load_checkpoint(tmp_path / "best.pt")["value"] == 350.5
    manager.save(state_of(400), 400, best=True)
    assert load_checkpoint(tmp_path / "best.pt")["value"] == 400


def test_best_without_hard_links_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    manager = CheckpointManager(tmp_path, keep_last=1)
    manager.save(state_of(1), 1, best=True)
    manager.save(state_of(2), 2)
    assert names(tmp_path) == ["best.pt", "step-0000002.pt"]
    assert load_checkpoint(tmp_path / "best.pt")["value"] == 1


def test_newest_is_by_number_not_by_name(tmp_path: Path) -> None:
    """Protects against timm's string sort: step 10000000 comes after 9999999."""
    manager = CheckpointManager(tmp_path)
    for step in (9_999_999, 10_000_000):
        manager.save(state_of(step), step)
    assert manager.steps() == [9_999_999, 10_000_000]
    assert manager.latest() == tmp_path / "step-10000000.pt"
    assert manager.resolve("last") == tmp_path / "step-10000000.pt"
    assert manager.resolve(9_999_999) == manager.resolve("9999999") == tmp_path / "step-9999999.pt"
    with pytest.raises(
        CheckpointError,
        match=r"no checkpoint 'best' in .* which holds 9999999, 10000000; give last",
    ):
        manager.resolve("best")
    with pytest.raises(CheckpointError, match="no checkpoint 'newest'"):
        manager.resolve("newest")


def test_a_damaged_newest_is_passed_over_by_name(tmp_path: Path) -> None:
    notes: list[str] = []
    manager = CheckpointManager(tmp_path, report=notes.append)
    assert manager.latest() is None
    for step in (1, 2):
        manager.save(state_of(step), step, best=step == 1)
    flip_bit(manager.path(2), 500)
    assert manager.latest() == manager.path(1)
    assert len(notes) == 1
    assert "passing over step-0000002.pt" in notes[0]
    assert "content changed" in notes[0]
    manager.path(1).unlink()
    assert manager.latest() == tmp_path / "best.pt"
    (tmp_path / "best.pt").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* is intact \(step-0000002\.pt, best\.pt\)"
    ):
        manager.latest()


def test_nothing_is_deleted_before_the_new_one_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects against a disk that takes a write and returns something else."""
    manager = CheckpointManager(tmp_path, keep_last=1)
    manager.save(state_of(1), 1)
    real = checkpoint._publish

    def corrupting(temporary: Path, info: checkpoint.CheckpointInfo) -> None:
        flip_bit(temporary, 700)
        real(temporary, info)

    monkeypatch.setattr(checkpoint, "_publish", corrupting)
    with pytest.raises(CheckpointError, match=r"step-0000002\.pt is damaged"):
        manager.save(state_of(2), 2)
    assert load_checkpoint(manager.path(1))["value"] == 1


def test_a_failing_delete_is_reported_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    manager = CheckpointManager(tmp_path, keep_last=1, report=notes.append)
    manager.save(state_of(1), 1)
    real = Path.unlink

    def stuck(self: Path, missing_ok: bool = False) -> None:
        if self.name == "step-0000001.pt":
            raise PermissionError(13, "Permission denied")
        real(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stuck)
        manager.save(state_of(2), 2)
    assert len(notes) == 1
    assert "could not delete" in notes[0]
    assert "step-0000001.pt: Permission denied" in notes[0]
    assert load_checkpoint(manager.path(1))["value"] == 1
    manager.save(state_of(3), 3)
    assert names(tmp_path) == ["step-0000003.pt"]


def test_resuming_earlier_abandons_the_later_steps_and_nothing_else_does(tmp_path: Path) -> None:
    """Protects both ways: a stale future must not be `latest`, and a mistaken save must not delete another run."""
    notes: list[str] = []
    manager = CheckpointManager(tmp_path)
    for step in (100, 200):
        manager.save(state_of(step), step)
    stranger = CheckpointManager(tmp_path, report=notes.append)
    stranger.save(state_of(0), 0)
    assert names(tmp_path) == ["step-0000000.pt", "step-0000100.pt", "step-0000200.pt"]
    assert "left alone: steps [100, 200]" in notes[0]
    flip_bit(manager.path(200), 500)
    resumed = CheckpointManager(tmp_path, report=notes.append)
    assert resumed.latest() == manager.path(100)
    resumed.save(state_of(150), 150)
    assert names(tmp_path) == ["step-0000100.pt", "step-0000150.pt"]
    assert resumed.latest() == manager.path(150)


def test_a_policy_that_keeps_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"at least 1"):
        CheckpointManager(tmp_path, keep_last=0)


def test_reading_while_the_training_replaces_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects evaluating best.pt during training: the file may be replaced between opening it and reading its sidecar."""
    path = save_checkpoint(tmp_path / "best.pt", state_of(1.0)).path
    real = checkpoint._read_sidecar
    replaced = []

    def replace_first(asked: Path) -> list[checkpoint.CheckpointInfo]:
        if not replaced:
            replaced.append(True)
            save_checkpoint(path, state_of(2.0))
        return real(asked)

    monkeypatch.setattr(checkpoint, "_read_sidecar", replace_first)
    assert load_checkpoint(path)["value"] == 2.0
