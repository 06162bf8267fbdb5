"""One process per CPU core: the command starts itself several times with torch's elastic launcher.

On cores of their own, two processes with one thread each are faster than one process with two
threads: the short operations between the matrix products do not split over threads. Virtual cores
that are two threads of one core gain nothing. The processes share each batch (`World.share`), so
that learning rate, masks and image order are those of one process.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from mae_kernels import cpu_bf16_units
from sssd_fast.config import Config
from sssd_fast.errors import ConfigError
from sssd_fast.run.device import SHARED_BATCH, pick_device

LEAST_GAIN = 0.75  # of the ideal
MIN_IMAGES = 4  # of a batch per process: below, the cost per call outweighs the gain


def cpu_threads(config: Config) -> int:
    """CPU threads of a run, all processes together."""
    return config.threads or torch.get_num_threads()


def pick_processes(config: Config, stages: Sequence[str]) -> tuple[int, str]:
    """(number of processes that share each batch, why).

    stages: the sections of the settings that this command trains. The number is the largest that
    divides every batch and is at most the number of cores. Raises ConfigError for a number that
    does not divide a batch.
    """
    wanted = config.processes
    sizes = [getattr(config, stage).batch_size for stage in stages]
    listed = " and ".join(f"{stage}.batch_size {n}" for stage, n in zip(stages, sizes, strict=True))
    if wanted != "auto":
        if any(size % wanted for size in sizes):
            raise ConfigError(f"processes is {wanted}, which does not divide {listed}")
        return wanted, f"processes is {wanted}"
    if pick_device(config.device).type != "cpu":
        return 1, "a GPU needs one process"
    if any(getattr(config, stage).batch == "auto" for stage in stages):
        return 1, "the batch size is chosen for one process"
    cores = cpu_threads(config)
    able = [
        n
        for n in range(1, cores + 1)
        if all(size % n == 0 and size // n >= MIN_IMAGES for size in sizes)
    ]
    count = able[-1]
    if count == 1:
        return 1, "one core" if cores == 1 else f"{listed} cannot be divided over {cores} cores"
    gain = parallel_gain(count)
    measured = f"{count} threads at once compute {gain:.1f} times as much as one (measured)"
    if gain < LEAST_GAIN * count:
        return 1, f"{measured}: these cores share their units"
    return count, f"{measured}, and short operations do not split over threads"


def parallel_gain(threads: int) -> float:
    """How much more `threads` independent threads compute than one, by matrix products on this
    machine for about half a second: `threads` on independent cores, 1 on one core.
    """
    a = torch.randn(512, 512).to(torch.bfloat16 if cpu_bf16_units() else torch.float32)
    before = torch.get_num_threads()
    products = 1

    def work(_: int) -> None:
        torch.set_num_threads(1)  # of the calling thread
        for _ in range(products):
            torch.mm(a, a)

    def seconds(pool: ThreadPoolExecutor, count: int) -> float:
        start = time.perf_counter()
        list(pool.map(work, range(count)))
        return time.perf_counter() - start

    with ThreadPoolExecutor(threads) as pool:
        seconds(pool, threads)
        products = max(1, int(0.02 / seconds(pool, 1)))
        rounds = [(seconds(pool, 1), seconds(pool, threads)) for _ in range(9)]
    torch.set_num_threads(before)
    one, all_at_once = (statistics.median(times) for times in zip(*rounds, strict=True))
    return threads * one / all_at_once


def launch(words: Sequence[str], processes: int, threads: int) -> int:
    """Runs `python -m sssd_fast WORDS` in so many processes with `threads` threads each.

    Returns the exit code of the process that failed first, 0 if all succeeded. The first process
    writes to the terminal; of the others only the error that stopped the run is shown.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # the launcher logs each signal and each failed process, which this command reports itself
    # (the second logger sets its own level)
    for name in ("", ".agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic{name}").setLevel(logging.CRITICAL)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ[SHARED_BATCH] = "1"
    if sys.platform == "linux":  # gloo looks the host's name up, which not every machine resolves
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory(prefix="sssd-fast-") as folder:
        quiet = dict.fromkeys(range(1, processes), Std.ALL)
        launcher = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.2,
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=quiet),
        )
        # recorded in config.yaml, so that a resumed run has as many
        command = "-m", "sssd_fast", *words, f"processes={processes}"
        try:
            elastic_launch(launcher, sys.executable)(*command)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if rank != 0:
                _show(Path(folder), rank)
            return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        except SignalException as stopped:
            return 128 + int(stopped.sigval)
    return 0


def _show(folder: Path, rank: int) -> None:
    """Prints what process `rank` wrote to stderr."""
    for path in folder.glob(f"**/{rank}/stderr.log"):
        print(path.read_text(encoding="utf-8", errors="replace").strip(), file=sys.stderr)
