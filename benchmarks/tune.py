"""`bench tune`: which launch of each kernel is fastest, and what can be said of each before a GPU has run it.

    sssd-fast bench tune                                      on a CUDA device: every candidate measured
    sssd-fast bench tune --predict sm_90 --op restore_tokens  anywhere: every candidate compiled and counted

The first row of a table is the launch that the package chooses now, the others are those of candidates.py. Each is compiled by the
path of tools/lint_kernels.py; one that breaks its rules (spills, too much shared memory) is refused. The occupancy is that of
occupancy.py. The bound is the time in which memory can move the bytes that the kernel must move; "k cycles" is the other one: the
thousands of clock cycles that the multiprocessors need to issue every instruction once (predictions only). + : loops repeat some.

On a device a candidate's results and gradients must first pass the gate of `bench kernels` (measure.py: as close to fp64 as
twice plain eager PyTorch); then the kernel's launcher is timed, all candidates in turns. "keep": no candidate is faster than the
chosen launch by more than 2 % and by more than noise. A candidate that fails has a row with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mae_kernels import _samples, backend
from mae_kernels._runtime import (
    HAVE_TRITON,
    INTERPRET,
    architecture,
    record_launches,
)
from sssd_fast.errors import SssdError
from sssd_fast.run.log import Console
from tools import lint_kernels as lint

from . import results
from .attention import Attention, attention_op
from .bench import Bench, attempt, forget, reason, time_rows
from .candidates import AS_IS, Candidate, Site, choosing, sites
from .formats import NONE, percent, rate_text, size_text, time_text
from .kernels import cast, results_of, truth
from .machine import NAMES, slug, sources_hash
from .measure import LARGEST_FLUSH, PASSES, SAMPLES, Cache, Call, allowed_error, error_of
from .occupancy import ARCHITECTURES, code_of, occupancy, waves
from .op import Inputs, Op
from .registry import OPS
from .results import Results, Row
from .shapes import MODELS

SCHEMA = "sssd_fast.tune/1"  # rows as in results.py; provider = the launch, more = what the compiler and occupancy.py say of it
META = torch.device("meta")
MODEL, BATCH = "ViT-B", 256
NAMED = list(dict.fromkeys(site.op for site in sites(MODELS[MODEL])))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [f"sm_{arch}" for arch in ARCHITECTURES]
    parser.add_argument(
        "--op", nargs="+", choices=NAMED, metavar="OP", help=f"of: {', '.join(NAMED)}"
    )
    parser.add_argument(
        "--batch", type=int, default=BATCH, metavar="N", help=f"images of {MODEL} (default {BATCH})"
    )
    parser.add_argument(
        "--predict",
        choices=names,
        metavar="ARCH",
        help=f"compile and count, needs no GPU; of: {', '.join(names)}",
    )
    parser.add_argument(
        "--bandwidth",
        type=float,
        metavar="TB/S",
        help="with --predict: of a copy (default: data sheet)",
    )
    parser.add_argument(
        "--sms",
        type=int,
        metavar="N",
        help="with --predict: multiprocessors (default: of the same card)",
    )
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="begin no new candidate after so long"
    )
    parser.add_argument(
        "--json",
        metavar="FILE.json",
        help="default: a new file in results/tune; a prediction is written only if asked",
    )


class Target(NamedTuple):
    """What rows are reckoned for."""

    arch: int
    sms: int
    bytes_per_s: float
    listed: bool = True  # machine code is listed and counted: half a second for a launch, more than it takes to time it

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.arch < 80 else torch.bfloat16


def main(args: argparse.Namespace, words: Sequence[str], path: Path | None) -> int:
    for name, least in (("batch", 1), ("sms", 1), ("minutes", 0.01), ("bandwidth", 0.001)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise SssdError(f"--{name} is {value:g}, needs at least {least:g}")
    if not HAVE_TRITON:
        raise SssdError(
            "tune needs triton, which is not installed: CUDA builds of torch bring it, else pip install triton"
        )
    if INTERPRET:
        raise SssdError(
            "tune needs triton's compiler, and TRITON_INTERPRET=1 replaces it; unset it"
        )
    found = [
        site
        for site in sites(MODELS[MODEL].at(args.batch))
        if args.op is None or site.op in args.op
    ]
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    with Console() as console:
        return (measure if args.predict is None else predict)(
            console, found, args, deadline, words, path
        )


def predict(
    console: Console, found: list[Site], args: argparse.Namespace, deadline: float | None, words: Sequence[str], path: Path | None
) -> int:  # fmt: skip
    arch = int(args.predict.removeprefix("sm_"))
    card = ARCHITECTURES[arch]
    target = Target(arch, args.sms or card.sms, 1e12 * (args.bandwidth or card.tb_per_s))
    where = card.card if args.sms is None and args.bandwidth is None else "as asked for"
    console.rule(
        f"predicted for sm_{arch} ({where}: {target.sms} SMs, {rate_text(target.bytes_per_s, 'B/s')})"
    )
    document = None
    if path is not None:
        asked = {
            "predicted_for": f"sm_{arch}",
            "sms": target.sms,
            "bytes_per_s": target.bytes_per_s,
        }
        document = _document(torch.device("cpu"), target, words, path, ceilings={}, settings=asked)
    with document or nullcontext():
        for site in _with_kernels(console, found, target):
            rows = list(site_rows(console, site, target, deadline))
            if document is not None:
                document.add(*rows)
            show(console, site, target, rows)
    console.info(
        "nothing was run"
        if document is None
        else f"nothing was run; figures: {os.path.relpath(document.path)}"
    )
    return 0


def measure(
    console: Console, found: list[Site], args: argparse.Namespace, deadline: float | None, words: Sequence[str], path: Path | None
) -> int:  # fmt: skip
    if args.sms is not None or args.bandwidth is not None:
        raise SssdError(
            "--sms and --bandwidth are of a prediction, needs --predict beside them; a device is asked and measured"
        )
    if not torch.cuda.is_available():
        raise SssdError(
            "tune measures on a CUDA device, and torch finds none here (see `sssd-fast doctor`); "
            "`--predict sm_90` compiles and counts on any machine"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    target = Target(architecture(device), properties.multi_processor_count, 0.0, listed=False)
    if path is None:
        now = datetime.datetime.now(datetime.timezone.utc)
        path = results.FOLDER / "tune" / f"tune-{slug(properties.name)}-{now:%Y%m%d-%H%M%S}.json"
    with console.announce("what a large copy reaches here"):
        document = _document(
            device, target, words, path, settings={"samples": SAMPLES, "passes": PASSES}
        )
    target = target._replace(bytes_per_s=document.head["ceilings"]["copy_bytes_per_s"])
    console.rule(
        f"{properties.name}: {target.sms} SMs, a copy moves {rate_text(target.bytes_per_s, 'B/s')}"
    )
    if target.arch not in ARCHITECTURES:
        console.warn(
            f"sm_{target.arch} has no limits in occupancy.py: registers and occupancy are left out"
        )
    # the largest flush keeps the device busy while the host prepares a launch
    bench = Bench(device, console, document, Cache(device, LARGEST_FLUSH), deadline=deadline)
    with document:
        measure_sites(bench, _with_kernels(console, found, target), target)
    console.info(f"figures: {os.path.relpath(document.path)}")
    return 0


def _document(
    device: torch.device, target: Target, words: Sequence[str], path: Path, **more: Any
) -> Results:
    document = Results("tune", device, [target.dtype], words=words, path=path, **more)
    document.head["schema"] = SCHEMA
    return document


def _with_kernels(console: Console, found: Sequence[Site], target: Target) -> list[Site]:
    """Without those whose op starts no kernel on this architecture."""
    oldest = {site.op: _samples.OPS[site.op].oldest for site in found}
    refused = {op for op in oldest if target.arch < oldest[op]}
    for op in sorted(refused):
        console.info(f"{op}: has no kernels before sm_{oldest[op]}")
    return [site for site in found if site.op not in refused]


# ---- rows ----


def op_of(site: Site, device: torch.device, dtype: torch.dtype) -> Op:
    return (
        attention_op(site.shape, device, dtype)
        if isinstance(site.shape, Attention)
        else OPS[site.op]
    )


def inputs_of(site: Site, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Those of `bench kernels`; on the meta device their shapes alone."""
    op = op_of(site, device, dtype)
    if (
        device.type == "meta" and site.op == "crop_resize"
    ):  # the op's own are random images, made on the CPU
        made = {"pixels": torch.empty(10**8, dtype=torch.uint8, device=device)}
        for name, size in (("offsets", (1,)), ("shapes", (2,)), ("boxes", (4,)), ("flips", (1,))):
            made[name] = torch.empty(
                (site.shape.batch, *size), dtype=torch.int64, device=device
            ).squeeze(1)
        return {**made, "flips": made["flips"].bool()}
    return cast(op, op.make(site.shape, device), dtype)


def site_rows(
    console: Console,
    site: Site,
    target: Target,
    deadline: float | None,
    check: Callable[[Candidate, Row], None] | None = None,
) -> Iterator[Row]:
    """A row for each different launch, the chosen one first; `check` runs it and raises where it is wrong."""
    call, known = site.call(inputs_of(site, META, target.dtype)), set[str]()
    candidates = (AS_IS, *site.candidates)
    for number, candidate in enumerate(candidates):
        if number and deadline is not None and time.monotonic() >= deadline:
            console.warn(
                f"{site.name}: time was up before {len(candidates) - number} of {len(candidates)} candidates"
            )
            return
        row = Row(site.op, site.shape.name, NAMES[target.dtype], site.phase, f"candidate {number}")
        row.sizes = site.shape.sizes()
        row.sources = sources_hash(site.op)
        row.bytes = site.cost(site.shape, target.dtype.itemsize)
        row.more = {"kernel": site.kernel, "chosen": candidate is AS_IS}
        ran = attempt(row, partial(examine, row, site, candidate, call, target))
        if row.provider in known:  # on this architecture it is the same launch as another
            continue
        known.add(row.provider)
        if ran and check is not None:
            attempt(row, partial(check, candidate, row))
        yield row


def examine(row: Row, site: Site, candidate: Candidate, call: Call, target: Target) -> None:
    """Names the launch and fills what the compiler makes of it. Raises SssdError where it breaks the lint's rules."""
    with backend("triton"), record_launches(target.arch), choosing(site, candidate) as started:
        call()
    if not started:
        raise SssdError(f"the launcher started no {site.kernel}")
    row.provider = started[0].label
    if target.arch not in ARCHITECTURES or INTERPRET:
        return
    first = started[0]
    found = lint.judge(site.op, first.launch, target.arch, wide=False)
    fits = occupancy(target.arch, found.registers, found.shared, first.warps)
    row.more |= {
        "registers": found.registers,
        "stack": found.stack,
        "shared": found.shared,
        "widest": found.widest,
    }
    row.more |= {
        "blocks": fits.blocks,
        "warps": fits.warps,
        "of_warps": fits.of_warps,
        "limit": fits.limit,
    }
    if found.problems or not fits.blocks:
        raise SssdError(
            f"refused: {'; '.join(found.problems) or f'no block fits an SM ({fits.limit})'}"
        )
    row.more["waves"] = waves(first.programs, target.sms, fits.blocks)
    if target.listed:
        code = code_of(first.launch, target.arch)
        cycles = code.cycles(first.programs * first.warps, target.sms)
        row.more |= {"instructions": code.instructions, "varies": code.varies, "cycles": cycles}


# ---- on a device ----


def measure_sites(bench: Bench, found: Sequence[Site], target: Target) -> None:
    groups = [list(group) for _, group in groupby(found, key=lambda site: (site.op, site.shape))]
    with bench.console.progress(len(groups), "tune") as progress:
        for number, members in enumerate(groups):
            try:
                measure_op(bench, members, target)
                forget(bench.device)
            except Exception as error:  # noqa: BLE001 - one op's failure does not end the run
                bench.console.error(f"{members[0].op}: {reason(error)}")
                bench.leave_out(f"{members[0].op}: {reason(error)}")
            progress.update(number + 1, case=members[0].op)


def measure_op(bench: Bench, found: Sequence[Site], target: Target) -> None:
    """The sites of one op at one shape, which share inputs and truth."""
    if bench.time_is_up():
        return leave_out(bench, found)
    torch.manual_seed(0)
    op, dtype = op_of(found[0], bench.device, target.dtype), target.dtype
    inputs = inputs_of(found[0], bench.device, dtype)
    exact, eager = truth(op, found[0].shape, inputs)
    allowed = op.tolerance or allowed_error(eager, dtype)
    ours = op.providers["ours"]
    for number, site in enumerate(found):
        if bench.time_is_up():
            return leave_out(bench, found[number:])
        call, calls, rows = site.call(inputs), dict[str, Call](), list[Row]()

        def check(
            candidate: Candidate,
            row: Row,
            site: Site = site,
            call: Call = call,
            calls: dict[str, Call] = calls,
        ) -> None:
            with backend("triton"), choosing(site, candidate) as started:
                row.error = error_of(results_of(op, site.shape, inputs, ours, ours.call), exact)
            row.allowed = allowed
            if not started:
                raise SssdError(f"the op started no {site.kernel}")
            if not row.error <= allowed:
                raise SssdError(
                    f"its results are off by {row.error:.1e} of the largest, {allowed:.1e} are allowed"
                )
            calls[row.provider] = partial(_chosen, site, candidate, call)

        for row in site_rows(bench.console, site, target, bench.deadline, check):
            rows.append(row)
            bench.results.draft(rows)
        time_rows(bench, {row.provider: row for row in rows}, calls, ours=rows[0].provider)
        decide(rows)
        bench.results.add(*rows)
        show(bench.console, site, target, rows)


def leave_out(bench: Bench, found: Sequence[Site]) -> None:
    for site in found:
        bench.leave_out(site.name)


def _chosen(site: Site, candidate: Candidate, call: Call) -> object:
    with choosing(site, candidate):
        return call()


def decide(rows: Sequence[Row]) -> None:
    """Marks the fastest row, and says in the chosen one whether to keep it."""
    timed = [row for row in rows if row.time is not None]
    if timed:
        best = min(timed, key=lambda row: row.time.median_us if row.time else 0.0)
        best.more["best"] = True
        beaten = rows[0].time is None or (
            best.versus is not None and best.versus.verdict == "faster"
        )
        rows[0].more["verdict"] = f"change to {best.provider}" if beaten else "keep"


# ---- tables ----


def show(console: Console, site: Site, target: Target, rows: Sequence[Row]) -> None:
    bytes_ = site.cost(site.shape, target.dtype.itemsize)
    bound = time_text(1e6 * bytes_ / target.bytes_per_s)
    title = f"{site.name}, {NAMES[target.dtype]}: {size_text(bytes_)} to move, at least {bound}"
    cells = [_cells(row, target) for row in rows if row.reason is None]
    used = [
        name
        for name in _cells(rows[0], target)
        if any(cell[name] not in ("", NONE) for cell in cells)
    ]
    console.table(title, used, [[cell[name] for name in used] for cell in cells])
    for row in rows:
        if row.reason is not None:
            console.info(
                f"  {row.provider}{' (chosen)' if row.more['chosen'] else ''}: {row.reason}"
            )
    if "verdict" in rows[0].more:
        console.info(f"  {rows[0].more['verdict']}")


def _cells(row: Row, target: Target) -> dict[str, str]:
    more = row.more
    reached = row.bytes and row.time and row.bytes / (row.time.median_us / 1e6) / target.bytes_per_s
    marks = [mark for mark in ("chosen", "best") if more.get(mark)]
    return {
        "launch": row.provider,
        "registers": str(more.get("registers", NONE)),
        "shared B": str(more.get("shared", NONE)),
        "access B": str(more.get("widest", NONE)),
        "blocks": str(more.get("blocks", NONE)),
        "warps": f"{more['warps']} of {more['of_warps']}" if "warps" in more else NONE,
        "limit": more.get("limit", NONE),
        "waves": f"{more['waves']:.1f}" if "waves" in more else NONE,
        "instructions": f"{more['instructions']}{'+' * more['varies']}"
        if "instructions" in more
        else NONE,
        "k cycles": f"{more['cycles'] / 1000:.0f}" if more.get("cycles") else NONE,
        "median": time_text(row.time.median_us) if row.time else NONE,
        "of copy": percent(reached) if reached else NONE,
        "/ chosen": f"{row.versus.ratio:.2f} {row.versus.verdict}" if row.versus else NONE,
        "": ", ".join(marks),
    }
