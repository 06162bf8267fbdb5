"""`batch: auto`: the largest micro-batch that fits; the effective batch stays as configured.

On a CUDA device the search starts from estimate.py, and real steps on random images decide what
fits. On the CPU, where running out of memory may end other programs, the estimate alone decides,
against half of the free memory.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sssd_fast.config import Config
from sssd_fast.errors import ConfigError
from sssd_fast.loaders.resident import reserved
from sssd_fast.objective import SSSDOutput
from sssd_fast.optim import build_optimizer, parameter_groups
from sssd_fast.performance.estimate import estimate
from sssd_fast.performance.execution import compiled, configure_model, pick_compile
from sssd_fast.performance.fake import make_model, random_inputs
from sssd_fast.performance.plan import FRAGMENTS, divisors
from sssd_fast.run.device import (
    World,
    available_memory,
    data_parallel,
    is_out_of_memory,
    pick_precision,
)
from sssd_fast.step import Step, TaskLoss

# Batches are tried up to this share of the free memory: the estimate may be too high.
OPTIMISM = 1.15
CPU_SHARE = 0.5

Log = Callable[[str], Any]
Fits = Callable[[int], bool]


def resolve_batch(
    config: Config, task: str, world: World, classes: int = 2, log: Log = print
) -> Config:
    """`config` with batch_size and accumulate set and `batch` empty, or as it is if batch is not
    auto. Processes agree on the smallest. Raises ConfigError if not one image fits.
    """
    settings = getattr(config, task)
    if settings.batch is None:
        return config
    own = settings.batch_size * settings.accumulate  # images per step of this process
    device = world.device
    cuda = device.type == "cuda"
    compile_it = pick_compile(config.step, device)[0]
    options: dict[str, Any] = {"compiled": compile_it, "classes": classes}
    if cuda:
        options["capability"] = torch.cuda.get_device_capability(device)
    found = estimate(config, task, pick_precision(config.precision, device), device, **options)
    kept = 0  # bytes that the loader will need
    if config.data.loader in ("auto", "resident"):
        kept = reserved(device, config.data.resident_gib)
    free = _free_bytes(device) - kept
    # The free memory does not contain the CUDA context any more.
    limit = free / (1 + FRAGMENTS) * OPTIMISM if cuda else CPU_SHARE * free
    # A budget keeps less than estimated: start higher, the trials decide.
    budget = config.step.activation_budget if cuda and compile_it else 1.0

    def peak(images: float) -> float:
        return found.peak(images, accumulate=own / images, gradient_copies=int(world.size > 1))

    def resolved(images: int) -> Config:
        fixed = {"batch_size": images, "accumulate": own // images, "batch": None}
        return config.model_copy(update={task: settings.model_copy(update=fixed)})

    def fits(images: int) -> bool:
        return not cuda or steps_fit(resolved(images), task, classes, world, kept, log)

    batch_size = search(own, lambda images: peak(budget * images) <= limit, fits, world)
    if batch_size is None:
        raise ConfigError(
            f"{task}.batch is auto, and not one image fits: a micro-batch of 1 is estimated to "
            f"need {peak(1) / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on {device}. Free memory, "
            "or see `sssd-fast plan` for settings that need less"
        )
    how = "tried" if cuda else f"estimated, within {CPU_SHARE:.0%} of the free memory"
    log(
        f"{task}.batch=auto: micro-batch {batch_size} x {own // batch_size} (effective batch "
        f"{own * world.size}), {how}; estimated peak {peak(batch_size) / 1e9:.2f} of "
        f"{free / 1e9:.2f} GB free on {device}"
    )
    return resolved(batch_size)


def search(own: int, likely: Fits, fits: Fits, world: World) -> int | None:
    """The largest divisor of `own` that is likely to fit and fits, in every process, or None."""
    for images in reversed(divisors(own)):
        if not world.any(not likely(images)) and not world.any(not fits(images)):
            return images
    return None


def _free_bytes(device: torch.device) -> float:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if free is None:
        raise ConfigError(
            "batch is auto, but this system does not report how much memory is free; set batch_size"
        )
    return float(free)


def steps_fit(config: Config, task: str, classes: int, world: World, kept: int, log: Log) -> bool:
    """Whether two real steps of `config` on random images run in the free memory.

    kept: bytes that they must leave free, for the decoded images that the loader stores later.
    """
    batch_size = getattr(config, task).batch_size
    what = f"trying a micro-batch of {batch_size}"
    log(f"{what} ...")
    device = world.device
    held: Tensor | None = None
    try:
        held = torch.empty(kept, dtype=torch.uint8, device=device)
        # alone: the other processes may still be at another size
        time_steps(config, task, classes, World(device), batch_size, steps=2)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        log(f"{what}: out of memory")
        return False
    finally:
        del held
        release(device)
    log(f"{what}: fits")
    return True


def release(device: torch.device) -> None:
    """Frees what trial steps leave, so that the next trial, and the run, start like the first."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def time_steps(
    config: Config, task: str, classes: int, world: World, images: int, steps: int
) -> float:
    """Seconds of a step on random images: the median of `steps` but the first.

    images: of a micro-batch in this process. A step computes at most two micro-batches.
    """
    settings, device = getattr(config, task), world.device
    precision = pick_precision(config.precision, device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = make_model(config, task, classes).to(device)
        execution = configure_model(model, config, precision, device, images)
        module: nn.Module = model
        if execution.compiled:
            module = compiled(model, config.step, graphs=execution.graphs)
        groups = parameter_groups(model, weight_decay=settings.weight_decay)
        betas = settings.beta1, settings.beta2
        step = Step(
            data_parallel(module, world),
            build_optimizer(groups, betas, config.step.optimizer),
            _loss,
            world=world,
            precision=precision,
            clip_grad=settings.clip_grad,
            graphs=execution.graphs,
        )
        # The other micro-batches only occupy memory.
        batches = [random_inputs(config, task, images, device) for _ in range(settings.accumulate)]
        seconds = []
        for i in range(steps):
            start = time.perf_counter()
            result = step(batches[:2], i, 0.0)
            float(result.grad_norm)  # waits for the device, where an error may still come
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:])


def _loss(module: nn.Module, batch: list[Tensor], step: int, micro: int) -> TaskLoss:
    out = module(*batch)
    if isinstance(out, SSSDOutput):
        return TaskLoss(out.total, {}, out.batch_center)
    return TaskLoss(out.float().square().mean(), {})
