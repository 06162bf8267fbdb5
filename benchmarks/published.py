"""The masked autoencoder and its self-distillation as published, written anew from what they compute: the baseline of the step.

MaskedAutoencoderViT does the operations of facebookresearch/mae (He et al., arXiv 2111.06377) on blocks as in timm 0.3.2, which it
requires: a convolution embeds all patches, visible or not; two argsorts and torch.gather with repeated indices mask and restore them;
attention writes its probabilities to memory; every patch is predicted; the target of the loss is written to memory. SDMAE adds the loss
of SD-MAE (Luo, Chen et al., arXiv 2203.16983): logits of every visible token, averaged before the softmax. Names of parameters are
those of facebookresearch/mae. Two things differ: the noise that chooses the masked patches is an argument, so that every provider can
mask alike, and images may be of any size and number of channels.

Shapes: B images, L patches, K visible, p = 1 cls token, N = tokens in a block, D encoder width, E decoder width, H heads, d = D / H,
V = P*P*C values of one patch in the order (row, column, channel), S prototypes, F bottleneck features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Sizes:
    image_size: tuple[int, int]  # height, width in pixels
    patch_size: int
    channels: int
    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    mask_ratio: float = 0.75

    @property
    def patches(self) -> int:
        return (self.image_size[0] // self.patch_size) * (self.image_size[1] // self.patch_size)


class Masked(NamedTuple):
    latent_BND: Tensor  # LayerNorm(encoder), the cls token first
    mask_BL: Tensor  # float, 1 = masked
    ids_restore_BL: Tensor
    ids_keep_BK: Tensor


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        B, N, D = x_BND.shape
        qkv_3BHNd = (
            self.qkv(x_BND).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        )
        q_BHNd, k_BHNd, v_BHNd = qkv_3BHNd[0], qkv_3BHNd[1], qkv_3BHNd[2]
        scores_BHNN = (q_BHNd @ k_BHNd.transpose(-2, -1)) * self.scale
        out_BND = (scores_BHNN.softmax(dim=-1) @ v_BHNd).transpose(1, 2).reshape(B, N, D)
        out: Tensor = self.proj(out_BND)
        return out


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.attn(self.norm1(x_BND))
        return x_BND + self.mlp(self.norm2(x_BND))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """[B, L, D]: all patches."""
        out: Tensor = self.proj(images_BCHW).flatten(2).transpose(1, 2)
        return out


class MaskedAutoencoderViT(nn.Module):
    """norm: how the target of a patch is normalised: "patch" over all of its values, "channel" each channel by itself, "none"."""

    def __init__(self, sizes: Sizes, norm: str = "patch") -> None:
        super().__init__()
        self.sizes = sizes
        self.norm_target = norm
        ratio = sizes.mlp_ratio
        eps = sizes.norm_eps
        D = sizes.width
        E = sizes.decoder_width
        self.patch_embed = PatchEmbed(sizes.patch_size, sizes.channels, D)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + sizes.patches, D), requires_grad=False)
        self.blocks = nn.ModuleList(Block(D, sizes.heads, ratio, eps) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(D, eps=eps)
        self.decoder_embed = nn.Linear(D, E)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, E))
        self.decoder_pos_embed = nn.Parameter(
            torch.zeros(1, 1 + sizes.patches, E), requires_grad=False
        )
        self.decoder_blocks = nn.ModuleList(
            Block(E, sizes.decoder_heads, ratio, eps) for _ in range(sizes.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(E, eps=eps)
        self.decoder_pred = nn.Linear(E, sizes.patch_size**2 * sizes.channels)

    def patchify(self, images_BCHW: Tensor) -> Tensor:
        """[B, L, V], written to memory."""
        B, C, height, width = images_BCHW.shape
        P = self.sizes.patch_size
        grid_BChPwP = images_BCHW.reshape(B, C, height // P, P, width // P, P)
        return grid_BChPwP.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, P * P * C)

    def keep_visible(
        self, x_BLD: Tensor, noise_BL: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(visible tokens [B, K, D], mask, ids_restore, ids_keep); the K smallest of the noise stay."""
        L, D = x_BLD.shape[1:]
        K = int(L * (1 - self.sizes.mask_ratio))
        order_BL = noise_BL.argsort(1)
        place_BL, kept_BK = order_BL.argsort(1), order_BL[:, :K]
        hidden_BL = torch.ones(noise_BL.shape, device=x_BLD.device)
        hidden_BL[:, :K] = 0
        visible_BKD = x_BLD.gather(1, kept_BK[..., None].repeat(1, 1, D))
        return visible_BKD, hidden_BL.gather(1, place_BL), place_BL, kept_BK

    def encode(self, images_BCHW: Tensor, noise_BL: Tensor) -> Masked:
        x_BLD = self.patch_embed(images_BCHW) + self.pos_embed[:, 1:, :]
        x_BND, *masking = self.keep_visible(x_BLD, noise_BL)
        cls_B1D = (self.cls_token + self.pos_embed[:, :1, :]).expand(x_BND.shape[0], -1, -1)
        x_BND = torch.cat((cls_B1D, x_BND), dim=1)
        for block in self.blocks:
            x_BND = block(x_BND)
        return Masked(self.norm(x_BND), *masking)

    def decode(self, latent_BND: Tensor, ids_restore_BL: Tensor) -> Tensor:
        """[B, p+L, E] tokens after the final norm, in image order behind the cls token."""
        x_BNE = self.decoder_embed(latent_BND)
        (B, N, E), L = x_BNE.shape, ids_restore_BL.shape[1]
        fill_BME = self.mask_token.repeat(B, L + 1 - N, 1).to(x_BNE.dtype)
        shuffled_BLE = torch.cat((x_BNE[:, 1:], fill_BME), 1)
        restored_BLE = shuffled_BLE.gather(1, ids_restore_BL[..., None].repeat(1, 1, E))
        x_BNE = torch.cat((x_BNE[:, :1], restored_BLE), 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x_BNE = block(x_BNE)
        out: Tensor = self.decoder_norm(x_BNE)
        return out

    def reconstruction_loss(self, images_BCHW: Tensor, pred_BLV: Tensor, mask_BL: Tensor) -> Tensor:
        """Mean squared error over masked patches, of every patch and then masked."""
        target_BLV = self.patchify(images_BCHW)
        if self.norm_target != "none":
            C = self.sizes.channels
            target = (
                target_BLV
                if self.norm_target == "patch"
                else target_BLV.unflatten(-1, (-1, C)).transpose(-1, -2)
            )
            center = target.mean(-1, keepdim=True)
            spread = (target.var(-1, keepdim=True) + 1e-6).sqrt()
            target = (target - center) / spread
            target_BLV = (
                target if self.norm_target == "patch" else target.transpose(-1, -2).flatten(-2)
            )
        each_BL = (pred_BLV - target_BLV).square().mean(-1)
        loss: Tensor = (each_BL * mask_BL).sum() / mask_BL.sum()
        return loss

    def forward(self, images_BCHW: Tensor, noise_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised float images and noise -> (loss, predictions [B, L, V], mask [B, L])."""
        encoded = self.encode(images_BCHW, noise_BL)
        y_BNE = self.decode(encoded.latent_BND, encoded.ids_restore_BL)
        pred_BLV = self.decoder_pred(y_BNE)[:, 1:, :]
        return (
            self.reconstruction_loss(images_BCHW, pred_BLV, encoded.mask_BL),
            pred_BLV,
            encoded.mask_BL,
        )


class Head(nn.Module):
    """Linear-GELU-Linear-GELU-Linear, L2-normalised, then weight-normalised prototypes of gain 1, for every token."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.last_layer = nn.Linear(bottleneck, prototypes, bias=False)

    def forward(self, x_BKD: Tensor) -> Tensor:
        """[B, K, S] logits."""
        f_BKF = F.normalize(self.mlp(x_BKD), dim=-1, p=2)
        unit_SF = self.last_layer.weight / self.last_layer.weight.norm(dim=1, keepdim=True)
        return F.linear(f_BKF, unit_SF)


class Distilled(NamedTuple):
    total: Tensor
    reconstruction: Tensor
    distillation: Tensor
    batch_center_S: Tensor  # mean over the images of the teacher's probabilities


class SDMAE(nn.Module):
    """weight: share of the distillation in the total. Gradients reach the teacher's side, as in SD-MAE."""

    center: Tensor

    def __init__(
        self,
        sizes: Sizes,
        norm: str = "channel",
        *,
        weight: float = 0.2,
        head: tuple[int, int, int] = (2048, 256, 4096),  # hidden, bottleneck, prototypes
        student_temp: float = 0.1,
        teacher_temp: float = 0.04,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.mae = MaskedAutoencoderViT(sizes, norm)
        self.student_head = Head(sizes.width, *head)
        self.teacher_head = Head(sizes.decoder_width, *head)
        self.weight = weight
        self.temps = (student_temp, teacher_temp)
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(head[2]))

    def forward(self, images_BCHW: Tensor, noise_BL: Tensor) -> Distilled:
        mae = self.mae
        encoded = mae.encode(images_BCHW, noise_BL)
        y_BNE = mae.decode(encoded.latent_BND, encoded.ids_restore_BL)
        reconstruction = mae.reconstruction_loss(
            images_BCHW, mae.decoder_pred(y_BNE)[:, 1:, :], encoded.mask_BL
        )
        ids_BKE = encoded.ids_keep_BK.unsqueeze(-1).repeat(1, 1, y_BNE.shape[-1])
        teacher_BKE = torch.gather(y_BNE[:, 1:, :], 1, ids_BKE)
        z_student_BS = self.student_head(encoded.latent_BND[:, 1:, :]).mean(dim=1)
        z_teacher_BS = self.teacher_head(teacher_BKE).mean(dim=1)
        student, teacher = self.temps
        p_BS = F.softmax((z_teacher_BS - self.center) / teacher, dim=-1)
        distillation = -(p_BS * F.log_softmax(z_student_BS / student, dim=-1)).sum(dim=-1).mean()
        total = self.weight * distillation + (1 - self.weight) * reconstruction
        return Distilled(total, reconstruction, distillation, p_BS.detach().mean(dim=0))

    @torch.no_grad()
    def update_center(self, batch_center_S: Tensor) -> None:
        self.center.mul_(self.momentum).add_(
            batch_center_S.to(self.center.dtype), alpha=1 - self.momentum
        )
