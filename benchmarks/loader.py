"""`bench loader`: images per second of every loader with the augmentation of pre-training.

    sssd-fast bench loader [DATA ...] [--manifest CSV ...]

Without DATA, synthetic slices of 512 x 512 pixels. The baseline is torch with worker processes.
A provider is timed only if its first epoch has the records and labels of the torch loader in the
same order, and pixels within 1 grey level of Pillow's on average.

A sample is one epoch as a training without pauses sees it: from the last batch of the previous
epoch to its own last batch, so that prefetched batches do not change it. The consumer reads one
pixel per image; on a GPU the clock waits for the device at both ends. Providers alternate.
"start" is the time to the first batch: decoding the data set, building the pipeline, starting
workers. "gap" compares the second half of the rounds with the first. All images of DATA are used,
also those with a wrong extension; decoded ones are kept in memory, without a cache file.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Bench, attempt
from benchmarks.race import wait
from benchmarks.results import Row, sources_hash
from sssd_fast.config import AugmentConfig
from sssd_fast.data.index import DataIndex, check_data
from sssd_fast.data.synthetic import write_synthetic_dataset
from sssd_fast.errors import SssdError
from sssd_fast.loaders import Batch, Loader, SampleOrder, build_loader

MAX_MEAN = 1.0  # grey levels from Pillow on average, beyond which speed is not measured
SETTLE = 8  # batches before the clock starts: more than any provider prefetches
PAUSE_S = 0.5  # in which the previous provider finishes what it started
QUICK_IMAGES, QUICK_ROUNDS = 256, 2
SYNTHETIC, SIDE = 600, 512  # slices, and their pixels a side


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", nargs="*", metavar="DATA", help="folder with one folder per class, or with images")
    add("--manifest", nargs="+", default=[], metavar="CSV", help="one per DATA, in the same order")
    add("--size", type=int, default=224, help="pixels of a side (default 224)")
    add("--channels", type=int, nargs="+", choices=(1, 3), default=[1, 3])
    add("--batch", type=int, default=64, help="images (default 64)")
    add("--workers", type=int, default=2, help="threads or processes of a loader (default 2)")
    add("--rounds", type=int, default=5, help="timed epochs of each provider (default 5)")


def run(args: argparse.Namespace, bench: Bench) -> None:
    if args.manifest and len(args.manifest) != len(args.data):
        raise SssdError(
            f"--manifest names {len(args.manifest)} files for {len(args.data)} data folders; "
            "give one per folder, or none"
        )
    for name in ("size", "batch", "workers", "rounds"):
        if getattr(args, name) < 1:
            raise SssdError(f"--{name} is {getattr(args, name)}, needs at least 1")
    rounds = min(args.rounds, QUICK_ROUNDS) if bench.quick else args.rounds
    names = ("size", "channels", "batch", "workers")
    settings = {name: getattr(args, name) for name in names}
    bench.results.head["settings"] |= {**settings, "rounds": rounds}
    with TemporaryDirectory(prefix="sssd-fast-bench-") as folder:
        data = args.data
        if not data:
            count = QUICK_IMAGES if bench.quick else SYNTHETIC
            with bench.console.announce(f"drawing {count} synthetic slices"):
                data = [write_synthetic_dataset(Path(folder, "synthetic"), count, (SIDE, SIDE))]
        for source, manifest in zip(data, args.manifest or [None] * len(data), strict=True):
            index = check_data(source, manifest, accept_wrong_extension=True)
            if bench.quick:
                index = replace(index, records=index.records[:QUICK_IMAGES])
            for channels in args.channels:
                sizes = (channels, args.size, args.batch, args.workers, bench.device)
                case = LoaderCase(Path(source).resolve().name, index, *sizes)
                label = f"loader: {case.data}, {len(index)} images, {case.shape}"
                if not bench.time_is_up(label):
                    with bench.console.announce(label):
                        bench.results.add(*speed(case, rounds))


@dataclass(frozen=True)
class LoaderCase:
    """One data set at one number of channels."""

    data: str
    index: DataIndex
    channels: int
    size: int
    batch: int
    workers: int
    device: torch.device

    @property
    def shape(self) -> str:
        return f"{self.channels} channel{'s' * (self.channels > 1)}"

    @property
    def providers(self) -> tuple[str, ...]:
        """The reference first, then the baseline."""
        return ("torch, 0 workers", f"torch, {self.workers} workers", "dali", "resident")

    def row(self, provider: str) -> Row:
        sizes = {"channels": self.channels, "size": self.size, "batch": self.batch}
        row = Row(self.data, self.shape, "uint8", "epoch", provider, sizes)
        row.sources = sources_hash("crop_resize")  # the op that loaders use
        return row

    def loader(self, name: str) -> Loader:
        """All images of the index with the augmentation of pre-training."""
        provider, _, workers = name.removesuffix(" workers").partition(", ")
        order = SampleOrder(
            self.index,
            range(len(self.index)),
            augment=AugmentConfig(),
            seed=0,
            batch_size=self.batch,
            image_size=(self.size, self.size),
            channels=self.channels,
        )
        options: dict[str, Any] = {"cache": "none", "device": str(self.device)}
        count = int(workers or self.workers)
        return build_loader(order, provider=provider, workers=count, **options)

    def reference(self) -> Loader:
        """Pillow, in this process."""
        return replace(self, device=torch.device("cpu")).loader("torch, 0 workers")


# ---- speed ----


def speed(case: LoaderCase, rounds: int) -> list[Row]:
    """Starts every provider, compares its pixels, and times those that pass."""
    rows = {name: case.row(name) for name in case.providers}
    loaders: dict[str, Loader] = {}
    with ExitStack() as stack:
        for row in rows.values():
            attempt(row, partial(_start, case, row, loaders, stack))
        rates = race(loaders, case.batch, rounds, case.device)
    baseline = f"torch, {case.workers} workers"
    for name, found in rates.items():
        more = rows[name].more
        more |= {"samples": found, **rate_summary(found)}
        if baseline in rates:
            more["x_baseline"] = more["images_per_s"] / statistics.median(rates[baseline])
    return list(rows.values())


def _start(case: LoaderCase, row: Row, loaders: dict[str, Loader], stack: ExitStack) -> None:
    start = time.perf_counter()
    loader = case.loader(row.provider)
    stack.callback(loader.close)
    touch([next(batches := loader.epoch(0))])
    wait(case.device)
    row.more |= {"start_s": time.perf_counter() - start, "how": loader.describe()}
    touch(batches)
    found = difference(loader, case.reference())
    row.more |= found
    if found["mean"] > MAX_MEAN:
        mean = f"{found['mean']:.2f}"
        raise SssdError(
            f"wrong: {mean} grey levels from Pillow on average, allowed are {MAX_MEAN:g}"
        )
    loaders[row.provider] = loader


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
            seconds = epoch_seconds(loaders[name], 2 * turn + 2, device, clock)
            rates[name].append(loaders[name].steps_per_epoch * batch / seconds)
    return rates


def epoch_seconds(
    loader: Loader, epoch: int, device: torch.device, clock: Callable[[], float]
) -> float:
    """From the last batch of epoch - 1 to the last of `epoch`."""
    touch(loader.epoch(epoch - 1, max(0, loader.steps_per_epoch - SETTLE)))
    wait(device)
    start = clock()
    touch(loader.epoch(epoch))
    wait(device)
    return clock() - start


def touch(batches: Iterable[Batch]) -> None:
    """A consumer that reads one pixel of every image."""
    for batch in batches:
        batch.images[:, 0, 0, 0].sum()


def rate_summary(rates: list[float]) -> dict[str, Any]:
    """gap: the second half of the rounds relative to the first, without the middle one."""
    p20, p80 = (float(q) for q in np.quantile(rates, (0.2, 0.8)))
    median, half = statistics.median(rates), len(rates) // 2
    late = rates[len(rates) - half :]
    gap = statistics.median(late) / statistics.median(rates[:half]) - 1 if half else None
    return {"images_per_s": median, "p20": p20, "p80": p80, "n": len(rates), "gap": gap}


# ---- pixels ----


def difference(loader: Loader, reference: Loader, epoch: int = 0) -> dict[str, float]:
    """Grey levels between the pixels of two loaders over one epoch: mean, max, and the share of
    pixels that differ by more than 2 (beyond_2).

    Raises SssdError if the batches are not those of the reference.
    """
    if loader.steps_per_epoch != reference.steps_per_epoch:
        raise SssdError(f"{loader.steps_per_epoch} batches, needs {reference.steps_per_epoch}")
    total = largest = beyond = pixels = 0
    pairs = zip(loader.epoch(epoch), reference.epoch(epoch), strict=True)
    for step, (batch, wanted) in enumerate(pairs):
        for name in ("indices", "labels", "valid"):
            if not torch.equal(getattr(batch, name).cpu(), getattr(wanted, name)):
                raise SssdError(f"wrong: batch {step} has other {name} than the torch loader")
        off_RCHW = (batch.images.cpu().short() - wanted.images.short()).abs()[wanted.valid]
        total += int(off_RCHW.sum())
        largest = max(largest, int(off_RCHW.max()))
        beyond += int((off_RCHW > 2).sum())
        pixels += off_RCHW.numel()
    return {"mean": total / pixels, "max": largest, "beyond_2": beyond / pixels}
