"""`bench step`: the whole training step of every provider, pre-training and fine-tuning.

A provider is timed only if its losses over the first steps (with its own backward and updates)
agree with those of the published model in fp64, from equal weights on an equal batch with equal
masks. Allowed is twice the error of the published model in the same precision, plus one rounding.

All providers and precisions of a case are in one race; "ours" has the precision that
precision=auto selects. A row has, besides its time: images per second; mfu, the FLOPs of a plain
model relative to the matrix product rate of this device in the provider's dtype; peak_bytes, the
peak of a step beyond parameters, moments and batch; what was selected and why ("how"). On a CPU
also ours, and the best of transformers and of published, in one process per core.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import step_models
from benchmarks.harness import Bench, attempt, forget, time_rows
from benchmarks.processes import Processes
from benchmarks.race import first_call, peak_bytes
from benchmarks.results import DTYPES, NAMES, Row
from benchmarks.step_models import TASKS, Data, Provider, Setup
from sssd_fast.errors import DependencyError

# One rounding of the loss. To zero a tensor of the demo changes the first loss by more than 1e-4.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2**-8, torch.float16: 2**-8}
STEPS = 3  # that are checked; in fp16 the first one: it starts with updates that the scale skips
RACE_S, LEAST_SAMPLES = 90.0, 8  # of a race on a CPU, where a step takes seconds
# (model, task, images) without --model and --task, most important first
CASES = {
    "cuda": [("ViT-B-224", task, 256) for task in TASKS],
    "cpu": [
        ("ViT-T-128", "MAE", 32),
        ("ViT-T-224", "MAE", 32),
        ("ViT-T-128", "finetune", 32),
        ("ViT-T-224", "finetune", 32),
        ("ViT-S-224", "MAE", 16),
        ("ViT-S-224", "finetune", 16),
        ("cpu_smoke", "SSSD", 32),
        ("cpu_smoke", "finetune", 32),
        ("ViT-T-128", "SSSD", 32),
    ],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Shared with `bench memory`."""
    models = f"{', '.join(step_models.MODELS)}, or a shipped configuration"
    add = parser.add_argument
    add("--model", nargs="+", metavar="M", help=f"of: {models}")
    add("--batch", type=int, metavar="N", help="images")
    add("--task", nargs="+", choices=TASKS)


def run(args: argparse.Namespace, bench: Bench) -> None:
    from sssd_fast.run.device import keep_freed_memory

    if bench.device.type == "cpu":
        keep_freed_memory()  # as in a run of ours; the others profit as well
    for setup in setups(args, bench):
        if not bench.time_is_up(f"{setup.task}, {setup.shape}"):
            contest(bench, setup, args.dtypes)


def setups(args: argparse.Namespace, bench: Bench) -> Iterator[Setup]:
    """The cases. Raises DependencyError without the packages of our model, whose weights all
    providers get.
    """
    if problem := step_models.missing("ours"):
        raise DependencyError(f"bench {args.kind}: {problem}: pip install 'sssd-fast[train]'")
    usual = CASES[bench.device.type]
    cases = [case for case in usual if args.task is None or case[1] in args.task]
    if args.model:
        batch = {model: images for model, _, images in usual}
        tasks = args.task or TASKS
        cases = [(m, t, batch.get(m, usual[0][2])) for m in args.model for t in tasks]
    for model, task, images in cases[:1] if bench.quick else cases:
        config = step_models.configuration(model, task)
        yield Setup(model, config, task, bench.device, args.batch or images)


def our_dtype(device: torch.device, dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """What precision=auto selects, if it is one of `dtypes`."""
    from sssd_fast.run.device import pick_precision

    auto = DTYPES[pick_precision("auto", device)]
    return auto if auto in dtypes else dtypes[0]


def providers(bench: Bench, task: str, dtypes: Sequence[torch.dtype]) -> list[Provider]:
    """Those that were requested and are available, most important first."""
    auto = our_dtype(bench.device, dtypes)
    half = [dtype for dtype in dtypes if dtype != torch.float32]
    found = [Provider("ours", auto)]
    found += [Provider("transformers", dtype) for dtype in dtypes]
    found += [Provider("transformers", dtype, attention="eager") for dtype in half]
    models = [(family, dtype) for family in ("plain", "published") for dtype in dtypes]
    found += [Provider(*model, compile=flag) for flag in (False, True) for model in models]
    found += [Provider("transformers", dtype, compile=True) for dtype in half or dtypes]
    if bench.device.type == "cpu":  # on a GPU "ours" is compiled already
        found.append(Provider("ours", auto, compile=True))
        cores = torch.get_num_threads()
        found += [Provider("ours", auto, c, processes=cores) for c in (False, True) if cores > 1]
        if bench.quick:
            found = [p for p in found if not p.compile]
    found = [p for p in found if task != "SSSD" or p.family != "transformers"]
    found = [p for p in found if bench.wants(p.name)]
    reasons = {p.family: step_models.missing(p.family) for p in found}
    bench.results.head["missing"] |= {name: why for name, why in reasons.items() if why}
    return [p for p in found if reasons[p.family] is None]


def contest(bench: Bench, setup: Setup, dtypes: Sequence[torch.dtype]) -> None:
    """Adds the rows of one case: checked one by one, then timed together."""
    data, source = Data(setup), step_models.initial_model(setup)
    reference = cache(partial(step_models.reference_losses, setup, source, steps=STEPS))
    rows: dict[Provider, Row] = {}
    steps: dict[Provider, Any] = {}
    seconds: dict[Provider, float] = {}  # of the last checked step

    def check(provider: Provider) -> None:
        """Adds a row; the step is timed if the first losses are right."""
        row = rows[provider] = new_row(setup, provider, "step")
        losses: list[Tensor] = []

        def first_steps() -> None:
            if provider.processes > 1:
                step: Any = Processes(provider, setup)
            else:
                step = step_models.build(provider, setup, data, source)
            steps[provider] = step
            row.more["how"] = step.how
            row.first_call_s = first_call(lambda: losses.append(step()), bench.device)
            if provider.processes == 1:
                # the second call: moments exist, and CUDA graphs are captured
                row.peak_bytes = peak_bytes(lambda: losses.append(step()), bench.device)
            while len(losses) < STEPS:
                start = time.perf_counter()
                losses.append(step())
                seconds[provider] = time.perf_counter() - start
            gate(row, provider.dtype, [float(loss) for loss in losses], reference)

        with bench.console.announce(f"{row.case}, {row.shape}, {row.dtype}, {row.provider}"):
            attempt(row, first_steps)
        if row.reason is not None and provider in steps:
            steps.pop(provider).close()
            if row.reason == "out of memory" and steps:
                row.reason += " together with the others; --provider measures it alone"

    try:
        for provider in providers(bench, setup.task, dtypes):
            if not bench.time_is_up(f"{setup.task}, {setup.shape}, {provider.name}"):
                check(provider)
        several = max((provider.processes for provider in steps), default=1)
        for family in ("transformers", "published") if several > 1 else ():
            theirs = [provider for provider in steps if provider.family == family]
            if theirs:
                check(replace(min(theirs, key=seconds.__getitem__), processes=several))
        samples = bench.samples
        if bench.device.type == "cpu":
            one_round = sum(seconds[provider] for provider in steps)
            samples = min(samples, max(LEAST_SAMPLES, int(RACE_S / max(one_round, 1e-3))))
        ours = next((provider for provider in steps if provider.family == "ours"), None)
        # a step includes its Python
        time_rows(replace(bench, samples=samples, replayed=False), rows, steps, ours)
        for row in (rows[provider] for provider in steps):
            if row.time is not None:
                us = row.time.median_us, row.time.p80_us, row.time.p20_us
                rates = [setup.batch / value * 1e6 for value in us]
                row.more |= dict(zip(("images_per_s", "p20", "p80"), rates, strict=True))
                row.flops = setup.flops() * setup.batch
                ceiling = bench.results.head["ceilings"]["matmul_flops_per_s"].get(row.dtype)
                row.more["mfu"] = ceiling and row.flops / us[0] * 1e6 / ceiling
    finally:  # a run that is stopped keeps what was checked
        bench.results.add(*rows.values())
        for step in steps.values():
            step.close()
        steps.clear()
        forget(bench.device)


def new_row(setup: Setup, provider: Provider, phase: str) -> Row:
    dtype = NAMES[provider.dtype]
    return Row(setup.task, setup.shape, dtype, phase, provider.name, setup.sizes)


def gate(
    row: Row,
    dtype: torch.dtype,
    losses: Sequence[float],
    reference: Callable[[torch.dtype], list[float]],
) -> None:
    """Sets the error of the row, and a reason if the first losses are wrong.

    reference: dtype -> losses of the published model, fp64 for the exact ones.
    """

    def error(got: float, wanted: float) -> float:
        return abs(got - wanted) / abs(wanted)

    exact = reference(torch.float64)[: 1 if dtype == torch.float16 else STEPS]
    eager = max(map(error, reference(dtype), exact))
    row.allowed = 2 * (eager if math.isfinite(eager) else 0.0) + ROUNDING[dtype]
    row.error = max(map(error, losses, exact))
    for number, (got, wanted) in enumerate(zip(losses, exact, strict=False), 1):
        if not error(got, wanted) <= row.allowed:
            row.reason = f"wrong: the loss of step {number} is {got:.6g}, not {wanted:.6g}"
            return
