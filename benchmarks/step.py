"""`bench step`: the whole training step of every provider.

A provider is timed only if its losses over the first steps (with its own backward and updates)
agree with those of the plain model in a wider dtype, from equal weights on an equal batch with
equal masks. A row has, besides its time: images per second; mfu, the FLOPs of a plain masked
autoencoder (performance.fake.standard_flops) relative to the matmul rate of this device; peak_bytes
and mb_per_image, the peak of a step beyond parameters, moments and batch; the first and last
loss; what was selected and why ("how").

Providers alternate sample by sample if all of them fit into the memory together; otherwise each is
rebuilt for each pass, one after another ("raced" in the row says which).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import step_models
from benchmarks.harness import Bench, attempt, forget, set_times, time_rows
from benchmarks.race import Load, Samples, first_call, peak_bytes, race
from benchmarks.results import DTYPES, NAMES, Row, sources_hash
from benchmarks.step_models import TASKS, Data, Setup, Training

# Largest relative difference of a loss from the reference: fp32 against fp64, bf16 and fp16 against
# fp32. On the CPU with cpu_smoke the losses differ by at most 4e-7, 1.1e-3 and 4e-5. Setting one
# of the 100 tensors of the weights to zero (a norm to one) changes the first loss by more than
# 1e-4 for 98 of them, and later steps are checked, too.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# Steps that are checked. fp16 starts with updates that the loss scale skips; the reference makes
# them.
GATE_STEPS = {torch.float32: 3, torch.bfloat16: 3, torch.float16: 1}
STEPS, QUICK_STEPS = 20, 5
QUICK = ("published", "plain", "plain compiled", "ours")
FIRST = ("ours", "published", "plain compiled", "ViTMAE")  # the time may be up before the others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Shared with `bench memory`."""
    models = "tiny, small, base, large, or a shipped configuration"
    add = parser.add_argument
    add("--model", help=f"{models} (default: base on CUDA, else cpu_smoke)")
    add("--batch", type=int, nargs="+", metavar="N", help="images")
    add("--task", choices=TASKS, help="default: both")


def run(args: argparse.Namespace, bench: Bench) -> None:
    for setup in setups(args, bench):
        usual = 256 if bench.device.type == "cuda" else setup.config.pretrain.batch_size
        batches = args.batch or [usual]
        for batch in batches[:1] if bench.quick else batches:
            at = replace(setup, batch=batch)
            if not bench.time_is_up(f"{at.task}, {at.shape}, {NAMES[at.dtype]}"):
                Contest(bench, at).run()


def setups(args: argparse.Namespace, bench: Bench) -> list[Setup]:
    """One per task and dtype; empty without the packages of the trainer."""
    problem = step_models.missing("ours", bench.device)
    if problem:  # the weights of all providers come from our model
        bench.results.head["missing"] |= dict.fromkeys(step_models.PROVIDERS["MAE"], problem)
        return []
    from sssd_fast.config import to_dict
    from sssd_fast.run.device import pick_precision

    dtypes = args.dtypes or [DTYPES[pick_precision("auto", bench.device)]]
    config = step_models.configuration(args.model, bench.device)
    tree = to_dict(config)
    bench.results.head["settings"] |= {n: tree[n] for n in ("model", "objective", "step")}
    tasks = {t: step_models.for_task(config, t) for t in TASKS if args.task in (None, t)}
    return [Setup(c, t, bench.device, dtype, 1) for t, c in tasks.items() for dtype in dtypes]


def providers(bench: Bench, task: str) -> list[str]:
    """Those that were requested and are available, most important first."""
    names = [name for name in step_models.PROVIDERS[task] if bench.wants(name)]
    if bench.quick and not bench.only:
        compiles = bench.device.type == "cuda"
        names = [name for name in names if name in QUICK and (compiles or "compiled" not in name)]
    reasons = {name: step_models.missing(name, bench.device) for name in names}
    bench.results.head["missing"] |= {name: why for name, why in reasons.items() if why}
    available = [name for name in names if reasons[name] is None]
    return sorted(available, key=lambda n: FIRST.index(n) if n in FIRST else len(FIRST))


class Contest:
    """The providers of one task, dtype and batch: checked one by one, then timed together."""

    def __init__(self, bench: Bench, setup: Setup) -> None:
        self.bench = bench
        self.setup = setup
        self.rows: dict[str, Row] = {}
        self.data = Data(setup)
        self.source = step_models.initial_model(setup.config)
        self.alive: dict[str, Training] = {}  # while all fit into the memory together
        self.together = True

    def run(self) -> None:
        problem = Row("", "", "", "", "")
        reference: list[float] = []
        attempt(problem, lambda: reference.extend(self._reference()))
        try:
            for name in providers(self.bench, self.setup.task):
                self._admit(name, reference, problem.reason)
            self._race({name: row for name, row in self.rows.items() if row.reason is None})
        finally:  # a run that is stopped keeps what was checked
            order = step_models.PROVIDERS[self.setup.task]
            self.bench.results.add(*(self.rows[name] for name in order if name in self.rows))
            self.alive.clear()
            forget(self.bench.device)

    def _reference(self) -> list[float]:
        steps = GATE_STEPS[self.setup.dtype]
        return step_models.reference_losses(self.setup, self.data, self.source, steps)

    def _build(self, name: str) -> Training:
        return step_models.build(name, self.setup, self.data, self.source)

    def _admit(self, name: str, reference: Sequence[float], problem: str | None) -> None:
        """Builds and checks a provider; it stays in memory for the race while all fit together."""
        label = f"{self.setup.task}, {self.setup.shape}, {NAMES[self.setup.dtype]}, {name}"
        if self.bench.time_is_up(label):
            return
        for _ in range(2):
            row = self.rows[name] = new_row(self.setup, self.setup.task, name, "step")
            if problem:
                row.reason = f"no reference to compare with: {problem}"
                return
            with self.bench.console.announce(label):
                attempt(row, partial(self._check, name, row, reference))
            if row.reason != "out of memory" or not self.alive:
                break
            self._separate()  # and again with all of the memory
        if not self.together or row.reason:
            self.alive.pop(name, None)
            forget(self.bench.device)
        elif self._is_tight():
            self._separate()

    def _check(self, name: str, row: Row, reference: Sequence[float]) -> None:
        losses: list[Tensor] = []
        step = self._build(name)
        row.more["how"] = step.how
        before = _graphs()
        row.first_call_s = first_call(lambda: losses.append(step()), self.bench.device)
        new, cached = (now - then for now, then in zip(_graphs(), before, strict=True))
        if new or cached:  # first_call_s alone does not say whether anything was compiled
            row.more["graphs"] = f"{new} compiled, {cached} from the cache"
        # the second call: moments exist, and CUDA graphs are captured
        row.peak_bytes = peak_bytes(lambda: losses.append(step()), self.bench.device)
        row.more["mb_per_image"] = row.peak_bytes / self.setup.batch / 1e6
        while len(losses) < (QUICK_STEPS if self.bench.quick else STEPS):
            losses.append(step())
        gate(row, [float(loss) for loss in losses], reference)
        if row.reason is None:
            self.alive[name] = step

    def _is_tight(self) -> bool:
        """Whether another provider of the same size may not fit."""
        from sssd_fast.run.device import available_memory

        device = self.bench.device
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
            free -= torch.cuda.memory_allocated(device)
        else:
            free = available_memory() or 1 << 62
        held = max(step.held_bytes() for step in self.alive.values())
        peak = max(row.peak_bytes or 0 for row in self.rows.values())
        return free < 1.2 * (held + peak)

    def _separate(self) -> None:
        self.together = False
        self.alive.clear()
        forget(self.bench.device)

    def _race(self, rows: dict[str, Row]) -> None:
        peaks = {name: row.peak_bytes for name, row in rows.items()}
        if self.together:
            time_rows(self.bench, rows, self.alive)
            if any(row.reason == "out of memory" for row in rows.values()):
                self._separate()
        if not self.together:
            self._race_separately(rows)
        for name, row in rows.items():
            # time_rows measures replays, which do not show the memory of a CUDA graph
            row.peak_bytes = peaks[name]
            row.more["raced"] = "together" if self.together else "one after another, twice"
            if row.time is not None:
                self._rate(row)

    def _race_separately(self, rows: dict[str, Row]) -> None:
        bench, load = self.bench, Load()
        found = {name: Samples([], []) for name in rows}

        def once(name: str) -> None:
            calls = {name: self._build(name)}
            one = race(calls, bench.device, bench.cache, samples=bench.samples, passes=1)[name]
            found[name].passes.extend(one.passes)
            found[name].host.extend(one.host)

        for row in rows.values():
            row.reason = row.time = row.versus = None
        for number in range(bench.passes):
            for name in list(rows)[:: -1 if number % 2 else 1]:
                if rows[name].reason is None:
                    attempt(rows[name], partial(once, name))
                forget(bench.device)
        timed = {name: samples for name, samples in found.items() if rows[name].reason is None}
        set_times(rows, timed, load.others())

    def _rate(self, row: Row) -> None:
        """Images per second, and their share of the device's matmul rate."""
        from sssd_fast.performance.fake import standard_flops

        assert row.time is not None
        row.flops = standard_flops(self.setup.config) * self.setup.batch
        ceilings = self.bench.results.head["ceilings"].get("matmul_flops_per_s", {})
        seconds = row.time.median_us / 1e6
        mfu = row.flops / seconds / ceilings[row.dtype] if row.dtype in ceilings else None
        row.more |= {"images_per_s": self.setup.batch / seconds, "mfu": mfu}


def new_row(setup: Setup, case: str, provider: str, phase: str) -> Row:
    row = Row(case, setup.shape, NAMES[setup.dtype], phase, provider, setup.sizes)
    row.sources = sources_hash("step")
    row.allowed = ALLOWED[setup.dtype]
    row.more["batch"] = setup.batch
    return row


def _graphs() -> tuple[int, int]:
    """Graphs that this process has compiled so far, and taken from the compiler's cache."""
    from torch._dynamo.utils import counters

    found: Any = counters["inductor"]
    return found["fxgraph_cache_miss"] + found["fxgraph_cache_bypass"], found["fxgraph_cache_hit"]


def gate(row: Row, losses: Sequence[float], reference: Sequence[float]) -> None:
    """Sets error and losses of the row, and a reason if the first losses are wrong."""
    row.more |= {"loss_start": losses[0], "loss": losses[-1], "loss_steps": len(losses)}
    assert row.allowed is not None
    row.error = 0.0
    for number, (got, exact) in enumerate(zip(losses, reference, strict=False), 1):
        difference = abs(got - exact) / abs(exact)
        row.error = max(row.error, difference) if math.isfinite(difference) else None
        if row.error is None or row.error > row.allowed:
            row.reason = f"wrong: the loss of step {number} is {got:.6g}, not {exact:.6g}"
            return
