"""The run folder: what a run was asked to do, on what machine, with what data, and everything it wrote.

config.yaml  command.txt  env.json  data.json  index.json  split.csv  train.log  metrics.jsonl  metrics.csv  tensorboard/
checkpoints/  images/  eval/  report.md  report.html
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import CheckpointManager, atomic_write_text
from .config import Config, from_dict, to_dict, to_yaml
from .console import Console
from .distributed import World
from .doctor import collect_environment
from .errors import CheckpointError
from .guards import require_run_folder
from .step import pick_precision
from .tracking import Tracker

# These do not change what is computed, so a run may be resumed with other values.
FREE_KEYS = (
    "device", "threads", "log_seconds", "tensorboard", "data.loader", "data.workers", "data.cache",
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
            atomic_write_text(self.out / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def check_resumable(self, state: dict[str, Any], path: Path) -> None:
        """Raises CheckpointError where continuing would not continue the same run."""
        problems = []
        if state["task"] != self.task:
            problems.append(f"it is a checkpoint of `{state['task']}`, this command is `{self.task}`")
        if state["processes"] != self.world.size:
            problems.append(f"it was written by {state['processes']} processes, this run has {self.world.size}")
        if state["data"] != self.data_fingerprint:
            problems.append("the images or their split have changed since (see data.json and split.csv)")
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
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
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
            raise CheckpointError(f"{out} is no run folder (config.yaml is missing); give the folder of a finished run")
    elif world.main:
        require_run_folder(out, resume=resume, overwrite=overwrite)
    world.barrier()
    if config.threads:
        torch.set_num_threads(config.threads)
    settings = getattr(config, task, None)
    with Console(log_file=out / "train.log", enabled=world.main, interval=config.log_seconds) as console:
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
                notify=console.warn,
            ),
            checkpoints=CheckpointManager(
                out / "checkpoints", keep_last=getattr(settings, "keep_last", 2), report=console.warn
            ),
            precision=pick_precision(config.precision, world.device),
            resume=resume,
            resume_with=resume_with or f"sssd-fast {task} --resume {shlex.quote(str(out))}",
        )
        if world.main and not existing:
            atomic_write_text(out / "config.yaml", to_yaml(config))
            with open(out / "command.txt", "a", encoding="utf-8") as file:  # a resumed run lists every command
                file.write(command + "\n")
            run.write_json("env.json", collect_environment(out))
        try:
            yield run
        finally:
            run.tracker.close()
