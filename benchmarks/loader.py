"""Images per second of every way to load images, on data of your own, with the augmentation of pre-training.

    sssd-fast bench loader [DATA ...] [--manifest CSV ...]      speed
    sssd-fast bench loader DATA --parity                        how far the pixels are from Pillow's
    sssd-fast bench loader DATA --memory                        memory over 50 epochs

Without DATA, on synthetic slices of 512 x 512 that are drawn for it.
A provider gets a time only if its first epoch has the records and labels of the torch loader, in the same order, and pixels
within 1 grey level of Pillow's on average; the differences stand in the row. The baseline is torch with worker processes.

One figure is one epoch as a training without pauses sees it: from the last batch of the epoch before to its own last
batch, so that what a provider has prefetched counts neither for nor against it. The consumer reads one pixel per image;
on a GPU the clock waits for the device at both ends. Providers take turns, the order changes from round to round. "start
s" is the time from nothing to the first batch: decoding the set, building the pipeline (with DALI's import, once), starting
workers; it is in no other figure. "gap" is the second half of the rounds against the first.
All images of DATA are used, those with a wrong extension too; decoded ones are kept in memory, without a cache file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.loader_memory import SHOWN, watch_apart
from benchmarks.loader_pixels import Case, Difference, difference, parity, ways
from benchmarks.machine import sources_hash
from benchmarks.results import Results
from sssd_fast.config import AugmentConfig
from sssd_fast.data.index import check_data
from sssd_fast.data.synthetic import write_synthetic_dataset
from sssd_fast.errors import SssdError
from sssd_fast.loaders import Batch, Loader
from sssd_fast.run.log import Console

MOST_MEAN = 1.0  # grey levels from Pillow on average, above which no time is given
SETTLE = 8  # batches before the clock starts: more than any provider works ahead of an epoch's end
PAUSE_S = 0.5  # in which the provider before finishes what it began
QUICK = {"images": 256, "rounds": 2, "epochs": 12}
SYNTHETIC, SIDE = 600, 512  # slices, and their pixels a side


@dataclass
class Row:
    """One provider on one case. images_per_s is empty where `reason` says why there is no time."""

    data: str
    channels: int
    provider: str
    reason: str | None = None
    how: str = ""  # Loader.describe()
    start_s: float | None = None
    difference: Difference | None = None
    images_per_s: list[float] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    ratio: float | None = None  # of the medians, to the baseline


def figures(images_per_s: Sequence[float]) -> dict[str, Any]:
    """Median, quantiles, and the second half of the rounds against the first (the middle one left out)."""
    p20, p80 = (float(q) for q in np.quantile(images_per_s, (0.2, 0.8)))
    count, half = len(images_per_s), len(images_per_s) // 2
    early, late = images_per_s[:half], images_per_s[count - half :]
    gap = statistics.median(late) / statistics.median(early) - 1 if half else None
    return {
        "median": statistics.median(images_per_s),
        "p20": p20,
        "p80": p80,
        "n": count,
        "gap": gap,
    }


def touch(batches: Iterable[Batch]) -> None:
    """A consumer that reads one pixel of every image."""
    for batch in batches:
        batch.images[:, 0, 0, 0].sum()


def epoch_seconds(
    loader: Loader, epoch: int, device: torch.device, clock: Callable[[], float]
) -> float:
    """From the last batch of epoch - 1 to the last of `epoch`."""
    touch(loader.epoch(epoch - 1, max(0, loader.steps_per_epoch - SETTLE)))
    _wait(device)
    start = clock()
    touch(loader.epoch(epoch))
    _wait(device)
    return clock() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def measure(case: Case, rounds: int) -> list[Row]:
    """Starts every provider, compares its pixels, and times those that pass."""
    rows = [Row(case.data, case.channels, way.name) for way in ways(case.threads)]
    loaders: dict[str, Loader] = {}
    with ExitStack() as stack:
        for row, way in zip(rows, ways(case.threads), strict=True):
            start = time.perf_counter()
            try:
                loader = case.loader(way, AugmentConfig())
            except SssdError as error:
                row.reason = str(error)
                continue
            stack.callback(loader.close)
            touch([next(batches := loader.epoch(0))])
            _wait(case.device)
            row.start_s = time.perf_counter() - start
            row.how = loader.describe()
            touch(batches)
            found = difference(loader, case.reference(AugmentConfig()))
            if isinstance(found, str):
                row.reason = f"no time: {found}"
                continue
            row.difference = found
            if found.mean > MOST_MEAN:
                row.reason = f"no time: {found.mean:.2f} grey levels from Pillow on average, at most {MOST_MEAN:g} are allowed"
                continue
            loaders[way.name] = loader
        rates = race(loaders, case.batch, rounds, case.device)
    for row in rows:
        if row.provider in rates:
            row.images_per_s = rates[row.provider]
            row.figures = figures(rates[row.provider])
    baseline = rows[1].figures.get("median")
    for row in rows:
        row.ratio = row.figures["median"] / baseline if row.figures and baseline else None
    return rows


def memory(case: Case, epochs: int) -> list[dict[str, Any]]:
    rows = []
    for way in ways(case.threads):
        found = watch_apart(case.index, epochs, case.threads, case.arguments(way))
        rows.append(
            {
                "data": case.data,
                "channels": case.channels,
                "provider": way.name,
                **asdict(found),
                "flat": found.flat,
            }
        )
    return rows


# ---- what is printed and written ----

HEAD = ["data", "channels", "provider"]
SPEED = [
    *HEAD,
    "images/s",
    "p20",
    "p80",
    "n",
    "gap",
    "x baseline",
    "start s",
    "mean off",
    "max off",
    "note",
]
PARITY = [*HEAD, "view", "images", "differing", "mean off", "max off", "pixels off by > 2", "note"]
MEMORY = [*HEAD, "before", *(f"epoch {n}" for n in SHOWN), "peak", "flat", "note"]


def cells(kind: str, row: dict[str, Any]) -> list[str]:
    def show(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    head = [row["data"], str(row["channels"]), row["provider"]]
    note = row.get("reason") or ""
    if kind == "parity":
        share = row.get("beyond_2")
        counts = [show(row.get("images"), "d"), show(row.get("images_differing"), "d")]
        off = [show(row.get("mean"), ".3f"), show(row.get("max"), "d"), show(share, ".4%")]
        return [*head, row["view"], *counts, *off, note]
    if kind == "memory":
        after = [row["epochs"][n - 1] if n <= len(row["epochs"]) else None for n in SHOWN]
        flat = {True: "yes", False: "no", None: ""}[row["flat"]]
        return [
            *head,
            *(show(mib, ".0f") for mib in (row["before"], *after, row["peak"])),
            flat,
            note,
        ]
    rates, pixels = row["figures"], row["difference"] or {}
    speed = [show(rates.get(name), ".0f") for name in ("median", "p20", "p80")]
    rest = [show(rates.get("n"), "d"), show(rates.get("gap"), "+.1%"), show(row["ratio"], ".2f")]
    levels = [show(pixels.get("mean"), ".3f"), show(pixels.get("max"), "d")]
    return [*head, *speed, *rest, show(row["start_s"], ".2f"), *levels, note]


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sssd-fast bench loader",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "data",
        nargs="*",
        metavar="DATA",
        help="folder with one folder per class, or the manifest's",
    )
    parser.add_argument(
        "--manifest", nargs="+", default=[], metavar="CSV", help="one per DATA, in the same order"
    )
    parser.add_argument("--size", type=int, default=224, help="pixels of a side (default 224)")
    parser.add_argument("--channels", type=int, nargs="+", choices=(1, 3), default=[1, 3])
    parser.add_argument("--batch", type=int, default=64, help="images (default 64)")
    parser.add_argument(
        "--threads", type=int, default=2, help="of torch and DALI, and processes of the baseline"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="timed epochs of each provider (default 5)"
    )
    parser.add_argument(
        "--epochs-flat", type=int, default=50, help="epochs of --memory (default 50)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--parity", action="store_true", help="pixels in place of times")
    kinds.add_argument("--memory", action="store_true", help="memory in place of times")
    parser.add_argument(
        "--json", metavar="FILE.json", help="default: a new file in benchmarks/results"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="{images} images, {rounds} rounds, {epochs} epochs".format(**QUICK),
    )
    args = parser.parse_args(words)
    if args.manifest and len(args.manifest) != len(args.data):
        parser.error(
            f"{len(args.manifest)} manifests for {len(args.data)} data folders; give one per folder, or none"
        )
    if min(args.size, args.batch, args.threads, args.rounds, args.epochs_flat) < 1:
        parser.error("--size, --batch, --threads, --rounds and --epochs-flat must be at least 1")
    if args.quick:
        args.rounds = QUICK["rounds"]
        args.epochs_flat = QUICK["epochs"]
    if args.json is not None and Path(args.json).suffix != ".json":
        parser.error(f"--json is {args.json!r}, needs a file name that ends in .json")
    return args


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(words: Sequence[str]) -> dict[str, Any]:
    """What the command line does; returns the head and the rows of the file. Raises DataError for data that cannot be used."""
    args = arguments(words)
    name = (
        ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    )
    device = torch.device(name)
    kind = "parity" if args.parity else "memory" if args.memory else "speed"
    settings = {
        name: getattr(args, name)
        for name in ("size", "channels", "batch", "rounds", "epochs_flat", "threads")
    }
    sources = sources_hash("crop_resize")  # the one op that loaders use
    with (
        torch_threads(args.threads),
        TemporaryDirectory(prefix="sssd-fast-bench-") as folder,
        Console(stream=sys.stderr) as console,
    ):
        results = Results(
            f"loader-{kind}",
            device,
            (),
            words=["loader", *words],
            path=None if args.json is None else Path(args.json),
            quick=args.quick,
            settings=settings,
            ceilings={},
        )
        with results:
            for case in cases(args, device, Path(folder), console):
                with console.announce(
                    f"{kind}: {case.data}, {len(case.index)} images, {case.channels} channel(s)"
                ):
                    if kind == "speed":
                        rows = [asdict(row) for row in measure(case, args.rounds)]
                    else:
                        rows = parity(case) if kind == "parity" else memory(case, args.epochs_flat)
                    results.add(*({**row, "sources": sources} for row in rows))
        columns = {"speed": SPEED, "parity": PARITY, "memory": MEMORY}[kind]
        table = [cells(kind, row) for row in results.rows]
        if args.markdown:
            print(markdown(columns, table))
        else:
            with Console() as screen:
                screen.table(f"{kind}: {results.head['device']['name']}", columns, table)
        console.info(f"figures: {os.path.relpath(results.path)}")
    return {**results.head, "rows": results.rows}


def cases(
    args: argparse.Namespace, device: torch.device, folder: Path, console: Console
) -> Iterator[Case]:
    """Every data set at every number of channels; synthetic slices in `folder` where none is named."""
    data = args.data
    if not data:
        count = QUICK["images"] if args.quick else SYNTHETIC
        with console.announce(f"drawing {count} synthetic slices"):
            data = [write_synthetic_dataset(folder / "synthetic", count, (SIDE, SIDE))]
    for source, manifest in zip(data, args.manifest or [None] * len(data), strict=True):
        index = check_data(source, manifest, accept_wrong_extension=True)
        index = replace(index, records=index.records[: QUICK["images"]]) if args.quick else index
        for channels in args.channels:
            yield Case(
                Path(source).resolve().name,
                index,
                channels,
                args.size,
                args.batch,
                args.threads,
                device,
            )


def main() -> None:
    try:
        run(sys.argv[1:])
    except SssdError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
