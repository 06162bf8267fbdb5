"""What may happen to a run folder that exists."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sssd_fast.cli import main
from sssd_fast.config import Config
from sssd_fast.errors import CheckpointError, ConfigError, RunExistsError
from sssd_fast.run.device import World
from sssd_fast.run.folder import REPLACED, RUN_MARKER, open_run, require_run_folder
from tests.sssd_fast.conftest import TINY


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
    assert {item.name for item in path.iterdir()} == {RUN_MARKER, REPLACED}
    shutil.rmtree(path / REPLACED)
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "step-0000001.pt").write_bytes(b"x")
    (path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(RunExistsError, match=r"already holds a run\. .*--resume.*--overwrite"):
        require_run_folder(path)
    assert require_run_folder(path, resume=True) == path
    assert (path / "metrics.jsonl").read_text() == "{}\n"
    with pytest.raises(ConfigError, match="exclude each other"):
        require_run_folder(path, resume=True, overwrite=True)


def test_overwrite_moves_a_run_without_following_links_until_it_is_accepted(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "scan.png").write_bytes(b"precious")
    path = require_run_folder(tmp_path / "a")
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "best.pt").write_bytes(b"x")
    (path / "images").symlink_to(data, target_is_directory=True)
    (path / "one").symlink_to(data / "scan.png")
    before = tree(path)
    require_run_folder(path, overwrite=True)
    assert {item.name for item in path.iterdir()} == {RUN_MARKER, REPLACED}
    (path / "train.log").write_text("of a command that is killed before the run is accepted")
    with pytest.raises(RunExistsError, match="already holds a run"):
        require_run_folder(path)
    assert tree(path) == before
    with open_run("pretrain", Config(), path, World(torch.device("cpu")), overwrite=True) as run:
        run.accept()
    assert not (path / REPLACED).exists()
    assert not (path / "checkpoints").exists()
    assert (data / "scan.png").read_bytes() == b"precious"


@pytest.mark.parametrize("renames", range(7))
def test_kill_while_a_run_is_replaced_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Killed after so many renames: while the old run is moved out, or moved back."""
    path = require_run_folder(tmp_path / "a")
    for name in ("checkpoints", "eval"):
        (path / name).mkdir()
        (path / name / "step-0000001.pt").write_bytes(b"x")
    before = tree(path)
    real, done = Path.rename, 0

    def rename(item: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done > renames:
            raise KeyboardInterrupt
        return real(item, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with contextlib.suppress(KeyboardInterrupt):
            require_run_folder(path, overwrite=True)
            (path / "train.log").write_text("new")
            require_run_folder(path, resume=True)
    assert require_run_folder(path, resume=True) == path
    assert tree(path) == before


def test_accepted_run_is_kept_if_the_old_one_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = require_run_folder(tmp_path / "a")
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "step-0000001.pt").write_bytes(b"old")
    with open_run("pretrain", Config(), path, World(torch.device("cpu")), overwrite=True) as run:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *args, **options: None)
            run.accept()
        (path / "new").write_text("new")
    assert require_run_folder(path, resume=True) == path
    assert (path / "new").read_text() == "new"
    assert not (path / "checkpoints").exists()


REFUSED = {
    "resume": "finetune --resume RUN finetune.batch_size=4",
    "resume data": "finetune --resume RUN data.source=/nowhere",
    "resume extra": "pretrain --resume PRE pretrain.extra=DATA",
    "overwrite data": "finetune --out RUN --overwrite data.source=/nowhere",
    "overwrite weights": "finetune --out RUN --overwrite --init /nowhere.pth data.source=DATA",
    "overwrite settings": "run --out TOP --overwrite data.source=DATA finetune.warmup_epochs=99",
    "overwrite split": "run --out TOP --overwrite data.source=DATA data.split=patient",
    "exists": "finetune --out RUN data.source=DATA",
    "resume probe": "probe --resume RUN --init PRE",
    "evaluate": "evaluate RUN data.source=/nowhere",
}


@pytest.mark.parametrize("command", REFUSED.values(), ids=REFUSED)
def test_refused_command_leaves_every_file_as_it_was(
    command: str, trained: Path, slices: Path, tmp_path: Path
) -> None:
    top = tmp_path / "run"
    shutil.copytree(trained, top)
    before = tree(top)
    names = {"TOP": top, "RUN": top / "finetune", "PRE": top / "pretrain", "DATA": slices}
    words = [str(names.get(w, w)).replace("=DATA", f"={slices}") for w in command.split()]
    tiny = TINY if "--out" in words else []
    assert main([words[0], *tiny, *words[1:]]) == 2
    assert tree(top) == before


def test_moved_data_are_named_by_a_setting_and_compared(
    trained: Path, slices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, new = tmp_path / "run", tmp_path / "new"
    shutil.copytree(trained / "finetune", run)
    shutil.copytree(slices, new)
    gone = str(tmp_path / "gone")
    for name in ("config.yaml", "index.json"):
        text = (run / name).read_text()
        assert str(slices) in text
        (run / name).write_text(text.replace(str(slices), gone))
    assert main(["evaluate", str(run)]) == 2
    advice = capsys.readouterr().err
    assert gone in advice
    assert "data.source=DIR" in advice
    assert main(["evaluate", str(run), f"data.source={new}"]) == 0
    results = [
        json.loads((f / "eval/test/metrics.json").read_text()) for f in (run, trained / "finetune")
    ]
    assert results[0]["image"] == results[1]["image"]
    assert main(["finetune", "--resume", str(run), f"data.source={new}"]) == 0
    # recorded: no setting is needed now
    assert main(["evaluate", str(run)]) == 0
    changed = next(new.rglob("*.png"))
    changed.write_bytes(changed.read_bytes() + b"x")
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 2
    assert f"{changed.relative_to(new)}: another content" in capsys.readouterr().err


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


def tree(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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
