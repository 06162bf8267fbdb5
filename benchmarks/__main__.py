"""`sssd-fast bench`, also `python -m benchmarks`: measure, compare and report.

Every run writes one JSON file, rewritten after each row. Exit codes: 0; 1 (compare: something is
slower; report --check: the page is out of date; all: an error); 2 bad arguments or files.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.harness import QUICK_SAMPLES, Bench
from benchmarks.race import SAMPLES, Cache
from benchmarks.results import DTYPES, FOLDER, Results
from benchmarks.tables import doubts, tables
from sssd_fast.errors import DependencyError, SssdError
from sssd_fast.run.log import Console

MEASURED = {
    "attention": "self-attention against every SDPA backend and xformers",
    "ops": "each op of mae_kernels against eager, compiled and library code",
    "step": "a whole training step: images per second, MFU, memory",
    "memory": "memory of a training step over the batch",
    "loader": "images per second of the loaders, and their pixels",
}
HELP = {
    **MEASURED,
    "all": "all of these, each with an equal share of the time that is left",
    "compare": "what became slower from A to B",
    "report": "tables and pictures from results",
}
FILES = ("compare", "report")


def main(words: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if words is None else words)
    # torch's profiler, which counts memory on a CPU, prints a line at each start
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    try:
        args = _parse(words)
        if args.kind in FILES:
            return int(_module(args.kind).main(args))
        if args.device.startswith("cuda") and not torch.cuda.is_available():
            raise SssdError("torch finds no CUDA device (see `sssd-fast doctor`); use --device cpu")
        if args.kind == "all":
            return _all(words[1:], 60 * args.minutes)
        with Console() as console:
            _measure(args, words, console)
        return 0
    except SssdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the rows measured so far are in the file", file=sys.stderr)
        return 130


def _all(words: list[str], seconds: float) -> int:
    """Failures are reported and do not stop the other kinds; the largest exit code."""
    codes, end = [0], time.monotonic() + seconds
    for number, kind in enumerate(MEASURED):
        minutes = max(0.01, (end - time.monotonic()) / 60 / (len(MEASURED) - number))
        try:
            codes.append(main([kind, *words, "--minutes", f"{minutes:.2f}"]))
        except Exception:  # noqa: BLE001 - reported in full, the other kinds still run
            traceback.print_exc()
            codes.append(1)
        if codes[-1] == 130:
            break
    return max(codes)


def _measure(args: argparse.Namespace, words: Sequence[str], console: Console) -> None:
    """Writes the result file of a kind and prints its tables."""
    kind, device = args.kind, torch.device(args.device)
    module = _module(kind)
    console.info(f"{kind}: measuring the rate of a large copy and of a large matrix product")
    with Results(kind, device, args.dtypes, words, args.out, quick=args.quick) as results:
        bench = Bench(device, console, results, Cache(device), args.quick, args.samples)
        bench.deadline = args.minutes and time.monotonic() + 60 * args.minutes
        bench.only = args.provider or []
        module.run(args, bench)
    head = results.head
    head["doubts"] = doubts(results.rows)
    results.save()
    console.rule(f"{kind}: {head['device']['name']}, torch {head['versions']['torch']}")
    for table in tables({**head, "rows": results.rows}):
        console.table(table.title, table.columns, table.cells)
        for text in table.doubts:
            console.warn(f"doubtful verdicts: {text}")
    for provider, why in head["missing"].items():
        console.info(f"not available: {provider}: {why}")
    if head["skipped"]:
        console.warn(f"the time was up before: {'; '.join(head['skipped'])}")
    console.info(f"results: {os.path.relpath(results.path)}")


def _module(kind: str) -> ModuleType:
    """Raises DependencyError if packages are missing: the loader needs those of the trainer."""
    try:
        return importlib.import_module(f"benchmarks.{'ops' if kind == 'attention' else kind}")
    except ImportError as error:
        raise DependencyError(f"bench {kind} needs {error.name}: pip install '.[train]'") from error


def _parse(words: Sequence[str]) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sssd-fast bench", description=__doc__, formatter_class=form)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    for kind, text in HELP.items():
        sub = kinds.add_parser(kind, help=text, description=text)
        if kind not in FILES:
            add = sub.add_argument
            add("--quick", action="store_true", help=f"{QUICK_SAMPLES} samples, few shapes")
            add("--device", default=default, help="cpu, cuda, cuda:1, ...")
            add("--dtype", nargs="+", choices=list(DTYPES), help="bf16; on a CPU fp32 and bf16")
            add("--provider", nargs="+", metavar="P", help="only these, by their names in tables")
            add("--samples", type=int, metavar="N", help=f"per provider (default {SAMPLES})")
            add("--minutes", type=float, metavar="M", help="start no new case after M minutes")
            add("--out", type=Path, default=FOLDER, help="folder, or FILE.json")
        if kind == "all":
            sub.set_defaults(minutes=9.0)
        elif kind in words[:1]:  # importing the loader takes a second
            _module(kind).add_arguments(sub)
    args = parser.parse_args(words)
    if args.kind in FILES:
        return args
    for name, least in (("samples", 2), ("minutes", 0.01)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"argument --{name}: got {value:g}, needs at least {least:g}")
    usual = ["bf16"] if args.device.startswith("cuda") else ["fp32", "bf16"]
    args.dtypes = [DTYPES[name] for name in args.dtype or usual]
    args.samples = args.samples or (QUICK_SAMPLES if args.quick else SAMPLES)
    return args


if __name__ == "__main__":
    sys.exit(main())
