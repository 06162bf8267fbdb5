"""`bench memory`: peak memory of a training step over the batch.

Peak: all memory on the device at the worst moment of a step (batch, weights, gradients, moments,
activations), without the CUDA context. CUDA: torch's allocator over two steps after the first one,
which creates the moments and compiles. CPU: weights, moments and batch by size, plus the peak of
the second step by torch's profiler. CUDA graphs are off: their pools keep memory between steps.
mb_per_further_image is the slope from the previous batch. `sssd-fast plan` and batch=auto find the
largest batch that fits.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial

import torch

from benchmarks import step_models
from benchmarks.harness import Bench, attempt, forget
from benchmarks.race import first_call, peak_bytes
from benchmarks.results import NAMES, Row
from benchmarks.step import add_arguments, gate, new_row, providers, setups
from benchmarks.step_models import Data, Setup

__all__ = ["add_arguments", "run"]
BATCHES = {"cuda": (64, 128, 256), "cpu": (8, 16, 32)}


def run(args: argparse.Namespace, bench: Bench) -> None:
    batches = sorted(args.batch or BATCHES[bench.device.type])
    for setup in setups(args, bench):
        setup = replace(setup, step={"cuda_graphs": False})
        for name in providers(bench, setup.task):
            over_batches(bench, setup, name, batches[:2] if bench.quick else batches)


def over_batches(bench: Bench, setup: Setup, name: str, batches: list[int]) -> None:
    """Adds a row for each batch up to the first that fails; the first one checks the loss."""
    smaller: tuple[int, int] | None = None
    for batch in batches:
        at = replace(setup, batch=batch)
        label = f"{setup.task} {at.shape} {NAMES[setup.dtype]}: {name}, memory"
        if bench.time_is_up(label):
            continue
        row = new_row(at, setup.task, name, "memory")
        with bench.console.announce(label):
            attempt(row, partial(_measure, row, at, name, check=smaller is None))
        forget(bench.device)
        if row.peak_bytes is not None:
            row.more["mb_per_image"] = row.peak_bytes / batch / 1e6
            if smaller:
                further = (row.peak_bytes - smaller[1]) / (batch - smaller[0])
                row.more["mb_per_further_image"] = further / 1e6
            smaller = (batch, row.peak_bytes)
        bench.results.add(row)
        if row.reason is not None:
            break


def _measure(row: Row, setup: Setup, name: str, *, check: bool) -> None:
    """Sets the row's peak; with `check` only if the first loss is that of the reference."""
    device = setup.device
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    data, source = Data(setup), step_models.initial_model(setup.config)
    step = step_models.build(name, setup, data, source)
    row.more["how"] = step.how
    losses: list[torch.Tensor] = []
    row.first_call_s = first_call(lambda: losses.append(step()), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        step()
        torch.cuda.synchronize(device)
        peak = int(torch.cuda.max_memory_allocated(device)) - before
    else:
        peak = peak_bytes(step, device) + step.held_bytes() + data.bytes()
    if check:
        reference = step_models.reference_losses(setup, Data(setup), source, 1)
        gate(row, [float(losses[0])], reference)
    if row.reason is None:
        row.peak_bytes = peak
