"""Where the time of a pre-training step goes: `sssd-fast profile`.

The step that the configuration requests is timed without a profiler, then run under torch.profiler.
The ranges in step.py split it into the stages data, forward, backward and update; each operation
counts for the stage in which the host started it, by kind. On the CPU the time of an operation is
its own, without the operations that it calls; on CUDA it is that of its kernels on the device.
"""

from __future__ import annotations

import io
import itertools
import os
import statistics
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profiler

from sssd_fast.config import Config
from sssd_fast.errors import ConfigError
from sssd_fast.loaders.prepare import make_loader, prepare_data
from sssd_fast.performance.execution import ExecutionPlan
from sssd_fast.run.device import world
from sssd_fast.run.environment import collect_environment
from sssd_fast.run.files import atomic_write_bytes
from sssd_fast.run.folder import Run, open_run
from sssd_fast.run.log import Console
from sssd_fast.step import Step

# (run, index, split) -> the step of pre-training and how it is executed
Build = Callable[[Run, Any, Any], tuple[Step, ExecutionPlan]]

LEARNING_RATE = 1e-5  # small, so that the weights stay ordinary numbers
STAGES = ("data", "forward", "backward", "update")
OTHER = "other"
IDLE = "Python, waiting"
# kind: (colour, parts of the names of its operations and kernels); the first match counts
KINDS = {
    "attention": ("#0b3c6f", "scaled_dot_product attention flash fmha"),
    "matrix products": ("#2f7fc1", "aten::mm addmm bmm matmul linear gemm conv"),
    "losses": ("#cc79a7", "_loss random_masking"),
    "patches, tokens": ("#86d3b9", "patches restore_tokens crop_resize gather"),
    "compiled kernels": ("#009e73", "triton_ cpp_fused graph CompiledFunction"),
    "optimizer": ("#f0e442", "adam _foreach"),
    "norms": ("#8fc1ea", "layer_norm normalize linalg_vector_norm"),
    "GELU, additions": ("#e69f00", "gelu add mul div sum mean softmax"),
    "copies, casts": ("#f2a46f", "copy cat clone _to contiguous fill zero empty"),
    OTHER: ("#b3aaa0", ""),
    IDLE: ("#ececec", ""),
}


def profile(
    config: Config, build: Build, *, steps: int = 10, warmup: int = 3, out: str | Path | None = None
) -> dict[str, Any]:
    """Trains a new model for `warmup` and `steps` steps in a temporary run folder, prints the times
    of the latter and draws `out` (PNG). Raises ConfigError for settings that cannot be profiled.
    """
    _check(config, steps, warmup, out)
    with ExitStack() as stack:
        here = stack.enter_context(world(config.device))
        # torch.profiler's library prints lines at every start and stop without it
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sssd-fast-profile-")))
        config = config.model_copy(update={"tensorboard": False, "logger": "none"})
        run = stack.enter_context(open_run("pretrain", config, folder / "run", here))
        result = _measure(run, build, steps, warmup)
        _show(result, run.console)
        if out is not None:
            draw(result, Path(out))
            run.console.info(f"picture: {out}")
    return result


def _check(config: Config, steps: int, warmup: int, out: str | Path | None) -> None:
    path = Path(out or "step.png").absolute()
    processes = os.environ.get("WORLD_SIZE", "1")
    problems = {
        f"steps is {steps}, warmup is {warmup}: both need at least 1": min(steps, warmup) < 1,
        f"out is {str(out)!r}, needs a file name that ends in .png": path.suffix != ".png",
        f"the folder of {str(out)!r} does not exist; make it first": not path.parent.is_dir(),
        "pretrain.batch is auto: set pretrain.batch=null": config.pretrain.batch is not None,
        f"{processes} processes were started, needs one: no torchrun": processes != "1",
    }
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise ConfigError("profile: " + "; ".join(found))


# ---- measuring -----------------------------------------------------------------------------------


def _measure(run: Run, build: Build, steps: int, warmup: int) -> dict[str, Any]:
    settings, model, device = run.config.pretrain, run.config.model, run.world.device
    cuda = device.type == "cuda"
    step, batches, execution = prepare(run, build, steps + warmup)
    run.console.info("\n".join(execution.lines))
    with run.console.announce(f"{warmup} + {steps} steps, then {steps} under the profiler"):
        times = time_steps(step, batches, steps, warmup, device)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with torch_profiler(activities=activities) as profiler:
            time_steps(step, batches, steps, 0, device)
    images = settings.batch_size * settings.accumulate
    size = "×".join(map(str, model.image_size))
    compiled = "compiled" if execution.compiled else "not compiled"
    cpu = f"{collect_environment()['cpu']['model']}, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name(device) if cuda else cpu
    return {
        "what": f"{images} images of {size}, ViT-{model.name}, {run.precision}, {compiled}",
        "machine": f"{machine}, torch {torch.__version__}",
        "compiled": execution.compiled,
        "times": times,
        "images_per_s": images / statistics.median(times),
        "stages": read_events(profiler.events(), steps, cuda=cuda),
    }


def prepare(run: Run, build: Build, needed: int) -> tuple[Step, Iterator[Any], ExecutionPlan]:
    """(step, micro-batches of one step after another, execution) of a pre-training run."""
    settings = run.config.pretrain
    index, split = prepare_data(run)
    options: dict[str, Any] = {"batch_size": settings.batch_size, "augment": settings.augment}
    loader = make_loader(run, index, split.train, **options)
    # A loader that stores decoded images has them after its first epoch.
    for _ in itertools.islice(loader.epoch(0), needed * settings.accumulate):
        pass
    step, execution = build(run, index, split)

    def batches() -> Iterator[Any]:
        for epoch in itertools.count():
            micro_batches = loader.epoch(epoch)
            for _ in range(loader.steps_per_epoch // settings.accumulate):
                yield [next(micro_batches) for _ in range(settings.accumulate)]

    return step, batches(), execution


def time_steps(
    step: Step, batches: Iterator[Any], steps: int, warmup: int, device: torch.device
) -> list[float]:
    """Seconds of each step with its data; on CUDA each waits for the device."""
    times = []
    for i in range(warmup + steps):
        started = time.perf_counter()
        with record_function("data"):
            micro_batches = next(batches)
        step(micro_batches, i, LEARNING_RATE)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return times[warmup:]


def read_events(events: Iterable[Any], steps: int, *, cuda: bool) -> dict[str, dict[str, float]]:
    """Seconds per step of each stage by kind of operation, from torch.profiler's events.

    IDLE is the time of the stage on the host's clock in which no operation ran; on CUDA, where the
    host runs ahead of the device, it is the excess over the kernels.
    """
    on_host = [e for e in events if e.device_type.name == "CPU"]
    ranges = sorted((e for e in on_host if e.name in STAGES), key=lambda e: e.time_range.start)
    starts = [e.time_range.start for e in ranges]
    stages: dict[str, dict[str, float]] = {stage: {} for stage in STAGES}
    for e in on_host:
        # On the CPU the step runs in one thread, the loader may run in others.
        before = bisect_right(starts, e.time_range.start)
        if before == 0 or e.name in STAGES or not (cuda or e.thread == ranges[0].thread):
            continue
        within = ranges[before - 1]
        busy = e.self_device_time_total if cuda else e.self_cpu_time_total
        if e.time_range.start <= within.time_range.end and busy > 0:
            kinds, kind = stages[within.name], kind_of(e.name)
            kinds[kind] = kinds.get(kind, 0.0) + busy / steps / 1e6
    for stage, kinds in stages.items():
        spans = [e.time_range for e in ranges if e.name == stage]
        wall = sum(span.end - span.start for span in spans) / steps / 1e6
        kinds[IDLE] = max(0.0, wall - sum(kinds.values()))
    return stages


def kind_of(name: str) -> str:
    """The kind of an operation by its name, e.g. aten::addmm."""
    found = (k for k, (_, parts) in KINDS.items() if any(part in name for part in parts.split()))
    return next(found, OTHER)


# ---- showing -------------------------------------------------------------------------------------


def _show(result: dict[str, Any], console: Console) -> None:
    stages, times = result["stages"], result["times"]
    totals = [sum(kinds.values()) for kinds in stages.values()]
    rows = []
    for kind in _kinds(result):
        seconds = [kinds.get(kind, 0.0) for kinds in stages.values()]
        cells = [f"{s * 1e3:,.2f}" if s else "-" for s in seconds]
        rows.append([kind, *cells, f"{sum(seconds) / sum(totals):.1%}"])
    rows.append(["all", *(f"{s * 1e3:,.2f}" for s in totals), "100.0%"])
    title = f"Step of {result['what']}, {result['machine']}: ms under the profiler"
    console.table(title, ("kind of operation", *STAGES, "share"), rows)
    console.info(
        f"Without the profiler: {_ms(statistics.median(times))} per step (median; "
        f"{_ms(min(times))} to {_ms(max(times))}), {result['images_per_s']:,.4g} images/s."
    )


def _kinds(result: dict[str, Any]) -> list[str]:
    return [kind for kind in KINDS if any(kind in found for found in result["stages"].values())]


def draw(result: dict[str, Any], path: Path) -> None:
    """A bar for each stage, divided by kind of operation."""
    from matplotlib.figure import Figure

    stages = result["stages"]
    totals = [1e3 * sum(stages[stage].values()) for stage in STAGES]
    figure = Figure((11, 4.8), 150, layout="constrained")
    axes = figure.subplots()
    starts = np.zeros(len(STAGES))
    for kind in _kinds(result):
        widths = np.array([1e3 * stages[stage].get(kind, 0.0) for stage in STAGES])
        axes.barh(STAGES, widths, 0.66, starts, color=KINDS[kind][0], edgecolor="white", label=kind)
        starts += widths
    for y, total in enumerate(totals):
        share = f"{total / sum(totals):.0%}"
        axes.text(total, y, f" {_ms(total / 1e3)}, {share}", va="center", fontsize=9)
    axes.set_xlim(0, 1.16 * max(totals))
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per step, under the profiler", fontsize=9)
    axes.spines[["right", "top"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8.5)
    step = f"{_ms(statistics.median(result['times']))}, {result['images_per_s']:,.3g} images/s"
    figure.suptitle(f"One pre-training step: {step}", x=0.01, ha="left", fontweight="bold")
    caption = f"{result['what']}; {result['machine']}"
    axes.set_title(caption, loc="left", fontsize=8.5, parse_math=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    atomic_write_bytes(path, png.getvalue())


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"
