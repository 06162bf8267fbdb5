"""The run folder: what a run was asked to do, on what machine, with what data, and everything it wrote.

config.yaml  command.txt  env.json  data.json  index.json  split.csv  train.log  metrics.jsonl  metrics.csv  tensorboard/
checkpoints/  images/  eval/  report.md  report.html
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
from sssd_fast.run.device import World, pick_precision
from sssd_fast.run.environment import collect_environment
from sssd_fast.run.files import atomic_write_text
from sssd_fast.run.log import Console
from sssd_fast.run.metrics_log import Tracker

# These do not change what is computed, so a run may be resumed with other values.
FREE_KEYS = (
    "device", "threads", "tensorboard", "data.loader", "data.workers", "data.cache",
    "data.resident_gib", "step.compile", "step.cuda_graphs", "step.attention", "step.decoder_attention", "step.mlp",
    "step.activation_budget", "step.checkpoint",
)  # fmt: skip
FREE_ENDINGS = (".checkpoint_epochs", ".checkpoint_steps", ".keep_last", ".image_epochs")


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

    def write_json(self, name: str, content: Any) -> None:
        if self.world.main:
            atomic_write_text(
                self.out / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            )

    def check_resumable(self, state: dict[str, Any], path: Path) -> None:
        """Raises CheckpointError where continuing would not continue the same run."""
        problems = []
        if state["task"] != self.task:
            problems.append(
                f"it is a checkpoint of `{state['task']}`, this command is `{self.task}`"
            )
        if state["processes"] != self.world.size:
            problems.append(
                f"it was written by {state['processes']} processes, this run has {self.world.size}"
            )
        if state["data"] != self.data_fingerprint:
            problems.append(
                "the images or their split have changed since (see data.json and split.csv)"
            )
        problems += differences(from_dict(state["config"]), self.config)
        if problems:
            raise CheckpointError(
                f"{path} cannot be resumed:\n"
                + "\n".join(f"  - {p}" for p in problems)
                + "\nUndo the change, or start a new run (weights alone: --init)."
            )


def differences(old: Config, new: Config) -> list[str]:
    """One line per setting that changes what a run computes."""
    before, after = _flat(to_dict(old)), _flat(to_dict(new))
    return [
        f"{key} was {before[key]!r}, is {after[key]!r}"
        for key in before
        if before[key] != after[key] and key not in FREE_KEYS and not key.endswith(FREE_ENDINGS)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
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
) -> Iterator[Run]:
    """Makes or reopens the run folder `out`; writes what was asked for and where, before anything is computed.

    existing: use a finished run without changing what it says of itself (evaluate). resume_with: the command that continues
    this run where it is part of a larger one. command: what the user typed. Raises RunExistsError for an existing run unless
    told to resume or overwrite it.
    """
    out = Path(out)
    if existing:
        if not (out / "config.yaml").is_file():
            raise CheckpointError(
                f"{out} is no run folder (config.yaml is missing); give the folder of a finished run"
            )
    elif world.main:
        require_run_folder(out, resume=resume, overwrite=overwrite)
    world.barrier()
    if config.threads:
        torch.set_num_threads(config.threads)
    settings = getattr(config, task, None)
    with Console(log_file=out / "train.log", enabled=world.main) as console:
        run = Run(
            out=out,
            task=task,
            config=config,
            world=world,
            console=console,
            tracker=Tracker(
                out,
                tensorboard=config.tensorboard and not existing,
                enabled=world.main and not existing,
                log=console.warn,
            ),
            checkpoints=CheckpointManager(
                out / "checkpoints",
                keep_last=getattr(settings, "keep_last", 2),
                log=console.warn,
            ),
            precision=pick_precision(config.precision, world.device),
            resume=resume,
            resume_with=resume_with or f"sssd-fast {task} --resume {shlex.quote(str(out))}",
        )
        if world.main and not existing:
            atomic_write_text(out / "config.yaml", to_yaml(config))
            with open(
                out / "command.txt", "a", encoding="utf-8"
            ) as file:  # a resumed run lists every command
                file.write(command + "\n")
            run.write_json("env.json", collect_environment(out))
        try:
            yield run
        finally:
            run.tracker.close()


RUN_MARKER = ".sssd-fast-run"


_MARKER_TEXT = "This is a run folder of sssd-fast. With --overwrite, everything in this folder may be deleted.\n"


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
        raise ConfigError(
            "--resume and --overwrite exclude each other: continue the run, or delete it and start again"
        )
    if path.exists() and not path.is_dir():
        raise RunExistsError(f"{path} is a file; choose another folder for the run")
    if resume and not marker.is_file():
        what = "is not a run folder" if path.exists() else "does not exist"
        raise CheckpointError(
            f"cannot resume: {path} {what}. Check the path, or start a new run without --resume"
        )
    if path.is_dir() and any(item.name != RUN_MARKER for item in path.iterdir()) and not resume:
        if not marker.is_file():
            raise RunExistsError(
                f"{path} is not empty and not a run folder of sssd-fast (it lacks {RUN_MARKER}), so nothing in it was "
                "touched. Choose another folder"
            )
        if not any((path / "checkpoints").glob("*.pt")):
            overwrite = (
                True  # it failed before it trained anything: nothing is lost by starting again
            )
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
    _held[marker] = (
        descriptor  # closing it, or any other descriptor of the file, would drop the lock
    )


def _empty(path: Path) -> None:
    """Deletes everything in a run folder but its marker, so that an interrupted deletion can be taken up again."""
    working = Path.cwd()
    if path.resolve() in (working, *working.parents, Path.home()):
        raise RunExistsError(
            f"refusing to empty {path}: it contains the working directory or is your home"
        )
    for item in path.iterdir():
        if item.name == RUN_MARKER:
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()
