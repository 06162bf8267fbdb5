"""Time launch parameters of each kernel on this GPU; print a table and write a file.

    python tools/tune.py [--op OP ...] [--batch N] [--minutes M] [--out DIR]

The first row of a table is the launch that mae_kernels selects now, the others are candidates:
other tile sizes and numbers of warps. A candidate's results and gradients must pass the correctness
check of the benchmarks; then the whole op (forward, or forward with backward) is captured in a CUDA
graph with that launch and its replay is timed, all candidates in alternating order. "keep": no
candidate is faster by more than 2 % and by more than noise.

`choosing` is the only way to try a choice: for the duration of a `with` block it replaces the
names by which the op's module selects (rows_per_program, TILE, FORWARD, ...) and the warps of one
kernel. The op's own launcher then computes grid and constants as always. Ops are not compiled here,
since compiled code would keep the choice with which it was traced. num_stages is not
tried: the compiler makes the same code of these kernels with 1, 3 or 5.
linear_reconstruction_loss launches the kernels of masked_reconstruction_loss and is not tried
separately.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / name) for name in ("", "kernels")]


from benchmarks import results  # noqa: E402
from benchmarks.harness import (  # noqa: E402
    BOTH,
    FORWARD,
    Bench,
    Calls,
    attempt,
    forget,
    gate,
    time_rows,
    truth,
)
from benchmarks.ops import attention_sample, op_of, samples  # noqa: E402
from benchmarks.race import Cache  # noqa: E402
from benchmarks.results import NAMES, Results, Row, slug  # noqa: E402
from benchmarks.tables import tables  # noqa: E402
from mae_kernels import Sample, backend  # noqa: E402
from mae_kernels._runtime import HAVE_TRITON, INTERPRET, Launch, architecture  # noqa: E402
from mae_kernels.short_attention import ROWS_KERNEL_TOKENS, Sizes  # noqa: E402
from sssd_fast.errors import SssdError  # noqa: E402
from sssd_fast.run.log import Console  # noqa: E402

# constants that a choice sets, in the order of a label
LAUNCHED = ("T0", "T1", "T2", "TILE", "BLOCK_H", "BLOCK_W", "ROWS", "BLOCK_D", "BLOCK_F")
USUAL_WARPS = 4  # of a launch without num_warps: Triton's default
BATCH = 256
# names of samples(); of the other ops the first one
SAMPLES = {"embed_patches": "B/16", "gelu_linear": "encoder B/16", "crop_resize": "rgb"}


@dataclass(frozen=True)
class Candidate:
    """What is in force inside `choosing`: names of the op's module, and warps. None = unchanged."""

    names: dict[str, Any] = field(default_factory=dict)
    warps: int | None = None


AS_IS = Candidate()


@dataclass(frozen=True)
class TunedKernel:
    """A kernel, the call and phase in which it runs, and the launches to try."""

    sample: Sample
    phase: str
    kernel: str
    module: ModuleType
    candidates: tuple[Candidate, ...]

    @property
    def name(self) -> str:
        return f"{self.sample} {self.phase}, {self.kernel}"


class Started(NamedTuple):
    """A launch as it was made."""

    grid: tuple[int, ...]
    launch: Launch

    @property
    def label(self) -> str:
        """The choice in words, from the launch itself; x: number of programs."""
        constants = self.launch.constants
        words = [f"{name}={constants[name]}" for name in LAUNCHED if constants.get(name)]
        warps = constants.get("num_warps", USUAL_WARPS)
        return " ".join([*words, f"warps={warps}", f"x{math.prod(self.grid)}"])


@contextmanager
def choosing(tuned: TunedKernel, candidate: Candidate) -> Iterator[list[Started]]:
    """Inside the block the module selects as the candidate says; launches of the kernel are listed.

    Raises AttributeError if the module has no such name: then the op would not read it.
    """
    real, started = tuned.module.launch, list[Started]()

    def launch(
        kernel: Any, grid: tuple[int, ...], on: Tensor, *args: Any, **constants: Any
    ) -> None:
        if kernel.fn.__name__.strip("_") == tuned.kernel:
            if candidate.warps is not None:
                constants["num_warps"] = candidate.warps
            started.append(Started(grid, Launch(kernel, args, constants)))
        real(kernel, grid, on, *args, **constants)

    names = {"launch": launch, **candidate.names}
    before = {name: getattr(tuned.module, name) for name in names}
    try:
        _set(tuned.module, names)
        yield started
    finally:
        _set(tuned.module, before)


def _set(module: ModuleType, names: dict[str, Any]) -> None:
    """Replaces names of a module, and forgets what it chose before."""
    for name, value in names.items():
        setattr(module, name, value)
    for value in list(vars(module).values()):
        if hasattr(value, "cache_clear"):
            value.cache_clear()


# ---- kernels and candidates ----


def tuned_kernels() -> list[TunedKernel]:
    """Most important first: attention, losses, restoring, patches, the rest."""
    found = [*_attention()]
    chosen = {sample.op: sample for sample in reversed([*samples("ops")])}
    chosen |= {s.op: s for s in samples("ops") if s.name == SAMPLES.get(s.op)}

    def add(op: str, module: str, phase: str, kernel: str, tried: Sequence[Candidate]) -> None:
        # functions of the package hide some of its modules, so they are imported by name
        place = importlib.import_module(f"mae_kernels.{module}")
        found.append(TunedKernel(chosen[op], phase, kernel, place, tuple(tried)))

    losses, forward, backward = "_loss_kernels", "losses_kernel", "losses_backward_kernel"
    op = "masked_reconstruction_loss"
    tried = tiles((1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (4, 2), (4, 4), (4, 8))
    add(op, losses, FORWARD, forward, tried)
    add(op, losses, BOTH, backward, tried)

    op = "distillation_loss"
    groups = ((128, 4), (128, 8), (128, 16), (64, 8), (256, 4), (256, 8))
    tried = [Candidate({"FORWARD_GROUPS": count}, warps) for count, warps in groups]
    add(op, losses, FORWARD, forward, tried)
    add(op, losses, BOTH, backward, [Candidate(warps=warps) for warps in (4, 8, 16)])

    tried = [_merged(*one) for one in ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 8))]
    add("sssd_loss", losses, FORWARD, forward, tried)
    add("sssd_loss", losses, BOTH, backward, tried)

    rows: tuple[tuple[int, ...], ...] = ((1, 1), (1, 2), (2, 1), (2, 2), (4, 4), (8, 4), (8, 8))
    add("restore_tokens", "restore", FORWARD, "restore_kernel", tiles(*rows, (16, 8), block=512))
    walks = ((4, 4, 256), (4, 4, 1024), (4, 4, 2048), (4, 2, 2048), (8, 8, 512), (8, 8, 1024))
    tried = tiles(*walks, (16, 8, 1024), block=512)
    add("restore_tokens", "restore", BOTH, "restore_backward_kernel", tried)

    tried = tiles((1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (2, 8), (4, 4), (4, 8))
    add("gather_patches", "patches", FORWARD, "gather_kernel", tried)
    tried = tiles((2, 1), (4, 2), (4, 4), (8, 2), (8, 4), (8, 8), (16, 8), block=256)
    add("embed_patches", "patches", FORWARD, "add_positions_kernel", tried)

    rows = ((1, 1), (2, 2), (2, 4), (4, 2), (4, 8), (8, 4))
    tried = tiles(*rows, block=512) + tiles((1, 2), block=1024)
    add("gelu_linear", "gelu_linear", FORWARD, "gelu_kernel", tried)
    walks = ((4, 8, 1024), (4, 8, 2048), (2, 4, 1024), (2, 4, 2048), (4, 4, 1024), (8, 8, 512))
    tried = tiles(*walks, (8, 16, 512), block=512)
    add("gelu_linear", "gelu_linear", BOTH, "gelu_backward_kernel", tried)

    tried = [Candidate(warps=warps) for warps in (1, 2, 4, 8)]
    add("random_masking", "masking", FORWARD, "masking_kernel", tried)
    shapes = ((8, 64, 4, 1), (8, 128, 4, 1), (8, 128, 4, 2), (16, 64, 8, 1), (16, 128, 4, 2))
    tried = [
        Candidate({"TILE": one[:3]}, one[3]) for one in (*shapes, (4, 128, 4, 1), (8, 32, 4, 1))
    ]
    add("crop_resize", "crop_resize", FORWARD, "crop_resize_kernel", tried)
    return found


def tiles(*choices: tuple[int, ...], block: int | None = None) -> list[Candidate]:
    """(rows of a program, warps, number of programs if the kernel loops over its rows).

    block: columns of a program.
    """
    return [_tile(block, *choice) for choice in choices]


def _tile(block: int | None, rows: int, warps: int, programs: int | None = None) -> Candidate:
    names: dict[str, Any] = {"rows_per_program": lambda *width: (rows, warps)}
    names |= {} if block is None else {"column_block": lambda width: block}
    return Candidate(names | ({} if programs is None else {"BACKWARD_PROGRAMS": programs}), warps)


def _merged(rows: int, warps: int) -> Candidate:
    """The warps of the kernels of sssd_loss are the larger number of both losses'."""
    own: dict[str, Any] = {"rows_per_program": lambda width: (rows, warps)}
    return Candidate(own | {"_warps": lambda width, shared: warps})


def _attention() -> Iterator[TunedKernel]:
    """Encoder and decoder of ViT-B."""
    module = importlib.import_module("mae_kernels.short_attention")
    for tokens, heads, width in ((50, 12, 64), (197, 16, 32)):
        sample = attention_sample(tokens, heads, width)
        short = tokens <= ROWS_KERNEL_TOKENS  # one kernel takes the sequence in one piece
        cuts = (False,) if tokens <= 128 else (True, False)
        rows = ((16, 2), (32, 2), (32, 4), (64, 2), (64, 4), (64, 8), (128, 8))[
            slice(6) if short else slice(2, 7)
        ]
        forward = [_sizes("FORWARD", cut, *pair) for cut in cuts for pair in rows]
        yield TunedKernel(sample, FORWARD, "attention_kernel", module, tuple(forward))
        keys = ((16, 4), (16, 8), (32, 4), (32, 8), (64, 8))
        backward = [_sizes("BACKWARD", cut, *pair) for cut in cuts for pair in keys]
        kernel = "backward_keys_kernel"
        if short:
            kernel, backward = "backward_rows_kernel", [Candidate(warps=n) for n in (2, 4, 8)]
        yield TunedKernel(sample, BOTH, kernel, module, tuple(backward))


def _sizes(table: str, split: bool, rows: int, warps: int) -> Candidate:
    """A table of one line, valid for all sequences that the kernels take."""
    return Candidate({table: (Sizes(80, 256, 128, split, rows, warps),)})


# ---- measuring ----


def measure(bench: Bench, tuned: TunedKernel, dtype: torch.dtype, batch: int) -> None:
    """Adds a row for each different launch, the current one first."""
    op = op_of(tuned.sample, bench.device, dtype, batch)
    inputs = op.inputs()
    exact, allowed = truth(op, inputs)
    calls = Calls(inputs, op.providers["ours"])
    rows: dict[str, Row] = {}
    timed = {}
    for number, candidate in enumerate((AS_IS, *tuned.candidates)):
        row = Row(op.sample.op, op.shape, NAMES[dtype], tuned.phase, f"candidate {number}")
        row.more = {"kernel": tuned.kernel, "current": candidate is AS_IS}

        def check(candidate: Candidate = candidate, row: Row = row) -> None:
            with choosing(tuned, candidate) as started:
                gate(bench, dict.fromkeys(op.phases, row), calls, exact, allowed)
            if not started:
                raise SssdError(f"the op started no {tuned.kernel}")
            row.provider = started[0].label

        attempt(row, check)
        if row.provider not in rows:  # else the same launch as another candidate
            rows[row.provider] = row
            timed[row.provider] = partial(_chosen, tuned, candidate, calls.timed[tuned.phase])
    current = next(iter(rows))
    time_rows(bench, rows, timed, ours=current)
    decide(list(rows.values()))
    bench.results.add(*rows.values())


def _chosen(tuned: TunedKernel, candidate: Candidate, call: Any) -> object:
    with choosing(tuned, candidate):
        return call()


def decide(rows: Sequence[Row]) -> None:
    """Sets the verdict of the first row, the current launch: keep it, or change to the fastest."""
    timed = [row for row in rows if row.time is not None]
    if not timed:
        return
    best = min(timed, key=lambda row: row.time.median_us if row.time else 0.0)
    faster = best.versus is not None and best.versus.verdict == "faster"
    change = rows[0].time is None or faster
    rows[0].more["verdict"] = f"change to {best.provider}" if change else "keep"


def main() -> int:
    names = list(dict.fromkeys(tuned.sample.op for tuned in tuned_kernels()))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--op", nargs="+", choices=names, metavar="OP", help=f"of: {', '.join(names)}")
    add("--batch", type=int, default=BATCH, metavar="N", help=f"images (default {BATCH})")
    add("--minutes", type=float, metavar="M", help="start no new kernel after M minutes")
    add("--out", type=Path, default=results.FOLDER / "tune", metavar="DIR")
    args = parser.parse_args()
    if not torch.cuda.is_available() or not HAVE_TRITON or INTERPRET:
        parser.error("needs a CUDA device and triton without TRITON_INTERPRET")
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = torch.float16 if architecture(device) < 80 else torch.bfloat16
    path = args.out / f"tune-{slug(torch.cuda.get_device_name(device))}.json"
    with Console() as console, backend("triton"):
        document = Results("tune", device, [dtype], sys.argv[1:], path)
        document.head["command"] = " ".join(["python tools/tune.py", *sys.argv[1:]])
        bench = Bench(device, console, document, Cache(device))
        bench.deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
        with document:
            for tuned in tuned_kernels():
                wanted = args.op is None or tuned.sample.op in args.op
                if wanted and not bench.time_is_up(tuned.name):
                    show(bench, tuned, dtype, args.batch)
        console.info(f"results: {document.path}")
    return 0


def show(bench: Bench, tuned: TunedKernel, dtype: torch.dtype, batch: int) -> None:
    """Measures one kernel and prints its table; an error does not stop the others."""
    before = len(bench.results.rows)
    try:
        with bench.console.announce(tuned.name):
            measure(bench, tuned, dtype, batch)
    except Exception as error:  # noqa: BLE001 - the kernels have nothing to do with each other
        bench.console.error(f"{tuned.name}: {error}")
        return
    rows = bench.results.rows[before:]
    for table in tables({**bench.results.head, "rows": rows}):
        bench.console.table(tuned.name, table.columns, table.cells)
    bench.console.info(f"{tuned.name}: {rows[0]['more'].get('verdict', 'nothing was timed')}")
    forget(bench.device)


if __name__ == "__main__":
    sys.exit(main())
