"""What may happen to a run folder that exists."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sssd_fast.errors import CheckpointError, ConfigError, RunExistsError
from sssd_fast.run.folder import RUN_MARKER, require_run_folder


def test_run_folder_is_made_and_marked(tmp_path: Path) -> None:
    path = require_run_folder(tmp_path / "runs" / "a")
    assert path == tmp_path / "runs" / "a"
    assert "--overwrite" in (path / RUN_MARKER).read_text()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert require_run_folder(empty) == empty
    # nothing but the marker: a run that failed before it began
    assert require_run_folder(path) == path
    # deleted by hand: made again, with another lock
    (path / RUN_MARKER).unlink()
    path.rmdir()
    require_run_folder(path)
    assert (path / RUN_MARKER).stat().st_size > 0


def test_existing_run_is_an_error_that_names_both_flags(tmp_path: Path) -> None:
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
def test_other_folder_is_never_changed(tmp_path: Path, flags: dict[str, bool]) -> None:
    """Protects a user who gives their data folder as the run folder, even with --overwrite."""
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunExistsError, match="not a run folder of sssd-fast"):
        require_run_folder(tmp_path, **flags)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RunExistsError, match="is a file"):
        require_run_folder(tmp_path / "thesis.tex", **flags)
    with pytest.raises(CheckpointError, match="is not a run folder"):
        require_run_folder(tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"cannot resume: .*nothing does not exist"):
        require_run_folder(tmp_path / "nothing", resume=True)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


def test_overwrite_rejects_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (require_run_folder(tmp_path / "a") / "notes").mkdir()
    monkeypatch.chdir(tmp_path / "a" / "notes")
    with pytest.raises(RunExistsError, match="working directory"):
        require_run_folder(tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "notes").is_dir()


HOLDER = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
from sssd_fast.run.folder import require_run_folder
require_run_folder(sys.argv[1])
if os.fork():
    print("held", flush=True)
time.sleep(60)
"""


def test_run_folder_has_one_writer_and_is_free_at_once_after_a_kill(tmp_path: Path) -> None:
    """Protects metrics and checkpoints from two writers; an orphaned loader worker must not
    block the resume.
    """
    root = str(Path(__file__).parents[3])
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "a"), root]
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdout=pipe, text=True, start_new_session=True)
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
