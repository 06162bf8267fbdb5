"""AdamW parameter groups with layer-wise learning rates, and the schedule.

Layer decay (Clark et al., arXiv 2003.10555; BEiT, arXiv 2106.08254): the learning rate of block i of n is multiplied by
decay ** (n + 1 - (i + 1)), of the embedding by decay ** (n + 1), of the head by 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def scaled_lr(base_lr: float, effective_batch: int) -> float:
    """lr = base_lr * effective batch / 256 (Goyal et al., arXiv 1706.02677)."""
    return base_lr * effective_batch / 256


def lr_at(step: int, *, total_steps: int, warmup_steps: int, peak: float, minimum: float) -> float:
    """Linear warm-up to `peak`, then half a cosine to `minimum`. `step` counts optimizer steps from 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def layer_of(name: str, depth: int) -> int:
    """0 = embedding, 1..depth = blocks, depth + 1 = everything after them."""
    if name.startswith("encoder.blocks."):
        return int(name.split(".")[2]) + 1
    if name.startswith(("encoder.patch_embed.", "encoder.cls_token", "encoder.pos_embed")):
        return 0
    return depth + 1


def parameter_groups(
    model: nn.Module, *, weight_decay: float, layer_decay: float = 1.0, depth: int = 0
) -> list[dict[str, Any]]:
    """Groups with keys params, weight_decay, lr_scale, names. Biases, norms, tokens and positions are not decayed."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or name.endswith(("cls_token", "mask_token", "pos_embed"))
        decay = 0.0 if plain else weight_decay
        scale = layer_decay ** (depth + 1 - layer_of(name, depth))
        group = groups.setdefault((decay, scale), {"params": [], "weight_decay": decay, "lr_scale": scale, "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW: one kernel per group, and it can skip a step on the device (`found_inf`), which guards rely on."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
