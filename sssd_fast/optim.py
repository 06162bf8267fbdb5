"""AdamW with parameter groups, layer-wise learning rates and a schedule.

Layer decay (Clark et al., arXiv 2003.10555; BEiT, arXiv 2106.08254): the learning rate of block i
of n is multiplied by decay ** (n + 1 - (i + 1)), of the embedding by decay ** (n + 1), of the head
by 1.

Values that change from step to step (learning rate, gradient scale, the flag that skips a step) are
tensors on the device: nothing waits for the device, and a compiled step is compiled once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sssd_fast.performance.adamw8bit import build_adamw8bit


def scaled_lr(base_lr: float, effective_batch: int) -> float:
    """lr = base_lr * effective batch / 256 (Goyal et al., arXiv 1706.02677)."""
    return base_lr * effective_batch / 256


def lr_at(step: int, *, total_steps: int, warmup_steps: int, peak: float, minimum: float) -> float:
    """Linear warm-up to `peak`, then half a cosine to `minimum`. `step` counts optimizer steps from
    0.
    """
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
    """Groups with keys params, weight_decay, lr_scale, names. Biases, norms, tokens and positions
    are not decayed.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or name.endswith(("cls_token", "mask_token", "pos_embed"))
        decay = 0.0 if plain else weight_decay
        scale = layer_decay ** (depth + 1 - layer_of(name, depth))
        group = groups.setdefault(
            (decay, scale), {"params": [], "weight_decay": decay, "lr_scale": scale, "names": []}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


# Both are custom ops: torch.compile cannot trace torch's multi-tensor kernels with a tensor as
# learning rate, and it would compile a norm over hundreds of tensors to hundreds of kernels.
@torch.library.custom_op("sssd_fast::global_norm", mutates_args=())
def global_norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of all elements of all tensors together, fp32 scalar."""
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


@global_norm.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float32)


_STATE = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")


@torch.library.custom_op("sssd_fast::adamw_", mutates_args=_STATE)
def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    scale: Tensor | None,
    skip: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), in place.

    Gradients are divided by `scale`. Nothing changes if `skip` is 1.
    """
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=scale,
        found_inf=skip,
    )
    torch._foreach_sub_(steps, [skip] * len(steps))


class Group(NamedTuple):
    """The parameters of one group that have a gradient, and what AdamW needs to update them."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    lr: Tensor  # scalar, on the parameters' device
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class FusedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True) with an update that torch.compile can trace; same state
    dict.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, lr=0.0, betas=betas, fused=True)
        device = self.param_groups[0]["params"][0].device
        scales = [group["lr_scale"] for group in self.param_groups]
        self._lr = torch.zeros((), device=device)
        self._scales_G = torch.tensor(scales, device=device)

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]  # for the checkpoint; the update reads the tensor
        self._lr.fill_(lr)

    def filled_groups(self) -> list[Group]:
        """The groups that have gradients."""
        found = []
        lrs = (self._lr * self._scales_G).unbind()
        for group, lr in zip(self.param_groups, lrs, strict=True):
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    keep = torch.preserve_format
                    self.state[p]["step"] = torch.zeros((), device=p.device)
                    self.state[p]["exp_avg"] = torch.zeros_like(p, memory_format=keep)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p, memory_format=keep)
            values = [p.detach() for p in params]
            grads = [p.grad for p in params]
            first = [self.state[p]["exp_avg"] for p in params]
            second = [self.state[p]["exp_avg_sq"] for p in params]
            steps = [self.state[p]["step"] for p in params]
            numbers = lr, *group["betas"], group["eps"], group["weight_decay"]
            found.append(Group(values, grads, first, second, steps, *numbers))
        return found


def clipped_update(
    groups: list[Group], max_norm: float | None, must_be_finite: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """AdamW on gradients clipped to a global norm: (norm before clipping, whether it was applied).

    Two passes over the gradients: the norm, and the update itself. Nothing is applied unless the
    norm and everything in `must_be_finite` are finite.
    """
    grad_norm = global_norm([grad for group in groups for grad in group.grads])
    finite = all_finite(grad_norm, *must_be_finite)
    # The inverse of the factor of torch.nn.utils.clip_grad_norm_.
    scale = None if max_norm is None else torch.clamp((grad_norm + 1e-6) / max_norm, min=1.0)
    skip = (~finite).float()
    for params, grads, exp_avgs, exp_avg_sqs, steps, lr, *numbers in groups:
        adamw_(params, grads, exp_avgs, exp_avg_sqs, steps, lr, scale, skip, *numbers)
    return grad_norm, finite


def build_optimizer(
    groups: list[dict[str, Any]], betas: tuple[float, float], name: str = "adamw"
) -> torch.optim.Optimizer:
    """FusedAdamW for "adamw". For "adamw8bit" torchao's, with 2 bytes of moments per parameter,
    not 8.
    """
    return FusedAdamW(groups, betas) if name == "adamw" else build_adamw8bit(groups, betas)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    if isinstance(optimizer, FusedAdamW):
        optimizer.set_lr(lr)
        return
    for group in optimizer.param_groups:
        group["lr"].fill_(lr * group["lr_scale"])  # torchao's update takes the rate as a tensor


def all_finite(loss: Tensor, *others: Tensor) -> Tensor:
    """Whether every element of all tensors is finite: a bool scalar on the device of the first.

    Does not wait for the device, so it can be part of a compiled or captured step.
    """
    finite = torch.isfinite(loss.detach()).all()
    for other in others:
        finite = finite & torch.isfinite(other.detach()).all().to(finite.device)
    return finite
