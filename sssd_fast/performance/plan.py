"""Which micro-batch and settings fit a GPU: `sssd-fast plan`. All numbers are estimates by
estimate.py; what a real card needs in addition to tensors is assumed, not measured.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

import torch

from sssd_fast.config import Config, StepConfig, from_dict, to_dict
from sssd_fast.errors import ConfigError
from sssd_fast.performance.estimate import Estimate, estimate, step_flops
from sssd_fast.performance.fake import FakeStep
from sssd_fast.run.device import pick_precision
from sssd_fast.run.log import Console

CONTEXT_BYTES = 0.6e9  # CUDA context, loaded kernels, cuBLAS and cuDNN workspaces
FRAGMENTS = 0.06  # share of all tensors, lost to rounding and fragments of the allocator
OLDEST = (8, 0)  # compute capability that is assumed without a GPU
# Below it, by arithmetic, the kernels of a ViT-B step are too short to keep a large GPU busy.
GOOD_MICRO_BATCH = 64
# Changes of the section `step` to try, cheapest first. step.activation_budget is not among them:
# torch's partitioner counts it relative to the parameters, so that what it keeps cannot be told
# without the final batch.
TRIED: tuple[dict[str, Any], ...] = (
    {},
    {"residual": "bf16"},
    {"residual": "bf16", "optimizer": "adamw8bit"},
    {"residual": "bf16", "compile": False, "checkpoint": "full"},
    {"residual": "bf16", "compile": False, "checkpoint": "full", "optimizer": "adamw8bit"},
)
# The changes start from these settings, so that they do not contradict the configuration.
START: dict[str, Any] = {
    "activation_budget": 1.0,
    "checkpoint": "none",
    "compile": "auto",
    "cuda_graphs": "auto",
}


@dataclass(frozen=True)
class Row:
    """An estimate for one set of settings."""

    settings: dict[str, Any]  # keys of the section `step` that differ from the configuration
    estimate: Estimate
    largest: int  # micro-batch that fits
    micro_batch: int  # the largest that divides the effective batch; 0 = none fits
    accumulate: int
    peak_bytes: float  # at that micro-batch, or at one image if none fits
    speed: float  # of the step by FLOPs, 1 = nothing is computed twice

    @property
    def overrides(self) -> list[str]:
        return [f"{key}={str(value).lower()}" for key, value in self.settings.items()]


def plan(config: Config, task: str, memory: float, *, effective: int | None = None) -> list[Row]:
    """One row for each of TRIED that the configuration allows. memory: in bytes.

    effective: batch of one optimizer step; None = as configured. Raises ConfigError for settings
    that cannot be combined.
    """
    settings = getattr(config, task)
    effective = effective or settings.batch_size * settings.accumulate
    precision = precision_of(config)
    device = torch.device("cuda")
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else OLDEST
    fake = FakeStep(config, task)
    options: dict[str, Any] = {"capability": capability, "fake": fake}
    rows: list[Row] = []
    for tried in TRIED:
        changes = {k: v for k, v in tried.items() if k != "residual" or precision == "bf16"}
        if changes in [row.settings for row in rows]:
            continue
        changed = _changed(config, {**START, **changes} if changes else {})
        step = changed.step
        # changes that differ only in the optimizer share an estimate
        optimizer = {"optimizer": step.optimizer}
        previous = [r for r in rows if r.settings and r.settings | optimizer == changes]
        if previous:
            found = replace(previous[0].estimate, optimizer_name=step.optimizer)
            speed = previous[0].speed
        else:
            compiled = would_compile(step)
            found = estimate(changed, task, precision, device, compiled=compiled, **options)
            speed = 1.0  # "selective", if configured, keeps the results of all matrix products
            if step.checkpoint == "full":
                plain = _changed(config, {**START, "compile": False})
                speed = step_flops(plain, task, fake) / step_flops(changed, task, fake)
        largest = largest_micro_batch(found, memory, effective)
        micro = max((n for n in divisors(effective) if n <= largest), default=0)
        accumulate = effective // micro if micro else 0
        peak = with_reserve(found.peak(max(micro, 1), accumulate=accumulate or effective))
        rows.append(Row(changes, found, largest, micro, accumulate, peak, speed))
    return rows


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    tree = to_dict(config)
    return from_dict({**tree, "step": {**tree["step"], **changes}})


def with_reserve(tensors: float) -> float:
    """Bytes of a card that are needed for these bytes of tensors."""
    return tensors * (1 + FRAGMENTS) + CONTEXT_BYTES


def largest_micro_batch(found: Estimate, memory: float, effective: int) -> int:
    """The largest up to four times the effective batch whose peak fits; 0 if none does."""

    def too_large(images: int) -> bool:
        return with_reserve(found.peak(images, accumulate=-(-effective // images))) > memory

    # the peak grows with the images
    return bisect_left(range(1, 4 * effective + 1), True, key=too_large)


def precision_of(config: Config) -> str:
    """auto: that of the GPU of this machine; without one, of a GPU from sm_80 on."""
    if torch.cuda.is_available():
        return pick_precision(config.precision, torch.device("cuda", torch.cuda.current_device()))
    return "bf16" if config.precision == "auto" else config.precision


def would_compile(step: StepConfig) -> bool:
    """execution.pick_compile on a GPU that can compile."""
    return step.compile is True or (step.compile == "auto" and step.checkpoint == "none")


def divisors(n: int) -> list[int]:
    """Ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def parse_memory(text: str) -> float:
    """Bytes of "12GB" (1e9), "12GiB" (2**30), "8000MB" or "auto", the GPU of this machine.
    Raises ConfigError.
    """
    if text == "auto":
        if not torch.cuda.is_available():
            raise ConfigError(
                "--memory auto needs a CUDA device, which was not found; give a size, such as "
                "--memory 12GB"
            )
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB)", text.strip(), re.IGNORECASE)
    units = {"gb": 1e9, "gib": 2.0**30, "mb": 1e6, "mib": 2.0**20}
    if found is None or float(found[1]) == 0:
        raise ConfigError(
            f"--memory is {text!r}, needs a size such as 12GB, 11.5GiB or 8000MB, or auto"
        )
    return float(found[1]) * units[found[2].lower()]


# ---- the command ---------------------------------------------------------------------------------


def recommended(rows: list[Row], effective: int) -> Row | None:
    """The fastest by estimate whose micro-batch keeps a GPU busy; else the one with the largest
    micro-batch.
    """
    fitting = [row for row in rows if row.micro_batch]
    busy = [row for row in fitting if row.micro_batch >= min(effective, GOOD_MICRO_BATCH)]
    if busy:
        return max(busy, key=lambda row: row.speed)  # of equals the first, which changes least
    return max(fitting, key=lambda row: row.micro_batch, default=None)


def plan_command(config: Config, task: str, memory: float, *, effective: int | None = None) -> None:
    """Prints the table and the settings to use. Raises ConfigError if nothing fits."""
    settings = getattr(config, task)
    configured = (
        f"{task}.batch_size={settings.batch_size} x {task}.accumulate={settings.accumulate}"
    )
    effective = effective or settings.batch_size * settings.accumulate
    rows = plan(config, task, memory, effective=effective)
    best = recommended(rows, effective)
    size = "x".join(map(str, config.model.image_size))
    model = f"ViT-{config.model.name}, {size}, {precision_of(config)}"
    columns = (
        "settings",
        "MB per image",
        "fixed GB",
        "max micro-batch",
        f"batch x accumulate (effective {effective})",
        "peak GB",
        "relative speed",
    )
    lines = [
        f"effective batch: images of one optimizer step. Configured: {configured}; --batch N plans "
        "for another.",
        "MB per image: activations kept for the backward. fixed: parameters, gradients, optimizer "
        "state. relative speed: by FLOPs, 1 = nothing is recomputed; element-wise work does not "
        "count.",
        "Estimated from the real model on fake tensors; for the CUDA context "
        f"{CONTEXT_BYTES / 1e9:.1f} GB and for fragments {FRAGMENTS:.0%} are added. Not measured "
        f"on a GPU; {task}.batch=auto tries real steps.",
    ]
    if best is not None:
        batch = f"{task}.batch_size={best.micro_batch} {task}.accumulate={best.accumulate}"
        changes = [f"step.{change}" for change in best.overrides]
        lines.append(f"recommended, {_name(best)}: {' '.join([batch, *changes])}")
    with Console() as console:
        title = f"{task}, {model}, {memory / 1e9:.1f} GB: estimates"
        console.table(title, columns, [_cells(row, effective) for row in rows])
        for line in lines:
            console.info(line)
    if best is None:
        smallest = min(row.peak_bytes for row in rows)
        raise ConfigError(
            f"nothing fits {memory / 1e9:.1f} GB: the smallest of these needs {smallest / 1e9:.1f} "
            "GB for one image. Choose a smaller model.name, fewer model.decoder_depth or a smaller "
            "model.image_size"
        )


def _name(row: Row) -> str:
    return " ".join(row.overrides) or "as configured"


def _cells(row: Row, effective: int) -> tuple[str, ...]:
    largest = f"{row.largest}" if row.largest < 4 * effective else f"over {row.largest}"
    return (
        _name(row),
        f"{row.estimate.kept_per_image / 1e6:.1f}",
        f"{row.estimate.fixed / 1e9:.2f}",
        largest if row.largest else "-",
        f"{row.micro_batch} x {row.accumulate}" if row.micro_batch else "does not fit",
        f"{row.peak_bytes / 1e9:.1f}",
        f"{row.speed:.2f}",
    )
