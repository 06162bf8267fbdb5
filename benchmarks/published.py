"""The masked autoencoder and its self-distillation as published: the baseline of the training step.

MaskedAutoencoderViT does the operations of facebookresearch/mae (He et al., arXiv 2111.06377) on
blocks as in timm 0.3.2, which it requires: a convolution embeds all patches, visible or not; two
argsorts and torch.gather with repeated indices mask and restore them; attention writes its
probabilities to memory; every patch is predicted; the target of the loss is written to memory.
SDMAE adds the loss of SD-MAE (Luo, Chen et al., arXiv 2203.16983): logits of every visible token,
averaged before the softmax. Parameters have the names of facebookresearch/mae. The noise that
selects the masked patches is an argument, so that all providers mask alike.

Shapes: B images, L patches, K visible, D encoder width, E decoder width, V = P*P*C values of a
patch in the order (row, column, channel), S prototypes, F bottleneck features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import eager

if TYPE_CHECKING:
    from sssd_fast.config import ModelConfig, ObjectiveConfig


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float, eps: float) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width)})
        self.attn["proj"] = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x_BND: Tensor) -> Tensor:
        qkv_BN3Hd = self.attn["qkv"](self.norm1(x_BND)).unflatten(-1, (3, self.heads, -1))
        x_BND = x_BND + self.attn["proj"](eager.attention(qkv_BN3Hd).flatten(2))
        hidden_BNF = F.gelu(self.mlp["fc1"](self.norm2(x_BND)))
        out: Tensor = x_BND + self.mlp["fc2"](hidden_BNF)
        return out


class Encoder(nn.Module):
    """What autoencoder and classifier share. pos_embed is fixed in pre-training."""

    def __init__(self, m: ModelConfig, trained: bool = False) -> None:
        super().__init__()
        self.config = m
        D, depth, heads = m.encoder_shape
        self.sizes = (m.mlp_ratio, m.norm_eps)
        conv = nn.Conv2d(m.in_channels, D, kernel_size=m.patch_size, stride=m.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": conv})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + m.num_patches, D), requires_grad=trained)
        self.blocks = nn.ModuleList(Block(D, heads, *self.sizes) for _ in range(depth))
        self.norm = nn.LayerNorm(D, eps=m.norm_eps)

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """[B, L, D], all patches with their positions."""
        x_BDL = self.patch_embed["proj"](images_BCHW).flatten(2)
        return x_BDL.transpose(1, 2) + self.pos_embed[:, 1:]

    def run_blocks(self, x_BKD: Tensor) -> Tensor:
        """[B, 1+K, D] after the final norm, the cls token first."""
        cls_B1D = (self.cls_token + self.pos_embed[:, :1]).expand(x_BKD.shape[0], -1, -1)
        x_BND = torch.cat((cls_B1D, x_BKD), dim=1)
        for block in self.blocks:
            x_BND = block(x_BND)
        out: Tensor = self.norm(x_BND)
        return out


class Classifier(Encoder):
    """Fine-tuning in facebookresearch/mae: all patches, a linear layer on the cls token."""

    def __init__(self, m: ModelConfig, classes: int) -> None:
        super().__init__(m, trained=True)
        self.head = nn.Linear(m.encoder_shape[0], classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """[B, classes] logits of normalised float images."""
        logits: Tensor = self.head(self.run_blocks(self.embed(images_BCHW))[:, 0])
        return logits


class MaskedAutoencoderViT(Encoder):
    """norm: of the target: "patch" over all values, "channel" per channel, "none"."""

    def __init__(self, m: ModelConfig, norm: str) -> None:
        super().__init__(m)
        self.norm_target = norm
        E = m.decoder_width
        self.decoder_embed = nn.Linear(m.encoder_shape[0], E)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, E))
        positions = torch.zeros(1, 1 + m.num_patches, E)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(E, m.decoder_heads, *self.sizes) for _ in range(m.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(E, eps=m.norm_eps)
        self.decoder_pred = nn.Linear(E, m.patch_size**2 * m.in_channels)

    def encode(self, images_BCHW: Tensor, noise_BL: Tensor) -> tuple[Tensor, ...]:
        """(tokens after the final norm, ids_keep [B, K], ids_restore [B, L], mask [B, L])"""
        x_BLD = self.embed(images_BCHW)
        keep_BK, restore_BL, _, mask_BL = eager.random_masking(noise_BL, self.config.num_visible)
        return self.run_blocks(eager.repeated(x_BLD, keep_BK)), keep_BK, restore_BL, mask_BL

    def decode(self, latent_BND: Tensor, ids_restore_BL: Tensor) -> Tensor:
        """[B, 1+L, E] tokens after the final norm, in image order after the cls token."""
        x_BND = self.decoder_embed(latent_BND)
        mask_E = self.mask_token.flatten().to(x_BND.dtype)
        x_BNE = eager.restore_tokens(x_BND, ids_restore_BL, mask_E, self.decoder_pos_embed, 1)
        for block in self.decoder_blocks:
            x_BNE = block(x_BNE)
        out: Tensor = self.decoder_norm(x_BNE)
        return out

    def reconstruction_loss(self, images_BCHW: Tensor, y_BNE: Tensor, mask_BL: Tensor) -> Tensor:
        """Mean squared error of every patch, then of the masked ones."""
        pred_BLV = self.decoder_pred(y_BNE)[:, 1:, :]
        target_BLV = eager.target(images_BCHW, self.config.patch_size, self.norm_target)
        each_BL = (pred_BLV - target_BLV).square().mean(-1)
        loss: Tensor = (each_BL * mask_BL).sum() / mask_BL.sum()
        return loss

    def forward(self, images_BCHW: Tensor, noise_BL: Tensor) -> tuple[Tensor, None]:
        """Normalised float images and noise [B, L] -> (loss, no centre)."""
        latent_BND, _, restore_BL, mask_BL = self.encode(images_BCHW, noise_BL)
        y_BNE = self.decode(latent_BND, restore_BL)
        return self.reconstruction_loss(images_BCHW, y_BNE, mask_BL), None


class Head(nn.Module):
    """Three linear layers with GELU, L2-normalised, and prototypes of unit length."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, bottleneck)
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))

    def forward(self, x_BKD: Tensor) -> Tensor:
        """[B, K, S] logits."""
        f_BKF = self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x_BKD)))))
        unit_SF = self.prototypes / self.prototypes.norm(dim=1, keepdim=True)
        return F.linear(F.normalize(f_BKF, dim=-1, p=2), unit_SF)


class SDMAE(nn.Module):
    """Gradients also reach the teacher's branch."""

    center: Tensor

    def __init__(self, mae: MaskedAutoencoderViT, o: ObjectiveConfig) -> None:
        super().__init__()
        self.mae = mae
        self.objective = o
        head = (o.head_hidden, o.head_bottleneck, o.prototypes)
        self.student_head = Head(mae.config.encoder_shape[0], *head)
        self.teacher_head = Head(mae.config.decoder_width, *head)
        self.register_buffer("center", torch.zeros(o.prototypes))

    def losses(self, images_BCHW: Tensor, noise_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction, distillation, mean of the teacher's probabilities [S])."""
        mae, o = self.mae, self.objective
        latent_BND, keep_BK, restore_BL, mask_BL = mae.encode(images_BCHW, noise_BL)
        y_BNE = mae.decode(latent_BND, restore_BL)
        reconstruction = mae.reconstruction_loss(images_BCHW, y_BNE, mask_BL)
        teacher_BKE = eager.repeated(y_BNE[:, 1:, :], keep_BK)
        z_student_BS = self.student_head(latent_BND[:, 1:, :]).mean(dim=1)
        z_teacher_BS = self.teacher_head(teacher_BKE).mean(dim=1)
        p_BS = F.softmax((z_teacher_BS - self.center) / o.teacher_temp, dim=-1)
        log_q_BS = F.log_softmax(z_student_BS / o.student_temp, dim=-1)
        return reconstruction, -(p_BS * log_q_BS).sum(dim=-1).mean(), p_BS.detach().mean(dim=0)

    def forward(self, images_BCHW: Tensor, noise_BL: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, mean of the teacher's probabilities over the images [S])."""
        reconstruction, distillation, batch_center_S = self.losses(images_BCHW, noise_BL)
        weight = self.objective.weight
        return weight * distillation + (1 - weight) * reconstruction, batch_center_S

    @torch.no_grad()
    def update_center(self, batch_center_S: Tensor) -> None:
        m = self.objective.center_momentum
        self.center.mul_(m).add_(batch_center_S.to(self.center.dtype), alpha=1 - m)
