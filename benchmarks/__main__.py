"""`sssd-fast bench`, also `python -m benchmarks`: measure ops, attention, the step, loaders and memory; compare and report.

    kernels     every op against eager PyTorch as published and as tuned, torch.compile of that, and library calls
    attention   self-attention at the lengths of masked autoencoders against every SDPA backend and xformers
    step        images per second, MFU and memory of a whole training step against published models and transformers
    memory      memory of a step over the batch, and the largest batch under a cap
    loader      images per second of each loader
    all         all of these within --minutes, the most telling first
    tune        which launch of each kernel is fastest; --predict counts registers and occupancy without a GPU
    compare     two result files: what became slower
    report      README tables, docs/benchmarks.md and its pictures from the files in benchmarks/results

Every run writes one JSON file, anew after each row. Exit codes: 0, 1 (compare: something became slower; report --check:
a page is out of date), 2 bad arguments or files.
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
from types import ModuleType
from typing import Any

import torch

from sssd_fast.errors import DependencyError, SssdError
from sssd_fast.run.log import Console, duration

from . import terminal, tune
from .bench import QUICK_SAMPLES, Bench
from .machine import DTYPES
from .measure import PASSES, SAMPLES, Cache, cache_bytes
from .results import FOLDER, Results

MEASURED = {
    "kernels": "each op of mae_kernels against eager, compiled and library code",
    "attention": "self-attention against every SDPA backend and xformers",
    "step": "a whole training step: images per second, MFU, memory, loss",
    "memory": "memory over the batch, and the largest batch under a cap",
}
# What `all` measures, the most telling first: kind, its arguments by device, and the share of the time at which it must end. A kind that
# comes again goes on in its file with what is missing there.
STAGES: tuple[tuple[str, dict[str, list[str]], float], ...] = (
    ("attention", {"cuda": ["--shape", "ViT-B encoder", "ViT-B decoder", "--batch", "256"]}, 0.15),
    ("kernels", {"cuda": ["--shape", "ViT-B", "--batch", "256"]}, 0.45),
    ("step", {}, 0.7),
    ("memory", {}, 0.82),
    ("loader", {}, 0.88),
    ("attention", {}, 0.91),
    ("kernels", {}, 0.95),  # what is begun before is finished: the rest of the time is for that
)
NOT_ENOUGH_S = 10.0  # a stage with less time left is not begun


def main(words: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if words is None else words)
    # torch's profiler, which counts memory on the CPU, greets at each start
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    try:
        if words[:1] == ["loader"]:
            _loader(words[1:])
            return 0
        args = _parse(words)
        if args.kind in ("compare", "report"):
            return int(importlib.import_module(f".{args.kind}", __package__).main(args))
        if args.kind == "tune":
            return tune.main(args, words, _path(args))
        return _all(args, words) if args.kind == "all" else _measure(args, words)
    except SssdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the rows measured so far are in the file", file=sys.stderr)
        return 130


# ---- measuring ----


def _measure(args: argparse.Namespace, words: Sequence[str]) -> int:
    with ExitStack() as stack:
        console = _prepare(args, stack)
        results = stack.enter_context(_open(args.kind, args, words, console))
        _run(
            args.kind,
            args,
            results,
            console,
            None if args.minutes is None else time.monotonic() + 60 * args.minutes,
        )
        _show(console, results)
    return 0


def _all(args: argparse.Namespace, words: Sequence[str]) -> int:
    """A kind that fails is told, and does not stop the others. 2 where any failed."""
    started, failed = time.monotonic(), []
    with ExitStack() as stack:
        console, opened = _prepare(args, stack), dict[str, Results]()
        for kind, more, share in STAGES:
            end = started + 60 * args.minutes * share
            if time.monotonic() > end - NOT_ENOUGH_S:
                console.warn(
                    f"{kind}: no time left for this part; `sssd-fast bench {kind}` measures it alone"
                )
                continue
            try:
                if kind == "loader":
                    _loader(["--device", args.device, "--channels", "1", *["--quick"] * args.quick])
                    continue
                part = _parse(
                    [kind, *_common_words(args), *more.get(torch.device(args.device).type, [])]
                )
                if kind not in opened:
                    known = next(iter(opened.values())).head["ceilings"] if opened else None
                    opened[kind] = stack.enter_context(_open(kind, part, words, console, known))
                _run(kind, part, opened[kind], console, end)
            except DependencyError as error:
                console.warn(f"{kind} is left out: {error}")
            except Exception as error:  # noqa: BLE001 - told in full, and the other parts still have their turn
                console.error(f"{kind}: {error}")
                if not isinstance(error, SssdError):
                    traceback.print_exc()
                failed.append(kind)
        for results in opened.values():
            _show(console, results)
        console.info(f"all: {duration(time.monotonic() - started)} of {args.minutes:g} minutes")
    return 2 if failed else 0


def _loader(words: Sequence[str]) -> None:
    """Raises DependencyError where the trainer's packages are missing."""
    try:
        from . import loader
    except ImportError as error:
        raise DependencyError(
            f"bench loader needs {error.name}, which is not installed: pip install '.[train]'"
        ) from error
    loader.run(words)


def _open(
    kind: str,
    args: argparse.Namespace,
    words: Sequence[str],
    console: Console,
    ceilings: dict[str, Any] | None = None,
) -> Results:
    device = torch.device(args.device)
    dtypes = args.dtypes or [torch.bfloat16 if device.type == "cuda" else torch.float32]
    with console.announce(f"{kind}: what a large copy and a large product reach here"):
        settings = {"samples": args.samples, "passes": PASSES, "flushed_bytes": cache_bytes(device)}
        path = _path(args)
        return Results(
            kind,
            device,
            dtypes,
            words=words,
            path=path,
            quick=args.quick,
            settings=settings,
            ceilings=ceilings,
        )


def _run(
    kind: str, args: argparse.Namespace, results: Results, console: Console, deadline: float | None
) -> None:
    device, only = results.device, args.provider or []
    bench = Bench(
        device,
        console,
        results,
        Cache(device),
        args.quick,
        args.samples,
        deadline=deadline,
        only=only,
    )
    importlib.import_module(f".{kind}", __package__).run(args, bench)


def _show(console: Console, results: Results) -> None:
    head = results.head
    terminal.show(console, head, results.rows)
    for provider, why in head["missing"].items():
        console.info(f"not measured: {provider}: {why}")
    if head["left_out"]:
        console.warn(f"time was up before: {'; '.join(head['left_out'])}")
    console.info(f"figures: {os.path.relpath(results.path)}")


def _prepare(args: argparse.Namespace, stack: ExitStack) -> Console:
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SssdError(
            "--device is cuda, and torch finds no CUDA device here (see `sssd-fast doctor`); use --device cpu"
        )
    threads = torch.get_num_threads()
    stack.callback(torch.set_num_threads, threads)
    if args.threads:
        torch.set_num_threads(args.threads)
    return stack.enter_context(Console())


def _path(args: argparse.Namespace) -> Path | None:
    if args.json is None:
        return None
    path = Path(args.json)
    if path.suffix != ".json":
        raise SssdError(f"--json is {args.json!r}, needs a file name that ends in .json")
    return path


# ---- arguments ----


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_SAMPLES} samples, few shapes: does it work here?",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ...",
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on the CPU"
    )
    parser.add_argument(
        "--provider", nargs="+", metavar="P", help="only these, by their names in the table"
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help=f"of each provider and pass (default {SAMPLES})"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of torch on the CPU")
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="begin nothing new after so long"
    )


def _common_words(args: argparse.Namespace) -> list[str]:
    """The common arguments of `all` for one of its parts."""
    words = ["--device", args.device]
    words += ["--quick"] if args.quick else []
    for name in ("dtype", "provider"):
        words += [f"--{name}", *getattr(args, name)] if getattr(args, name) else []
    return [*words, *(["--samples", str(args.samples)] if args.samples else [])]


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Arguments with their defaults, which depend on each other."""
    parser = _parser()
    args = parser.parse_args(words)
    if args.kind in ("compare", "report", "tune"):
        return args
    for name, least in (("samples", 2), ("threads", 1), ("minutes", 0.01)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"argument --{name}: got {value:g}, needs at least {least:g}")
    args.dtypes = [DTYPES[name] for name in args.dtype] if args.dtype else None
    args.samples = args.samples or (QUICK_SAMPLES if args.quick else SAMPLES)
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sssd-fast bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, text in MEASURED.items():
        sub = kinds.add_parser(kind, help=text, description=text)
        _common(sub)
        sub.add_argument(
            "--json",
            metavar="FILE.json",
            help=f"default: a new file in {FOLDER.parent.name}/{FOLDER.name}",
        )
        module: ModuleType = importlib.import_module(f".{kind}", __package__)
        module.add_arguments(sub)
    kinds.add_parser(
        "loader", help="images per second, pixels and memory of the loaders", add_help=False
    )
    sub = kinds.add_parser("all", help="all of these within a time, the most telling first")
    _common(sub)
    sub.set_defaults(minutes=9.0)
    own = {
        "tune": "which launch of each kernel is fastest",
        "compare": "what became slower from A to B",
        "report": "tables and pictures from results",
    }
    for kind, text in own.items():
        sub = kinds.add_parser(kind, help=text, description=text)
        importlib.import_module(f".{kind}", __package__).add_arguments(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main())
