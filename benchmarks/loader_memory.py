"""Resident memory of a loader over many epochs, each provider in a process of its own, so that none inherits another's heap.

    sssd-fast bench loader DATA --memory [--epochs-flat 50]

What is read after each epoch: VmRSS of the process, with that of its loader workers added (pages that they share count in
each). The peak is VmHWM, added up alike. Figures are MiB (2**20 bytes) and hold Python, torch and the data index too, which
stand in the table as what was there before the loader. Linux only; memory of a GPU is not seen.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.loader_pixels import loader_of
from sssd_fast.config import AugmentConfig
from sssd_fast.data.index import DataIndex
from sssd_fast.errors import SssdError

SHOWN = (1, 5, 10, 25, 50)  # epochs in the table
SETTLED = 10  # epochs after which memory should grow no more, but for
GROWTH, GROWTH_MIB = 0.05, 16.0  # whichever is more


@dataclass
class Memory:
    """MiB: before the loader was made, after each epoch, and at most."""

    before: float | None = None
    epochs: list[float] = field(default_factory=list)
    peak: float | None = None
    reason: str | None = None  # why there is nothing

    @property
    def flat(self) -> bool | None:
        return is_flat(self.epochs)


def is_flat(after_epoch_mib: Sequence[float]) -> bool | None:
    """Whether the last epoch ends below 5 % or 16 MiB more than the tenth; None where there are no more than ten."""
    if len(after_epoch_mib) <= SETTLED:
        return None
    settled = after_epoch_mib[SETTLED - 1]
    return after_epoch_mib[-1] - settled < max(GROWTH * settled, GROWTH_MIB)


def watch(index: DataIndex, epochs: int, arguments: dict[str, Any]) -> Memory:
    """Runs `epochs` epochs of pre-training crops in this process. arguments: of build_loader."""
    memory = Memory(before=_mib("VmRSS"))
    try:
        loader = loader_of(index, AugmentConfig(), arguments)
    except SssdError as error:
        return Memory(reason=str(error))
    for epoch in range(epochs):
        for batch in loader.epoch(epoch):
            batch.images[:, 0, 0, 0].sum().item()
        memory.epochs.append(_mib("VmRSS"))
    memory.peak = _mib("VmHWM")
    loader.close()
    return memory


def watch_apart(index: DataIndex, epochs: int, threads: int, arguments: dict[str, Any]) -> Memory:
    """`watch` in a new process, where torch has `threads` threads. A process that dies gives its last words as the reason."""
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder, "index.json")
        index.save(saved)
        task = json.dumps(
            {"index": str(saved), "epochs": epochs, "threads": threads, "arguments": arguments}
        )
        command = [sys.executable, "-m", "benchmarks.loader_memory"]
        done = subprocess.run(
            command,
            input=task,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        return Memory(
            reason=(done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        )
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def _mib(name: str) -> float:
    """A line of /proc/PID/status, over this process and its loader workers."""
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    kib = 0
    for process in processes:
        found = re.search(
            rf"^{name}:\s*(\d+) kB$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE
        )
        if found is None:
            raise OSError(
                f"/proc/{process}/status has no line {name}: the process ended, or this is not Linux"
            )
        kib += int(found.group(1))
    return kib / 1024


def main() -> None:
    """The process that `watch_apart` starts: a task on standard input, a Memory on standard output."""
    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    memory = watch(DataIndex.load(task["index"]), task["epochs"], task["arguments"])
    print(
        json.dumps({name: getattr(memory, name) for name in ("before", "epochs", "peak", "reason")})
    )


if __name__ == "__main__":
    main()
