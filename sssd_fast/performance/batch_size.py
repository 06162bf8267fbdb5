"""`batch: auto`: the largest micro-batch that fits, found before a run starts; the effective batch stays as configured.

On a CUDA device memory_model.py says where to begin, and real steps on random images say what fits. On the CPU, where running out of
memory may end other programs, the model alone decides, against half of the memory that is free.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sssd_fast.config import Config
from sssd_fast.errors import ConfigError
from sssd_fast.loaders.resident import reserved
from sssd_fast.model import Classifier
from sssd_fast.objective import SSSD
from sssd_fast.optim import build_optimizer, parameter_groups
from sssd_fast.performance.execution import compiled, pick_compile, prepare
from sssd_fast.performance.memory_model import total_peak
from sssd_fast.performance.plan import RESERVE, budgeted, divisors, options_of, work_of
from sssd_fast.run.device import World, available_memory, is_out_of_memory, pick_precision
from sssd_fast.step import Step, TaskLoss

OPTIMISM = 1.15  # sizes are tried up to this share of what the model allows: it is a prediction
CPU_SHARE = 0.5

Say = Callable[[str], Any]
Trial = Callable[[int], bool]


def resolve_batch(
    config: Config, task: str, world: World, classes: int = 2, say: Say = print
) -> Config:
    """`config` with batch_size and accumulate set and `batch` empty; as it is where `batch` is not auto.

    task: "pretrain" or "finetune". Processes agree on the smallest. Raises ConfigError where not one image fits.
    """
    settings = getattr(config, task)
    if settings.batch is None:
        return config
    own = settings.batch_size * settings.accumulate  # of this process
    work, device = work_of(config, task, classes), world.device
    precision = pick_precision(config.precision, device)
    compile_it = pick_compile(config.step, device)[0]
    o = options_of(config, work, precision, device, compile_it)
    kept = (
        reserved(device, config.data.resident_gib)
        if config.data.loader in ("auto", "resident")
        else 0
    )
    free, stages = _free_bytes(device) - kept, work.stages(o)
    if compile_it and config.step.activation_budget < 1:
        stages, _ = budgeted(work, o, config.step.activation_budget, own, say)

    def predicted(images: int) -> float:
        copies = int(world.size > 1)
        return total_peak(work, stages, images, o, accumulate=own // images, gradient_copies=copies)

    def trial(images: int) -> bool:
        return _steps_fit(config, task, classes, world, precision, images, own // images, kept, say)

    # what is free does not hold the CUDA context any more
    limit = free / (1 + RESERVE.fragments) * OPTIMISM if device.type == "cuda" else CPU_SHARE * free
    found = search(
        own,
        lambda n: predicted(n) <= limit,
        trial if device.type == "cuda" else lambda n: True,
        world,
    )
    if found is None:
        raise ConfigError(
            f"{task}.batch is auto, and not one image fits: a micro-batch of 1 is predicted to need {predicted(1) / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB are free on {device}. Free memory, or see `sssd-fast plan` for settings that need less"
        )
    how = (
        "tried"
        if device.type == "cuda"
        else f"predicted, within {CPU_SHARE:.0%} of the free memory"
    )
    say(
        f"{task}.batch=auto: micro-batch {found} x {own // found} (effective batch {own * world.size}), {how}; predicted peak "
        f"{predicted(found) / 1e9:.2f} of {free / 1e9:.2f} GB free on {device}"
    )
    fixed = settings.model_copy(
        update={"batch_size": found, "accumulate": own // found, "batch": None}
    )
    return config.model_copy(update={task: fixed})


def search(own: int, likely: Trial, trial: Trial, world: World) -> int | None:
    """The largest divisor of `own` that is likely to fit and passes its trial, in every process; None when none does."""
    for images in reversed(divisors(own)):
        if world.any(not likely(images)):
            continue
        if not world.any(not trial(images)):
            return images
    return None


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = available_memory()
    if free is None:
        raise ConfigError(
            "batch is auto, but this system does not tell how much memory is free; set batch_size"
        )
    return float(free)


def _steps_fit(
    config: Config,
    task: str,
    classes: int,
    world: World,
    precision: str,
    images: int,
    accumulate: int,
    kept: int,
    say: Say,
) -> bool:
    """Whether two real steps on random images run in the memory that is free, of two micro-batches where there are more.

    kept: bytes that they must leave, for the decoded images that come later.
    """
    say(f"trying a micro-batch of {images} ...")
    held: Tensor | None = None
    try:
        held = torch.empty(kept, dtype=torch.uint8, device=world.device)
        _two_steps(config, task, classes, world, precision, images, accumulate)
        peak = (
            torch.cuda.max_memory_reserved(world.device) / 1e9
            if world.device.type == "cuda"
            else 0.0
        )
        say(f"trying a micro-batch of {images}: fits, {peak:.2f} GB reserved")
        return True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        say(f"trying a micro-batch of {images}: out of memory")
        return False
    finally:
        del held
        _forget(world.device)


def _two_steps(
    config: Config, task: str, classes: int, world: World, precision: str, images: int, accumulate: int
) -> None:  # fmt: skip
    settings, device = getattr(config, task), world.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model: SSSD | Classifier
        if task == "pretrain":
            model = SSSD(config.model, config.objective).to(device)
        else:
            model = Classifier(
                config.model, classes, config.finetune.pool, config.finetune.drop_path
            ).to(device)
        execution = prepare(model, config, precision, device, images)
        module = (
            compiled(model, config.step, graphs=execution.graphs) if execution.compiled else model
        )
        groups = parameter_groups(model, weight_decay=settings.weight_decay)
        optimizer = build_optimizer(groups, (settings.beta1, settings.beta2), config.step.optimizer)

        def pretrain_loss(module: Any, images_BCHW: Tensor, step: int, micro: int) -> TaskLoss:
            out = module(images_BCHW, torch.rand(images, config.model.num_patches, device=device))
            return TaskLoss(out.total, {}, out.batch_center)

        step = Step(
            module,
            optimizer,
            pretrain_loss if task == "pretrain" else _classifier_loss,
            world=World(device),  # by itself: the others may not have got so far
            precision=precision,
            clip_grad=settings.clip_grad,
            compiled=execution.compiled,
            graphs=execution.graphs,
        )
        height, width = config.model.image_size
        shape = images, config.model.in_channels, height, width
        batches = [
            torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
            for _ in range(accumulate)
        ]
        for i in range(2):
            result = step(
                batches[:2], i, 0.0
            )  # the other micro-batches of a step only wait in memory
        float(result.grad_norm)  # waits until it really ran


def _classifier_loss(module: Any, images_BCHW: Tensor, step: int, micro: int) -> TaskLoss:
    return TaskLoss(module(images_BCHW).float().square().mean(), {})


def _forget(device: torch.device) -> None:
    """Frees what a trial left, so that the next one, and the run, begin as it did."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
