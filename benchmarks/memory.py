"""`sssd-fast bench memory`: the peak of a training step over the batch, and the largest batch that fits into a card.

Peak: everything that lies on the device at the worst moment of a step: batch, weights, gradients, both moments and activations; not
the CUDA context. CUDA: torch's allocator, over two steps after the first one, which makes the moments and compiles. CPU: weights,
moments and batch by size, and on top of them the peak of the second step by torch's profiler. CUDA graphs are off, whose pools keep
memory between steps. mb_per_further_image is the slope from the batch before: what one image more takes.

Largest batch: torch's allocator is forbidden more than the card would leave, the card's GB (1e9 bytes) less what the plan sets
aside for the CUDA context. Peaks are linear in the batch: the two largest that were measured say where to begin, then real steps
under the cap decide, going down by 4 % until they run. A batch that stands in a row did run; a larger one may run too where
the first guess did.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from . import machine, step_data, step_models
from .bench import Bench, attempt, forget
from .measure import first_call, peak_bytes, race, summary
from .results import Row
from .step import ALLOWED, by_weight, describe, gate, note_missing, providers
from .step_data import Data, Setup
from .step_models import TASKS

BATCHES = {"cuda": (64, 128, 256), "cpu": (8, 16, 32)}
CAPS_GB = (8, 12, 16, 24)
MULTIPLE, SMALLER = 8, 0.96
WITHOUT_GRAPHS = {"cuda_graphs": False}
RATE_SAMPLES = 10  # steps that the images per second of a largest batch are the median of

Point = tuple[int, int]  # images, peak bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="tiny, small, base, large, or a shipped configuration (default: base on CUDA, cpu_smoke elsewhere)"
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=int, nargs="+", metavar="N",
        help="images per step, two or more for the largest batch (default: 64 128 256 on CUDA, 8 16 32 elsewhere)",
    )  # fmt: skip
    parser.add_argument("--task", choices=TASKS, help="default: both")
    parser.add_argument(
        "--cap", type=float, nargs="*", metavar="GB", help="cards to emulate (default: 8 12 16 24; none: --cap alone)"
    )  # fmt: skip


def run(args: argparse.Namespace, bench: Bench) -> None:
    absent = step_models.missing("ours")
    if absent:
        note_missing(
            bench, {name: absent for task in TASKS for name in step_models.PROVIDERS[task]}
        )
        return
    device = bench.device
    config = step_data.configuration(args.model, device)
    describe(bench, config)
    batches = sorted(args.batch or BATCHES["cuda" if device.type == "cuda" else "cpu"])
    caps = list(CAPS_GB if args.cap is None else args.cap)
    if bench.quick:
        batches, caps = batches[:2], caps[:1]
    if device.type != "cuda" and caps:
        note_missing(bench, {"memory caps": "torch can limit the memory of a CUDA device only"})
        caps = []
    dtype = args.dtypes[0] if args.dtypes else step_data.default_dtype(device)
    for task in [args.task] if args.task else TASKS:
        setup = Setup(
            step_data.for_task(config, task), task, device, dtype, batches[0], WITHOUT_GRAPHS
        )
        names = by_weight(providers(bench, task))
        for name in names:
            points = over_batches(bench, setup, name, batches)
            for cap in caps:
                if bench.time_is_up():
                    bench.leave_out(f"largest batch {task}, {name}, {cap:g} GB")
                else:
                    under_cap(bench, setup, name, points, cap)


# ---- peak over the batch ----


def over_batches(bench: Bench, setup: Setup, name: str, batches: list[int]) -> list[Point]:
    """Adds a row for each batch; returns what was measured. A provider that fails at one batch is not asked for larger ones."""
    points: list[Point] = []
    for batch in batches:
        at = replace(setup, batch=batch)
        what = f"{setup.task} {at.shape} {machine.NAMES[setup.dtype]}: {name}, memory"
        if bench.time_is_up():
            bench.leave_out(what)
            continue
        row = _row(at, setup.task, name, "memory")
        row.more["batch"] = batch
        with bench.console.announce(what):
            attempt(row, lambda at=at, row=row: _measure(row, at, name, check=not points))  # type: ignore[misc]
        forget(bench.device)
        if row.peak_bytes is not None:
            row.more["mb_per_image"] = row.peak_bytes / batch / 1e6
            if points:
                (fewer, less) = points[-1]
                row.more["mb_per_further_image"] = (row.peak_bytes - less) / (batch - fewer) / 1e6
            points.append((batch, row.peak_bytes))
        bench.results.add(row)
        if row.reason is not None:
            break
    return points


def _row(setup: Setup, case: str, name: str, phase: str) -> Row:
    row = Row(case, setup.shape, machine.NAMES[setup.dtype], phase, name, setup.sizes)
    row.sources = machine.sources_hash("step")
    return row


def _measure(row: Row, setup: Setup, name: str, *, check: bool) -> None:
    """Sets the row's peak; with `check` only where the first loss is that of the reference."""
    device, losses = setup.device, list[Tensor]()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    data, source = Data(setup), step_data.initial_model(setup.config)
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
        row.allowed = ALLOWED[setup.dtype]
        gate(row, [float(losses[0])], step_data.reference_losses(setup, Data(setup), source, 1))
    if row.reason is None:
        row.peak_bytes = peak


# ---- the largest batch under a cap ----


def under_cap(bench: Bench, setup: Setup, name: str, points: list[Point], cap_gb: float) -> None:
    """Adds the row of one provider and card. The shape is the model's alone; the card stands in the phase."""
    row = _row(setup, f"largest batch {setup.task}", name, f"memory, {cap_gb:g} GB")
    row.shape = row.shape.rpartition(",")[0]
    row.more["cap_gb"] = cap_gb
    usable = cap_gb * 1e9 - _context_bytes()
    row.more["allocator_gb"] = usable / 1e9
    total = torch.cuda.get_device_properties(bench.device).total_memory
    if len(points) < 2:
        row.reason = f"needs the peaks of two batches, has {len(points)}"
    elif cap_gb * 1e9 > total:
        row.reason = f"this GPU has {total / 1e9:.1f} GB"
    else:
        with bench.console.announce(f"{setup.task} {name}: the largest batch in {cap_gb:g} GB"):
            attempt(row, lambda: _search(bench, row, setup, name, points, usable))
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
    """Whether real steps run in the memory there is; where they do, the row gets their peak and their time."""
    from sssd_fast.run.device import is_out_of_memory

    try:
        _steps(bench, row, setup, name)
        return True
    except Exception as error:
        if not is_out_of_memory(getattr(error, "inner_exception", None) or error):
            raise
        return False
    finally:
        forget(bench.device)


def _steps(bench: Bench, row: Row, setup: Setup, name: str) -> None:
    device = bench.device
    before = torch.cuda.memory_allocated(device)
    step = step_models.build(name, setup, Data(setup), step_data.initial_model(setup.config))
    row.more["how"] = step.how
    row.first_call_s = first_call(step, device)
    torch.cuda.reset_peak_memory_stats(device)
    first_call(step, device)  # the moments are there since the first step
    row.peak_bytes = int(torch.cuda.max_memory_allocated(device)) - before
    samples = min(bench.samples, RATE_SAMPLES)
    row.time = summary(race({name: step}, device, bench.cache, samples=samples, passes=1)[name])
    row.more["images_per_s"] = setup.batch / (row.time.median_us / 1e6)


def largest_batch(
    small: Point, large: Point, limit: float, fits: Callable[[int], bool]
) -> int | None:
    """A multiple of 8 for which `fits` is true: the one where the line through both points meets the limit, or the first below it.

    Each batch that does not fit is followed by one at least 4 % smaller. None where not even 8 do.
    """
    slope = (large[1] - small[1]) / (large[0] - small[0])
    if slope <= 0:
        raise ValueError(
            f"peaks of {small[1]} and {large[1]} bytes at {small[0]} and {large[0]} images do not grow"
        )
    batch = int((limit - large[1]) / slope + large[0]) // MULTIPLE * MULTIPLE
    while batch >= MULTIPLE:
        if fits(batch):
            return batch
        batch = min(batch - MULTIPLE, int(batch * SMALLER) // MULTIPLE * MULTIPLE)
    return None


@contextmanager
def capped(device: torch.device, usable: float) -> Iterator[None]:
    """Inside, torch's allocator gets no more than `usable` bytes beyond what it holds already."""
    forget(device)
    held = torch.cuda.memory_reserved(device)
    total = torch.cuda.get_device_properties(device).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(min(1.0, (usable + held) / total), device)
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _context_bytes() -> float:
    from sssd_fast.performance.plan import RESERVE

    return RESERVE.context_bytes
