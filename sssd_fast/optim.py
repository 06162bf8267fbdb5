"""AdamW with parameter groups, layer-wise learning rates and a schedule.

Layer decay (Clark et al., arXiv 2003.10555; BEiT, arXiv 2106.08254): the learning rate of block i
of n is multiplied by decay ** (n + 1 - (i + 1)), of the embedding by decay ** (n + 1), of the head
by 1.

Values that change from step to step (learning rate, gradient scale, the flag that skips a step) are
tensors on the device: nothing waits for the device. The update is not compiled: it consists of a
few multi-tensor kernels, and the guards of compiled code take longer than launching them.
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


def global_norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of all elements of all tensors together, fp32 scalar."""
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


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
    """torch.optim.AdamW(fused=True) whose learning rates, gradient scale and skip flag are tensors
    on the device; same state dict.
    """

    # position of a group -> (id of each parameter that has a gradient, the lists of the update)
    _lists: dict[int, tuple[list[int], Group]]

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, lr=0.0, betas=betas, fused=True)
        device = self.param_groups[0]["params"][0].device
        scales = [group["lr_scale"] for group in self.param_groups]
        self._scales_G = torch.tensor(scales, device=device)
        self._lrs_G = torch.zeros(len(scales), device=device)
        self._lr_views = self._lrs_G.unbind()
        self._lists = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called by load_state_dict, which replaces the tensors of the state."""
        super().__setstate__(state)
        self._lists = {}

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]  # for the checkpoint; the update reads the tensor
        torch.mul(self._scales_G, lr, out=self._lrs_G)

    def filled_groups(self) -> list[Group]:
        """The groups that have gradients. Collecting their lists takes the host longer than the
        update, so they are kept until other parameters have gradients.
        """
        found = []
        for number, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            names, known = list(map(id, params)), self._lists.get(number)
            if known is None or known[0] != names:
                known = names, self._group(params, group, self._lr_views[number])
                self._lists[number] = known
            found.append(known[1]._replace(grads=[p.grad for p in params]))
        return found

    def _group(self, params: list[Tensor], group: dict[str, Any], lr: Tensor) -> Group:
        for p in params:
            if not self.state[p]:
                keep = torch.preserve_format
                self.state[p]["step"] = torch.zeros((), device=p.device)
                self.state[p]["exp_avg"] = torch.zeros_like(p, memory_format=keep)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p, memory_format=keep)
        first, second, steps = (
            [self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        beta1, beta2 = group["betas"]
        decay = group["weight_decay"]
        return Group(params, [], first, second, steps, lr, beta1, beta2, group["eps"], decay)


@torch.no_grad()
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
    applied = finite.float()
    skip = 1 - applied
    for group in groups:
        _adamw(group, scale, applied, skip)
    return grad_norm, finite


def _adamw(group: Group, scale: Tensor | None, applied: Tensor, skip: Tensor) -> None:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), in place.

    Gradients are divided by `scale`. Nothing changes if `skip` is 1 and `applied` 0.
    """
    torch._foreach_add_(group.steps, [applied] * len(group.steps))
    torch._fused_adamw_(
        group.params,
        group.grads,
        group.exp_avgs,
        group.exp_avg_sqs,
        [],
        group.steps,
        lr=group.lr,
        beta1=group.beta1,
        beta2=group.beta2,
        weight_decay=group.weight_decay,
        eps=group.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=scale,
        found_inf=skip,
    )


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

    Does not wait for the device.
    """
    x = torch.cat([t.detach().flatten().to(loss.device) for t in (loss, *others)])
    # 0 for finite numbers, else NaN: 3 launches, where isfinite has 5 for each tensor
    return (x - x).sum() == 0
