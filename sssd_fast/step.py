"""One optimizer step: precision, micro-batches, clipping, and the rule that nothing non-finite is ever applied.

The decision is taken on the device: the fused optimizer and the centre read a flag there, so that no step waits for the host.
Compiled, a step is two graphs: forward and backward, cut by torch where activations are kept, and the update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sssd_fast.optim import FusedAdamW, all_finite, clipped_update, set_lr
from sssd_fast.run.device import World, autocast


class TaskLoss(NamedTuple):
    """What a task computes from one micro-batch. `parts` are logged; `carry` (or None) is averaged and handed to `after`."""

    total: Tensor
    parts: dict[str, Tensor]
    carry: Tensor | None = None


class StepResult(NamedTuple):
    parts: dict[str, Tensor]  # scalars, averaged over micro-batches (not over processes)
    grad_norm: Tensor
    finite: Tensor  # bool scalar: False = this step was skipped


class Step:
    """Callable that does forward, backward and update for a list of micro-batches.

    `loss(module, batch, step, micro)` returns a TaskLoss; `after(carry, finite)` updates state that is no parameter (the centre).
    compiled: compile the update too (the module comes compiled already). graphs: the module runs as CUDA graphs, whose
    outputs the next replay overwrites.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[nn.Module, Any, int, int], TaskLoss],
        *,
        world: World,
        precision: str = "fp32",
        clip_grad: float | None = None,
        after: Callable[[Tensor, Tensor], None] | None = None,
        compiled: bool = False,
        graphs: bool = False,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.loss = loss
        self.after = after
        self.world = world
        self.precision = precision
        self.graphs = graphs
        self.clip_grad = clip_grad
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(world.device.type) if precision == "fp16" else None
        self._update: Callable[..., tuple[Tensor, Tensor]] = clipped_update
        if compiled:
            self._update = torch.compile(clipped_update, fullgraph=True, dynamic=False)

    def autocast(self) -> torch.autocast:
        return autocast(self.precision, self.world.device)

    def __call__(self, micro_batches: Sequence[Any], step: int, lr: float) -> StepResult:
        set_lr(self.optimizer, lr)
        sums, carry = self._forward_backward(micro_batches, step)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        watched = [self.world.mean_(sums["loss"].clone())] + (
            [] if carry is None else [self.world.mean_(carry)]
        )
        grad_norm, finite = self._apply(watched)
        if self.scaler is not None:
            self.scaler.update()
        if carry is not None and self.after is not None:
            self.after(carry, finite)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(sums, grad_norm, finite)

    def _forward_backward(
        self, micro_batches: Sequence[Any], step: int
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Gradients of the mean over the micro-batches; returns the means of loss and parts, and of what is carried."""
        n = len(micro_batches)
        sums: dict[str, Tensor] = {}
        carry_sum: Tensor | None = None
        for i, batch in enumerate(micro_batches):
            if self.graphs:
                torch.compiler.cudagraph_mark_step_begin()
            ddp = self.module if isinstance(self.module, DistributedDataParallel) else None
            with ddp.no_sync() if ddp is not None and i < n - 1 else nullcontext():
                with self.autocast():
                    total, parts, carry = self.loss(self.module, batch, step, i)
                scaled = total / n
                (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
            if self.graphs and n > 1 and i == 0:
                for p in (
                    self.parameters
                ):  # out of the memory of the graph, which the next micro-batch writes again
                    p.grad = None if p.grad is None else p.grad.clone()
            for name, value in {"loss": total, **parts}.items():
                value = value.detach().float() / n
                sums[name] = value if name not in sums else sums[name] + value
            if carry is not None:
                carry = carry.detach() / n
                carry_sum = carry if carry_sum is None else carry_sum + carry
        return sums, carry_sum

    @torch.no_grad()
    def _apply(self, watched: list[Tensor]) -> tuple[Tensor, Tensor]:
        optimizer = self.optimizer
        if isinstance(optimizer, FusedAdamW):
            return self._update(optimizer.filled_groups(), self.clip_grad, watched)
        # torchao's update cannot be skipped on the device: here, and only here, a step waits for it
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_grad or float("inf"))
        finite = all_finite(grad_norm, *watched)
        if bool(finite):
            optimizer.step()
        return grad_norm, finite
