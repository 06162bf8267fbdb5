"""`sssd-fast bench`, also `python -m benchmarks`: measure, compare and report.

Every run writes one JSON file, rewritten after each row. Exit codes: 0; 1 (compare: something
became slower; report --check: a page is out of date); 2 bad arguments or files.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks import attention, compare, memory, ops, report, step
from benchmarks.harness import QUICK_SAMPLES, Bench
from benchmarks.race import PASSES, SAMPLES, Cache, cache_bytes
from benchmarks.results import DTYPES, FOLDER, Results
from benchmarks.tables import doubts, tables
from sssd_fast.errors import DependencyError, SssdError
from sssd_fast.run.log import Console, duration

MEASURED: dict[str, Any] = {"ops": ops, "attention": attention, "step": step, "memory": memory}
HELP = {
    "ops": "each op of mae_kernels against eager, compiled and library code",
    "attention": "self-attention against every SDPA backend and xformers",
    "step": "a whole training step: images per second, MFU, memory, loss",
    "memory": "memory of a training step over the batch",
    "loader": "images per second of the loaders, and their pixels",
    "all": "all of these within a time, most important first",
    "compare": "what became slower from A to B",
    "report": "tables and pictures from results",
}
# What `all` measures, most important first: kind, arguments on a GPU, and the share of the time at
# which it must end. A kind that comes again adds what is missing to its file.
STAGES: tuple[tuple[str, list[str], float], ...] = (
    ("attention", ["--shape", "ViT-B encoder", "ViT-B decoder", "--batch", "256"], 0.15),
    ("ops", ["--shape", "ViT-B", "--batch", "256"], 0.45),
    ("step", [], 0.7),
    ("memory", [], 0.82),
    ("loader", ["--channels", "1"], 0.88),
    ("attention", [], 0.91),
    ("ops", [], 0.95),  # the rest is for finishing what was started
)
COMMON = ("quick", "device", "provider", "samples", "threads", "out", "dtypes")
NOT_ENOUGH_S = 10.0  # a stage with less time left does not start


def main(words: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if words is None else words)
    if words[:1] == ["kernels"]:  # the former name
        words[0] = "ops"
    # torch's profiler, which counts memory on a CPU, prints a line at each start
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    try:
        args = _parse(words)
        if args.kind in ("compare", "report"):
            return (compare if args.kind == "compare" else report).main(args)
        return _all(args, words) if args.kind == "all" else _one(args, words)
    except SssdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the rows measured so far are in the file", file=sys.stderr)
        return 130


def _one(args: argparse.Namespace, words: Sequence[str]) -> int:
    with ExitStack() as stack:
        console = _prepare(args, stack)
        results = stack.enter_context(_open(args, words, console))
        deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
        _run(args, results, console, deadline)
        _show(console, results)
    return 0


def _all(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Failures are reported and do not stop the other kinds; 2 if any failed."""
    started, failed = time.monotonic(), []
    with ExitStack() as stack:
        console, opened = _prepare(args, stack), dict[str, Results]()
        for kind, more, share in STAGES:
            end = started + 60 * args.minutes * share
            if time.monotonic() > end - NOT_ENOUGH_S:
                console.warn(f"{kind}: no time left; `sssd-fast bench {kind}` measures it alone")
                continue
            try:
                stage = _parse([kind, *(more if torch.device(args.device).type == "cuda" else [])])
                vars(stage).update({name: getattr(args, name) for name in COMMON})
                if kind not in opened:
                    known = next(iter(opened.values())).head["ceilings"] if opened else None
                    opened[kind] = stack.enter_context(_open(stage, words, console, known))
                _run(stage, opened[kind], console, end)
            except DependencyError as error:
                console.warn(f"{kind} is skipped: {error}")
            except Exception as error:  # noqa: BLE001 - reported in full, the other kinds still run
                console.error(f"{kind}: {error}")
                if not isinstance(error, SssdError):
                    traceback.print_exc()
                failed.append(kind)
        for results in opened.values():
            _show(console, results)
        console.info(f"all: {duration(time.monotonic() - started)} of {args.minutes:g} minutes")
    return 2 if failed else 0


def _prepare(args: argparse.Namespace, stack: ExitStack) -> Console:
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise SssdError(
            "--device is cuda, but torch finds no CUDA device (see `sssd-fast doctor`); "
            "use --device cpu"
        )
    stack.callback(torch.set_num_threads, torch.get_num_threads())
    if args.threads:
        torch.set_num_threads(args.threads)
    return stack.enter_context(Console())


def _open(
    args: argparse.Namespace,
    words: Sequence[str],
    console: Console,
    ceilings: dict[str, Any] | None = None,
) -> Results:
    """The result file of a kind. ceilings: None = measure them, if the kind needs them."""
    device = torch.device(args.device)
    dtypes = args.dtypes or [torch.bfloat16 if device.type == "cuda" else torch.float32]
    settings = {"samples": args.samples, "passes": PASSES, "flushed_bytes": cache_bytes(device)}
    kind = args.kind
    if kind == "loader":
        kind, settings, ceilings = "loader-speed", {}, {}
    if args.json is not None and args.json.suffix != ".json":
        raise SssdError(f"--json is {str(args.json)!r}, needs a file name that ends in .json")
    with console.announce(f"{kind}: rate of a large copy and a large product"):
        place = (args.json, args.out, args.quick)
        return Results(kind, device, dtypes, words, *place, settings, ceilings)


def _run(
    args: argparse.Namespace, results: Results, console: Console, deadline: float | None
) -> None:
    device = results.device
    bench = Bench(device, console, results, Cache(device), args.quick, args.samples)
    bench.deadline = deadline
    bench.only = args.provider or []
    _module(args.kind).run(args, bench)


def _module(kind: str) -> Any:
    """The loader needs the packages of the trainer. Raises DependencyError if they are missing."""
    if kind in MEASURED:
        return MEASURED[kind]
    try:
        return importlib.import_module("benchmarks.loader")
    except ImportError as error:
        hint = "pip install '.[train]'"
        raise DependencyError(f"bench loader needs {error.name}: {hint}") from error


def _show(console: Console, results: Results) -> None:
    head, document = results.head, {**results.head, "rows": results.rows}
    head["doubts"] = doubts(results.rows)
    results.save()
    console.rule(f"{head['kind']}: {head['device']['name']}, torch {head['versions']['torch']}")
    for table in tables(document, skip=("how", "n", "first call")):
        console.table(table.title, table.columns, table.cells)
        for text in table.doubts:
            console.warn(f"doubtful verdicts: {text}")
    for provider, why in head["missing"].items():
        console.info(f"not available: {provider}: {why}")
    if head["skipped"]:
        console.warn(f"the time was up before: {'; '.join(head['skipped'])}")
    console.info(f"results: {os.path.relpath(results.path)}")


# ---- arguments ----


def _common(parser: argparse.ArgumentParser) -> None:
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--quick", action="store_true", help=f"{QUICK_SAMPLES} samples, few shapes: a first test")
    add("--device", default="cuda" if cuda else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--dtype", nargs="+", choices=list(DTYPES), help="default: bf16 on a GPU, else fp32")
    add("--provider", nargs="+", metavar="P", help="only these, by their names in the table")
    add("--samples", type=int, metavar="N", help=f"per provider and pass (default {SAMPLES})")
    add("--threads", type=int, metavar="N", help="of torch on the CPU")
    add("--minutes", type=float, metavar="M", help="start no new case after M minutes")
    add("--out", type=Path, default=FOLDER, metavar="DIR", help="default: benchmarks/results")


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sssd-fast bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, text in HELP.items():
        sub = kinds.add_parser(kind, help=text, description=text)
        if kind not in ("compare", "report"):
            _common(sub)
        if kind == "all":
            sub.set_defaults(minutes=9.0)
        elif kind in ("compare", "report"):
            (compare if kind == "compare" else report).add_arguments(sub)
        else:
            sub.add_argument("--json", type=Path, metavar="FILE.json", help="the result file")
            if kind in words[:1]:  # importing the loader takes a second
                _module(kind).add_arguments(sub)
    args = parser.parse_args(words)
    if args.kind in ("compare", "report"):
        return args
    for name, least in (("samples", 2), ("threads", 1), ("minutes", 0.01)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"argument --{name}: got {value:g}, needs at least {least:g}")
    args.dtypes = [DTYPES[name] for name in args.dtype] if args.dtype else None
    args.samples = args.samples or (QUICK_SAMPLES if args.quick else SAMPLES)
    return args


if __name__ == "__main__":
    sys.exit(main())
