"""The SSSD-COVID objective: masked reconstruction plus self-distillation from decoder to encoder.

    total = w * distillation + (1 - w) * reconstruction

As in SD-MAE (Luo, Chen et al., arXiv 2203.16983, and its released code): the student is
LayerNorm(encoder), the teacher LayerNorm(decoder), both at the visible patches. Each passes its own
projection head; the loss is the cross-entropy from the centred, sharpened teacher to the student
(DINO, arXiv 2104.14294, eq. 1), per image.

To add a loss term, add its name to LOSSES and its value to `losses` in `SSSD.compute_losses`, or do
both in a subclass (examples/custom_loss.py). Logging, validation and plots use these names.

Shapes: B images, K visible patches, D any width, S prototypes, F bottleneck features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae_kernels import masked_reconstruction_loss, sssd_loss
from sssd_fast.config import ModelConfig, ObjectiveConfig
from sssd_fast.model import MAE, MAEOutput

LOSSES = ("reconstruction", "distillation")  # the terms of the total


class SSSDOutput(NamedTuple):
    """Losses are means over the batch; all tensors but `batch_center` are scalars."""

    total: Tensor
    losses: dict[str, Tensor]  # the terms by name, without gradients
    batch_center: Tensor | None  # [S] mean teacher distribution; None if the loss has no centre


class ProjectionHead(nn.Module):
    """Linear-GELU-Linear-GELU-Linear, L2-normalised; with prototypes a weight-normalised linear
    layer of gain 1 follows.
    """

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int | None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, bottleneck)
        self.prototypes = None
        if prototypes is not None:
            self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        for layer in (self.fc1, self.fc2, self.fc3):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        if self.prototypes is not None:
            nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, x_BKD: Tensor, pooling: str) -> Tensor:
        """pooling "image": [B, S]; "token": [B*K, S]. Without prototypes S is the bottleneck F.

        The last layer is linear, so mean_k(W f_k) = W mean_k(f_k). Pooling before it gives SD-MAE's
        image-level logits without storing [B, K, S].
        """
        f_BKF = F.normalize(self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x_BKD))))).float(), dim=-1)
        f = f_BKF.mean(1) if pooling == "image" else f_BKF.flatten(0, 1)
        if self.prototypes is None:
            return f
        return F.linear(f, F.normalize(self.prototypes.float(), dim=-1))


class SSSD(nn.Module):
    """Masked autoencoder, both projection heads and the centre: everything that pre-training
    trains.
    """

    loss_names: tuple[str, ...] = LOSSES
    center: Tensor

    def __init__(self, model: ModelConfig, objective: ObjectiveConfig) -> None:
        super().__init__()
        self.mae = MAE(model)
        self.objective = objective
        self.student_head: ProjectionHead | None = None
        self.teacher_head: ProjectionHead | None = None
        if objective.weight > 0:
            prototypes = objective.prototypes if objective.kind == "dino" else None
            sizes = objective.head_hidden, objective.head_bottleneck, prototypes
            self.student_head = ProjectionHead(model.encoder_shape[0], *sizes)
            self.teacher_head = ProjectionHead(model.decoder_width, *sizes)
        self.register_buffer("center", torch.zeros(objective.prototypes))

    def forward(self, images_BCHW: Tensor, noise_BL: Tensor) -> SSSDOutput:
        """Losses of a batch. Images are uint8 or normalised floats; the noise chooses the masked
        patches."""
        out = self.mae(images_BCHW, noise_BL, teacher=self.teacher_head is not None)
        return self.compute_losses(out, images_BCHW)

    def compute_losses(self, out: MAEOutput, images_BCHW: Tensor) -> SSSDOutput:
        """Losses of the outputs of the masked autoencoder; override it to add a term."""
        cfg, encoder = self.objective, self.mae.encoder
        uint8 = images_BCHW.dtype == torch.uint8
        reconstruction: dict[str, Any] = {
            "ids": out.masking.ids_masked,
            "patch_size": encoder.patch_size,
            "norm": None if cfg.norm == "none" else cfg.norm,
            "mean": encoder.mean if uint8 else None,
            "std": encoder.std if uint8 else None,
        }
        if self.student_head is None or self.teacher_head is None or out.teacher_BKE is None:
            loss = masked_reconstruction_loss(out.pred_BMV, images_BCHW, **reconstruction)
            losses = {"reconstruction": loss.detach(), "distillation": torch.zeros_like(loss)}
            return SSSDOutput(loss, losses, None)
        both = sssd_loss(
            out.pred_BMV,
            images_BCHW,
            self.student_head(out.student_BKD, cfg.pooling),
            self.teacher_head(out.teacher_BKE, cfg.pooling),
            weight=cfg.weight,
            kind=cfg.kind,
            center=self.center if cfg.kind == "dino" else None,
            center_mode=cfg.center,
            student_temp=cfg.student_temp,
            teacher_temp=cfg.teacher_temp,
            detach_teacher=cfg.detach_teacher,
            **reconstruction,
        )
        losses = {"reconstruction": both.reconstruction, "distillation": both.distillation}
        return SSSDOutput(both.total, losses, both.batch_center)

    @torch.no_grad()
    def update_center(self, batch_center_S: Tensor, apply: Tensor) -> None:
        """c <- m c + (1 - m) mean(teacher), only if the bool scalar `apply` is true.

        The caller averages `batch_center_S` over processes and micro-batches.
        """
        m = self.objective.center_momentum
        moved_S = m * self.center + (1 - m) * batch_center_S.to(self.center.dtype)
        self.center.copy_(torch.where(apply, moved_S, self.center))
