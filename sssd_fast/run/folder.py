"""The run folder: settings, machine and data of a run, and everything it writes.

config.yaml  command.txt  env.json  data.json  index.json  split.csv  train.log  metrics.jsonl
tensorboard/  checkpoints/  images/  eval/  report.md  report.html
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sssd_fast.config import Config, from_dict, to_dict, to_yaml
from sssd_fast.errors import CheckpointError, ConfigError, RunExistsError
from sssd_fast.run.checkpoint import CheckpointManager
from sssd_fast.run.device import World, keep_freed_memory, pick_precision
from sssd_fast.run.environment import collect_environment
from sssd_fast.run.files import atomic_write_bytes, atomic_write_text
from sssd_fast.run.log import Console
from sssd_fast.run.metrics_log import Tracker

# Settings that do not change what is computed: a run can be resumed with other values. So can all
# of the section step but two.
# The fingerprint of the images covers their folders.
FREE = (
    "device threads processes tensorboard logger data.loader data.workers data.cache "
    "data.resident_gib data.source pretrain.extra"
)
FREE_ENDINGS = (".checkpoint_epochs", ".checkpoint_steps", ".keep_last", ".image_epochs")
FIXED = ("step.residual", "step.optimizer")
RUN_MARKER = ".sssd-fast-run"
_MARKER_TEXT = b"A run folder of sssd-fast. With --overwrite, everything in it may be deleted.\n"
# Subfolders of a run folder that is overwritten: what is moved out or back, what is out until the
# new run is accepted, and what is deleted then. Each change of state is one rename: a process
# can be killed at any time.
MOVING, REPLACED, DISCARDED = ".moving", ".replaced", ".discarded"
# descriptors of the markers that this process has locked
_held: list[int] = []


@dataclass
class Run:
    """One open run folder; what the loop and the tasks write to."""

    out: Path
    task: str
    config: Config
    world: World
    console: Console
    tracker: Tracker
    checkpoints: CheckpointManager
    precision: str
    resume: bool = False
    resume_with: str = ""
    data_fingerprint: str = ""
    data_summary: str = ""
    train_images: int = 0
    command: str = ""
    top: Path | None = None
    position: str = ""  # "stage 1 of 2"
    later: tuple[str, ...] = ()  # stages after this one
    accepted: bool = False

    @property
    def title(self) -> str:
        """Such as "pretrain (stage 1 of 2)"."""
        return f"{self.task} ({self.position})" if self.position else self.task

    def describe(self) -> None:
        """Writes settings, command and environment, and starts train.log."""
        self.console.hold_log = False
        if not self.world.main:
            return
        atomic_write_text(self.out / "config.yaml", to_yaml(self.config))
        # a resumed run lists every command
        with open(self.out / "command.txt", "a", encoding="utf-8") as file:
            file.write(self.command + "\n")
        self.write_json("env.json", collect_environment(self.out))

    def accept(self) -> None:
        """Call it when settings, data and weights are loaded: deletes what the run replaces.

        If an error ends the command earlier, the replaced run is restored.
        """
        self.accepted = True
        if not self.world.main:
            return
        if (self.out / REPLACED).is_dir():
            (self.out / REPLACED).rename(self.out / DISCARDED)
        shutil.rmtree(self.out / DISCARDED, ignore_errors=True)
        if self.top is not None:
            atomic_write_text(self.top / "config.yaml", to_yaml(self.config))

    def local_batch(self, batch_size: int) -> int:
        """Images of a batch that this process computes."""
        return batch_size // self.world.share

    def write_json(self, name: str, content: Any) -> None:
        if self.world.main:
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            # bytes of a file name that are not UTF-8 are escaped as JSON does it
            atomic_write_bytes(self.out / name, text.encode("utf-8", "backslashreplace"))

    def check_resumable(self, state: dict[str, Any], path: Path) -> None:
        """Describes the resumed run in its folder, which is unchanged until then.

        Raises CheckpointError if the checkpoint `state` is of another run than this one.
        """
        problems = []
        if state["task"] != self.task:
            problems.append(f"it is a checkpoint of `{state['task']}`, not of `{self.task}`")
        if state["processes"] != self.world.replicas:
            wrote = f"it was written by {state['processes']} processes with a batch each"
            problems.append(f"{wrote}, this run has {self.world.replicas}")
        if state["data"] != self.data_fingerprint:
            problems.append("the images or their split changed (see data.json and split.csv)")
        problems += differences(from_dict(state["config"]), self.config)
        if problems:
            listed = "".join(f"  - {problem}\n" for problem in problems)
            advice = "Undo the change, or start a new run (weights alone: --init)."
            raise CheckpointError(f"{path} cannot be resumed:\n{listed}{advice}")
        self.describe()


def differences(old: Config, new: Config, *, evaluation: bool = False) -> list[str]:
    """One line per setting that changes what training computes, with `evaluation` also results."""
    before, after = _flat(to_dict(old)), _flat(to_dict(new))
    sections = ("step.",) if evaluation else ("step.", "evaluate.")
    free = [key for key in before if key.startswith(sections) and key not in FIXED] + FREE.split()
    return [
        f"{key} was {before[key]!r}, is {after[key]!r}"
        for key in before
        if before[key] != after[key] and key not in free and not key.endswith(FREE_ENDINGS)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


@contextmanager
def open_run(
    task: str,
    config: Config,
    out: str | Path,
    world: World,
    *,
    resume: bool = False,
    overwrite: bool = False,
    existing: bool = False,
    resume_with: str | None = None,
    command: str = "",
    top: Path | None = None,
    position: str = "",
    later: tuple[str, ...] = (),
) -> Iterator[Run]:
    """Makes or reopens the run folder `out`; writes settings and environment before the work.

    A resumed training writes them, and its log, once `Run.check_resumable` has accepted it.

    Args:
        existing: use a finished run without changing its description (evaluate).
        resume_with: the command that continues this run, if not that of `task`.
        top: a folder above `out` that gets a copy of config.yaml.
        position, later: of this stage among all, for the terminal; see Run.
    """
    out = Path(out)
    if existing and not (out / "config.yaml").is_file():
        raise CheckpointError(f"{out} is not the folder of a run: config.yaml is missing")
    if not existing:
        flags = {"resume": resume, "overwrite": overwrite}
        world.on_main(lambda: require_run_folder(out, **flags))
    if config.threads:
        torch.set_num_threads(max(1, config.threads // world.share))
    if world.device.type == "cpu":
        keep_freed_memory()
    keep_last = getattr(getattr(config, task, None), "keep_last", 2)
    writes = world.main and not existing
    unchecked = resume and task in ("pretrain", "finetune")
    with Console(log_file=out / "train.log", enabled=world.main) as console:
        console.hold_log = unchecked
        run = Run(
            out=out,
            task=task,
            config=config,
            world=world,
            console=console,
            tracker=Tracker(
                out,
                tensorboard=config.tensorboard,
                logger=config.logger,
                settings=_flat(to_dict(config)),
                enabled=writes,
                log=console.warn,
            ),
            checkpoints=CheckpointManager(out / "checkpoints", keep_last, log=console.warn),
            precision=pick_precision(config.precision, world.device),
            resume=resume,
            resume_with=resume_with or f"sssd-fast {task} --resume {shlex.quote(str(out))}",
            command=command,
            top=top,
            position=position,
            later=later,
        )
        if not (existing or unchecked):
            run.describe()
        try:
            yield run
        finally:
            run.tracker.close()
            if writes and not run.accepted:
                _restore_replaced(out)


def require_run_folder(path: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Makes a new run folder, or reopens an old one (resume), or moves its content to REPLACED
    (overwrite).

    Nothing is moved in a folder without the marker file. A run that ended before its first
    checkpoint can be started again without `overwrite`. The marker is locked until the process
    ends, so that two processes cannot write to one run. Call it on rank 0.

    Raises RunExistsError if the folder holds a run and neither flag was given, is not a run folder,
    or is in use; CheckpointError if there is nothing to resume; ConfigError for both flags.
    """
    path = Path(path).absolute()
    marker = path / RUN_MARKER
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; give one of them")
    if marker.is_file():
        _hold(marker)
        # left by a process that was killed
        _restore_replaced(path)
    if path.exists() and not path.is_dir():
        raise RunExistsError(f"{path} is a file; choose another folder for the run")
    if resume and not marker.is_file():
        what = "is not a run folder" if path.exists() else "does not exist"
        raise CheckpointError(f"cannot resume: {path} {what}; start a new run without --resume")
    if path.is_dir() and any(item.name != RUN_MARKER for item in path.iterdir()) and not resume:
        if not marker.is_file():
            what = f"not empty and not a run folder of sssd-fast (it lacks {RUN_MARKER})"
            raise RunExistsError(f"{path} is {what}; choose another folder")
        # without a checkpoint, nothing is lost by starting again
        overwrite = overwrite or not any((path / "checkpoints").glob("*.pt"))
        if not overwrite:
            raise RunExistsError(
                f"{path} already holds a run. Continue it with --resume, delete it and start again "
                "with --overwrite, or choose another folder"
            )
    if not marker.is_file():
        path.mkdir(parents=True, exist_ok=True)
        _hold(marker)
    if overwrite:
        _set_aside(path)
    return path


def _hold(marker: Path) -> None:
    """Writes the marker and locks it while this process lives.

    A record lock, not flock: forked workers that outlive a killed parent by seconds do not inherit
    it, so that the run can be resumed at once.
    """
    # stays open: closing any descriptor of the file would drop the lock
    descriptor = os.open(marker, os.O_RDWR | os.O_CREAT, 0o666)
    _held.append(descriptor)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        problem = f"another process is writing to the run in {marker.parent}"
        raise RunExistsError(f"{problem}; wait for it, or choose another folder") from error
    except OSError:
        # a file system without locks
        pass
    if os.fstat(descriptor).st_size == 0:
        os.write(descriptor, _MARKER_TEXT)


def _set_aside(path: Path) -> None:
    """Moves everything but the marker into the subfolder REPLACED."""
    working = Path.cwd()
    if path.resolve() in (working, *working.parents, Path.home()):
        raise RunExistsError(f"cannot empty {path}: it holds the working directory or is your home")
    items = [item for item in path.iterdir() if item.name not in (RUN_MARKER, DISCARDED)]
    if not items:
        return
    (path / MOVING).mkdir()
    for item in items:
        item.rename(path / MOVING / item.name)
    (path / MOVING).rename(path / REPLACED)


def _restore_replaced(path: Path) -> None:
    """Moves a replaced run back; what was written instead of it is deleted."""
    if (path / REPLACED).is_dir():
        for item in path.iterdir():
            if item.name in (RUN_MARKER, REPLACED, DISCARDED):
                continue
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            else:
                item.unlink()
        (path / REPLACED).rename(path / MOVING)
    if (path / MOVING).is_dir():
        for item in (path / MOVING).iterdir():
            item.rename(path / item.name)
        (path / MOVING).rmdir()
    shutil.rmtree(path / DISCARDED, ignore_errors=True)
