"""`bench loader`: images per second of every loader with the augmentation of pre-training.

    sssd-fast bench loader [DATA ...]

Without DATA, synthetic slices of 512 x 512 pixels. The baseline is torch with two threads.
A provider is timed only if its first epoch has the records and labels of the torch loader in the
same order, and pixels within 1 grey level of Pillow's on average.

A sample is one epoch, from the last batch of the previous epoch to its own last batch, so that
prefetched batches do not change it. "start" is the time to the first batch: decoding the data set,
building the pipeline, starting workers. No cache file is written.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Bench, attempt
from benchmarks.race import gap_of, wait
from benchmarks.results import Row
from sssd_fast.config import AugmentConfig
from sssd_fast.data.index import DataIndex, check_data
from sssd_fast.data.synthetic import write_synthetic_dataset
from sssd_fast.errors import SssdError
from sssd_fast.loaders import Batch, Loader, SampleOrder, build_loader

MAX_MEAN = 1.0  # grey levels from Pillow on average, beyond which speed is not measured
SETTLE = 8  # batches before the clock starts: more than any provider prefetches
WORKERS = 2
BASELINE = f"torch, {WORKERS} workers"
PROVIDERS = ("torch, 0 workers", BASELINE, "dali", "resident")  # the reference first
PAUSE_S = 0.5  # in which the previous provider finishes what it started
QUICK_IMAGES, QUICK_ROUNDS = 256, 2
SYNTHETIC, SIDE = 600, 512  # slices, and their pixels a side


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", nargs="*", metavar="DATA", help="folder with one folder per class, or with images")
    add("--size", type=int, default=224, help="pixels of a side (default 224)")
    add("--channels", type=int, nargs="+", choices=(1, 3), default=[1, 3])
    add("--batch", type=int, default=64, help="images (default 64)")
    add("--rounds", type=int, default=5, help="timed epochs of each provider (default 5)")


def run(args: argparse.Namespace, bench: Bench) -> None:
    for name in ("size", "batch", "rounds"):
        if getattr(args, name) < 1:
            raise SssdError(f"--{name} is {getattr(args, name)}, needs at least 1")
    rounds = min(args.rounds, QUICK_ROUNDS) if bench.quick else args.rounds
    with TemporaryDirectory(prefix="sssd-fast-bench-") as folder:
        data = args.data
        if not data:
            count = QUICK_IMAGES if bench.quick else SYNTHETIC
            data = [write_synthetic_dataset(Path(folder, "synthetic"), count, (SIDE, SIDE))]
        for source in data:
            index = check_data(source)
            for channels in args.channels:
                make = partial(make_loader, index, channels, args.size, args.batch)
                sizes = {"channels": channels, "size": args.size, "batch": args.batch}
                shape = ", ".join(f"{name} {value}" for name, value in sizes.items())
                case = f"{Path(source).resolve().name}, {len(index)} images"
                rows = {n: Row(case, shape, "uint8", "epoch", n, sizes) for n in PROVIDERS}
                if not bench.time_is_up(f"{case}, {shape}"):
                    with bench.console.announce(f"{case}, {shape}"):
                        speed(rows, make, bench.device, args.batch, rounds)
                    bench.results.add(*rows.values())


def make_loader(
    index: DataIndex, channels: int, size: int, batch: int, name: str, device: torch.device
) -> Loader:
    """All images of the index with the augmentation of pre-training."""
    provider, _, workers = name.removesuffix(" workers").partition(", ")
    more: dict[str, Any] = {"image_size": (size, size), "channels": channels, "seed": 0}
    order = SampleOrder(index, range(len(index)), augment=AugmentConfig(), batch_size=batch, **more)
    options: dict[str, Any] = {"cache": "none", "device": str(device)}
    return build_loader(order, provider=provider, workers=int(workers or WORKERS), **options)


def speed(
    rows: Mapping[str, Row],
    make: Callable[[str, torch.device], Loader],
    device: torch.device,
    batch: int,
    rounds: int,
) -> None:
    """Starts every provider, compares its pixels, and times those that pass."""
    loaders: dict[str, Loader] = {}

    def start(row: Row) -> None:
        begin = time.perf_counter()
        loader = make(row.provider, device)
        stack.callback(loader.close)
        touch([next(batches := loader.epoch(0))])
        wait(device)
        row.more |= {"start_s": time.perf_counter() - begin, "how": loader.describe()}
        touch(batches)
        row.more |= difference(loader, make(PROVIDERS[0], torch.device("cpu")))
        if (mean := row.more["mean"]) > MAX_MEAN:
            allowed = f"allowed are {MAX_MEAN:g}"
            raise SssdError(f"wrong: {mean:.2f} grey levels from Pillow on average, {allowed}")
        loaders[row.provider] = loader

    with ExitStack() as stack:
        for row in rows.values():
            attempt(row, partial(start, row))
        rates = race(loaders, batch, rounds, device)
    for name, found in rates.items():
        median, (p20, p80) = statistics.median(found), np.quantile(found, (0.2, 0.8)).tolist()
        more = {"images_per_s": median, "p20": p20, "p80": p80, "n": rounds, "gap": gap_of(found)}
        if BASELINE in rates:
            more["x_baseline"] = median / statistics.median(rates[BASELINE])
        rows[name].more |= more


def race(
    loaders: Mapping[str, Loader],
    batch: int,
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Images per second of each loader in each round; every other round in the opposite order."""
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for turn in range(rounds):
        for name in list(loaders)[:: -1 if turn % 2 else 1]:
            time.sleep(PAUSE_S)
            loader, epoch = loaders[name], 2 * turn + 2
            # from the last batch of the epoch before to the last of this one
            touch(loader.epoch(epoch - 1, max(0, loader.steps_per_epoch - SETTLE)))
            wait(device)
            start = clock()
            touch(loader.epoch(epoch))
            wait(device)
            rates[name].append(loader.steps_per_epoch * batch / (clock() - start))
    return rates


def touch(batches: Iterable[Batch]) -> None:
    """A consumer that reads one pixel of every image."""
    for batch in batches:
        batch.images[:, 0, 0, 0].sum()


def difference(loader: Loader, reference: Loader) -> dict[str, float]:
    """Mean and largest (max) difference of the first epoch's pixels, in grey levels.

    Raises SssdError if the batches are not those of the reference.
    """
    if loader.steps_per_epoch != reference.steps_per_epoch:
        raise SssdError(f"{loader.steps_per_epoch} batches, needs {reference.steps_per_epoch}")
    total = largest = pixels = 0
    for step, (batch, wanted) in enumerate(zip(loader.epoch(0), reference.epoch(0), strict=True)):
        for name in ("indices", "labels"):
            if not torch.equal(getattr(batch, name).cpu(), getattr(wanted, name)):
                raise SssdError(f"wrong: batch {step} has other {name} than the torch loader")
        off_RCHW = (batch.images.cpu().short() - wanted.images.short()).abs()[: wanted.count]
        total += int(off_RCHW.sum())
        largest = max(largest, int(off_RCHW.max()))
        pixels += off_RCHW.numel()
    return {"mean": total / pixels, "max": largest}
