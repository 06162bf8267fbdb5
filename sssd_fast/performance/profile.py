"""Where the time of a pre-training step goes: `sssd-fast profile`.

Two measurements of the same step on the same data. The plain step, operation by operation, under torch.profiler: a breakdown into
parts (see profile_trace.py) with FLOPs and bytes by formula (costs.py) against ceilings measured here. And the step as config.step
wants it, timed whole without the profiler: once compiled, a step has no parts any more.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sssd_fast.config import Config, to_dict
from sssd_fast.data.index import check_data
from sssd_fast.data.pixels import cache_folder
from sssd_fast.data.synthetic import write_synthetic_dataset
from sssd_fast.errors import ConfigError
from sssd_fast.loaders import Batch, Loader
from sssd_fast.loaders.prepare import make_loader, make_split
from sssd_fast.performance.ceilings import Ceilings, measure_ceilings
from sssd_fast.performance.costs import Part, parts, standard_flops, train_flops
from sssd_fast.performance.profile_trace import BACKWARD, HEADS, PARTS, Timeline, profile_steps
from sssd_fast.pretrain import PretrainTask
from sssd_fast.run.checkpoint import CheckpointManager
from sssd_fast.run.device import AUTOCAST, World, pick_precision, world
from sssd_fast.run.environment import collect_environment
from sssd_fast.run.files import atomic_write_text
from sssd_fast.run.folder import Run
from sssd_fast.run.log import Console
from sssd_fast.run.metrics_log import Tracker
from sssd_fast.step import Step
from sssd_fast.train import Schedule, make_step

SCHEMA = 1
LEARNING_RATE = 1e-5  # small: speed does not depend on it, and the weights stay ordinary numbers
IN_HEADS = (
    "prediction head",
    "projection heads",
    "loss",
)  # parts of costs.py that one range covers


def profile(
    config: Config,
    *,
    steps: int = 10,
    warmup: int = 3,
    out: str | Path | None = None,
    json_out: str | Path | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Measures `steps` steps after `warmup` others, prints a table, draws `out` (PNG), writes and returns what `json_out` holds.

    Trains a model of its own for these few steps and keeps nothing of it. Raises ConfigError for settings that cannot be profiled.
    """
    from sssd_fast.performance.profile_plot import draw, show

    _check(config, steps, warmup, out, json_out)
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        if config.threads:
            torch.set_num_threads(config.threads)
        here = stack.enter_context(world(config.device))
        cuda = [here.device] if here.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        console = stack.enter_context(Console())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sssd-fast-profile-")))
        result = _measure(config, here, console, folder, steps, warmup)
        result = {
            "schema": SCHEMA,
            "command": command,
            **result,
            "environment": collect_environment(),
        }
        show(result, console)
        if out is not None:
            console.info(f"picture: {draw(result, path=out)}")
        if json_out is not None:
            atomic_write_text(Path(json_out), json.dumps(result, indent=2) + "\n")
            console.info(f"figures: {json_out}")
    return result


def _check(
    config: Config, steps: int, warmup: int, out: str | Path | None, json_out: str | Path | None
) -> None:
    problems = []
    if steps < 1:
        problems.append(f"steps is {steps}, needs at least 1")
    if warmup < 1:
        problems.append(
            f"warmup is {warmup}, needs at least 1: the first step allocates memory and compiles"
        )
    for name, path, ending in (("out", out, ".png"), ("json", json_out, ".json")):
        if path is not None and Path(path).suffix != ending:
            problems.append(f"{name} is {str(path)!r}, needs a file name that ends in {ending}")
        if path is not None and not Path(path).absolute().parent.is_dir():
            problems.append(f"{name} is {str(path)!r}, whose folder does not exist; make it first")
    if config.pretrain.batch is not None:
        problems.append(
            "pretrain.batch is auto, needs a number of images: set pretrain.batch=null and pretrain.batch_size"
        )
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        problems.append(f"{processes} processes were started, needs one: run it without torchrun")
    if problems:
        raise ConfigError("profile: " + "; ".join(problems))


def _measure(
    config: Config, here: World, console: Console, folder: Path, steps: int, warmup: int
) -> dict[str, Any]:
    settings = config.pretrain
    bench = Bench(config, here, console, folder, needed=steps + warmup)
    step, execution, configured = bench.step(config), bench.execution, None
    if execution.compiled:
        with console.announce(
            f"configured step: {warmup} + {steps} steps; the first compiles, which can take minutes"
        ):
            configured = time_steps(step, bench.batches(), steps, warmup, here.device)
        del step
        gc.collect()  # the two models need not fit side by side
        step = bench.step(plain_step(config))
    with console.announce(f"plain step: {warmup} + {steps} steps, then as many under the profiler"):
        plain = time_steps(step, bench.batches(), steps, warmup, here.device)
        timeline, profiled_s = profile_steps(
            step, bench.batches(), steps, warmup, here.device, LEARNING_RATE
        )
    del step
    bench.loader.close()
    with console.announce("measuring the ceilings: one large matrix product, one large copy"):
        ceilings = measure_ceilings(here.device, AUTOCAST.get(bench.run.precision, torch.float32))
    images = settings.batch_size * settings.accumulate
    flops = standard_flops(config.model)
    costs = _costs(config, bench.run.precision)
    for whole in (plain, configured or {}):
        if whole:
            whole["images_per_s"] = images / whole["step_s"]
            whole["mfu"] = flops * whole["images_per_s"] / ceilings.matmul_flops
    return {
        "settings": {"steps": steps, "warmup": warmup, "config": to_dict(config)},
        "device": str(here.device),
        "threads": torch.get_num_threads(),
        "precision": bench.run.precision,
        "images_per_step": images,
        "flops_per_image": {"standard": flops, "needed": train_flops(config.model, config.objective)},
        "ceilings": asdict(ceilings),
        "profiled": {
            "step_s": profiled_s,
            "parts": breakdown(timeline, steps, costs, images, settings.accumulate, ceilings),
            "gaps_s": {name: t / steps / 1e6 for name, t in timeline.gaps.items()},
        },
        "plain": plain,
        "configured": {
            "compiled": execution.compiled, "cuda_graphs": execution.graphs, "how": execution.lines, **(configured or plain)
        },
    }  # fmt: skip


def _costs(config: Config, precision: str) -> list[Part]:
    return parts(
        config.model,
        config.objective,
        dtype_bytes=4 if precision == "fp32" else 2,
        residual_bytes=2 if config.step.residual == "bf16" else 4,
        moment_bytes=1 if config.step.optimizer == "adamw8bit" else 4,
    )


def plain_step(config: Config) -> Config:
    """The same step, not compiled."""
    eager = {"compile": False, "cuda_graphs": False, "activation_budget": 1.0}
    return config.model_copy(update={"step": config.step.model_copy(update=eager)})


# ---- the pieces of a pre-training run, without a run folder ---------------------------------------------------------------------


class Bench:
    """Data, loader and the makings of a step for a configuration; `folder` takes the synthetic slices, where they are the data."""

    def __init__(
        self, config: Config, here: World, console: Console, folder: Path, *, needed: int
    ) -> None:
        settings, data = config.pretrain, config.data
        self.run = Run(
            out=folder / "run",
            task="pretrain",
            config=config,
            world=here,
            console=console,
            tracker=Tracker(folder, enabled=False),
            checkpoints=CheckpointManager(folder),
            precision=pick_precision(config.precision, here.device),
        )
        images = needed * settings.batch_size * settings.accumulate
        source = Path(data.source)
        if data.source == "synthetic":  # no more of them than the steps see
            source = folder / "synthetic"
            count = min(data.synthetic_images, 2 * images + 40)
            with console.announce(f"drawing {count} synthetic slices"):
                write_synthetic_dataset(
                    source, count, config.model.image_size, seed=data.synthetic_seed
                )
        self.index = check_data(
            source,
            data.manifest,
            max_bad_fraction=data.max_bad_fraction,
            accept_wrong_extension=data.accept_wrong_extension,
            index_cache=cache_folder(data.cache),
        )
        self.split = make_split(data, self.index)
        self.loader: Loader = make_loader(
            self.run,
            self.index,
            self.split.train,
            batch_size=settings.batch_size,
            augment=settings.augment,
        )
        self.schedule = Schedule.of(settings, self.loader.steps_per_epoch, 1)
        for _ in itertools.islice(self.loader.epoch(0), needed * settings.accumulate):
            pass  # a loader that keeps decoded images has them from here on, as in all epochs of a run but the first

    def step(self, config: Config) -> Step:
        """A new model and its Step."""
        step, self.execution = make_step(
            PretrainTask(self.run, self.index, self.split), self.run, config
        )
        return step

    def batches(self) -> Iterator[list[Batch]]:
        """Micro-batches of one step after another, epoch after epoch, for ever."""
        accumulate = self.run.config.pretrain.accumulate
        for epoch in itertools.count():
            batches = self.loader.epoch(epoch)
            for _ in range(self.schedule.steps_per_epoch):
                yield [next(batches) for _ in range(accumulate)]


# ---- measuring ----------------------------------------------------------------------------------------------------------------


class _Clock:
    """Moments on the device's own time line: events on CUDA, so that nothing waits; the host's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.marks: list[dict[str, Any]] = []

    def mark(self, name: str) -> None:
        """`fetch` begins a step; a name marked again in the same step moves."""
        if name == "fetch":
            self.marks.append({})
        if self.cuda:
            moment: Any = torch.cuda.Event(enable_timing=True)
            moment.record(torch.cuda.current_stream(self.device))
        else:
            moment = time.perf_counter()
        self.marks[-1][name] = moment

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1000 if self.cuda else end - start

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


def time_steps(
    step: Step, batches: Iterator[list[Batch]], steps: int, warmup: int, device: torch.device
) -> dict[str, Any]:
    """Seconds of a step, without a profiler: means that add up to `step_s`, and how single steps spread.

    On CUDA data wait is the time in which the device had nothing to do because a batch was being fetched or copied.
    """
    clock = _Clock(device)
    with _backward_marked(step.module, clock):
        for i in range(warmup + steps + 1):
            if i in (warmup, warmup + steps):
                clock.wait()
            clock.mark("fetch")
            if i == warmup + steps:
                break
            micro_batches = next(batches)
            clock.mark("forward")
            step(micro_batches, i, LEARNING_RATE)
    clock.wait()
    marks = clock.marks[warmup:]
    rows = [
        [
            clock.seconds(a, b)
            for a, b in itertools.pairwise((*(now[m] for m in MARKS), then["fetch"]))
        ]
        for now, then in itertools.pairwise(marks)
    ]
    whole = sorted(sum(row) for row in rows)
    means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    return {
        "step_s": sum(means),
        **dict(zip(("data_wait_s", "forward_backward_s", "update_s"), means, strict=True)),
        "spread_s": {"min": whole[0], "median": statistics.median(whole), "max": whole[-1]},
    }


MARKS = ("fetch", "forward", "update")


@contextmanager
def _backward_marked(module: nn.Module, clock: _Clock) -> Iterator[None]:
    """Marks `update` where the gradient of the patch projection arrives, the last of a backward; compiled, all arrive together."""
    weight = module.get_parameter("mae.encoder.patch_embed.proj.weight")
    handle = weight.register_post_accumulate_grad_hook(lambda _: clock.mark("update"))
    try:
        yield
    finally:
        handle.remove()


def breakdown(
    timeline: Timeline,
    steps: int,
    costs: list[Part],
    images: int,
    micro_batches: int,
    ceilings: Ceilings,
) -> list[dict[str, Any]]:
    """One row per part of the step, those of the backward below it; seconds, FLOPs and bytes per step."""
    work: dict[str, Part] = {}
    for part in costs:
        name = HEADS if part.name in IN_HEADS else part.name
        work[name] = work.get(name, Part()) + part

    def row(name: str, microseconds: float, flops: float, moved: float) -> dict[str, Any]:
        seconds = microseconds / steps / 1e6
        bounds = {"matmul": flops / ceilings.matmul_flops, "copy": moved / ceilings.copy_bytes}
        known = seconds > 0 and max(bounds.values()) > 0
        return {
            "name": name,
            "seconds": seconds,
            "share": microseconds / timeline.wall,
            "flops": flops,
            "bytes": moved,
            "flops_per_s": flops / seconds if known else None,
            "share_of": {bound: t / seconds for bound, t in bounds.items()} if known else None,
            "nearer": max(bounds, key=lambda bound: bounds[bound]) if known else None,
        }

    def cost(name: str, way: int) -> tuple[float, float]:
        part = work.get(name, Part())
        return part.step_flops(images)[way], part.step_bytes(images, micro_batches)[way]

    rows = [row(name, timeline.parts[name], *cost(name, 0)) for name in PARTS]
    backward = rows[PARTS.index(BACKWARD)]
    below = [row(name, t, *cost(name, 1)) for name, t in timeline.backward.items()]
    total = sum(r["flops"] for r in below), sum(r["bytes"] for r in below)
    backward.update(row(BACKWARD, timeline.parts[BACKWARD], *total), below=below)
    return rows
