"""What to train within a given time: the configuration for a machine and an image set, and the
number of epochs.

    name, why = choose_config(images=746, device=torch.device("cpu"))
    config = fit_minutes(load_config(name), ("pretrain", "finetune"), 746, 30.0, world, print)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sssd_fast.config import Config, TrainConfig
from sssd_fast.errors import ConfigError
from sssd_fast.performance.batch_size import release, time_steps
from sssd_fast.run.device import GIB, World

STEPS = 8  # timed on random images, for each stage
# Start, loading, validation, checkpoints, evaluation and report, as a fraction of the steps' time.
# With it `run --minutes 4` on COVID-CT took 3.7 minutes on two CPU cores.
OTHER = 0.15
SMALL_SET = 1200  # images; below, the recipe of COVID-CT (746), else that of SARS-CoV-2 CT (2481)
GPU_CONFIGS = ((20.0, "24gb"), (12.0, "16gb"), (0.0, "8gb"))  # from so many GiB on


def choose_config(images: int, device: torch.device) -> tuple[str, str]:
    """(name of a shipped configuration, why) for a number of images on a device."""
    if device.type == "cuda":
        gib = torch.cuda.get_device_properties(device).total_memory / GIB
        name = next(name for least, name in GPU_CONFIGS if gib >= least)
        return name, f"the GPU has {gib:.0f} GiB"
    name = "paper_covid_ct_cpu" if images < SMALL_SET else "paper_sars_cov_2_cpu"
    return name, f"the device is a CPU and the set has {images} images"


def fit_minutes(
    config: Config,
    stages: Sequence[str],
    images: int,
    minutes: float | None,
    world: World,
    log: Callable[[str], object],
) -> Config:
    """`config` with all epochs multiplied by one factor, so that the stages take `minutes`.

    Warm-ups keep their fraction. minutes None: `config` as it is. The expected time, from a few
    steps on random images, is logged in both cases, but not on a GPU without `minutes`: there the
    steps would be compiled twice. Raises ConfigError if one epoch takes longer.

    images: of the training split.
    """
    if minutes is None and world.device.type == "cuda":
        return config
    seconds = {stage: _seconds(config, stage, images, world) for stage in stages}
    total = sum(seconds.values())
    if minutes is None:
        log(f"expected time: {_times(config, seconds)}")
        return config
    factor = 60 * minutes / total
    update = {}
    for stage in stages:
        settings = getattr(config, stage)
        epochs = int(settings.epochs * factor)
        if epochs < 1:
            raise ConfigError(
                f"minutes is {minutes:g}, but one epoch of {stage} takes about "
                f"{seconds[stage] / settings.epochs:.0f} s here and one of all stages "
                f"{sum(s / getattr(config, k).epochs for k, s in seconds.items()) / 60:.1f} "
                "minutes; allow more minutes, or choose a smaller --config"
            )
        warmup = settings.warmup_epochs * epochs / settings.epochs
        every = min(settings.validate_epochs, epochs)
        changed = {"epochs": epochs, "warmup_epochs": warmup, "validate_epochs": every}
        update[stage] = settings.model_copy(update=changed)
        seconds[stage] *= epochs / settings.epochs
    planned = config.model_copy(update=update)
    log(f"minutes={minutes:g}: {_times(planned, seconds)}")
    return planned


def _seconds(config: Config, stage: str, images: int, world: World) -> float:
    """Expected duration of a stage, the same in all processes."""
    settings = getattr(config, stage)
    local = settings.batch_size // world.share
    effective = settings.batch_size * settings.accumulate * world.replicas
    steps = settings.epochs * (images // effective)
    if settings.max_steps is not None:
        steps = min(steps, settings.max_steps)
    measured = torch.tensor(time_steps(config, stage, 2, world, local, STEPS), device=world.device)
    if world.device.type == "cuda" or config.step.compile is True:
        release(world.device)
    measured *= max(1.0, settings.accumulate / 2)
    return float(world.mean_(measured)) * steps * (1 + OTHER)


def _times(config: Config, seconds: dict[str, float]) -> str:
    parts = [
        f"{_length(getattr(config, stage))} of {stage} in about {value / 60:.1f} minutes"
        for stage, value in seconds.items()
    ]
    total = sum(seconds.values()) / 60
    return f"{' and '.join(parts)}; together about {total:.0f} minutes on this machine"


def _length(settings: TrainConfig) -> str:
    steps = settings.max_steps
    return f"{settings.epochs} epochs" if steps is None else f"at most {steps} steps"
