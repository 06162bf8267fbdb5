"""One optimizer step: precision, micro-batches, clipping. Nothing non-finite is ever applied.

Whether a step is applied is decided on the device: the fused optimizer and the centre read a flag
there, so no step waits for the host. Forward and backward may be compiled; the update is not, since
its few multi-tensor kernels are launched faster than the guards of compiled code are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from sssd_fast.optim import FusedAdamW, all_finite, clipped_update, set_lr
from sssd_fast.run.device import World, autocast


class TaskLoss(NamedTuple):
    """What a task computes from one micro-batch.

    `losses` are logged. `batch_stats` (or None) is averaged and passed to `update_state`.
    """

    total: Tensor
    losses: dict[str, Tensor]
    batch_stats: Tensor | None = None


class StepResult(NamedTuple):
    losses: dict[str, Tensor]  # scalars, averaged over micro-batches (not over processes)
    grad_norm: Tensor
    finite: Tensor  # bool scalar: False = this step was skipped


class Step:
    """Callable that computes forward, backward and update for a list of micro-batches.

    Args:
        module: what `loss` calls; compiled or wrapped in DistributedDataParallel already.
        loss: `loss(module, batch, step, micro)` returns a TaskLoss.
        update_state: `update_state(batch_stats, finite)` updates state that is not a parameter (the
            centre of the distillation).
        graphs: the module runs as CUDA graphs, whose outputs are overwritten by the next replay.
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
        update_state: Callable[[Tensor, Tensor], None] | None = None,
        graphs: bool = False,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.loss = loss
        self.update_state = update_state
        self.world = world
        self.precision = precision
        self.graphs = graphs
        self.clip_grad = clip_grad
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(world.device.type) if precision == "fp16" else None

    def autocast(self) -> torch.autocast:
        return autocast(self.precision, self.world.device)

    def __call__(self, micro_batches: Sequence[Any], step: int, lr: float) -> StepResult:
        set_lr(self.optimizer, lr)
        losses, batch_stats = self._forward_backward(micro_batches, step)
        with record_function("update"):
            grad_norm, finite = self._update_parameters(losses["loss"], batch_stats)
        return StepResult(losses, grad_norm, finite)

    def _update_parameters(self, loss: Tensor, batch_stats: Tensor | None) -> tuple[Tensor, Tensor]:
        """(gradient norm before clipping, whether the update was applied)."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        # The step is skipped everywhere if the loss or the statistics are not finite on any
        # process.
        must_be_finite = [self.world.mean_(loss.clone())]
        if batch_stats is not None:
            must_be_finite.append(self.world.mean_(batch_stats))
        grad_norm, finite = self._apply(must_be_finite)
        if self.scaler is not None:
            self.scaler.update()
        if batch_stats is not None and self.update_state is not None:
            self.update_state(batch_stats, finite)
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm, finite

    def _forward_backward(
        self, micro_batches: Sequence[Any], step: int
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Accumulates the gradients of the mean over the micro-batches.

        Returns the means of the losses and of the batch statistics.
        """
        n = len(micro_batches)
        losses: dict[str, Tensor] = {}
        stats: Tensor | None = None
        ddp = self.module if isinstance(self.module, DistributedDataParallel) else None
        for i, batch in enumerate(micro_batches):
            if self.graphs:
                torch.compiler.cudagraph_mark_step_begin()
            # Gradients are exchanged once per step, in the backward of the last micro-batch.
            with ddp.no_sync() if ddp is not None and i < n - 1 else nullcontext():
                with record_function("forward"), self.autocast():
                    total, terms, batch_stats = self.loss(self.module, batch, step, i)
                with record_function("backward"):
                    scaled = total / n
                    (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
            if self.graphs and n > 1 and i == 0:
                # The first gradients are in the graph's memory, which the next replay overwrites.
                for p in self.parameters:
                    p.grad = None if p.grad is None else p.grad.clone()
            for name, value in {"loss": total, **terms}.items():
                value = value.detach().float() / n
                losses[name] = value if name not in losses else losses[name] + value
            if batch_stats is not None:
                batch_stats = batch_stats.detach() / n
                stats = batch_stats if stats is None else stats + batch_stats
        return losses, stats

    @torch.no_grad()
    def _apply(self, must_be_finite: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(gradient norm before clipping, whether the update was applied)."""
        optimizer = self.optimizer
        if isinstance(optimizer, FusedAdamW):
            return clipped_update(optimizer.filled_groups(), self.clip_grad, must_be_finite)
        # torchao's update cannot be skipped on the device: only here a step waits for the host.
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_grad or float("inf"))
        finite = all_finite(grad_norm, *must_be_finite)
        if bool(finite):
            optimizer.step()
        return grad_norm, finite
