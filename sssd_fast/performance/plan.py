"""Which micro-batch and settings fit a GPU: `sssd-fast plan`. All numbers are estimates by
estimate.py; what a real card needs in addition to tensors is assumed, not measured.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

import torch

from sssd_fast.config import Config, from_dict, to_dict
from sssd_fast.errors import ConfigError
from sssd_fast.performance.estimate import Estimate, estimate
from sssd_fast.run.device import pick_precision
from sssd_fast.run.log import Console

CONTEXT_BYTES = 0.6e9  # CUDA context, loaded kernels, cuBLAS and cuDNN workspaces
FRAGMENTS = 0.06  # share of all tensors, lost to rounding and fragments of the allocator
OLDEST = (8, 0)  # compute capability that is assumed without a GPU
# Below it, by arithmetic, the kernels of a ViT-B step are too short to keep a large GPU busy.
GOOD_MICRO_BATCH = 64
# Changes of the section `step` to try, fastest first; not step.activation_budget, by which torch's
# partitioner keeps more or less depending on the final batch.
TRIED: tuple[dict[str, Any], ...] = (
    {},
    {"residual": "bf16"},
    {"residual": "bf16", "compile": False, "checkpoint": "full"},
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

    overrides: str  # key=value of the section `step`; "" = as configured
    estimate: Estimate
    largest: int  # micro-batch that fits
    micro_batch: int  # the largest that divides the effective batch; 0 = none fits
    peak_bytes: float  # at that micro-batch, or at one image if none fits


def plan(config: Config, task: str, memory: float, *, effective: int) -> list[Row]:
    """One row for each of TRIED and each optimizer that the configuration allows. memory: in bytes.
    effective: batch of one optimizer step. Raises ConfigError.
    """
    precision = precision_of(config)
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else OLDEST
    tree = to_dict(config)
    rows: list[Row] = []
    for tried in TRIED:
        changes = {k: v for k, v in tried.items() if k != "residual" or precision == "bf16"}
        if rows and not changes:
            continue
        step = {**tree["step"], **START, **changes} if changes else tree["step"]
        changed = from_dict({**tree, "step": step})
        # like execution.pick_compile on a GPU that can compile
        automatic = changed.step.compile == "auto" and changed.step.checkpoint == "none"
        compiled = changed.step.compile is True or automatic
        options: dict[str, Any] = {"compiled": compiled, "capability": capability}
        found = estimate(changed, task, precision, torch.device("cuda"), **options)
        rows.append(_row(changes, found, memory, effective))
        if changes and config.step.optimizer != "adamw8bit":
            small = replace(found, optimizer_name="adamw8bit")
            rows.append(_row({**changes, "optimizer": "adamw8bit"}, small, memory, effective))
    return rows


def _row(changes: dict[str, Any], found: Estimate, memory: float, effective: int) -> Row:
    def too_large(images: int) -> bool:
        return with_reserve(found.peak(images, accumulate=-(-effective // images))) > memory

    # the peak grows with the images
    largest = bisect_left(range(1, 4 * effective + 1), True, key=too_large)
    micro = max((n for n in divisors(effective) if n <= largest), default=0)
    images = max(micro, 1)
    peak = with_reserve(found.peak(images, accumulate=effective // images))
    overrides = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
    return Row(overrides, found, largest, micro, peak)


def with_reserve(tensors: float) -> float:
    """Bytes of a card that are needed for these bytes of tensors."""
    return tensors * (1 + FRAGMENTS) + CONTEXT_BYTES


def precision_of(config: Config) -> str:
    """auto: that of the GPU of this machine; without one, of a GPU from sm_80 on."""
    if torch.cuda.is_available():
        return pick_precision(config.precision, torch.device("cuda", torch.cuda.current_device()))
    return "bf16" if config.precision == "auto" else config.precision


def divisors(n: int) -> list[int]:
    """Ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def parse_memory(text: str) -> float:
    """Bytes of "12GB" (1e9), "12GiB" (2**30), "8000MB" or "auto", the GPU of this machine."""
    if text == "auto" and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB)", text.strip(), re.IGNORECASE)
    units = {"gb": 1e9, "gib": 2.0**30, "mb": 1e6, "mib": 2.0**20}
    if found is None or float(found[1]) == 0:
        raise ConfigError(
            f"--memory is {text!r}, needs a size such as 12GB, 11.5GiB or 8000MB, or auto on a "
            "machine with a CUDA device"
        )
    return float(found[1]) * units[found[2].lower()]


def recommended(rows: list[Row], effective: int) -> Row | None:
    """The first whose micro-batch keeps a GPU busy; else the one with the largest micro-batch."""
    fitting = [row for row in rows if row.micro_batch]
    busy = [row for row in fitting if row.micro_batch >= min(effective, GOOD_MICRO_BATCH)]
    return max(busy[:1] or fitting, key=lambda row: row.micro_batch, default=None)


def plan_command(config: Config, task: str, memory: float, *, effective: int | None = None) -> None:
    """Prints the table and the settings to use. Raises ConfigError if nothing fits."""
    settings = getattr(config, task)
    effective = effective or settings.batch_size * settings.accumulate
    rows = plan(config, task, memory, effective=effective)
    size = "x".join(map(str, config.model.image_size))
    model = f"ViT-{config.model.name}, {size}, {precision_of(config)}"
    title = f"{task}, {model}, {memory / 1e9:.1f} GB: estimates"
    columns = ["settings", "MB per image", "fixed GB", "max micro-batch"]
    columns += [f"batch x accumulate (effective {effective})", "peak GB"]
    with Console() as console:
        console.table(title, columns, [_cells(row, effective) for row in rows])
        console.info(
            f"effective batch: images of one optimizer step. Configured: "
            f"{task}.batch_size={settings.batch_size} x {task}.accumulate={settings.accumulate}; "
            "--batch N plans for another.\n"
            "MB per image: activations kept for the backward. fixed: parameters, gradients, "
            "optimizer state. checkpoint=full computes the forward pass of the blocks twice.\n"
            "Estimated from the real model on fake tensors; for the CUDA context "
            f"{CONTEXT_BYTES / 1e9:.1f} GB and for fragments {FRAGMENTS:.0%} are added. Not "
            f"measured on a GPU; {task}.batch=auto tries real steps."
        )
        best = recommended(rows, effective)
        if best is None:
            smallest = min(row.peak_bytes for row in rows)
            raise ConfigError(
                f"nothing fits {memory / 1e9:.1f} GB: the smallest of these needs "
                f"{smallest / 1e9:.1f} GB for one image. Choose a smaller model.name, fewer "
                "model.decoder_depth or a smaller model.image_size"
            )
        accumulate = effective // best.micro_batch
        changes = [f"{task}.batch_size={best.micro_batch}", f"{task}.accumulate={accumulate}"]
        changes += [f"step.{change}" for change in best.overrides.split()]
        console.info(f"recommended: {' '.join(changes)}")


def _cells(row: Row, effective: int) -> tuple[str, ...]:
    largest = f"{row.largest}" if row.largest < 4 * effective else f"over {row.largest}"
    return (
        row.overrides or "as configured",
        f"{row.estimate.kept_per_image / 1e6:.1f}",
        f"{row.estimate.fixed / 1e9:.2f}",
        largest if row.largest else "-",
        f"{row.micro_batch} x {effective // row.micro_batch}" if row.micro_batch else "none fits",
        f"{row.peak_bytes / 1e9:.1f}",
    )
