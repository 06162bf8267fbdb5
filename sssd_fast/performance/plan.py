"""Which micro-batch and settings fit a GPU: `sssd-fast plan`. All figures are predictions by memory_model.py.

The model counts bytes of tensors. What lies around them on a real card is assumed, not measured, and stands in RESERVE: the CUDA context
with its kernels, workspaces of cuBLAS and cuDNN, and a share that the allocator loses to rounding and fragments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from sssd_fast.attention import Site, choose
from sssd_fast.config import Config, StepConfig, from_dict, to_dict
from sssd_fast.errors import ConfigError
from sssd_fast.performance.costs import classifier_parts, train_flops
from sssd_fast.performance.memory_check import Traced, budget_is_ignored, measured_saved_bytes
from sssd_fast.performance.memory_model import (
    Options,
    Stage,
    Work,
    fixed_bytes,
    keeping,
    saved_per_image,
    total_peak,
)
from sssd_fast.run.device import AUTOCAST, pick_precision
from sssd_fast.run.log import Console


class Reserve(NamedTuple):
    """Assumed, on top of the bytes of tensors."""

    context_bytes: float = 0.6e9  # CUDA context, loaded kernels, cuBLAS and cuDNN workspaces
    fragments: float = 0.06  # of all tensors

    def usable(self, memory: float) -> float:
        return max(0.0, (memory - self.context_bytes) / (1 + self.fragments))


RESERVE = Reserve()
OLDEST = (8, 0)  # the GPU that is assumed where there is none, and no --arch
GOOD_MICRO_BATCH = (
    64  # below it, by arithmetic, kernels of a ViT-B step are too short to keep a large GPU busy
)
# What is tried: changes of the section `step`, the cheapest first.
TRIED: tuple[dict[str, Any], ...] = (
    {},
    {"residual": "bf16"},
    {"residual": "bf16", "activation_budget": 0.8},
    {"residual": "bf16", "activation_budget": 0.5},
    {"residual": "bf16", "activation_budget": 0.5, "optimizer": "adamw8bit"},
    {"residual": "bf16", "compile": False, "checkpoint": "selective"},
    {"residual": "bf16", "compile": False, "checkpoint": "full"},
    {"residual": "bf16", "compile": False, "checkpoint": "full", "optimizer": "adamw8bit"},
)
# What these changes start from, so that they do not meet settings that contradict them.
START: dict[str, Any] = {
    "activation_budget": 1.0,
    "checkpoint": "none",
    "compile": "auto",
    "cuda_graphs": "auto",
}


@dataclass(frozen=True)
class Row:
    """A prediction for one set of settings."""

    settings: dict[str, Any]  # keys of the section `step` that differ from the configuration
    kept_bytes_per_image: float
    fixed_bytes: float  # parameters, gradients, optimizer state
    largest: int  # micro-batch that fits
    micro_batch: int  # the largest that divides the effective batch; 0 = none fits
    accumulate: int
    peak_bytes: float  # at that micro-batch, with RESERVE
    speed: float  # of the step by FLOPs, 1 = nothing computed twice
    note: str = ""

    @property
    def name(self) -> str:
        told = [f"{key}={str(value).lower()}" for key, value in self.settings.items()]
        return " ".join(told) or "as configured"

    def overrides(self, task: str) -> list[str]:
        """The settings as key=value."""
        batch = [f"{task}.batch_size={self.micro_batch}", f"{task}.accumulate={self.accumulate}"]
        return batch + [f"step.{key}={str(value).lower()}" for key, value in self.settings.items()]


def plan(
    config: Config, task: str, memory: float, *, effective: int | None = None, capability: tuple[int, int] | None = None,
    say: Callable[[str], Any] = print,
) -> list[Row]:  # fmt: skip
    """One row per line of TRIED that these settings allow. `memory` in bytes; `effective` None = as configured.

    Raises ConfigError for settings that cannot be combined.
    """
    settings = getattr(config, task)
    effective = effective or settings.batch_size * settings.accumulate
    work = work_of(config, task)
    rows: list[Row] = []
    told: set[str] = set()

    def once(text: str) -> None:
        if text not in told:
            told.add(text)
            say(text)

    for tried in TRIED:
        changes = {
            k: v for k, v in tried.items() if k != "residual" or precision_of(config) == "bf16"
        }
        if changes not in [row.settings for row in rows]:
            tree = to_dict(config)
            start = START if changes else {}
            asked = from_dict({**tree, "step": {**tree["step"], **start, **changes}})
            rows.append(_row(work, asked, changes, memory, effective, capability, once))
    return rows


def _row(
    work: Work, config: Config, changes: dict[str, Any], memory: float, effective: int,
    capability: tuple[int, int] | None, say: Callable[[str], Any],
) -> Row:  # fmt: skip
    step, note = config.step, ""
    o = options_of(
        config, work, precision_of(config), torch.device("cuda"), would_compile(step), capability
    )
    stages, flops, extra = work.stages(o), flops_of(work), 0.0
    if step.activation_budget < 1:
        hoped = keeping(stages, step.activation_budget * saved_per_image(stages))
        guess = max(1, min(effective, _largest(work, hoped, o, memory, effective)))
        kept, extra = budgeted(work, o, step.activation_budget, guess, say)
        micro = _dividing(effective, _largest(work, kept, o, memory, effective))
        if budget_is_ignored(work, o, max(1, micro)):
            note, extra = "torch ignores the budget at so few images", 0.0
        else:
            stages = kept
    elif step.checkpoint == "full":
        extra = flops / 3  # a forward pass
    largest = _largest(work, stages, o, memory, effective)
    micro = _dividing(effective, largest)
    accumulate = effective // micro if micro else 0
    peak = total_peak(work, stages, max(micro, 1), o, accumulate=accumulate or effective)
    return Row(
        settings=changes,
        kept_bytes_per_image=saved_per_image(stages),
        fixed_bytes=fixed_bytes(stages, o),
        largest=largest,
        micro_batch=micro,
        accumulate=accumulate,
        peak_bytes=peak * (1 + RESERVE.fragments) + RESERVE.context_bytes,
        speed=flops / (flops + extra),
        note=note,
    )


def budgeted(
    work: Work, o: Options, budget: float, images: int, say: Callable[[str], Any]
) -> tuple[list[Stage], float]:
    """(stages that keep what torch keeps at this step.activation_budget, FLOPs per image that it repeats)."""
    stages = work.stages(o)
    if budget_is_ignored(work, o, images):
        return stages, 0.0
    say(f"activation_budget {budget:g}: tracing {images} images through torch's partitioner ...")
    traced = _traced(work, o, images, budget)
    return keeping(stages, traced.per_image), traced.recomputed_flops


def _dividing(effective: int, largest: int) -> int:
    return max((n for n in divisors(effective) if n <= largest), default=0)


def _traced(work: Work, o: Options, images: int, budget: float) -> Traced:
    """The ops' kernels do not run where this is traced: the plain ops keep the same or a little more."""
    on_cpu = replace(
        o,
        plain_ops=True,
        optimizer="adamw",
        attention=_traceable(o.attention),
        decoder_attention=_traceable(o.decoder_attention),
    )
    return measured_saved_bytes(work, on_cpu, images, budget)


def _traceable(provider: str) -> str:
    return "eager" if provider == "eager" else "sdpa"


def _largest(work: Work, stages: list[Stage], o: Options, memory: float, effective: int) -> int:
    """The largest micro-batch up to four times the effective batch whose peak fits, with as much accumulation as it then needs."""

    def fits(images: int) -> bool:
        accumulate = -(-effective // images)
        return total_peak(work, stages, images, o, accumulate=accumulate) <= RESERVE.usable(memory)

    low, high = 0, 4 * effective
    while low < high:  # the peak grows with the images
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


# ---- what a configuration asks for -------------------------------------------------------------------------------------------


def work_of(config: Config, task: str, classes: int = 2) -> Work:
    if task == "pretrain":
        return Work(config.model, config.objective)
    return Work(config.model, None, classes, config.finetune.pool, config.finetune.drop_path)


def precision_of(config: Config) -> str:
    """auto: that of the GPU here; where there is none, of one from sm_80 on."""
    if torch.cuda.is_available():
        return pick_precision(config.precision, torch.device("cuda", torch.cuda.current_device()))
    return "bf16" if config.precision == "auto" else config.precision


def would_compile(step: StepConfig) -> bool:
    """compute.pick_compile on a GPU that can."""
    return step.compile is True or (step.compile == "auto" and step.checkpoint == "none")


def options_of(
    config: Config, work: Work, precision: str, device: torch.device, compiled: bool, capability: tuple[int, int] | None = None
) -> Options:  # fmt: skip
    """What compute.prepare would decide on such a device (None = the one here, else sm_80), for memory_model."""
    step, model = config.step, config.model
    prefix, dtype = int(model.cls_token), AUTOCAST.get(precision, torch.float32)
    if capability is None and device.type == "cuda":
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else OLDEST
    width, _, heads = model.encoder_shape
    rows = (model.num_visible if work.objective is not None else model.num_patches) + prefix
    providers = []
    for name, tokens, h, d, setting in (
        (step.attention, rows, heads, width // heads, "step.attention"),
        (
            step.decoder_attention,
            model.num_patches + prefix,
            model.decoder_heads,
            model.decoder_width // model.decoder_heads,
            "step.decoder_attention",
        ),
    ):
        site = Site(device, dtype, tokens, h, d, compiled=compiled, capability=capability or (0, 0))
        providers.append(choose(name, site, setting).provider)
    return Options(
        precision=precision,
        residual=step.residual,
        checkpoint=step.checkpoint,
        compiled=compiled,
        fused_mlp=step.mlp != "plain" and device.type == "cuda",
        attention=providers[0],
        decoder_attention=providers[1],
        optimizer=step.optimizer,
        device=device.type,
        plain_ops=device.type == "cpu",
    )


def flops_of(work: Work) -> float:
    """FLOPs per image of forward and backward."""
    if work.objective is not None:
        return train_flops(work.model, work.objective)
    return sum(
        p.forward_flops + p.backward_flops
        for p in classifier_parts(work.model, work.classes, pool=work.pool)
    )


def divisors(n: int) -> list[int]:
    """Ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def parse_memory(text: str) -> float:
    """Bytes of "12GB" (1e9), "12GiB" (2**30), "8000MB" or "auto", the GPU here. Raises ConfigError."""
    if text == "auto":
        if not torch.cuda.is_available():
            raise ConfigError(
                "--memory auto needs a CUDA device and there is none here; give a size, such as --memory 12GB"
            )
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB)", text.strip(), re.IGNORECASE)
    units = {"gb": 1e9, "gib": 2.0**30, "mb": 1e6, "mib": 2.0**20}
    if found is None or float(found[1]) == 0:
        raise ConfigError(
            f"--memory is {text!r}, needs a size such as 12GB, 11.5GiB or 8000MB, or auto"
        )
    return float(found[1]) * units[found[2].lower()]


# ---- the command -------------------------------------------------------------------------------------------------------------


def recommended(rows: list[Row], effective: int) -> Row | None:
    """The fastest by prediction whose micro-batch is large enough to keep a GPU busy; else the one with the largest micro-batch."""
    fitting = [row for row in rows if row.micro_batch]
    busy = [row for row in fitting if row.micro_batch >= min(effective, GOOD_MICRO_BATCH)]
    if busy:
        return max(busy, key=lambda row: row.speed)  # of equals the first, which changes least
    return max(fitting, key=lambda row: row.micro_batch, default=None)


def plan_command(
    config: Config, task: str, memory: float, *, effective: int | None = None, as_json: bool = False
) -> None:
    """Prints the table and the settings to use. Raises ConfigError where nothing fits."""
    settings = getattr(config, task)
    effective = effective or settings.batch_size * settings.accumulate
    with Console() as console:
        say = (lambda text: None) if as_json else console.info
        rows = plan(config, task, memory, effective=effective, say=say)
        best = recommended(rows, effective)
        if as_json:
            print(json.dumps(_json(config, task, memory, effective, rows, best), indent=2))
        else:
            for line in _print(console, config, task, memory, effective, rows, best):
                console.info(line)
    if best is None:
        raise ConfigError(
            f"nothing fits {memory / 1e9:.1f} GB: the smallest of these needs {min(row.peak_bytes for row in rows) / 1e9:.1f} GB "
            f"for one image. Take a smaller model.name, fewer model.decoder_depth or a smaller model.image_size"
        )


def _print(
    console: Console, config: Config, task: str, memory: float, effective: int, rows: list[Row], best: Row | None
) -> list[str]:  # fmt: skip
    name, size = config.model.name, "x".join(map(str, config.model.image_size))
    console.table(
        f"{task} of ViT-{name} at {size}, {precision_of(config)}, in {memory / 1e9:.1f} GB: predictions",
        (
            "settings",
            "MB per image",
            "fixed GB",
            "largest micro-batch",
            f"for {effective}",
            "peak GB",
            "speed",
        ),
        [_cells(row, effective) for row in rows],
    )
    lines = [
        "MB per image: activations kept for the backward. fixed: parameters, gradients, optimizer state. speed: by FLOPs, 1 = nothing "
        "is computed twice; element-wise work is not in it.",
        f"Predicted by sssd_fast/memory_model.py, which tests hold against the bytes that autograd keeps on the CPU; budgets by torch's "
        f"own partitioner. Assumed on top: {RESERVE.context_bytes / 1e9:.1f} GB for the CUDA context and workspaces, "
        f"{RESERVE.fragments:.0%} for fragments. Not measured on a GPU; {task}.batch=auto tries on the GPU itself.",
    ]
    if best is not None:
        lines.append(f"recommended, {best.name}: {' '.join(best.overrides(task))}")
    return lines


def _cells(row: Row, effective: int) -> tuple[str, ...]:
    fits = f"{row.micro_batch} x {row.accumulate}" if row.micro_batch else "does not fit"
    largest = f"{row.largest}" if row.largest < 4 * effective else f"over {row.largest}"
    return (
        row.name + (f" ({row.note})" if row.note else ""),
        f"{row.kept_bytes_per_image / 1e6:.1f}",
        f"{row.fixed_bytes / 1e9:.2f}",
        largest if row.largest else "-",
        fits,
        f"{row.peak_bytes / 1e9:.1f}",
        f"{row.speed:.2f}",
    )


def _json(
    config: Config, task: str, memory: float, effective: int, rows: list[Row], best: Row | None
) -> dict[str, Any]:  # fmt: skip
    return {
        "schema": 1,
        "predicted": True,
        "task": task,
        "memory_bytes": memory,
        "effective_batch": effective,
        "reserve": RESERVE._asdict(),
        "config": to_dict(config),
        "rows": [asdict(row) | {"overrides": row.overrides(task)} for row in rows],
        "recommended": None if best is None else best.overrides(task),
    }
