"""One training step in several processes on a CPU: DistributedDataParallel over gloo.

Each process has its share of the batch and of the CPUs, to which it is pinned. Between steps the
processes wait without using a CPU, so that the step can be raced with others.
"""

from __future__ import annotations

import os
import statistics
import warnings
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import step_models
from benchmarks.step_models import Data, Provider, Setup
from sssd_fast.errors import SssdError

ANSWER_S = 600.0  # starting, compiling and one step


class Processes:
    """Like step_models.Training: a call is one step of all processes, and returns their loss."""

    def __init__(self, provider: Provider, setup: Setup) -> None:
        size = provider.processes
        threads = max(1, torch.get_num_threads() // size)
        context = get_context("spawn")
        self._folder = TemporaryDirectory(prefix="sssd-fast-bench-")
        store = Path(self._folder.name, "store").as_uri()
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        for rank in range(size):
            pipe, theirs = context.Pipe()
            given = (theirs, provider, setup, rank, threads, store)
            process = context.Process(target=_work, args=given, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._processes.append(process)
        try:
            how = str(self._answers()[0])
        except BaseException:
            self.close()
            raise
        self.how = f"{size} processes with {threads} threads each; {how}"

    def __call__(self) -> torch.Tensor:
        for pipe in self._pipes:
            pipe.send(True)
        return torch.tensor(statistics.mean(self._answers()))

    def _answers(self) -> list[Any]:
        answers = []
        for pipe in self._pipes:
            try:
                answer = pipe.recv() if pipe.poll(ANSWER_S) else TimeoutError("no answer")
            except EOFError:
                answer = RuntimeError("a process ended")
            if isinstance(answer, Exception):
                raise SssdError(f"fails in a process: {answer}")
            answers.append(answer)
        return answers

    def close(self) -> None:
        """Ends the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.join(timeout=10)
            process.kill()
        self._folder.cleanup()


def _work(
    pipe: Connection, provider: Provider, setup: Setup, rank: int, threads: int, store: str
) -> None:
    """What a process runs: an answer when it is ready, then one for each step."""
    from sssd_fast.run.device import World, keep_freed_memory

    size = provider.processes
    warnings.simplefilter("ignore", FutureWarning)  # each process would print torch's
    torch.set_num_threads(threads)
    keep_freed_memory()
    with suppress(AttributeError, OSError):  # not Linux
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cpus[rank * threads : (rank + 1) * threads] or cpus)
    try:
        limit = timedelta(seconds=ANSWER_S)
        dist.init_process_group("gloo", store, timeout=limit, rank=rank, world_size=size)
        source = step_models.initial_model(setup)
        world = World(setup.device, rank, size)
        step = step_models.build(provider, setup, Data(setup, rank, size), source, world)
        pipe.send(step.how)
        while pipe.recv():
            pipe.send(float(step()))
    except (EOFError, KeyboardInterrupt):  # closed by the other end
        pass
    except Exception as error:  # noqa: BLE001 - reported by the process that started this one
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
    finally:
        with suppress(Exception):
            dist.destroy_process_group()
