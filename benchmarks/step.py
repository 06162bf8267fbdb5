"""`sssd-fast bench step`: the whole training step of every provider, and where our gain comes from, one change at a time.

A provider is timed only after its losses over the first steps (with its own backward and updates between them) agree with those of
the plain model in a wider dtype, from equal weights on an equal batch with equal masks. A row has, beside its time: images per second;
mfu, the FLOPs of a plain masked autoencoder by sssd_fast.performance.costs.standard_flops over the product rate measured on this device;
peak_bytes and mb_per_image, the peak of a step above parameters, moments and batch, gradients included; the loss at the start and
after `--steps` steps; what was chosen, and why ("how").

Providers take turns sample by sample while all of them fit into the memory together; else each is built anew for each pass, one
after another, and "raced" in the row says which it was. The waterfall's rows are the same measurements under the name of what was
added, in order; a stage that this device cannot run stands there with its reason.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import machine, step_data, step_models
from .bench import OURS, Bench, attempt, forget, time_rows
from .measure import first_call, peak_bytes, race, summary, versus
from .results import Row
from .step_data import Data, Setup
from .step_models import TASKS, TrainStep

if TYPE_CHECKING:
    from sssd_fast.config import Config

# Largest relative difference of a loss from the reference's: fp32 against fp64, bf16 and fp16 against fp32. On the CPU, with cpu_smoke,
# losses differ by at most 4e-7, 1.1e-3 and 4e-5. Setting one tensor of the weights to zero (a norm's to one) moves the very first loss
# by more than 1e-4 for 98 of the 100 tensors; the gate jitter at later steps, too.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# Steps that the gate jitter at. fp16 begins with updates that the loss scale withholds, where the reference makes them.
GATE_STEPS = {torch.float32: 3, torch.bfloat16: 3, torch.float16: 1}
STEPS, QUICK_STEPS = 20, 5
QUICK = ("published", "plain", "plain compiled", "ours")
FIRST = (
    "ours",
    "published",
    "plain compiled",
    "ViTMAE",
)  # in this order, then the others: time may be up before the last
ALONE = (
    5  # samples of a provider right after its check, which stand in the file until the race is over
)
FITS = 0.85  # share of the free memory that providers may take together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="tiny, small, base, large, or a shipped configuration (default: base on CUDA, cpu_smoke elsewhere)"
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=int, nargs="+", metavar="N", help="images per step (default: 256 on CUDA, as configured elsewhere)"
    )  # fmt: skip
    parser.add_argument("--task", choices=TASKS, help="default: both")
    parser.add_argument(
        "--steps", type=int, metavar="N", help=f"steps whose losses are compared (default {STEPS}, with --quick {QUICK_STEPS})"
    )  # fmt: skip
    parser.add_argument(
        "--no-waterfall",
        action="store_true",
        help="leave out the gains one by one, as --quick and --provider do",
    )


def run(args: argparse.Namespace, bench: Bench) -> None:
    absent = step_models.missing(OURS)
    if absent:  # the weights of all come from our model, whose configuration needs it
        note_missing(
            bench, {name: absent for task in TASKS for name in step_models.PROVIDERS[task]}
        )
        return
    device = bench.device
    config = step_data.configuration(args.model, device)
    batches = args.batch or [256 if device.type == "cuda" else config.pretrain.batch_size]
    steps = args.steps or (QUICK_STEPS if bench.quick else STEPS)
    describe(bench, config, steps=steps)
    for dtype in args.dtypes or [step_data.default_dtype(device)]:
        for task in [args.task] if args.task else TASKS:
            for batch in batches[:1] if bench.quick else batches:
                setup = Setup(step_data.for_task(config, task), task, device, dtype, batch)
                if bench.time_is_up():
                    bench.leave_out(f"{task}, {setup.shape}, {machine.NAMES[dtype]}")
                    continue
                falls = batch == max(batches) and not (
                    args.no_waterfall or bench.quick or bench.only
                )
                measure(bench, setup, max(steps, GATE_STEPS[dtype]), waterfall=falls)


def describe(bench: Bench, config: Config, **more: Any) -> None:
    """Into the head of the results: what was trained."""
    from sssd_fast.config import to_dict

    tree = to_dict(config)
    bench.results.head["settings"] |= {
        name: tree[name] for name in ("model", "objective", "step")
    } | more


def note_missing(bench: Bench, reasons: dict[str, str]) -> None:
    """Into the head of the results: what takes no part, and why."""
    bench.results.head["missing"] |= reasons
    bench.results.save()


def providers(bench: Bench, task: str) -> list[str]:
    """Those that were asked for and that this machine has the packages for."""
    names = [name for name in step_models.PROVIDERS[task] if bench.wants(name)]
    cuda = bench.device.type == "cuda"
    if bench.quick and not bench.only:
        names = [name for name in names if name in QUICK and (cuda or "compiled" not in name)]
    reasons = {name: why for name in names if (why := step_models.missing(name))}
    if not cuda:
        reasons |= {name: "needs a CUDA device" for name in names if name in step_models.CUDA_ONLY}
    note_missing(bench, reasons)
    return [name for name in names if name not in reasons]


def by_weight(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def stages(device: torch.device) -> list[tuple[str, str]]:
    """(label, provider) of the waterfall. Where the ops' kernels do not run, what the compiler gets is the reference."""
    instead = {"ops compiled": "plain compiled"} if step_models.kernels_refused(device) else {}
    return [(label, instead.get(name, name)) for label, name in step_models.WATERFALL]


def measure(bench: Bench, setup: Setup, steps: int, *, waterfall: bool = False) -> None:
    """Adds the rows of one task, dtype and batch."""
    names = providers(bench, setup.task)
    falls = stages(bench.device) if waterfall else []
    contest = Contest(bench, setup, steps)
    for name in by_weight(dict.fromkeys([*names, *(name for _, name in falls)])):
        contest.admit(name)
    contest.race()
    rows = [contest.rows[name] for name in names if name in contest.rows]
    for order, (label, name) in enumerate(falls):
        if name in contest.rows:
            row, case = contest.rows[name], f"waterfall {setup.task}"
            more = {**row.more, "order": order, "measured_as": name}
            rows.append(replace(row, case=case, provider=label, versus=None, more=more))
    bench.results.add(*rows)


@dataclass
class Contest:
    """The providers of one task, dtype and batch: gate and loss curve one by one, then the race."""

    bench: Bench
    setup: Setup
    steps: int
    rows: dict[str, Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data, self.source = Data(self.setup), step_data.initial_model(self.setup.config)
        self.alive: dict[str, TrainStep] = {}
        self.together = True
        self.free = free_bytes(self.bench.device)
        self.reference: list[float] = []
        self.no_reference = Row("", "", "", "", "")
        attempt(self.no_reference, self._refer)

    def _refer(self) -> None:
        steps = GATE_STEPS[self.setup.dtype]
        self.reference = step_data.reference_losses(self.setup, self.data, self.source, steps)

    def admit(self, name: str) -> None:
        """Builds a provider, checks it and gives it a row; it stays alive for the race while all fit together."""
        bench = self.bench
        if bench.time_is_up():
            bench.leave_out(
                f"{self.setup.task}, {self.setup.shape}, {machine.NAMES[self.setup.dtype]}, {name}"
            )
            return
        self._try(name)
        if self.rows[name].reason == "out of memory" and self.alive:
            self._apart()
            self._try(name)
        if self.together and self._needed() > FITS * self.free:
            self._apart()
        if self.rows[name].reason is None and name in self.alive:
            attempt(self.rows[name], lambda: self._alone(name))
        if not self.together or self.rows[name].reason:
            self._drop(name)
        bench.results.draft(self.rows.values())

    def _try(self, name: str) -> None:
        setup = self.setup
        row = Row(setup.task, setup.shape, machine.NAMES[setup.dtype], "step", name, setup.sizes)
        row.sources = machine.sources_hash("step")
        row.allowed = ALLOWED[setup.dtype]
        row.more["batch"] = setup.batch
        self.rows[name] = row
        if self.no_reference.reason:
            row.reason = f"nothing to compare with: the reference {self.no_reference.reason}"
            return
        with self.bench.console.announce(
            f"{setup.task} {setup.shape} {row.dtype}: {name}, {self.steps} steps"
        ):
            attempt(row, lambda: self._check(name, row))

    def _check(self, name: str, row: Row) -> None:
        losses: list[Tensor] = []
        step = step_models.build(name, self.setup, self.data, self.source)
        row.more["how"] = step.how
        known = _graphs()
        row.first_call_s = first_call(lambda: losses.append(step()), self.bench.device)
        new, cached = (now - before for now, before in zip(_graphs(), known, strict=True))
        if (
            new or cached
        ):  # without this, first_call_s would not tell whether the compiler had to work
            row.more["graphs"] = f"{new} compiled, {cached} from the cache"
        # the second call: moments exist, and CUDA graphs are recorded, which later calls only replay
        row.peak_bytes = peak_bytes(lambda: losses.append(step()), self.bench.device)
        row.more["mb_per_image"] = row.peak_bytes / self.setup.batch / 1e6
        while len(losses) < self.steps:
            losses.append(step())
        gate(row, [float(loss) for loss in losses], self.reference)
        if row.reason is None:
            self.alive[name] = step

    def _alone(self, name: str) -> None:
        raced = race(
            {name: self.alive[name]}, self.bench.device, self.bench.cache, samples=ALONE, passes=1
        )
        self.rows[name].time = summary(raced[name])
        finish(self.bench, self.setup, self.rows[name], "alone: the run ended before the race")

    def _needed(self) -> float:
        """Bytes of all that are alive: weights and moments of each, what graphs keep, and the largest other peak."""
        held, largest = 0.0, 0.0
        for name, step in self.alive.items():
            held += step_models.held_bytes(step)
            peak = self.rows[name].peak_bytes or 0
            held, largest = (held + peak, largest) if step.graphs else (held, max(largest, peak))
        return held + largest

    def _apart(self) -> None:
        self.together = False
        self.alive.clear()
        forget(self.bench.device)

    def _drop(self, name: str) -> None:
        self.alive.pop(name, None)
        gc.collect()
        if self.bench.device.type == "cuda":
            torch.cuda.empty_cache()

    def race(self) -> None:
        rows = {name: row for name, row in self.rows.items() if row.reason is None}
        bench = self.bench
        peaks = {name: row.peak_bytes for name, row in rows.items()}
        for row in rows.values():
            row.time = None  # what it had alone
        if self.together and self._race_together(bench, rows):
            self._apart()
        if not self.together:
            self._race_apart(bench, rows)
        for name, row in rows.items():
            row.peak_bytes = peaks[
                name
            ]  # time_rows jitter at replays, which show nothing of a graph's memory
            finish(
                self.bench,
                self.setup,
                row,
                "together" if self.together else "one after another, twice",
            )
        self.alive.clear()
        forget(self.bench.device)

    def _race_together(self, bench: Bench, rows: dict[str, Row]) -> bool:
        """Whether the memory did not suffice after all; the rows are then as they were."""
        try:
            time_rows(bench, rows, self.alive)
            crowded = any(row.reason == "out of memory" for row in rows.values())
        except torch.OutOfMemoryError:
            crowded = True
        if crowded:
            for row in rows.values():
                row.reason = row.time = row.versus = None
        return crowded

    def _race_apart(self, bench: Bench, rows: dict[str, Row]) -> None:
        seconds: dict[str, list[list[float]]] = {name: [] for name in rows}

        def once(name: str) -> None:
            step = step_models.build(name, self.setup, self.data, self.source)
            raced = race({name: step}, bench.device, bench.cache, samples=bench.samples, passes=1)
            seconds[name] += raced[name]

        for number in range(bench.passes):
            for name in list(rows)[:: -1 if number % 2 else 1]:
                if rows[name].reason is None:
                    attempt(rows[name], lambda name=name: once(name))  # type: ignore[misc]
                forget(bench.device)
        timed = {name: passes for name, passes in seconds.items() if rows[name].reason is None}
        for name, passes in timed.items():
            rows[name].time = summary(passes)
            if name != OURS and OURS in timed:
                rows[name].versus = versus(passes, timed[OURS])


def _graphs() -> tuple[int, int]:
    """How many graphs this process has compiled, and taken from the compiler's cache, so far."""
    from torch._dynamo.utils import counters

    found = counters["inductor"]
    return found["fxgraph_cache_miss"] + found["fxgraph_cache_bypass"], found["fxgraph_cache_hit"]


def gate(row: Row, losses: Sequence[float], reference: Sequence[float]) -> None:
    """Sets error and loss of the row, and its reason where the first losses are not those of the reference."""
    row.more |= {"loss_start": losses[0], "loss": losses[-1], "loss_steps": len(losses)}
    assert row.allowed is not None
    row.error = 0.0
    for number, (got, exact) in enumerate(zip(losses, reference, strict=False), 1):
        difference = abs(got - exact) / abs(exact)
        row.error = max(row.error, difference) if math.isfinite(difference) else None
        if row.error is None or row.error > row.allowed:
            row.reason = (
                f"wrong: the loss at step {number} is {got:.6g}, the reference has {exact:.6g}"
            )
            return


def finish(bench: Bench, setup: Setup, row: Row, raced: str) -> None:
    """Images per second and what share of the device's product rate that is."""
    if row.time is None:
        return
    from sssd_fast.performance.costs import standard_flops

    row.flops = standard_flops(setup.config.model) * setup.batch
    ceiling = bench.results.head["ceilings"].get("matmul_flops_per_s", {}).get(row.dtype)
    seconds = row.time.median_us / 1e6
    mfu = None if ceiling is None else row.flops / seconds / ceiling
    row.more |= {"images_per_s": setup.batch / seconds, "mfu": mfu, "raced": raced}


def free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    from sssd_fast.run.device import available_memory

    free = available_memory()
    return math.inf if free is None else float(free)
