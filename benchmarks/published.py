"""The masked autoencoder and its self-distillation as published: the baseline of the training step.

MaskedAutoencoderViT does the operations of facebookresearch/mae (He et al., arXiv 2111.06377) on
blocks as in timm 0.3.2, which it requires: a convolution embeds all patches, visible or not; two
argsorts and torch.gather with repeated indices mask and restore them; attention writes its
probabilities to memory; every patch is predicted; the target of the loss is written to memory.
SDMAE adds the loss of SD-MAE (Luo, Chen et al., arXiv 2203.16983): logits of every visible token,
averaged before the softmax. Parameters have the names of facebookresearch/mae. Two differences:
the noise that selects the masked patches is an argument, so that all providers mask alike, and
images may have any size and channels.

Shapes: B images, L patches, K visible, D encoder width, E decoder width, V = P*P*C values of a
patch in the order (row, column, channel), S prototypes, F bottleneck features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import eager
from benchmarks.shapes import Shape


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


class Encoded(NamedTuple):
    latent_BND: Tensor  # after the final norm, the cls token first
    ids_keep_BK: Tensor
    ids_restore_BL: Tensor
    mask_BL: Tensor  # float, 1 = masked


class MaskedAutoencoderViT(nn.Module):
    """norm: of the target: "patch" over all values, "channel" per channel, "none"."""

    def __init__(
        self,
        s: Shape,
        depth: int,
        decoder_depth: int,
        norm: str = "patch",
        mlp_ratio: float = 4.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.shape = s
        self.norm_target = norm
        D = s.width
        E = s.decoder
        tokens = 1 + s.patches
        conv = nn.Conv2d(s.channels, D, kernel_size=s.patch, stride=s.patch)
        self.patch_embed = nn.ModuleDict({"proj": conv})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, D), requires_grad=False)
        self.blocks = nn.ModuleList(Block(D, s.heads, mlp_ratio, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(D, eps=eps)
        self.decoder_embed = nn.Linear(D, E)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, E))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, tokens, E), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(E, s.decoder_heads, mlp_ratio, eps) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(E, eps=eps)
        self.decoder_pred = nn.Linear(E, s.values)

    def encode(self, images_BCHW: Tensor, noise_BL: Tensor) -> Encoded:
        x_BDL = self.patch_embed["proj"](images_BCHW).flatten(2)
        x_BLD = x_BDL.transpose(1, 2) + self.pos_embed[:, 1:]
        keep_BK, restore_BL, _, mask_BL = eager.published_masking(noise_BL, self.shape)
        x_BKD = x_BLD.gather(1, keep_BK[..., None].repeat(1, 1, x_BLD.shape[-1]))
        cls_B1D = (self.cls_token + self.pos_embed[:, :1]).expand(x_BLD.shape[0], -1, -1)
        x_BND = torch.cat((cls_B1D, x_BKD), dim=1)
        for block in self.blocks:
            x_BND = block(x_BND)
        return Encoded(self.norm(x_BND), keep_BK, restore_BL, mask_BL)

    def decode(self, latent_BND: Tensor, ids_restore_BL: Tensor) -> Tensor:
        """[B, 1+L, E] tokens after the final norm, in image order after the cls token."""
        x_BND = self.decoder_embed(latent_BND)
        mask_E = self.mask_token.flatten().to(x_BND.dtype)
        x_BNE = eager.published_restore(x_BND, ids_restore_BL, mask_E, self.decoder_pos_embed)
        for block in self.decoder_blocks:
            x_BNE = block(x_BNE)
        out: Tensor = self.decoder_norm(x_BNE)
        return out

    def reconstruction_loss(self, images_BCHW: Tensor, y_BNE: Tensor, mask_BL: Tensor) -> Tensor:
        """Mean squared error of every patch, then of the masked ones."""
        pred_BLV = self.decoder_pred(y_BNE)[:, 1:, :]
        target_BLV = eager.patchify(images_BCHW, self.shape.patch, "rcc")
        if self.norm_target == "patch":
            target_BLV = eager.unit(target_BLV)
        elif self.norm_target == "channel":
            target_BLCA = target_BLV.unflatten(-1, (-1, self.shape.channels)).transpose(-1, -2)
            target_BLV = eager.unit(target_BLCA).transpose(-1, -2).flatten(-2)
        each_BL = (pred_BLV - target_BLV).square().mean(-1)
        loss: Tensor = (each_BL * mask_BL).sum() / mask_BL.sum()
        return loss

    def forward(self, images_BCHW: Tensor, noise_BL: Tensor) -> tuple[Tensor, None]:
        """Normalised float images and noise [B, L] -> (loss, no centre)."""
        encoded = self.encode(images_BCHW, noise_BL)
        y_BNE = self.decode(encoded.latent_BND, encoded.ids_restore_BL)
        return self.reconstruction_loss(images_BCHW, y_BNE, encoded.mask_BL), None


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
    """weight: share of the distillation. Gradients also reach the teacher's branch."""

    center: Tensor

    def __init__(
        self,
        mae: MaskedAutoencoderViT,
        *,
        weight: float = 0.2,
        head: tuple[int, int, int] = (2048, 256, 4096),  # hidden, bottleneck, prototypes
        temps: tuple[float, float] = (0.1, 0.04),  # student, teacher
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.mae = mae
        self.student_head = Head(mae.shape.width, *head)
        self.teacher_head = Head(mae.shape.decoder, *head)
        self.weight = weight
        self.temps = temps
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(head[2]))

    def losses(self, images_BCHW: Tensor, noise_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction, distillation, mean of the teacher's probabilities [S])."""
        mae = self.mae
        encoded = mae.encode(images_BCHW, noise_BL)
        y_BNE = mae.decode(encoded.latent_BND, encoded.ids_restore_BL)
        reconstruction = mae.reconstruction_loss(images_BCHW, y_BNE, encoded.mask_BL)
        ids_BKE = encoded.ids_keep_BK.unsqueeze(-1).repeat(1, 1, y_BNE.shape[-1])
        teacher_BKE = torch.gather(y_BNE[:, 1:, :], 1, ids_BKE)
        z_student_BS = self.student_head(encoded.latent_BND[:, 1:, :]).mean(dim=1)
        z_teacher_BS = self.teacher_head(teacher_BKE).mean(dim=1)
        student, teacher = self.temps
        p_BS = F.softmax((z_teacher_BS - self.center) / teacher, dim=-1)
        distillation = -(p_BS * F.log_softmax(z_student_BS / student, dim=-1)).sum(dim=-1).mean()
        return reconstruction, distillation, p_BS.detach().mean(dim=0)

    def forward(self, images_BCHW: Tensor, noise_BL: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, mean of the teacher's probabilities over the images [S])."""
        reconstruction, distillation, batch_center_S = self.losses(images_BCHW, noise_BL)
        return self.weight * distillation + (1 - self.weight) * reconstruction, batch_center_S

    @torch.no_grad()
    def update_center(self, batch_center_S: Tensor) -> None:
        new_S = batch_center_S.to(self.center.dtype)
        self.center.mul_(self.momentum).add_(new_S, alpha=1 - self.momentum)
