"""The SSSD-COVID objective: masked reconstruction plus self-distillation from decoder to encoder.

    total = w * distillation + (1 - w) * reconstruction

The student is LayerNorm(encoder), the teacher LayerNorm(decoder), both at the visible patches.
`objective.name` selects how they are compared (docs/self-distillation.md):

- published: as SD-MAE (Luo, Chen et al., arXiv 2203.16983, and its released code). Each passes its
  own projection head; the loss is the cross-entropy from the centred, sharpened teacher to the
  student (DINO, arXiv 2104.14294, eq. 1), per image. It collapses.
- centred: the same without a gradient to the teacher and with the mean logits as centre, as DINO.
  The teacher's head keeps its random weights.
- sinkhorn: the same without a gradient to the decoder, and with the centre that Sinkhorn-Knopp
  finds for each batch (SwAV, arXiv 2006.09882), so that all prototypes are used equally.
- predictor: an MLP predicts the decoder's standardised features of a token from the encoder's (as
  BYOL, arXiv 2006.07733); mean squared error, no gradient to the teacher.

To add a loss term, add its name to LOSSES and its value to `losses` in `SSSD.compute_losses`, or do
both in a subclass (examples/custom_loss.py). Logging, validation and plots use these names.

Shapes: B images, K visible patches, D any width, S prototypes, F bottleneck features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mae_kernels import masked_reconstruction_loss, sinkhorn_center, sssd_loss
from sssd_fast.config import ModelConfig, ObjectiveConfig
from sssd_fast.model import MAE, MAEOutput

LOSSES = ("reconstruction", "distillation")  # the terms of the total


class SSSDOutput(NamedTuple):
    """Losses are means over the batch, scalars."""

    total: Tensor
    losses: dict[str, Tensor]  # the terms by name, without gradients
    batch_center: Tensor | None  # [S] moves the running centre; None if the loss has none
    # what the distillation compares, in evaluation mode: student and teacher [R, S], and the
    # teacher's assignment to the prototypes [R, S] or None
    compared: tuple[Tensor, Tensor, Tensor | None] | None = None


class ProjectionHead(nn.Module):
    """Linear-GELU-Linear-GELU-Linear, L2-normalised; with prototypes a weight-normalised linear
    layer of gain 1 follows.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        bottleneck: int,
        prototypes: int | None,
        trained: bool = True,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, bottleneck)
        self.prototypes = None
        if prototypes is not None:
            self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        for layer in (self.fc1, self.fc2, self.fc3):
            # Random weights that stay must keep the variance, or all images have nearly the same
            # output.
            std = 0.02 if trained else layer.in_features**-0.5
            nn.init.trunc_normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        if self.prototypes is not None:
            nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, x_BKD: Tensor, pooling: str) -> Tensor:
        """pooling "image": [B, S]; "token": [B*K, S]. Without prototypes S is the bottleneck F.

        The last layer is linear, so mean_k(W f_k) = W mean_k(f_k). Pooling before it gives SD-MAE's
        image-level logits without storing [B, K, S].
        """
        f_BKF = F.normalize(self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x_BKD))))).float(), dim=-1)
        f = _pooled(f_BKF, pooling)
        if self.prototypes is None:
            return f
        return F.linear(f, F.normalize(self.prototypes.float(), dim=-1))


class Predictor(nn.Module):
    """Linear-GELU-Linear from a token's encoder features to its decoder features."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x_BKD: Tensor, pooling: str) -> Tensor:
        """pooling "image": [B, E]; "token": [B*K, E]."""
        return _pooled(self.fc2(F.gelu(self.fc1(x_BKD))), pooling)


class Standardised(nn.Module):
    """The teacher of a predictor: decoder features with mean 0 and variance 1 of each feature over
    the rows of all processes. Otherwise what all rows share would make up the loss.
    """

    def forward(self, x_BKE: Tensor, pooling: str) -> Tensor:
        x_RE = _pooled(x_BKE.float(), pooling)
        count = x_RE.new_full((1,), len(x_RE))
        sums = torch.cat([x_RE.sum(0), x_RE.square().sum(0), count])
        if _shared(self):
            sums = _sum_over_processes(sums)
        mean_E, square_E = (sums[:-1] / sums[-1]).chunk(2)
        std_E = (square_E - mean_E.square()).clamp_min(0).add(1e-6).sqrt()
        return (x_RE - mean_E) / std_E


def _pooled(x_BKF: Tensor, pooling: str) -> Tensor:
    return x_BKF.mean(1) if pooling == "image" else x_BKF.flatten(0, 1)


class SSSD(nn.Module):
    """Masked autoencoder, both heads and the centre: everything that pre-training trains."""

    loss_names: tuple[str, ...] = LOSSES
    center: Tensor

    def __init__(self, model: ModelConfig, objective: ObjectiveConfig) -> None:
        super().__init__()
        self.mae = MAE(model)
        self.objective = objective
        self.student_head: nn.Module | None = None
        self.teacher_head: nn.Module | None = None
        width, decoder = model.encoder_shape[0], model.decoder_width
        if objective.weight > 0 and objective.heads == "both":
            prototypes = objective.prototypes if objective.kind == "dino" else None
            sizes = objective.head_hidden, objective.head_bottleneck, prototypes
            self.student_head = ProjectionHead(width, *sizes)
            trained = objective.stop_gradient != "teacher"
            self.teacher_head = ProjectionHead(decoder, *sizes, trained=trained)
            self.teacher_head.requires_grad_(trained)
        elif objective.weight > 0:
            self.student_head = Predictor(width, objective.head_hidden, decoder)
            self.teacher_head = Standardised()
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
        student = self.student_head(out.student_BKD, cfg.pooling)
        stop = cfg.stop_gradient
        decoder_BKE = out.teacher_BKE if stop == "none" else out.teacher_BKE.detach()
        teacher = self.teacher_head(decoder_BKE, cfg.pooling)
        center = self._center(teacher)
        both = sssd_loss(
            out.pred_BMV,
            images_BCHW,
            student,
            teacher,
            weight=cfg.weight,
            kind=cfg.kind,
            center=center,
            center_mode="prob" if cfg.center == "prob" else "logit",
            student_temp=cfg.student_temp,
            teacher_temp=cfg.teacher_temp,
            detach_teacher=stop == "teacher",
            **reconstruction,
        )
        losses = {"reconstruction": both.reconstruction, "distillation": both.distillation}
        moves = None if cfg.center == "sinkhorn" else both.batch_center
        compared = None
        if not self.training:
            assigned = None
            if center is not None:
                assigned = ((teacher.float() - center) / cfg.teacher_temp).softmax(-1)
            compared = student.float(), teacher.float(), assigned
        return SSSDOutput(both.total, losses, moves, compared)

    def _center(self, teacher_RS: Tensor) -> Tensor | None:
        cfg = self.objective
        if cfg.kind != "dino":
            return None
        if cfg.center != "sinkhorn":
            return self.center
        reduce = _sum_over_processes if _shared(self) else None
        return sinkhorn_center(teacher_RS, cfg.teacher_temp, reduce=reduce)

    @torch.no_grad()
    def update_center(self, batch_center_S: Tensor, apply: Tensor) -> None:
        """c <- m c + (1 - m) mean(teacher), only if the bool scalar `apply` is true.

        The caller averages `batch_center_S` over processes and micro-batches.
        """
        m = self.objective.center_momentum
        moved_S = m * self.center + (1 - m) * batch_center_S.to(self.center.dtype)
        self.center.copy_(torch.where(apply, moved_S, self.center))


def _shared(module: nn.Module) -> bool:
    """Whether statistics are those of all processes: in training. In validation a process may have
    no image.
    """
    return module.training and dist.is_available() and dist.is_initialized()


def _sum_over_processes(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x
