"""`bench memory`: peak memory of a training step over the batch, and the largest batch under a cap.

Peak: all memory on the device at the worst moment of a step (batch, weights, gradients, moments,
activations), without the CUDA context. CUDA: torch's allocator over two steps after the first one,
which creates the moments and compiles. CPU: weights, moments and batch by size, plus the peak of
the second step by torch's profiler. CUDA graphs are off: their pools keep memory between steps.
mb_per_further_image is the slope from the previous batch.

Largest batch: torch's allocator is limited to the cap (in 1e9 bytes) minus the CUDA context.
Peaks are linear in the batch, so the two largest measured ones give a first guess; then real
steps under the cap decide, reducing the batch by 4 % until they run. A reported batch did run; a
larger one may run, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import step_models
from benchmarks.harness import Bench, attempt, forget
from benchmarks.race import first_call, peak_bytes, race, summary
from benchmarks.results import NAMES, Row
from benchmarks.step import add_model_arguments, gate, new_row, providers, setups
from benchmarks.step_models import Data, Setup

BATCHES = {"cuda": (64, 128, 256), "cpu": (8, 16, 32)}
CAPS_GB = (8, 12, 16, 24)
MULTIPLE, SMALLER = 8, 0.96
RATE_SAMPLES = 10  # steps for the images per second of a largest batch

Point = tuple[int, int]  # images, peak bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    caps = "memory limits to emulate (default: 8 12 16 24; none: --cap alone)"
    parser.add_argument("--cap", type=float, nargs="*", metavar="GB", help=caps)


def run(args: argparse.Namespace, bench: Bench) -> None:
    batches = sorted(args.batch or BATCHES["cuda" if bench.device.type == "cuda" else "cpu"])
    caps = list(CAPS_GB if args.cap is None else args.cap)
    if bench.quick:
        batches, caps = batches[:2], caps[:1]
    if bench.device.type != "cuda":
        caps = []  # torch can limit the memory of CUDA devices only
    for setup, _ in setups(args, bench):
        setup = replace(setup, step={"cuda_graphs": False})
        for name in providers(bench, setup.task):
            points = over_batches(bench, setup, name, batches)
            for cap in caps:
                if not bench.time_is_up(f"largest batch {setup.task}, {name}, {cap:g} GB"):
                    under_cap(bench, setup, name, points, cap)


def over_batches(bench: Bench, setup: Setup, name: str, batches: list[int]) -> list[Point]:
    """Adds a row for each batch up to the first that fails; returns the measured peaks."""
    points: list[Point] = []
    for batch in batches:
        at = replace(setup, batch=batch)
        label = f"{setup.task} {at.shape} {NAMES[setup.dtype]}: {name}, memory"
        if bench.time_is_up(label):
            continue
        row = new_row(at, setup.task, name, "memory")
        with bench.console.announce(label):
            attempt(row, partial(_measure, row, at, name, check=not points))
        forget(bench.device)
        if row.peak_bytes is not None:
            row.more["mb_per_image"] = row.peak_bytes / batch / 1e6
            if points:
                fewer, less = points[-1]
                row.more["mb_per_further_image"] = (row.peak_bytes - less) / (batch - fewer) / 1e6
            points.append((batch, row.peak_bytes))
        bench.results.add(row)
        if row.reason is not None:
            break
    return points


def _measure(row: Row, setup: Setup, name: str, *, check: bool) -> None:
    """Sets the row's peak; with `check` only if the first loss is that of the reference."""
    device, losses = setup.device, list[Tensor]()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    data, source = Data(setup), step_models.initial_model(setup.config)
    step = step_models.build(name, setup, data, source)
    row.more["how"] = step.how
    row.first_call_s = first_call(lambda: losses.append(step()), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step(), step()
        torch.cuda.synchronize(device)
        peak = int(torch.cuda.max_memory_allocated(device)) - before
    else:
        peak = peak_bytes(step, device) + step_models.held_bytes(step) + data.bytes()
    if check:
        reference = step_models.reference_losses(setup, Data(setup), source, 1)
        gate(row, [float(losses[0])], reference)
    if row.reason is None:
        row.peak_bytes = peak


def under_cap(bench: Bench, setup: Setup, name: str, points: list[Point], cap_gb: float) -> None:
    """Adds the row of one provider and cap; its shape has no batch, which is the result."""
    from sssd_fast.performance.plan import RESERVE

    row = new_row(setup, f"largest batch {setup.task}", name, f"memory, {cap_gb:g} GB")
    row.shape = row.shape.rpartition(",")[0]
    usable = cap_gb * 1e9 - RESERVE.context_bytes
    row.more |= {"cap_gb": cap_gb, "allocator_gb": usable / 1e9}
    total = torch.cuda.get_device_properties(bench.device).total_memory
    if len(points) < 2:
        row.reason = f"needs the peaks of two batches, has {len(points)}"
    elif cap_gb * 1e9 > total:
        row.reason = f"this GPU has {total / 1e9:.1f} GB"
    else:
        with bench.console.announce(f"{setup.task} {name}: largest batch in {cap_gb:g} GB"):
            attempt(row, partial(_search, bench, row, setup, name, points, usable))
    forget(bench.device)
    bench.results.add(row)


def _search(
    bench: Bench, row: Row, setup: Setup, name: str, points: list[Point], usable: float
) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return _runs(bench, row, replace(setup, batch=batch), name)

    with capped(bench.device, usable):
        found = largest_batch(points[-2], points[-1], usable, fits)
    row.more["tried"] = tried
    if found is None:
        row.reason = f"not even {MULTIPLE} images fit"
        return
    row.sizes = replace(setup, batch=found).sizes
    row.more |= {"batch": found, "largest_batch": found, "verified": True}


def _runs(bench: Bench, row: Row, setup: Setup, name: str) -> bool:
    """Whether real steps run in the available memory; if so, sets peak and time of the row."""
    from sssd_fast.run.device import is_out_of_memory

    device = bench.device
    before = torch.cuda.memory_allocated(device)
    try:
        source = step_models.initial_model(setup.config)
        step = step_models.build(name, setup, Data(setup), source)
        row.more["how"] = step.how
        row.first_call_s = first_call(step, device)
        torch.cuda.reset_peak_memory_stats(device)
        first_call(step, device)  # the moments exist since the first step
        row.peak_bytes = int(torch.cuda.max_memory_allocated(device)) - before
        samples = min(bench.samples, RATE_SAMPLES)
        row.time = summary(race({name: step}, device, bench.cache, samples=samples, passes=1)[name])
        row.more["images_per_s"] = setup.batch / (row.time.median_us / 1e6)
    except Exception as error:
        if not is_out_of_memory(getattr(error, "inner_exception", None) or error):
            raise
        return False
    finally:
        forget(device)
    return True


def largest_batch(
    small: Point, large: Point, limit: float, fits: Callable[[int], bool]
) -> int | None:
    """The first multiple of 8 for which `fits` is true, starting where the line through both points
    meets the limit; each next one is at least 4 % smaller. None if not even 8 fit."""
    slope = (large[1] - small[1]) / (large[0] - small[0])
    if slope <= 0:
        raise ValueError(f"the peaks of {small} and {large} (images, bytes) do not grow")
    batch = int((limit - large[1]) / slope + large[0]) // MULTIPLE * MULTIPLE
    while batch >= MULTIPLE:
        if fits(batch):
            return batch
        batch = min(batch - MULTIPLE, int(batch * SMALLER) // MULTIPLE * MULTIPLE)
    return None


@contextmanager
def capped(device: torch.device, usable: float) -> Iterator[None]:
    """Limits torch's allocator to `usable` bytes beyond what it holds already."""
    forget(device)
    held = torch.cuda.memory_reserved(device)
    total = torch.cuda.get_device_properties(device).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(min(1.0, (usable + held) / total), device)
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
