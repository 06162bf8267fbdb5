"""`bench step`: the whole training step of every provider.

A provider is timed only if its losses over the first steps (with its own backward and updates)
agree with those of the plain model in a wider dtype, from equal weights on an equal batch with
equal masks. A row has, besides its time: images per second; mfu, the FLOPs of a plain masked
autoencoder (performance.fake.standard_flops) relative to the matmul rate of this device; peak_bytes
and mb_per_image, the peak of a step beyond parameters, moments and batch; the first and last
loss; what was selected and why ("how").

Providers alternate sample by sample. A provider that does not fit into the memory together with
the others is not timed; the row says so (--provider measures it alone).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import step_models
from benchmarks.harness import Bench, attempt, forget, time_rows
from benchmarks.race import first_call, peak_bytes
from benchmarks.results import DTYPES, NAMES, Row
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
                contest(bench, at)


def setups(args: argparse.Namespace, bench: Bench) -> list[Setup]:
    """One per task and dtype; empty without the packages of the trainer."""
    problem = step_models.missing("ours")
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
    reasons = {name: step_models.missing(name) for name in names}
    bench.results.head["missing"] |= {name: why for name, why in reasons.items() if why}
    available = [name for name in names if reasons[name] is None]
    return sorted(available, key=lambda n: FIRST.index(n) if n in FIRST else len(FIRST))


def contest(bench: Bench, setup: Setup) -> None:
    """Adds the rows of one task, dtype and batch: checked one by one, then timed together."""
    rows: dict[str, Row] = {}
    alive: dict[str, Training] = {}
    data, source = Data(setup), step_models.initial_model(setup.config)
    reference: list[float] = []
    problem = new_row(setup, setup.task, "reference", "step")
    first = partial(step_models.reference_losses, setup, data, source, GATE_STEPS[setup.dtype])
    if not attempt(problem, lambda: reference.extend(first())):
        bench.results.add(problem)
        return

    def check(row: Row) -> None:
        """Makes the first steps; the provider stays in `alive` if its losses are right."""
        losses: list[Tensor] = []
        step = step_models.build(row.provider, setup, data, source)
        row.more["how"] = step.how
        row.first_call_s = first_call(lambda: losses.append(step()), bench.device)
        # the second call: moments exist, and CUDA graphs are captured
        row.peak_bytes = peak_bytes(lambda: losses.append(step()), bench.device)
        row.more["mb_per_image"] = row.peak_bytes / setup.batch / 1e6
        while len(losses) < (QUICK_STEPS if bench.quick else STEPS):
            losses.append(step())
        gate(row, [float(loss) for loss in losses], reference)
        if row.reason is None:
            alive[row.provider] = step

    try:
        for name in providers(bench, setup.task):
            label = f"{setup.task}, {setup.shape}, {NAMES[setup.dtype]}, {name}"
            if bench.time_is_up(label):
                continue
            row = rows[name] = new_row(setup, setup.task, name, "step")
            with bench.console.announce(label):
                attempt(row, partial(check, row))
            if row.reason is None:
                continue
            forget(bench.device)
            if row.reason == "out of memory" and alive:
                row.reason += f" together with {', '.join(alive)}; --provider measures it alone"
        passed = {name: rows[name] for name in alive}
        time_rows(bench, passed, alive)
        for row in passed.values():
            if row.time is not None:
                _rate(bench, setup, row)
    finally:  # a run that is stopped keeps what was checked
        order = step_models.PROVIDERS[setup.task]
        bench.results.add(*(rows[name] for name in order if name in rows))
        alive.clear()
        forget(bench.device)


def _rate(bench: Bench, setup: Setup, row: Row) -> None:
    """Images per second, and their share of the device's matmul rate."""
    from sssd_fast.performance.fake import standard_flops

    assert row.time is not None
    row.flops = standard_flops(setup.config) * setup.batch
    ceilings = bench.results.head["ceilings"].get("matmul_flops_per_s", {})
    seconds = row.time.median_us / 1e6
    mfu = row.flops / seconds / ceilings[row.dtype] if row.dtype in ceilings else None
    row.more |= {"images_per_s": setup.batch / seconds, "mfu": mfu}


def new_row(setup: Setup, case: str, provider: str, phase: str) -> Row:
    row = Row(case, setup.shape, NAMES[setup.dtype], phase, provider, setup.sizes)
    row.allowed = ALLOWED[setup.dtype]
    row.more["batch"] = setup.batch
    return row


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
