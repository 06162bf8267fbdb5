"""`bench memory`: peak memory of a training step over the batch.

Peak: all memory on the device at the worst moment (batch, weights, gradients, moments,
activations), without the CUDA context. CUDA: torch's allocator over two steps after the first one,
which creates the moments and compiles. CPU: torch's profiler from the creation of the model to the
second step. CUDA graphs are off: their pools keep memory between steps. mb_per_further_image is the
slope from the previous batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks import step_models
from benchmarks.harness import Bench, attempt, forget
from benchmarks.race import first_call, peak_bytes
from benchmarks.results import Row
from benchmarks.step import add_arguments, new_row, our_dtype, providers, setups
from benchmarks.step_models import Data, Provider, Setup

__all__ = ["add_arguments", "run"]
BATCHES = {"cuda": (64, 128, 256), "cpu": (8, 16, 32)}


def run(args: argparse.Namespace, bench: Bench) -> None:
    args.model = args.model or ["ViT-B-224" if bench.device.type == "cuda" else "cpu_smoke"]
    batches = [args.batch] if args.batch else BATCHES[bench.device.type]
    dtype = our_dtype(bench.device, args.dtypes)
    for setup in setups(args, bench):
        step = setup.config.step.model_copy(update={"cuda_graphs": False})
        setup = replace(setup, config=setup.config.model_copy(update={"step": step}))
        for provider in providers(bench, setup.task, [dtype]):
            if provider.processes == 1:
                over_batches(bench, setup, provider, batches)


def over_batches(bench: Bench, setup: Setup, provider: Provider, batches: Sequence[int]) -> None:
    """Adds a row for each batch up to the first that fails."""
    smaller: tuple[int, int] | None = None
    for batch in batches:
        at = replace(setup, batch=batch)
        row = new_row(at, provider, "memory")
        label = f"{row.case} {row.shape} {row.dtype}: {row.provider}, memory"
        if bench.time_is_up(label):
            return
        with bench.console.announce(label):
            fits = attempt(row, partial(_measure, row, at, provider))
        forget(bench.device)
        if smaller and row.peak_bytes:
            further = (row.peak_bytes - smaller[1]) / (batch - smaller[0])
            row.more["mb_per_further_image"] = further / 1e6
        bench.results.add(row)
        if not fits:
            return
        smaller = (batch, row.peak_bytes or 0)


def _measure(row: Row, setup: Setup, provider: Provider) -> None:
    device, source = setup.device, step_models.initial_model(setup)
    steps = []

    def start() -> None:
        steps.append(step_models.build(provider, setup, Data(setup), source))
        row.more["how"] = steps[0].how
        row.first_call_s = first_call(steps[0], device)

    def twice() -> None:
        if not steps:  # a CPU: all from the creation of the model is counted
            start()
        steps[0]()
        steps[0]()

    before = 0
    if device.type == "cuda":
        before = -torch.cuda.memory_allocated(device)
        start()
        before += torch.cuda.memory_allocated(device)
    row.peak_bytes = before + peak_bytes(twice, device)
