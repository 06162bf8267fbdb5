"""Where the time of a pre-training step goes: `sssd-fast profile`.

The step that the configuration requests is timed without a profiler, then run under torch.profiler. The ranges in
step.py split it into the stages data, forward, backward and update; each operation counts for the stage in which
the host started it, by kind. On the CPU the time of an operation is its own, without the operations that it calls;
on CUDA it is that of its kernels on the device.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profiler

from sssd_fast.config import Config, to_dict
from sssd_fast.data.index import check_data
from sssd_fast.data.pixels import cache_folder
from sssd_fast.data.synthetic import is_synthetic, write_synthetic_dataset
from sssd_fast.errors import ConfigError
from sssd_fast.evaluation.pictures import INK, QUIET, new_figure, save_figure
from sssd_fast.loaders import Batch
from sssd_fast.loaders.prepare import make_loader, make_split
from sssd_fast.performance.ceilings import measure_ceilings
from sssd_fast.performance.execution import ExecutionPlan
from sssd_fast.performance.fake import FakeStep, standard_flops
from sssd_fast.pretrain import PretrainTask
from sssd_fast.run.checkpoint import CheckpointManager
from sssd_fast.run.device import AUTOCAST, World, pick_precision, world
from sssd_fast.run.environment import collect_environment
from sssd_fast.run.files import atomic_write_text
from sssd_fast.run.folder import Run
from sssd_fast.run.log import Console
from sssd_fast.run.metrics_log import Tracker
from sssd_fast.step import Step
from sssd_fast.train import make_step

SCHEMA = 2
LEARNING_RATE = 1e-5  # small, so that the weights stay ordinary numbers
STAGES = ("data", "forward", "backward", "update")
OTHER = "other"
IDLE = "Python, waiting"
# kind: parts of the names of its operations and kernels; the first match counts. Colours after Okabe and Ito.
KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("scaled_dot_product", "attention", "flash", "fmha"),
    "matrix products": ("aten::mm", "addmm", "bmm", "matmul", "linear", "gemm", "conv"),
    "losses": ("_loss", "random_masking"),
    "patches, tokens": ("patches", "restore_tokens", "crop_resize", "gather"),
    "compiled kernels": ("triton_", "cpp_fused", "graph", "CompiledFunction"),
    "optimizer": ("adam", "global_norm", "_foreach"),
    "norms": ("layer_norm", "normalize", "linalg_vector_norm"),
    "GELU, additions": ("gelu", "add", "mul", "div", "sum", "mean", "softmax"),
    "copies, casts": ("copy", "cat", "clone", "_to", "contiguous", "fill", "zero", "empty"),
}
COLORS = {
    "attention": "#0b3c6f",
    "matrix products": "#2f7fc1",
    "losses": "#cc79a7",
    "patches, tokens": "#86d3b9",
    "compiled kernels": "#009e73",
    "optimizer": "#f0e442",
    "norms": "#8fc1ea",
    "GELU, additions": "#e69f00",
    "copies, casts": "#f2a46f",
    OTHER: "#b3aaa0",
    IDLE: "#ececec",
}


def profile(
    config: Config,
    *,
    steps: int = 10,
    warmup: int = 3,
    out: str | Path | None = None,
    json_out: str | Path | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Measures `steps` steps after `warmup` others, prints tables, draws `out` (PNG) and writes `json_out`.

    Trains a new model for these few steps and discards it. Returns what `json_out` holds. Raises ConfigError for
    settings that cannot be profiled.
    """
    _check(config, steps, warmup, out, json_out)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        if config.threads:
            torch.set_num_threads(config.threads)
        here = stack.enter_context(world(config.device))
        devices = [here.device] if here.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        # torch.profiler's library prints lines at every start and stop without it
        if "KINETO_LOG_LEVEL" not in os.environ:
            os.environ["KINETO_LOG_LEVEL"] = "6"
            stack.callback(os.environ.pop, "KINETO_LOG_LEVEL")
        console = stack.enter_context(Console())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sssd-fast-profile-")))
        result = _measure(config, here, console, folder, steps, warmup)
        result |= {"schema": SCHEMA, "command": command, "environment": collect_environment()}
        _show(result, console)
        if out is not None:
            console.info(f"picture: {draw(result, path=out)}")
        if json_out is not None:
            atomic_write_text(Path(json_out), json.dumps(result, indent=2) + "\n")
            console.info(f"numbers: {json_out}")
    return result


def _check(
    config: Config, steps: int, warmup: int, out: str | Path | None, json_out: str | Path | None
) -> None:
    problems = []
    if steps < 1:
        problems.append(f"steps is {steps}, needs at least 1")
    if warmup < 1:
        problems.append(f"warmup is {warmup}, needs at least 1: the first step allocates memory")
    for name, path, ending in (("out", out, ".png"), ("json", json_out, ".json")):
        if path is not None and Path(path).suffix != ending:
            problems.append(f"{name} is {str(path)!r}, needs a file name that ends in {ending}")
        if path is not None and not Path(path).absolute().parent.is_dir():
            problems.append(f"{name} is {str(path)!r}, whose folder does not exist; make it first")
    if config.pretrain.batch is not None:
        problems.append("pretrain.batch is auto: set pretrain.batch=null and pretrain.batch_size")
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        problems.append(f"{processes} processes were started, needs one: run it without torchrun")
    if problems:
        raise ConfigError("profile: " + "; ".join(problems))


# ---- measuring -----------------------------------------------------------------------------------


def _measure(
    config: Config, here: World, console: Console, folder: Path, steps: int, warmup: int
) -> dict[str, Any]:
    settings = config.pretrain
    step, batches, execution, precision = prepare(config, here, console, folder, steps + warmup)
    with console.announce(f"{warmup} + {steps} steps, then {steps} under the profiler"):
        times = time_steps(step, batches, steps, warmup, here.device)
        activities = [ProfilerActivity.CPU]
        if here.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with torch_profiler(activities=activities) as profiler:
            time_steps(step, batches, steps, 0, here.device)
    stages = read_events(profiler.events(), steps, cuda=here.device.type == "cuda")
    with console.announce("measuring the ceilings: one large matrix product, one large copy"):
        ceilings = measure_ceilings(here.device, AUTOCAST.get(precision, torch.float32))
    images = settings.batch_size * settings.accumulate
    median_s = statistics.median(times)
    flops = standard_flops(config)
    sort = "self_device_time_total" if here.device.type == "cuda" else "self_cpu_time_total"
    return {
        "settings": {"steps": steps, "warmup": warmup, "config": to_dict(config)},
        "device": str(here.device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "execution": asdict(execution),
        "images_per_step": images,
        "step_s": {"median": median_s, "min": min(times), "max": max(times)},
        "images_per_s": images / median_s,
        "mfu": flops * images / median_s / ceilings.matmul_flops,
        "flops_per_image": {"standard": flops, "needed": FakeStep(config, "pretrain").flops()},
        "ceilings": asdict(ceilings),
        "stages": stages,
        "operations": profiler.key_averages().table(sort_by=sort, row_limit=12),
    }


def prepare(
    config: Config, here: World, console: Console, folder: Path, needed: int
) -> tuple[Step, Iterator[list[Batch]], ExecutionPlan, str]:
    """(step, micro-batches of one step after another, execution, precision) of a pre-training run.

    There is no run folder; `folder` takes the synthetic slices.
    """
    settings, data = config.pretrain, config.data
    run = Run(
        out=folder / "run",
        task="pretrain",
        config=config,
        world=here,
        console=console,
        tracker=Tracker(folder, enabled=False),
        checkpoints=CheckpointManager(folder),
        precision=pick_precision(config.precision, here.device),
    )
    source = Path(data.source)
    if is_synthetic(data.source):  # no more than the steps need
        source = folder / "synthetic"
        images = 2 * needed * settings.batch_size * settings.accumulate + 40
        count = min(data.synthetic_images, images)
        with console.announce(f"drawing {count} synthetic slices"):
            size = config.model.image_size
            write_synthetic_dataset(source, count, size, seed=data.synthetic_seed)
    index = check_data(
        source,
        data.manifest,
        max_bad_fraction=data.max_bad_fraction,
        accept_wrong_extension=data.accept_wrong_extension,
        index_cache=cache_folder(data.cache),
    )
    split = make_split(data, index)
    augment = settings.augment
    loader = make_loader(run, index, split.train, batch_size=settings.batch_size, augment=augment)
    # A loader that stores decoded images has them after its first epoch.
    for _ in itertools.islice(loader.epoch(0), needed * settings.accumulate):
        pass
    step, execution = make_step(PretrainTask(run, index, split), run, config)

    def batches() -> Iterator[list[Batch]]:
        for epoch in itertools.count():
            micro_batches = loader.epoch(epoch)
            for _ in range(loader.steps_per_epoch // settings.accumulate):
                yield [next(micro_batches) for _ in range(settings.accumulate)]

    return step, batches(), execution, run.precision


def time_steps(
    step: Step, batches: Iterator[list[Batch]], steps: int, warmup: int, device: torch.device
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

    IDLE is the time of the stage on the host's clock in which no operation ran; on CUDA, where the host runs ahead
    of the device, it is the excess over the kernels.
    """
    events = list(events)
    ranges = [e for e in events if e.name in STAGES and e.device_type.name == "CPU"]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in ranges)
    stages: dict[str, dict[str, float]] = {stage: {} for stage in STAGES}
    span = 0
    for e in sorted(events, key=lambda e: e.time_range.start):
        # On the CPU the step runs in one thread, the loader may run in others.
        if e.name in STAGES or e.device_type.name != "CPU":
            continue
        if not cuda and e.thread != ranges[0].thread:
            continue
        while span < len(spans) and e.time_range.start > spans[span][1]:
            span += 1
        if span == len(spans):
            break
        start, _, stage = spans[span]
        busy = e.self_device_time_total if cuda else e.self_cpu_time_total
        if e.time_range.start >= start and busy > 0:
            kind = kind_of(e.name)
            stages[stage][kind] = stages[stage].get(kind, 0.0) + busy / steps / 1e6
    for stage, kinds in stages.items():
        wall = sum(end - start for start, end, name in spans if name == stage) / steps / 1e6
        kinds[IDLE] = max(0.0, wall - sum(kinds.values()))
    return stages


def kind_of(name: str) -> str:
    """The kind of an operation by its name, e.g. aten::addmm."""
    found = (kind for kind, parts in KINDS.items() if any(part in name for part in parts))
    return next(found, OTHER)


# ---- showing -------------------------------------------------------------------------------------


def _show(result: dict[str, Any], console: Console) -> None:
    stages = result["stages"]
    whole = sum(sum(kinds.values()) for kinds in stages.values())
    kinds = [kind for kind in COLORS if any(kind in found for found in stages.values())]
    rows = []
    for kind in kinds:
        seconds = [stages[stage].get(kind, 0.0) for stage in STAGES]
        cells = [f"{s * 1e3:,.2f}" if s else "-" for s in seconds]
        rows.append([kind, *cells, f"{sum(seconds) / whole:.1%}"])
    totals = [sum(stages[stage].values()) for stage in STAGES]
    rows.append(["all", *(f"{s * 1e3:,.2f}" for s in totals), "100.0%"])
    title = (
        f"Step of {result['images_per_step']} images on {hardware(result)}, ms under the profiler"
    )
    console.table(title, ("kind of operation", *STAGES, "share"), rows)
    console.info(result["operations"])
    for line in sentences(result):
        console.info(line)


def sentences(result: dict[str, Any]) -> list[str]:
    """What the numbers mean."""
    step, ceilings, flops = result["step_s"], result["ceilings"], result["flops_per_image"]
    lines = [
        f"Without the profiler: {_ms(step['median'])} per step (median; {_ms(step['min'])} to {_ms(step['max'])}), "
        f"{result['images_per_s']:,.4g} images/s, {result['mfu']:.1%} of the measured matrix product rate (MFU).",
        f"Rates measured here: {ceilings['matmul_flops'] / 1e9:,.4g} GFLOP/s matrix product ({ceilings['dtype']}), "
        f"{ceilings['copy_bytes'] / 1e9:,.1f} GB/s copy (read plus written).",
        f"MFU counts {flops['standard'] / 1e9:,.3g} GFLOP per image, the convention for masked autoencoders; this step needs "
        f"{flops['needed'] / 1e9:,.3g}, projection heads included.",
    ]
    if result["mfu"] > 1:
        lines.append(
            "MFU is above 100 %: other programs used this machine while the matrix product was measured. "
            "Repeat on an idle machine."
        )
    return lines


def hardware(result: dict[str, Any]) -> str:
    """The name of the device that was used."""
    environment = result["environment"]
    if result["device"].startswith("cuda"):
        gpu = environment["gpus"][int(result["device"].partition(":")[2] or 0)]
        return f"{gpu['name']} ({gpu['memory_gib']} GiB)"
    cpu = environment["cpu"]
    return f"{cpu['model']}, {result['threads']} of {cpu['cores']} cores"


def draw(result: dict[str, Any], *, path: str | Path) -> Path:
    """A bar for each stage of the step, divided by kind of operation; raises DependencyError without matplotlib."""
    figure = new_figure(11, 4.8)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0.08, 0.3, 0.9, 0.54))
    stages = result["stages"]
    totals = {stage: sum(kinds.values()) for stage, kinds in stages.items()}
    whole = sum(totals.values())
    for y, stage in zip(range(len(STAGES), 0, -1), STAGES, strict=True):
        left = 0.0
        for kind, color in COLORS.items():
            width = stages[stage].get(kind, 0.0) * 1e3
            if width == 0:
                continue
            hatch = "////" if kind == IDLE else None
            axes.barh(y, width, 0.66, left, color=color, edgecolor="white", hatch=hatch)
            share = width / 1e3 / totals[stage]
            if width > 0.035 * max(totals.values()) * 1e3:
                text_color = _contrast(color)
                middle = left + width / 2
                axes.text(
                    middle,
                    y,
                    f"{share:.0%}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=text_color,
                )
            left += width
        label = f" {_ms(totals[stage])}, {totals[stage] / whole:.0%}"
        axes.text(left, y, label, va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(STAGES), 0, -1), STAGES)
    axes.set_ylim(0.5, len(STAGES) + 0.5)
    axes.set_xlim(0, 1.16 * max(totals.values()) * 1e3)
    axes.set_xlabel("milliseconds per step, under the profiler", fontsize=9, color=QUIET)
    axes.tick_params(labelsize=10, colors=INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
    used = [kind for kind in COLORS if any(kind in kinds for kinds in stages.values())]
    handles = [axes.barh(0, 0, color=COLORS[kind], label=kind) for kind in used]
    figure.legend(handles, used, loc="lower center", ncols=6, frameon=False, fontsize=8.5)
    model = result["settings"]["config"]["model"]
    height, width = model["image_size"]
    title = (
        f"One pre-training step, {result['images_per_step']} images of {height}×{width}: "
        f"{_ms(result['step_s']['median'])}, {result['images_per_s']:,.3g} images/s"
    )
    figure.text(0.015, 0.96, title, fontsize=12, fontweight="bold", color=INK, va="top")
    compiled = "compiled" if result["execution"]["compiled"] else "not compiled"
    caption = (
        f"ViT-{model['name']}, {result['precision']}, {compiled}; {hardware(result)}; "
        f"torch {result['environment']['torch']['version']}"
    )
    figure.text(0.015, 0.89, caption, fontsize=8.5, color=QUIET, va="top", parse_math=False)
    return save_figure(figure, path)


def _contrast(color: str) -> str:
    """Black or white, whichever is easier to read on `color`."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"
